"""The linear maps inside of modules that call fused code, and how their uses are seen.

For the time of a recorded pass the module's ``forward`` is wrapped, as an attribute of the instance
that goes away afterwards: the wrapper calls the module's own forward with
:class:`acktr.kfac.statistics.elementary.Elementary` active. Hooks of the module run around it as
ever. Without gradients, where nothing is recorded, the pass is torch's own; and inside of
torch.utils.checkpoint, which computes it once more when nothing is replaced any longer, and finds
other tensors than before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from acktr.kfac.statistics.elementary import Elementary, checkpointed
from acktr.kfac.statistics.uses import LinearMap, Report

FUSED = (
    nn.MultiheadAttention,
    *(nn.LSTM, nn.GRU, nn.RNN),
    *(nn.LSTMCell, nn.GRUCell, nn.RNNCell),
)
"""Modules with linear maps inside of fused code."""


def is_fused(module: nn.Module) -> bool:
    """Whether a module's projections can be seen; a subclass must keep the forward pass."""
    return any(isinstance(module, k) and type(module).forward is k.forward for k in FUSED)


@dataclass(frozen=True)
class Projection:
    """A linear map inside of a module, or several of one input width that one weight stacks."""

    module: nn.Module
    key: str
    """Name of the weight in the module."""
    bias: str | None = None
    """Name of the bias."""
    groups: int = 1
    """Number of maps k in the weight (k out, in)."""
    gates: int = 1
    """Number of the parts of the output that different gates take."""

    @property
    def name(self) -> str:
        """Name among the module's projections, which is no parameter's: in_proj, ih_l0."""
        return self.key.removeprefix("weight_").removesuffix("weight").rstrip("._")


def projections(module: nn.Module) -> list[Projection]:
    """The projections of a fused module, whether trained or not."""
    if isinstance(module, nn.MultiheadAttention):
        out = Projection(module, "out_proj.weight", "out_proj.bias")
        if module._qkv_same_embed_dim:
            return [Projection(module, "in_proj_weight", "in_proj_bias", 3), out]
        return [*(Projection(module, f"{name}_proj_weight") for name in "qkv"), out]
    if isinstance(module, nn.RNNBase):
        names = [name for name in module._flat_weights_names if name.startswith("weight")]
    else:
        names = ["weight_ih", "weight_hh"]
    gates = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
    number = next((many for kind, many in gates.items() if isinstance(module, kind)), 1)
    return [
        Projection(module, name)
        if "hr" in name
        else Projection(module, name, name.replace("weight", "bias"), gates=number)
        for name in names
    ]


def biases(module: nn.Module) -> dict[str, list[Projection]]:
    """The projections that each bias of a fused module is added to the outputs of."""
    parts = projections(module)
    together = {part.bias: [part] for part in parts if part.bias is not None}
    separate = [
        part for part in parts if part.key in ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    ]
    return {**together, "in_proj_bias": separate} if separate else together


def recorded(root: nn.Module, path: str) -> nn.Module | Projection:
    """What a record is of: the submodule of that path, or a projection in one."""
    module, names = root, path.split(".")
    for place, name in enumerate(names):
        if is_fused(module):
            own = ".".join(names[place:])
            return next(part for part in projections(module) if part.name == own)
        module = module.get_submodule(name)
    return module


class _Wrapped:
    """The forward pass of an instance with its projections reported to all who ask."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward = module.forward
        self.own = "forward" in vars(module)
        self.reports: list[Report] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if checkpointed():
            warnings.warn(
                f"{type(self.module).__name__} inside of torch.utils.checkpoint is not recorded, so"
                " that its weights follow their plain gradients: call it outside of the checkpoint,"
                f" or leave it to the diagonal with skip=[nn.{type(self.module).__name__}]",
                stacklevel=3,
            )
            return self.forward(*args, **kwargs)
        with Elementary(self._report):
            return self.forward(*args, **kwargs)

    def _report(self, seen: LinearMap) -> None:
        for report in self.reports:
            report(seen)


@contextmanager
def reporting(module: nn.Module, report: Report) -> Iterator[None]:
    """Report the projections of a fused module in passes inside the context.

    Contexts may be nested, for several observers of one pass, and may end in any order.
    """
    wrapped = vars(module).get("forward")
    if not isinstance(wrapped, _Wrapped):
        wrapped = _Wrapped(module)
        vars(module)["forward"] = wrapped
    wrapped.reports.append(report)
    try:
        yield
    finally:
        wrapped.reports.remove(report)
        if not wrapped.reports and wrapped.own:
            vars(module)["forward"] = wrapped.forward
        elif not wrapped.reports:
            del vars(module)["forward"]
