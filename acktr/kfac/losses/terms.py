"""What the losses share: checks of their arguments, the divisor Z, and columns of Hessian roots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "batchmean", "sum"]
"""What the sum over terms is divided by (Z): the number of terms, output.shape[0], or 1."""
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def check_tuple(loss: object, what: str, value: object, count: int, kind: str = "tensors") -> None:
    """Raise ValueError unless this is a tuple of that length."""
    if not isinstance(value, tuple) or len(value) != count:
        got = str(len(value)) if isinstance(value, tuple) else _described(value)
        raise ValueError(f"{_name(loss)}: {what} must be a tuple of {count} {kind}, got {got}")


def checked_output(loss: object, output: object) -> Tensor:
    """The output in single precision at least; ValueError unless floating-point (N, ..., D)."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ValueError(
            f"{_name(loss)}: output must be a floating-point tensor, got {_described(output)}"
        )
    if output.ndim < 2 or output.numel() == 0:
        raise ValueError(
            f"{_name(loss)}: output must be (N, ..., D) without empty dimensions, "
            f"got {tuple(output.shape)}"
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


def check_halves(loss: object, output: Tensor) -> None:
    """Raise ValueError unless the last dimension holds as many means as log-stds."""
    if output.shape[-1] % 2:
        raise ValueError(
            f"{_name(loss)}: output must be (N, ..., 2 D), means and log-stds, "
            f"got {tuple(output.shape)}"
        )


def check_like(
    loss: object, what: str, value: object, like: Tensor, shape: torch.Size, integer: bool = False
) -> None:
    """Raise ValueError unless this is a tensor of that shape on the same device.

    Args:
        loss: Named in the message.
        what: The argument's name, for the message.
        value: What to check.
        like: The output, whose device is wanted.
        shape: The shape wanted; nothing is broadcast.
        integer: Whether int64 is wanted instead of any floating-point type.
    """
    fits = isinstance(value, Tensor) and value.shape == shape
    if fits and isinstance(value, Tensor):
        fits = value.dtype == torch.int64 if integer else value.is_floating_point()
    if not fits:
        kind = "an int64" if integer else "a floating-point"
        raise ValueError(
            f"{_name(loss)}: {what} must be {kind} tensor of shape {tuple(shape)}, "
            f"got {_described(value)}"
        )
    if isinstance(value, Tensor) and value.device != like.device:
        raise ValueError(
            f"{_name(loss)}: {what} is on {value.device}, but the output on {like.device}"
        )


def check_range(loss: object, target: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless all values lie in [low, high]; NaN does not."""
    if not bool(((target >= low) & (target <= high)).all()):
        least, most = target.min().item(), target.max().item()
        raise ValueError(
            f"{_name(loss)}: targets must lie in [{low}, {high}], got values from {least} to {most}"
        )


def check_generator(loss: object, generator: torch.Generator | None, output: Tensor) -> None:
    """Raise ValueError unless the generator draws on the output's kind of device."""
    if generator is not None and generator.device.type != output.device.type:
        raise ValueError(
            f"{_name(loss)}: the generator is for {generator.device}, the output on {output.device}"
        )


def term_count(output: Tensor, reduction: Reduction) -> float | None:
    """Z of an output (N, ..., D); None for "sum"."""
    if reduction == "sum":
        return None
    return float(len(output) if reduction == "batchmean" else output.shape[:-1].numel())


def diagonal_roots(output: Tensor, root: Tensor) -> Iterator[Tensor]:
    """sum_n (r * output) for every position and column where H is diag(root^2).

    Args:
        output: (N, ..., D).
        root: Square root of the diagonal of H, of that shape.
    """
    outputs, values = _positions(output), _positions(root.detach())
    for position in range(outputs.shape[1]):
        for column in range(outputs.shape[2]):
            yield (values[:, position, column] * outputs[:, position, column]).sum()


def categorical_roots(logits: Tensor) -> Iterator[Tensor]:
    """sum_n (r * logits) with r = sqrt(p_c) (e_c - p), which has sum_c r r^T = diag(p) - p p^T.

    Args:
        logits: (N, ..., D).
    """
    outputs = _positions(logits)
    probabilities = outputs.detach().softmax(-1)
    for position in range(outputs.shape[1]):
        p = probabilities[:, position]
        for column in range(outputs.shape[2]):
            root = -p
            root[:, column] += 1
            yield (p[:, column : column + 1].sqrt() * root * outputs[:, position]).sum()


def _positions(output: Tensor) -> Tensor:
    """(N, ..., D) as (N, T, D)."""
    return output.reshape(len(output), -1, output.shape[-1])


def _name(loss: object) -> str:
    return type(loss).__name__


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__
