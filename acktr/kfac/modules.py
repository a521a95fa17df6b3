"""Which modules K-FAC can have blocks of."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_WHOLE = "K-FAC needs whole weights, as DistributedDataParallel has them"


def check_module(module: nn.Module) -> None:
    """Raise ValueError for a module that K-FAC cannot have blocks of."""
    if not isinstance(module, nn.Module):
        raise ValueError(
            "K-FAC takes the module itself, not its parameters, as in KFAC(model),"
            f" got {type(module).__name__} (param_groups names a part of its parameters)"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("K-FAC needs a module of Python, not of torch.jit: layers are recorded")
    if isinstance(module, nn.DataParallel):
        raise ValueError("K-FAC cannot try steps out on DataParallel: give and call model.module")
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for path, part in module.named_modules():
        if isinstance(part, sharded):
            raise ValueError(
                f"module {path!r} is FullyShardedDataParallel, of whose weights each process holds"
                f" a part: {_WHOLE}"
            )
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"parameter {name!r} has no shape yet: run the lazy module once first")
        if hasattr(parameter, "full_tensor"):
            raise ValueError(
                f"parameter {name!r} is a DTensor, of which each process holds a part (FSDP):"
                f" {_WHOLE}"
            )
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex: K-FAC's Fisher is one of real parameters"
                " (keep real and imaginary part as parameters of their own)"
            )
