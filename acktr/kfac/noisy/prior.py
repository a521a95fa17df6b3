"""Which parameters have noise, and the variance of their prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

from torch import nn

from acktr.kfac.blocks.constant import KnownBlock, PlainBlock
from acktr.kfac.blocks.registry import Block, StatBlock
from acktr.kfac.blocks.vectors import Norm
from acktr.kfac.noisy.config import NoisyConfig


class Prior:
    """The prior N(0, eta) of every parameter, by block.

    Args:
        module: The network.
        named: Its trainable parameters by name.
        blocks: Their curvature blocks.
        config: Settings.

    Raises:
        ValueError: A name fits nothing, a parameter has no variance, or parameters that share a
            block are treated differently.
    """

    def __init__(
        self,
        module: nn.Module,
        named: Mapping[str, nn.Parameter],
        blocks: Sequence[Block],
        config: NoisyConfig,
    ) -> None:
        given = config.prior_variance
        table = dict(given) if isinstance(given, Mapping) else {"": float(given)}
        _check_names("prior_variance", table, named)
        _check_names("deterministic", config.deterministic, named)
        norms = set() if config.sample_norms else _of_norms(module)
        self.variance: dict[str, float] = {}
        """eta by block."""
        self.sampled: list[StatBlock] = []
        """Blocks whose parameters have noise and a prior."""
        for block in blocks:
            variances = {_longest(name, table) for name in block.names}
            fixed = {
                name in norms or any(_covers(key, name) for key in config.deterministic)
                for name in block.names
            }
            if len(variances) > 1 or len(fixed) > 1:
                raise ValueError(
                    f"{' and '.join(block.names)} share a curvature block: give them one"
                    f" {'prior_variance' if len(variances) > 1 else 'place in deterministic'}"
                )
            (variance,) = variances
            if variance is None:
                raise ValueError(f'{block.names[0]} has no prior_variance: give one for ""')
            self.variance[block.name] = variance
            if fixed == {False} and not isinstance(block, PlainBlock | KnownBlock):
                self.sampled.append(block)
        self.names = [name for block in self.sampled for name in block.names]
        """Names of the sampled parameters, block by block."""


def check_trainable(module: nn.Module) -> None:
    """Raise ValueError for a module in which nothing can have a posterior."""
    parameters = list(module.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        found = f"all {len(parameters)} have requires_grad=False" if parameters else "it has none"
        raise ValueError(f"a posterior needs a module with trainable parameters: {found}")


def _covers(key: str, name: str) -> bool:
    """Whether a parameter's name, or the path of one of its modules, is the key."""
    return key in ("", name) or name.startswith(f"{key}.")


def _longest(name: str, table: Mapping[str, float]) -> float | None:
    """The entry of the longest key that covers a name."""
    keys = [key for key in table if _covers(key, name)]
    return table[max(keys, key=len)] if keys else None


def _check_names(what: str, keys: Iterable[str], named: Iterable[str]) -> None:
    names = list(named)
    for key in keys:
        if not any(_covers(key, name) for name in names):
            raise ValueError(f"{what} names {key!r}, which is no trainable parameter or module")


def _of_norms(module: nn.Module) -> set[str]:
    """Names of the parameters of normalisations."""
    norms = [(p, m) for p, m in module.named_modules() if isinstance(m, get_args(Norm))]
    return {f"{p}.{key}" if p else key for p, m in norms for key in m._parameters}
