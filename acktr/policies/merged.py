"""Running statistics of several ranks, which know of all samples after every rollout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from acktr.kfac import Ranks
from acktr.policies.normalize import Normalizer, RewardScaler, RunningMoments


class MergedMoments:
    """Moments that every rank feeds with samples of its own, and that are those of all at times.

    What came since they were last the same is merged, not all that each rank has seen: that would
    count the common past once for every rank.

    Args:
        moments: The moments, which :meth:`merge` changes; the same on all ranks now.
        ranks: The ranks.
        device: That of their backend.
    """

    def __init__(
        self, moments: Sequence[RunningMoments], ranks: Ranks, device: torch.device
    ) -> None:
        self._moments, self._ranks, self._device = list(moments), ranks, device
        self.begin()

    @classmethod
    def of(
        cls,
        normalizer: Normalizer | None,
        scaler: RewardScaler | None,
        ranks: Ranks,
        device: torch.device,
    ) -> MergedMoments:
        """Those of what normalises observations and rewards, where there is such a thing."""
        moments = [] if normalizer is None else normalizer.running()
        return cls([*moments, *([] if scaler is None else [scaler.moments])], ranks, device)

    def begin(self) -> None:
        """Take the moments as they are for the common ones, as after a load."""
        self._common = [one.copy() for one in self._moments]

    def merge(self) -> None:
        """Make the moments those of all samples of all ranks."""
        if not self._moments:
            return
        pairs = zip(self._moments, self._common, strict=True)
        news = [one.since(common) for one, common in pairs]
        numbers = [x for new in news for x in (new.count, *new.mean.flat, *new.m2.flat)]
        rows = self._ranks.gather([float(x) for x in numbers], self._device)
        for row in rows:
            values = iter(row)
            for common in self._common:
                count = int(next(values))
                size, shape = common.mean.size, common.mean.shape
                mean, m2 = (
                    np.array([next(values) for _ in range(size)]).reshape(shape) for _ in range(2)
                )
                common.join(mean, m2, count)
        for one, common in zip(self._moments, self._common, strict=True):
            one.load_state_dict(common.state_dict())
