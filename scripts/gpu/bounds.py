"""How far a device may be from the CPU, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """An error e of the device is right if e <= min(most, max(least, times e')).

    Both errors are distances to the same computation in float64, with the same weights, batches and
    noise; e' is that of the CPU in the device's own precision. Device and CPU round with the same
    unit and in another order, so that e and e' are two draws from like distributions: nothing but a
    fault makes one many times the other. ``least`` is for an e' that is small by chance, and
    ``most`` keeps a precision that is lost on both sides from passing.
    """

    least: float
    times: float
    most: float

    def limit(self, other: float) -> float:
        """The largest error that is right, beside that of the CPU; NaN if the CPU's is none."""
        if not math.isfinite(other):
            return math.nan
        return min(self.most, max(self.least, self.times * other))


BOUNDS = {
    # 2^-24 in sums of some 10^4 numbers, times the condition of damped factors (1e2 to 1e3), is
    # 1e-6 to 1e-5 of a change. The convolutions of a processor were seen to multiply that by ten
    # once the number of threads was another than at the start: 30 is room for such kernels. The
    # factors of TF32 are rounded to 2^-11: an ACKTR update loses over 100 times as much by them.
    # RMSprop divides gradients by their own size, rounding too, and loses 1e-3 (A2C, on the CPU).
    "float32": Bound(least=2e-5, times=30.0, most=5e-2),
    # 2^-9 in every product, which averages over samples and adds up over layers.
    "bfloat16": Bound(least=2e-2, times=3.0, most=0.5),
}
"""By the precision of forward passes."""


def distance(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], begun: Mapping[str, Tensor]
) -> float:
    """Norm of all differences over that of the change from the beginning, in float64."""
    error = change = 0.0
    for name, truth in wanted.items():
        error += float((_wide(found[name]) - _wide(truth)).square().sum())
        change += float((_wide(truth) - _wide(begun[name])).square().sum())
    return math.sqrt(error / change) if change else math.inf


def farthest(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a tensor; NaN if one is."""
    gaps = [
        (_wide(found[n]) - _wide(w)).norm() / _wide(w).norm().clamp(min=1e-30)
        for n, w in wanted.items()
    ]
    return float(torch.stack(gaps).max())  # Python's max passes over NaN


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()
