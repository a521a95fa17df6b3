"""Block-tridiagonal inverse Fisher of a chain of linear layers.

Martens & Grosse 2015, section 4.3 and appendix B. Layer i has a weight matrix of shape
(out_i, in_i), in_i counting the homogeneous 1. With
A_ij = E[abar_i abar_j^T] over the layers' inputs and G_ij = E[g_i g_j^T] over the gradients with
respect to their outputs, the Fisher block of layers i and j is approximated by G_ij (x) A_ij; the
order is that of row-major (out, in) matrices, so that (G (x) A) V means G V A^T. F-hat is the one
matrix that has these blocks for |i - j| <= 1 and whose inverse is block tridiagonal:

    F-hat^-1 = Xi^T Lambda Xi,
    Psi_i    = (G_i,i+1 G_i+1^-1) (x) (A_i,i+1 A_i+1^-1)
    Lambda_i = (F_ii - Psi_i F_i+1,i+1 Psi_i^T)^-1,     and F_ii^-1 for the last layer,

where Xi has identities on its diagonal and the -Psi_i right above it, and Lambda is block diagonal.
Lambda_i inverts a difference of Kronecker products (appendix B). For K_A with K_A^T A_i K_A = I and
K_A^T (A_i,i+1 A_i+1^-1 A_i+1,i) K_A = diag(s_A), and K_G, s_G alike,

    Lambda_i V = K_G [(K_G^T V K_A) / (1 - s_G s_A^T)] K_A^T.

The s are squared canonical correlations: below 1 if own and cross factors are moments of the same
samples and the own factors are damped. Rounding, or averages that do not belong together, may
still bring 1 - s_G s_A to 0 or under it; it is clamped to :func:`eigenvalue_floor`, which keeps
Lambda, hence the inverse, positive definite.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.kfac.linalg import FactorError, symmetric_eigen

_PER_LAYER, _PER_LINK = 3, 2


def eigenvalue_floor(dtype: torch.dtype) -> float:
    """Smallest 1 - s_G s_A that is believed: sqrt(eps), 1.5e-8 in float64, 3.5e-4 in float32."""
    return float(torch.finfo(dtype).eps ** 0.5)


@dataclass(frozen=True)
class ChainInverse:
    """The prepared inverse F-hat^-1 of a chain of L layers; tensors are row-major.

    Attributes:
        a_bases: K_A of each layer, (in_i, in_i).
        g_bases: K_G of each layer, (out_i, out_i).
        gains: 1 / max(1 - s_G s_A^T, floor) of each layer, (out_i, in_i); ones for the last.
        a_links: A_i,i+1 A_i+1^-1 of each neighbouring pair, (in_i, in_i+1); L - 1 of them.
        g_links: G_i,i+1 G_i+1^-1 of each neighbouring pair, (out_i, out_i+1); L - 1 of them.
    """

    a_bases: tuple[Tensor, ...]
    g_bases: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]
    a_links: tuple[Tensor, ...]
    g_links: tuple[Tensor, ...]

    def apply(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 times a step or gradient: Xi, Lambda, Xi^T, as products of small matrices.

        Nothing is read back to the host.

        Args:
            matrices: One (out_i, in_i) matrix per layer.
        """
        links = list(zip(self.a_links, self.g_links, strict=True))
        rest = list(matrices)
        for i, (a, g) in enumerate(links):
            rest[i] = matrices[i] - g @ matrices[i + 1] @ a.mT
        solved = [
            g @ ((g.mT @ matrix @ a) * gain) @ a.mT
            for matrix, a, g, gain in zip(rest, self.a_bases, self.g_bases, self.gains, strict=True)
        ]
        result = list(solved)
        for i, (a, g) in enumerate(links):
            result[i + 1] = solved[i + 1] - g.mT @ solved[i] @ a
        return result

    def tensors(self) -> list[Tensor]:
        """All 5 L - 2 tensors: K_A, K_G, gain of each layer, then the A and G link of each pair."""
        layers = zip(self.a_bases, self.g_bases, self.gains, strict=True)
        links = zip(self.a_links, self.g_links, strict=True)
        return [tensor for group in (*layers, *links) for tensor in group]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], layers: int) -> ChainInverse:
        """Inverse of :meth:`tensors`, bit for bit.

        Args:
            tensors: What :meth:`tensors` gave.
            layers: Their number L.
        """
        kept = [tensor.contiguous() for tensor in tensors]
        split = _PER_LAYER * layers
        own, links = kept[:split], kept[split:]
        return cls(
            a_bases=tuple(own[0::_PER_LAYER]),
            g_bases=tuple(own[1::_PER_LAYER]),
            gains=tuple(own[2::_PER_LAYER]),
            a_links=tuple(links[0::_PER_LINK]),
            g_links=tuple(links[1::_PER_LINK]),
        )

    @classmethod
    def blank(cls, shapes: Sequence[tuple[int, int]], zero: Tensor) -> ChainInverse:
        """An inverse of zeros, with the type and device of ``zero``, for layers (out_i, in_i)."""
        sizes: list[tuple[int, int]] = []
        for out, width in shapes:
            sizes += [(width, width), (out, out), (out, width)]
        for (out, width), (next_out, next_width) in itertools.pairwise(shapes):
            sizes += [(width, next_width), (out, next_out)]
        return cls.from_tensors([zero.new_zeros(size) for size in sizes], len(shapes))


