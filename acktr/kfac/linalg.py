"""Linear algebra that survives bad factors, and the KL rescale."""

from __future__ import annotations

import torch
from torch import Tensor


class FactorError(RuntimeError):
    """A curvature factor that could not be decomposed."""


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
    q = quadratic.detach()
    safe = torch.where(q > 0, q, torch.ones_like(q))
    scale = (kl_clip / (lr * lr * safe)).sqrt().clamp(max=1.0)
    scale = torch.where(q > 0, scale, torch.ones_like(scale))
    return torch.where(torch.isfinite(q), scale, torch.zeros_like(scale))


def _attempt(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:  # LinAlgError and its CUDA relatives
        return None
    if bool(torch.isfinite(values).all()) and bool(torch.isfinite(vectors).all()):
        return values, vectors
    return None


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending, clamped at 0) and eigenvectors (columns) of a symmetric PSD matrix.

    The matrix is symmetrised and checked first (LAPACK reads one triangle only and returns NaN
    silently). Three attempts follow: as it is, in float64, and in float64 with a jitter of 1e-6
    of the mean diagonal.

    Raises:
        FactorError: The matrix is not finite, or every attempt failed.
    """
    sym = (matrix + matrix.mT) / 2
    if not bool(torch.isfinite(sym).all()):
        raise FactorError("factor has NaN or Inf entries")
    result = _attempt(sym)
    if result is None:
        result = _attempt(sym.double())
    if result is None:
        wide = sym.double()
        jitter = 1e-6 * wide.diagonal().mean().abs().clamp(min=1e-30)
        result = _attempt(wide + jitter * torch.eye(len(wide), dtype=wide.dtype, device=sym.device))
    if result is None:
        raise FactorError("eigendecomposition did not converge, also not in float64 with jitter")
    values, vectors = result
    # Row-major, as a checkpoint gives them back: products round alike before and after a resume.
    return values.clamp(min=0).to(matrix.dtype), vectors.to(matrix.dtype).contiguous()
