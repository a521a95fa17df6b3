"""What losses, statistics and steps all do with tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def accumulation_type(tensor: Tensor) -> torch.dtype:
    """The type in which sums over a tensor are taken: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def wide(tensor: Tensor) -> Tensor:
    """A tensor in single precision at least, for sums."""
    return tensor.to(accumulation_type(tensor))


def positions(rows: Tensor) -> Tensor:
    """Reshape (N, ..., d) to (N, T, d)."""
    return rows.reshape(len(rows), -1, rows.shape[-1])


def parts_of(output: Any) -> tuple[Any, ...]:
    """The parts of a loss's output: the items of a tuple, else it alone."""
    return output if isinstance(output, tuple) else (output,)
