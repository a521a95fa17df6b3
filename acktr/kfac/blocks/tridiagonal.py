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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.linear import LinearLayout
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import FactorError, Parts, factored_tikhonov, symmetric_eigen
from acktr.kfac.statistics.averages import History, RunningAverage
from acktr.kfac.statistics.uses import Observation


def eigenvalue_floor(dtype: torch.dtype) -> float:
    """Smallest 1 - s_G s_A that is believed: sqrt(eps), 1.5e-8 in float64, 3.5e-4 in float32."""
    return float(torch.finfo(dtype).eps ** 0.5)


@dataclass(frozen=True)
class ChainInverse:
    """The prepared inverse F-hat^-1 of a chain of L layers; tensors are row-major."""

    layers: Sequence[tuple[Tensor, Tensor, Tensor]]
    """Of each layer K_A (in_i, in_i), K_G (out_i, out_i), and the gain
    1 / max(1 - s_G s_A^T, floor) (out_i, in_i), which is 1 for the last."""
    links: Sequence[tuple[Tensor, Tensor]]
    """A_i,i+1 A_i+1^-1 (in_i, in_i+1) and G_i,i+1 G_i+1^-1 (out_i, out_i+1) of each pair."""

    def apply(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """F-hat^-1 times a step or gradient: Xi, Lambda, Xi^T, as products of small matrices.

        Nothing is read back to the host.

        Args:
            matrices: One (out_i, in_i) matrix per layer.
        """
        rest = list(matrices)
        for i, (a, g) in enumerate(self.links):
            rest[i] = matrices[i] - g @ matrices[i + 1] @ a.mT
        solved = [
            g @ ((g.mT @ matrix @ a) * gain) @ a.mT
            for matrix, (a, g, gain) in zip(rest, self.layers, strict=True)
        ]
        result = list(solved)
        for i, (a, g) in enumerate(self.links):
            result[i + 1] = solved[i + 1] - g.mT @ solved[i] @ a
        return result

    def tensors(self) -> list[Tensor]:
        """All 5 L - 2 tensors: K_A, K_G, gain of each layer, then the A and G link of each pair."""
        return [tensor for group in (*self.layers, *self.links) for tensor in group]

    @classmethod
    def from_tensors(cls, tensors: Sequence[Tensor], layers: int) -> ChainInverse:
        """Inverse of :meth:`tensors`, bit for bit.

        Args:
            tensors: What :meth:`tensors` gave.
            layers: Their number L.
        """
        kept = [tensor.contiguous() for tensor in tensors]
        own, links = kept[: 3 * layers], kept[3 * layers :]
        return cls(
            list(zip(own[0::3], own[1::3], own[2::3], strict=True)),
            list(zip(links[0::2], links[1::2], strict=True)),
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
    layers = list(zip(a_bases, g_bases, gains, strict=True))
    result = ChainInverse(layers, list(zip(a_links, g_links, strict=True)))
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


class TridiagonalBlock:
    """A chain of linear layers whose joint curvature has a block-tridiagonal inverse.

    Beside the layers' own factors it keeps E[a_i a_{i+1}^T] and E[g_i g_{i+1}^T] of neighbours
    (Martens & Grosse 2015, section 4.3).

    Args:
        layers: The linear layers in the order of registration, which must be that of the forward
            pass.
        config: Settings.

    Raises:
        ValueError: There are no layers, or some are not linear layers of their own.
    """

    name = "chain"
    method = None
    """A refresh decomposes all matrices together, see :meth:`decompose`."""

    def __init__(self, layers: Sequence[LayerFactors], config: KFACConfig) -> None:
        odd = [x.name for x in layers if not isinstance(x.layout, LinearLayout) or len(x.paths) > 1]
        if odd or not layers:
            raise ValueError(
                "structure=tridiagonal needs a chain of linear layers without shared weights, not"
                f" {', '.join(odd) or 'a network without linear layers'}"
            )
        self.layers = list(layers)
        self.paths = tuple(layer.name for layer in layers)
        self.names = tuple(name for layer in layers for name in layer.names)
        a = [len(layer.a.value) for layer in layers]
        g = [len(layer.g.value) for layer in layers]
        first = layers[0]
        pairs = range(len(layers) - 1)
        self.a_cross = [RunningAverage(first.zeros((a[i], a[i + 1]))) for i in pairs]
        self.g_cross = [RunningAverage(first.zeros((g[i], g[i + 1]))) for i in pairs]
        self.inverse = ChainInverse.blank(list(zip(g, a, strict=True)), first.zeros(()))
        self._float64 = config.float64
        self.history = History("chain", config.max_failures, first.device)

    @property
    def factors(self) -> list[RunningAverage]:
        """What a refresh decomposes: own factors A and G, then the cross moments."""
        own = [layer.a for layer in self.layers], [layer.g for layer in self.layers]
        return [*own[0], *own[1], *self.a_cross, *self.g_cross]

    needs_samples = False
    """Every row of its layers is a sample's."""

    averages = factors
    """All that batches are folded into."""

    # --- statistics -------------------------------------------------------------------------------

    def observe(self, seen: Observation) -> None:
        """Join a part of a batch to all moments.

        Raises:
            ValueError: A layer was not used exactly once, or over several positions, or the layers
                ran in another order than that of their registration.
        """
        ran = [use.name for use in sorted(seen.uses, key=lambda use: use.turn)]
        if ran != [use.name for use in seen.uses]:
            raise ValueError(
                "structure=tridiagonal needs layers registered in the order of the forward pass:"
                f" {', '.join(ran)}"
            )
        seen = seen.double() if self._float64 else seen
        rows: list[list[tuple[Tensor, Tensor]]] = []
        weights = seen.uses[0].weights
        for layer in self.layers:
            uses = [use for use in seen.uses if use.module is layer.module]
            if len(uses) != 1 or uses[0].input.dim() != 2:
                raise ValueError(
                    f"structure=tridiagonal needs every layer used once for (N, d) inputs:"
                    f" {layer.name!r} is not"
                )
            layer.observe(uses, seen.weights, seen.count)
            assert isinstance(layer.layout, LinearLayout)
            rows.append([layer.layout.rows(uses[0], i) for i in range(len(seen.weights))])
        for index in range(len(self.a_cross)):
            here, there = rows[index], rows[index + 1]
            inputs = here[0][0][:, 0], there[0][0][:, 0]
            count: float = len(inputs[0])
            if weights is not None:
                inputs = weights[:, None].to(inputs[0]) * inputs[0], inputs[1]
                count = float(weights.sum())
            self.a_cross[index].add(inputs[0].mT @ inputs[1], count)
            pairs = zip(seen.weights, here, there, strict=True)
            parts = ((g[:, 0].mT @ after[:, 0]) * weight for weight, (_, g), (_, after) in pairs)
            self.g_cross[index].add(reduce(torch.add, parts), seen.count)

    def pass_over(self, count: float) -> None:
        """Count a part of a batch in which the layers were not used."""
        for average in (*(layer.g for layer in self.layers), *self.g_cross):
            average.pass_over(count)

    def fold(self, decay: float) -> None:
        """Take the joined batch into the running averages."""
        # Own and cross moments of other samples would not belong to one positive matrix.
        self.history.fold(self.factors, decay)

    # --- decomposition ----------------------------------------------------------------------------

    def requests(self, damping: float) -> list[Tensor]:
        """What the inverse is made of: damped own factors A and G, then the cross moments.

        Raises:
            FactorError: After ``max_failures`` batches of NaN or Inf in a row.
        """
        if not self.history.has_statistics():
            return []
        own = [factored_tikhonov(x.a.mean(), x.g.mean(), damping) for x in self.layers]
        cross = [average.mean() for average in (*self.a_cross, *self.g_cross)]
        return [*(a for a, _ in own), *(g for _, g in own), *cross]

    def decompose(self, matrices: Sequence[Tensor]) -> list[Parts | FactorError]:
        """The inverse of requested matrices, as one decomposition; it touches no state."""
        count, rest = len(self.layers), list(matrices)
        a, g, cross = rest[:count], rest[count : 2 * count], rest[2 * count :]
        try:
            inverse = chain_inverse(a, g, cross[: count - 1], cross[count - 1 :])
        except FactorError as error:
            return [error]
        return [tuple(inverse.tensors())]

    def shapes(self) -> list[torch.Size]:
        """Shapes of the tensors that :meth:`decompose` gives."""
        return [tensor.shape for tensor in self.inverse.tensors()]

    def install(self, results: Sequence[Parts]) -> None:
        """Take a new inverse."""
        self.inverse = ChainInverse.from_tensors(results[0], len(self.layers))

    # --- step -------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """F^-1 g with the damping of the refresh, or the gradient before any."""
        if not self.history.ready:
            return {name: gradients[name] for name in self.names}
        matrices = [layer.matrix(gradients) for layer in self.layers]
        steps = self.inverse.apply([matrix.to(self.layers[0].dtype) for matrix in matrices])
        result: dict[str, Tensor] = {}
        for layer, step in zip(self.layers, steps, strict=True):
            result.update(layer.split(step.to(matrices[0].dtype)))
        return result

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All moments, the possibly stale inverse, and what happened so far."""
        return {
            "moments": [average.value for average in self.factors],
            "weights": [average.weight for average in self.factors],
            "inverse": self.inverse.tensors(),
            **self.history.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a checked state; parts of an unfinished batch are dropped."""
        device = self.layers[0].device
        stored = zip(self.factors, state["moments"], state["weights"], strict=True)
        for average, value, weight in stored:
            average.load(value, weight)
        inverse = [tensor.to(device) for tensor in state["inverse"]]
        self.inverse = ChainInverse.from_tensors(inverse, len(self.layers))
        self.history.load(state)
