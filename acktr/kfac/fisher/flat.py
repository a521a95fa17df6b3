"""Named tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def flattened(vector: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Named tensors as one vector (P,).

    Raises:
        ValueError: A name is missing.
    """
    missing = [name for name in names if name not in vector]
    if missing or not names:
        raise ValueError(f"a flat vector needs a tensor for {', '.join(missing) or 'some name'}")
    return torch.cat([vector[name].flatten() for name in names])


def unflattened(flat: Tensor, names: Sequence[str], module: nn.Module) -> dict[str, Tensor]:
    """Inverse of :func:`flattened`, with the shapes and types of the module's parameters.

    Raises:
        ValueError: A name is unknown, or the length is not that of the parameters.
    """
    named = dict(module.named_parameters())
    unknown = [name for name in names if name not in named]
    if unknown:
        raise ValueError(f"the module has no parameter {unknown[0]!r}")
    sizes = [named[name].numel() for name in names]
    if flat.shape != (sum(sizes),):
        raise ValueError(f"the vector must be of shape ({sum(sizes)},), got {tuple(flat.shape)}")
    parts = zip(names, torch.split(flat, sizes), strict=True)
    return {name: part.reshape(named[name].shape).to(named[name].dtype) for name, part in parts}
