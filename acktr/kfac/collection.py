"""The parts of one batch, joined over all blocks and folded at its end."""

from __future__ import annotations

from collections.abc import Mapping

from acktr.kfac.blocks.chain import Chain
from acktr.kfac.blocks.simple import StatBlock
from acktr.kfac.config import KFACConfig
from acktr.kfac.statistics.capture import Gradients


class Collection:
    """Gives every block what it sees of a batch, whole or in micro-batches.

    Args:
        stats: The blocks by name.
        chain: The chain they form, if any.
        config: Settings.
    """

    def __init__(
        self, stats: Mapping[str, StatBlock], chain: Chain | None, config: KFACConfig
    ) -> None:
        self.stats = stats
        self.chain = chain
        self.config = config
        self.batches = 0
        """Batches folded so far."""
        self._done: dict[str, int] = {}

    def add(self, found: Gradients, *, last: bool) -> None:
        """Join a part of a batch, and fold the batch with its last part.

        Raises:
            ValueError: Nothing was recorded, or a layer cannot be observed. All parts of the batch
                are then forgotten, as after any other exception.
        """
        try:
            self._join(found, last)
            if last:
                self._done.clear()
                for folding in self.folding:
                    folding.fold(self.config.stat_decay)
                self.batches += 1
        except BaseException:
            self.drop()
            raise

    def _join(self, found: Gradients, last: bool) -> None:
        stride = max(1, round(1 / self.config.stat_fraction))
        seen, sizes = {}, []
        for name, block in self.stats.items():
            done = self._done.get(name, 0)
            mine = found.observation(block.paths, stride, self.batches, done, last=last)
            if mine.uses:
                block.observe(mine, self.config)
                seen[name] = mine
            else:
                block.pass_over(mine.count)
            self._done[name] = done + mine.size
            sizes.append(mine.size)
        if sizes and not any(sizes):
            raise ValueError(
                "nothing was recorded: run the forward pass inside capture() with gradients"
                " enabled (a module compiled before its first capture() calls no hooks)"
            )
        if self.chain is not None:
            self.chain.observe(seen)

    def drop(self) -> None:
        """Forget the parts of an unfinished batch."""
        self._done.clear()
        for folding in self.folding:
            folding.drop()

    @property
    def folding(self) -> list[StatBlock | Chain]:
        """What learns from batches: the blocks and their chain."""
        return [*self.stats.values(), *([] if self.chain is None else [self.chain])]