def _check_finite(own: Sequence[Tensor], cross: Sequence[Tensor], what: str) -> None:
    named = {f"{what}_{i}": matrix for i, matrix in enumerate(own)}
    named |= {f"{what}_{i},{i + 1}": matrix for i, matrix in enumerate(cross)}
    for name, matrix in named.items():
        if not bool(torch.isfinite(matrix).all()):
            raise FactorError(f"factor {name} has NaN or Inf entries")


def _whitening(matrix: Tensor, name: str) -> Tensor:
    """W with W^T M W = I, from the eigendecomposition of M."""
    try:
        values, vectors = symmetric_eigen(matrix)
    except FactorError as error:
        raise FactorError(f"factor {name}: {error}") from error
    if bool(values[0] <= 10 * torch.finfo(values.dtype).eps * values[-1]):
        raise FactorError(
            f"factor {name} is not positive definite: its eigenvalues reach from"
            f" {float(values[0]):.3g} to {float(values[-1]):.3g} (raise damping)"
        )
    return vectors * values.rsqrt()


def _side(
    own: Sequence[Tensor], cross: Sequence[Tensor], what: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Bases K, squared correlations s and links M_i,i+1 M_i+1^-1 of one side (A or G)."""
    whitenings = [_whitening(matrix, f"{what}_{i}") for i, matrix in enumerate(own)]
    bases, spectra, links = [], [], []
    for i, matrix in enumerate(cross):
        half = matrix @ whitenings[i + 1]
        links.append((half @ whitenings[i + 1].mT).contiguous())
        correlation = whitenings[i].mT @ half
        try:
            squares, vectors = symmetric_eigen(correlation @ correlation.mT)
        except FactorError as error:
            raise FactorError(f"factor {what}_{i},{i + 1}: {error}") from error
        spectra.append(squares)
        bases.append((whitenings[i] @ vectors).contiguous())
    bases.append(whitenings[-1].contiguous())
    spectra.append(whitenings[-1].new_zeros(len(whitenings[-1])))
    return bases, spectra, links


@torch.no_grad()
def chain_inverse(
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    a_cross: Sequence[Tensor],
    g_cross: Sequence[Tensor],
) -> ChainInverse:
    """Prepare F-hat^-1 of a chain of L layers (Martens & Grosse 2015, section 4.3, appendix B).

    Costs four eigendecompositions per layer (two for the last).

    Args:
        a: A_i = E[abar_i abar_i^T] plus its damping, (in_i, in_i); L of them.
        g: G_i = E[g_i g_i^T] plus its damping, (out_i, out_i); L of them.
        a_cross: E[abar_i abar_i+1^T], undamped, (in_i, in_i+1); L - 1 of them.
        g_cross: E[g_i g_i+1^T], undamped, (out_i, out_i+1); L - 1 of them.

    Raises:
        FactorError: A factor is not finite, an own factor is not positive definite (its smallest
            eigenvalue does not exceed 10 eps times the largest), or a decomposition failed.
    """
    _check_finite(a, a_cross, "A")
    _check_finite(g, g_cross, "G")
    a_bases, a_spectra, a_links = _side(a, a_cross, "A")
    g_bases, g_spectra, g_links = _side(g, g_cross, "G")
    floor = eigenvalue_floor(a[0].dtype)
    gains = [
        (1 - torch.outer(s_g, s_a)).clamp(min=floor).reciprocal()
        for s_a, s_g in zip(a_spectra, g_spectra, strict=True)
    ]
    result = ChainInverse(*map(tuple, (a_bases, g_bases, gains, a_links, g_links)))
    if not all(bool(torch.isfinite(tensor).all()) for tensor in result.tensors()):
        raise FactorError("the inverse of the chain has NaN or Inf entries (raise damping)")
    return result


def _completed(own: Sequence[Tensor], cross: Sequence[Tensor]) -> list[list[Tensor]]:
    """All blocks of one side: M_ij = M_i,i+1 M_i+1^-1 M_i+1,j for j > i + 1, and transposes."""
    count = len(own)
    blocks = [list(own) for _ in range(count)]
    for j in range(count):
        blocks[j][j] = own[j]
        for i in range(j - 1, -1, -1):
            below = blocks[i + 1][j]
            if j == i + 1:
                blocks[i][j] = cross[i]
            else:
                try:
                    blocks[i][j] = cross[i] @ torch.linalg.solve(own[i + 1], below)
                except RuntimeError as error:  # LinAlgError: singular
                    raise FactorError(f"own factor {i + 1} is singular (raise damping)") from error
            blocks[j][i] = blocks[i][j].mT.contiguous()
    return blocks


@torch.no_grad()
def chain_matrix(
    a: Sequence[Tensor],
    g: Sequence[Tensor],
    a_cross: Sequence[Tensor],
    g_cross: Sequence[Tensor],
) -> Tensor:
    """F-hat as one dense matrix, for inspection; arguments and errors of :func:`chain_inverse`.

    Own factors of inner layers must be invertible; nothing is clamped. Rows and columns run over
    the layers and within each over its row-major (out, in) matrix.
    """
    _check_finite(a, a_cross, "A")
    _check_finite(g, g_cross, "G")
    a_blocks, g_blocks = _completed(a, a_cross), _completed(g, g_cross)
    count = range(len(a))
    rows = [[torch.kron(g_blocks[i][j], a_blocks[i][j]) for j in count] for i in count]
    return torch.cat([torch.cat(row, dim=1) for row in rows], dim=0)
