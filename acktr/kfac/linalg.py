"""Linear algebra that survives bad factors, and faster products of float32 matrices."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Inverse = Literal["eigen", "cholesky"]
Parts = tuple[Tensor, ...]
"""A decomposition: (values, vectors) of an eigendecomposition or (inverse,)."""
Request = tuple[Tensor, Inverse]
"""A factor, ([k,] d, d) or the diagonal (d,) of one, and how to decompose it."""


_FILL = 100.0
"""How many times as far below zero as the largest number of an output a fill lies."""


def fill_bound(output: Tensor) -> Tensor:
    """Numbers of an output below this () are what masks put there, such as -1e9 or -inf.

    Logits that a mask has filled say nothing of the size of the others.
    """
    return -_FILL * (1 + output.amax().nan_to_num(posinf=0.0, neginf=0.0).abs())


class FactorError(RuntimeError):
    """A curvature factor that could not be decomposed."""


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors (columns) of a symmetric matrix, or of a stack of them."""

    values: Tensor
    vectors: Tensor | None = None
    """None for a diagonal matrix."""

    @classmethod
    def blank(cls, zero: Tensor) -> Spectrum:
        """Zeros of the shapes that a matrix ([k,] d, d), or the diagonal (d,) of one, has."""
        return cls(zero) if zero.dim() == 1 else cls(zero[..., 0].clone(), zero.clone())

    def carried(self, former: Spectrum, diagonals: Tensor) -> Tensor:
        """Diagonals (..., d) of matrices that were diagonal in a former basis, in this one.

        diag(Q^T Q_former diag(s) Q_former^T Q) = (Q^T Q_former)^2 s, elementwise; traces stay.
        """
        if self.vectors is None or former.vectors is None:
            return diagonals
        return diagonals @ (former.vectors.mT @ self.vectors).square()


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no entry is NaN or infinite, as a scalar on the tensor's device.

    x - x is 0 for finite numbers alone; this takes half the time of isfinite on small matrices.
    """
    return (tensor - tensor).any().logical_not()


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
        g: Factor G, ([k,] out, out), or the diagonal (out,) of one.
        damping: lambda.
    """
    pi, root = trace_ratio(_diagonal(a), _diagonal(g)), damping**0.5
    return _shift(a, root * pi), _shift(g, root / pi)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() == 1 else matrix.diagonal(dim1=-2, dim2=-1)


def _shift(matrix: Tensor, amount: Tensor) -> Tensor:
    """Matrix, or the diagonal of one, plus amount ([k,] 1) times the identity."""
    if matrix.dim() == 1:
        return matrix + amount
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(amount)
    return shifted


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
    inverse = torch.cholesky_inverse(root).mT  # row-major, and the same: it is symmetric
    return (inverse,) if bool(all_finite(inverse)) else None


def _ladder(
    matrix: Tensor, sym: Tensor, attempt: Callable[[Tensor], Parts | None], what: str
) -> Parts:
    """Attempts as it is, in float64, and in float64 with a jitter of 1e-6 of the mean diagonal.

    ``sym`` is the matrix made symmetric.
    """
    if not (bool(all_finite(matrix)) and bool(all_finite(sym))):  # a sum of entries may overflow
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
    sym = (matrix + matrix.mT) / 2
    parts = _ladder(matrix, sym, _attempt, "eigendecomposition did not converge")
    values, vectors = _finish_eigen(parts, matrix.dtype)
    return values, vectors


