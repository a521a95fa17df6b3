"""Linear algebra that survives bad factors, and the KL rescale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

Inverse = Literal["eigen", "cholesky"]
Parts = tuple[Tensor, ...]
"""A decomposition: (values, vectors) of an eigendecomposition or (inverse,)."""
Request = tuple[Tensor, Inverse]
"""A factor, ([k,] d, d) or the diagonal (d,) of one, and how to decompose it."""


class FactorError(RuntimeError):
    """A curvature factor that could not be decomposed."""


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no entry is NaN or infinite, as a scalar on the tensor's device.

    x - x is 0 for finite numbers alone; this takes half the time of isfinite on small matrices.
    """
    return (tensor - tensor).any().logical_not()


def trust_scale(quadratic: Tensor, lr: float, kl_clip: float) -> Tensor:
    """Scale nu of a step so that its predicted KL stays inside the trust region.

    nu = min(1, sqrt(c / (lr^2 q))), so that the step lr nu U has length min(lr, sqrt(c / q)) along
    U and the quadratic form lr^2 nu^2 q never exceeds c = 2 delta (Wu et al. 2017, section 3.3).
    q <= 0 (a zero gradient) gives 1; a q that is not finite gives 0, which skips the step.

    Args:
        quadratic: q = U^T F U, a scalar tensor; it stays on its device.
        lr: Step size.
        kl_clip: c.
    """
    finite = quadratic.detach().nan_to_num(torch.nan, torch.inf, torch.nan)
    room = kl_clip / (lr * lr * finite.clamp(min=0.0))  # infinite for q <= 0
    return room.sqrt().clamp(max=1.0).nan_to_num(nan=0.0)


def trace_ratio(a: Tensor, g: Tensor) -> Tensor:
    """The trace ratio pi = sqrt(mean(a) / mean(g)) of eigenvalues or diagonals, ([k,] 1).

    Martens & Grosse 2015, section 6.3; kept in [1e-10, 1e10].
    """
    ratio = a.mean(-1, keepdim=True) / g.mean(-1, keepdim=True).clamp(min=1e-30)
    return ratio.clamp(1e-20, 1e20).sqrt()


def factored_tikhonov(a: Tensor, g: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A + pi sqrt(lambda) I and G + sqrt(lambda) / pi I (Martens & Grosse 2015, section 6.3).

    Args:
        a: Factor A, ([k,] in, in), or the diagonal (in,) of one.
        g: Factor G, ([k,] out, out).
        damping: lambda.
    """
    diagonal = a if a.dim() == 1 else a.diagonal(dim1=-2, dim2=-1)
    pi = trace_ratio(diagonal, g.diagonal(dim1=-2, dim2=-1))
    root = damping**0.5
    shifted = a + root * pi if a.dim() == 1 else _shift(a, root * pi)
    return shifted, _shift(g, root / pi)


def _shift(matrix: Tensor, amount: Tensor) -> Tensor:
    """Matrix plus amount ([k,] 1) times the identity."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return matrix + amount[..., None] * eye


def _attempt(matrix: Tensor) -> Parts | None:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError and its CUDA relatives
        return None
    if bool(all_finite(values)) and bool(all_finite(vectors)):
        return values, vectors
    return None


def _attempt_inverse(matrix: Tensor) -> Parts | None:
    root, failed = torch.linalg.cholesky_ex(matrix)
    if bool(failed.any()):
        return None
    inverse = torch.cholesky_inverse(root)
    return (inverse,) if bool(all_finite(inverse)) else None


def _ladder(matrix: Tensor, attempt: Callable[[Tensor], Parts | None], what: str) -> Parts:
    """Attempts as it is, in float64, and in float64 with a jitter of 1e-6 of the mean diagonal."""
    sym = (matrix + matrix.mT) / 2
    if not bool(all_finite(sym)):
        raise FactorError("factor has NaN or Inf entries")
    result = attempt(sym)
    if result is None:
        result = attempt(sym.double())
    if result is None:
        wide = sym.double()
        jitter = 1e-6 * wide.diagonal(dim1=-2, dim2=-1).mean().abs().clamp(min=1e-30)
        eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=sym.device)
        result = attempt(wide + jitter * eye)
    if result is None:
        raise FactorError(f"{what}, also not in float64 with jitter")
    return result


def _finish_eigen(parts: Parts, dtype: torch.dtype) -> Parts:
    values, vectors = parts
    # Row-major, as a checkpoint gives them back: products round alike before and after a resume.
    return values.clamp(min=0).to(dtype), vectors.to(dtype).contiguous()


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors (columns) of a symmetric PSD matrix.

    The matrix, or every one of a stack, is symmetrised and checked first (LAPACK reads one triangle
    only and returns NaN silently). Three attempts follow: as it is, in float64, and in float64 with
    a jitter of 1e-6 of the mean diagonal.

    Raises:
        FactorError: The matrix is not finite, or every attempt failed.
    """
    parts = _ladder(matrix, _attempt, "eigendecomposition did not converge")
    values, vectors = _finish_eigen(parts, matrix.dtype)
    return values, vectors


def symmetric_inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, or stack, by Cholesky with the same ladder.

    Raises:
        FactorError: The matrix is not finite, or not positive definite even with jitter.
    """
    (inverse,) = _ladder(matrix, _attempt_inverse, "factor is not positive definite")
    return inverse.to(matrix.dtype).contiguous()


def _one(matrix: Tensor, method: Inverse) -> Parts | FactorError:
    if matrix.dim() == 1:
        if not bool(all_finite(matrix)):
            return FactorError("factor has NaN or Inf entries")
        return (matrix.clamp(min=0) if method == "eigen" else 1 / matrix,)
    try:
        if method == "eigen":
            return symmetric_eigen(matrix)
        return (symmetric_inverse(matrix),)
    except FactorError as error:
        return error


def decompose(requests: Sequence[Request]) -> list[Parts | FactorError]:
    """Decompose many factors, those of equal size in one batched call.

    A batch in which anything fails is done again one by one, so that a bad factor spoils no other;
    what fails even then is returned as its error.

    Args:
        requests: Symmetric matrices, or stacks of them, with "eigen" for (values, vectors) or
            "cholesky" for (inverse,); for a diagonal the parts are (values,) or (inverse,).
    """
    results: dict[int, Parts | FactorError] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, (matrix, method) in enumerate(requests):
        key = (method, matrix.shape, matrix.dtype, matrix.device)
        groups.setdefault(key, []).append(index)
    for members in groups.values():
        method = requests[members[0]][1]
        matrices = [requests[index][0] for index in members]
        batch = _batch(matrices, method) if len(matrices) > 1 and matrices[0].dim() > 1 else None
        for place, index in enumerate(members):
            results[index] = _one(matrices[place], method) if batch is None else batch[place]
    return [results[index] for index in range(len(requests))]


def _batch(matrices: Sequence[Tensor], method: Inverse) -> list[Parts] | None:
    """All of them in one call, or None when anything fails."""
    stack = torch.stack(list(matrices))
    stack = (stack + stack.mT) / 2
    if not bool(all_finite(stack)):
        return None
    parts = _attempt(stack) if method == "eigen" else _attempt_inverse(stack)
    if parts is None:
        return None
    slices = [tuple(part[place] for part in parts) for place in range(len(matrices))]
    if method == "eigen":
        return [_finish_eigen(mine, stack.dtype) for mine in slices]
    return [(mine[0].contiguous(),) for mine in slices]
