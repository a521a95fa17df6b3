"""What the losses share: checks of their arguments, the divisor Z, and columns of Hessian roots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from acktr.kfac.tensors import accumulation_type, parts_of, positions

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
    return output.to(accumulation_type(output))


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


def has_rows(output: Any) -> bool:
    """Whether a loss's output, a tensor or a tuple of them, is of any sample."""
    parts = parts_of(output)
    return any(not isinstance(part, Tensor) or part.dim() == 0 or len(part) > 0 for part in parts)


def checked_weights(
    loss: object, weights: object, output: Tensor, *, empty: bool = False
) -> Tensor:
    """Weights in the shape (N, ...) of an output's terms, of its type.

    Args:
        loss: Named in the message.
        weights: A mask or numbers, for the terms or for the first of their dimensions.
        output: The output (N, ..., D).
        empty: Whether none need be positive, as in the share of one of several ranks.

    Raises:
        ValueError: They do not fit, one is negative or not finite, or none is positive.
    """
    shape = output.shape[:-1]
    if (
        not isinstance(weights, Tensor)
        or not 1 <= weights.dim() <= len(shape)
        or weights.shape != shape[: weights.dim()]
        or weights.is_complex()
    ):
        raise ValueError(
            f"{_name(loss)}: weights must be a mask or numbers for the terms {tuple(shape)}, or for"
            f" the first of these dimensions, got {_described(weights)}"
        )
    if weights.device != output.device:
        raise ValueError(
            f"{_name(loss)}: weights are on {weights.device}, but the output on {output.device}"
        )
    numbers = weights.detach().to(output.dtype)
    fit = bool((numbers.isfinite() & (numbers >= 0)).all())
    if not fit or not (empty or bool((numbers > 0).any())):
        raise ValueError(
            f"{_name(loss)}: weights must be finite, >= 0 and not all zero, got values from"
            f" {numbers.min().item():g} to {numbers.max().item():g}"
        )
    return numbers.reshape(*weights.shape, *[1] * (len(shape) - weights.dim())).expand(shape)


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


def diagonal_roots(output: Tensor, root: Tensor, scale: Tensor | None) -> Iterator[Tensor]:
    """sum_n (r * output) for every position and column where H is diag(root^2).

    Args:
        output: (N, ..., D).
        root: Square root of the diagonal of H, of that shape.
        scale: A factor (N, ...) for every term, of which 0 leaves it out; None for 1.
    """
    values = root.detach() if scale is None else _scaled(root.detach(), scale[..., None])
    outputs, values = positions(output), positions(values)
    for position in range(outputs.shape[1]):
        for column in range(outputs.shape[2]):
            yield (values[:, position, column] * outputs[:, position, column]).sum()


def categorical_roots(logits: Tensor, scale: Tensor | None) -> Iterator[Tensor]:
    """sum_n (r * logits) with r = sqrt(p_c) (e_c - p), which has sum_c r r^T = diag(p) - p p^T.

    Args:
        logits: (N, ..., D).
        scale: A factor (N, ...) for every term, of which 0 leaves it out; None for 1.
    """
    outputs = positions(logits)
    scales = None if scale is None else positions(scale[..., None])
    probabilities = outputs.detach().softmax(-1)
    for position in range(outputs.shape[1]):
        p = probabilities[:, position]
        for column in range(outputs.shape[2]):
            root = -p
            root[:, column] += 1
            root = p[:, column : column + 1].sqrt() * root
            if scales is not None:
                root = _scaled(root, scales[:, position])
            yield (root * outputs[:, position]).sum()


def _scaled(root: Tensor, scale: Tensor) -> Tensor:
    return (scale * root).where(scale > 0, 0)  # 0 times NaN would be NaN


def _name(loss: object) -> str:
    return type(loss).__name__


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__