def symmetric_inverse(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix, or stack, by Cholesky with the same ladder.

    The lower triangle counts, as it does where several are inverted in one call.

    Raises:
        FactorError: The matrix is not finite, or not positive definite even with jitter.
    """
    sym = matrix.tril() + matrix.tril(-1).mT
    (inverse,) = _ladder(matrix, sym, _attempt_inverse, "factor is not positive definite")
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
        batch = _batch(matrices, method) if matrices[0].dim() > 1 else None
        for place, index in enumerate(members):
            results[index] = _one(matrices[place], method) if batch is None else batch[place]
    return [results[index] for index in range(len(requests))]


def part_shapes(matrix: Tensor, method: Inverse) -> list[torch.Size]:
    """The shapes of the parts that :func:`decompose` makes of a matrix."""
    if matrix.dim() > 1 and method == "eigen":
        return [matrix.shape[:-1], matrix.shape]
    return [matrix.shape]


def _batch(matrices: Sequence[Tensor], method: Inverse) -> list[Parts] | None:
    """All of them in one call, or None when anything fails."""
    stack = torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0][None]
    if method == "eigen":  # the other one reads one triangle alone
        stack = (stack + stack.mT) / 2
    if not bool(torch.isfinite(stack.sum())):  # one look instead of three; it may err to this side
        return None
    parts = _attempt(stack) if method == "eigen" else _attempt_inverse(stack)
    if parts is None:
        return None
    slices = [tuple(part[place] for part in parts) for place in range(len(matrices))]
    if method == "eigen":
        return [_finish_eigen(mine, stack.dtype) for mine in slices]
    return [(mine[0].contiguous(),) for mine in slices]


# --- faster kernels that give the same numbers up to rounding -------------------------------------
#
# oneDNN may be allowed to take bfloat16 for the factors of a float32 product and float32 for its
# sums (CUDA: TF32). Two uses of that permission lose nothing: factors that came from bfloat16, as
# the statistics of a network that runs in bfloat16, are unchanged by it; and where the hardware has
# no such product oneDNN computes in float32 all the same, on some processors in half the time of
# the other library, which a probe finds out.

LARGE_FACTOR = 256
"""Size of a factor from which choosing a library for its products is worth the call."""

_PROBE = 512
_MKLDNN: Any = torch.backends.mkldnn
_FLOAT32_ERROR = 1e-5
"""Above the relative error of a product that was computed in float32; bfloat16 gives 2e-3."""


class _Precision:
    """A backend's precision of float32 products, which is one for all threads.

    The first thread that needs another one sets it, and the last one puts the former back.

    Args:
        backend: Of matrix products.
        parent: Whose precision it has unless it was given one of its own.
        precision: What is needed.
    """

    def __init__(self, backend: Any, parent: Any, precision: str) -> None:
        self._backend = backend
        self._parent = parent
        self._precision = precision
        self._lock = threading.Lock()
        self._users = 0
        self._before = "none"

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context in which it is set."""
        with self._lock:
            if self._users == 0:
                before = self._backend.fp32_precision
                self._before = "none" if before == self._parent.fp32_precision else before
                self._backend.fp32_precision = self._precision
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._backend.fp32_precision = self._before


_BFLOAT16 = _Precision(_MKLDNN.matmul, _MKLDNN, "bf16")
_TF32 = _Precision(torch.backends.cuda.matmul, torch.backends, "tf32")


def narrow_products(source: torch.dtype, device: torch.device) -> Any:
    """Context for float32 products whose factors are numbers of a narrower type.

    Args:
        source: What the factors were converted from; a type wider than bfloat16 changes nothing.
        device: Where they are.
    """
    if device.type == "cpu" and source == torch.bfloat16:
        return _BFLOAT16()
    if device.type == "cuda" and source in (torch.bfloat16, torch.float16):
        return _TF32()
    return nullcontext()


def float32_products(device: torch.device) -> Any:
    """Context for float32 products on a processor whose oneDNN computes them faster."""
    if device.type == "cpu" and _stays_float32():
        return _BFLOAT16()
    return nullcontext()


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices take half the time of those of float32 or less."""
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


@lru_cache(maxsize=1)
def _stays_float32() -> bool:
    """Whether oneDNN takes float32 products and does not round their factors.

    Processors with AMX do round them, and have fast float32 products anyway.
    """
    if torch.cpu._is_amx_tile_supported() or not torch.cpu._is_avx512_bf16_supported():
        return False
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE, _PROBE, generator=draw, dtype=torch.float32, device="cpu")
    exact = rows.double() @ rows.double()
    with _BFLOAT16():
        error = (rows @ rows - exact).norm() / exact.norm()
    return float(error) < _FLOAT32_ERROR
