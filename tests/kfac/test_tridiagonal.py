"""The block-tridiagonal inverse against dense linear algebra and exact Fisher matrices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.func import jacrev

from acktr.kfac.blocks.tridiagonal import (
    ChainInverse,
    chain_inverse,
    chain_matrix,
    eigenvalue_floor,
)
from acktr.kfac.linalg import FactorError

WIDTHS = {1: [(3, 4)], 2: [(3, 2), (2, 4)], 3: [(2, 4), (3, 3), (1, 4)]}
WIDTHS[4] = [(3, 2), (2, 4), (4, 3), (2, 5)]
F64 = torch.float64


@dataclass
class Factors:
    a: list[Tensor]
    g: list[Tensor]
    a_cross: list[Tensor]
    g_cross: list[Tensor]

    def args(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        return self.a, self.g, self.a_cross, self.g_cross

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(*([matrix.to(dtype) for matrix in group] for group in self.args()))


def moments(vectors: Sequence[Tensor], damping: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    """Own (damped) and neighbouring second moments of samples (N, d_i)."""
    own = [v.mT @ v / len(v) + damping * torch.eye(v.shape[1], dtype=v.dtype) for v in vectors]
    cross = [v.mT @ w / len(v) for v, w in itertools.pairwise(vectors)]
    return own, cross


def random_factors(shapes: list[tuple[int, int]], seed: int = 0, damping: float = 0.0) -> Factors:
    """Moments of correlated samples of the concatenated inputs, and of the gradients."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for sizes in ([width for _, width in shapes], [out for out, _ in shapes]):
        total = sum(sizes)
        mix = torch.randn(total, total, generator=generator, dtype=F64)
        samples = torch.randn(3 * total, total, generator=generator, dtype=F64) @ mix
        sides.append(moments(split(samples, sizes, 1), damping))
    (a, a_cross), (g, g_cross) = sides
    return Factors(a, g, a_cross, g_cross)


def random_matrices(shapes: list[tuple[int, int]], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


def split(matrix: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
    ends = list(itertools.accumulate(sizes))
    return [matrix.narrow(dim, end - size, size) for end, size in zip(ends, sizes, strict=True)]


def flat(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.flatten() for matrix in matrices])


def block(matrix: Tensor, shapes: list[tuple[int, int]], i: int, j: int) -> Tensor:
    sizes = [out * width for out, width in shapes]
    return split(split(matrix, sizes, 0)[i], sizes, 1)[j]


def close(actual: Tensor, expected: Tensor, tol: float = 1e-9) -> None:
    """Largest error relative to the largest entry."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < tol, error


def dense_inverse(inverse: ChainInverse, shapes: list[tuple[int, int]]) -> Tensor:
    """The inverse column by column."""
    sizes = [rows * columns for rows, columns in shapes]
    found = []
    for unit in torch.eye(sum(sizes), dtype=F64):
        parts = zip(torch.split(unit, sizes), shapes, strict=True)
        found.append(flat(inverse.apply([part.reshape(shape) for part, shape in parts])))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_apply_is_the_dense_inverse(layers: int, seed: int) -> None:
    shapes = WIDTHS[layers]
    factors = random_factors(shapes, seed)
    dense = chain_matrix(*factors.args())
    assert torch.linalg.eigvalsh(dense)[0] > 0
    inverse = chain_inverse(*factors.args())
    matrices = random_matrices(shapes)
    close(flat(inverse.apply(matrices)), torch.linalg.solve(dense, flat(matrices)))
    close(dense_inverse(inverse, shapes), torch.linalg.inv(dense))
    close(dense @ flat(inverse.apply(matrices)), flat(matrices))


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_tridiagonal_blocks_and_inverse_define_the_matrix(layers: int) -> None:
    shapes = WIDTHS[layers]
    factors = random_factors(shapes)
    dense = chain_matrix(*factors.args())
    inverse = dense_inverse(chain_inverse(*factors.args()), shapes)
    solved = torch.linalg.inv(dense)
    close(dense, dense.mT, 1e-14)
    for i in range(layers):
        assert torch.equal(block(dense, shapes, i, i), torch.kron(factors.g[i], factors.a[i]))
        if i + 1 < layers:
            cross = torch.kron(factors.g_cross[i], factors.a_cross[i])
            assert torch.equal(block(dense, shapes, i, i + 1), cross)
            assert block(inverse, shapes, i, i + 1).abs().max() > 1e-3
        for j in range(i + 2, layers):
            assert block(inverse, shapes, i, j).count_nonzero() == 0
            assert block(inverse, shapes, j, i).count_nonzero() == 0
            assert block(solved, shapes, i, j).abs().max() < 1e-9 * solved.abs().max()
            assert block(dense, shapes, i, j).abs().max() > 1e-3


def test_without_cross_moments_it_is_the_block_diagonal_inverse() -> None:
    shapes = WIDTHS[3]
    factors = random_factors(shapes)
    zero_a = [torch.zeros_like(matrix) for matrix in factors.a_cross]
    zero_g = [torch.zeros_like(matrix) for matrix in factors.g_cross]
    matrices = random_matrices(shapes)
    expected = [
        torch.linalg.solve(g, torch.linalg.solve(a, matrix.mT).mT)
        for a, g, matrix in zip(factors.a, factors.g, matrices, strict=True)
    ]
    # One side without correlation is enough: the product of the two is what counts.
    for a_cross, g_cross in ((zero_a, zero_g), (zero_a, factors.g_cross)):
        result = chain_inverse(factors.a, factors.g, a_cross, g_cross).apply(matrices)
        for actual, right in zip(result, expected, strict=True):
            close(actual, right)


def linear_net(sizes: list[int], samples: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs and output gradients of a deep linear net with unit Gaussian output, and its Fisher.

    Weights are (out, in + 1), the last column the bias. The Fisher is J^T J averaged over the
    samples, J = d output / d weights by automatic differentiation. Gradients are those of the
    out pseudo-targets y = mean + sqrt(out) e_k, whose second moment is that of the Gaussian; they
    do not depend on the input.
    """
    generator = torch.Generator().manual_seed(3)
    shapes = [(out, width + 1) for width, out in itertools.pairwise(sizes)]
    weights = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    x = torch.randn(samples, sizes[0], generator=generator, dtype=F64)
    ones = x.new_ones(samples, 1)

    def forward(*parameters: Tensor) -> Tensor:
        out = x
        for weight in parameters:
            out = torch.cat([out, ones], dim=1) @ weight.mT
        return out

    jacobians = jacrev(forward, argnums=tuple(range(len(weights))))(*weights)
    rows = torch.cat([j.reshape(samples * sizes[-1], -1) for j in jacobians], dim=1)
    inputs = [torch.cat([x, ones], dim=1)]
    for weight in weights[:-1]:
        inputs.append(torch.cat([inputs[-1] @ weight.mT, ones], dim=1))
    gradients = [torch.eye(sizes[-1], dtype=F64) * sizes[-1] ** 0.5]
    for weight in reversed(weights[1:]):
        gradients.insert(0, gradients[0] @ weight[:, :-1])
    return inputs, gradients, rows.mT @ rows / samples


def test_matrix_is_the_exact_fisher_of_an_invertible_linear_net() -> None:
    # Inputs are maps of one another and independent of the gradients, so the chain loses nothing.
    inputs, gradients, fisher = linear_net([3, 3, 3, 3], samples=7)
    a, a_cross = moments(inputs)
    g, g_cross = moments(gradients)
    close(chain_matrix(a, g, a_cross, g_cross), fisher)


@pytest.mark.parametrize("samples", [1, 6])
def test_step_solves_the_damped_fisher_of_two_linear_layers(samples: int) -> None:
    inputs, gradients, fisher = linear_net([3, 2, 4], samples)
    shapes = [(2, 4), (4, 3)]
    bare_a, _ = moments(inputs)
    bare_g, _ = moments(gradients)
    a, a_cross = moments(inputs, damping=0.1)
    g, g_cross = moments(gradients, damping=0.2)
    damped = fisher.clone()
    for i in range(2):
        extra = torch.kron(g[i], a[i]) - torch.kron(bare_g[i], bare_a[i])
        block(damped, shapes, i, i).add_(extra)
    matrices = random_matrices(shapes)
    step = chain_inverse(a, g, a_cross, g_cross).apply(matrices)
    close(damped @ flat(step), flat(matrices))


@pytest.mark.parametrize("layers", [2, 4])
def test_float32_agrees_with_float64(layers: int) -> None:
    shapes = WIDTHS[layers]
    factors = random_factors(shapes, damping=0.1)
    matrices = random_matrices(shapes)
    wide = chain_inverse(*factors.args()).apply(matrices)
    narrow = chain_inverse(*factors.to(torch.float32).args()).apply([m.float() for m in matrices])
    assert all(matrix.dtype == torch.float32 for matrix in narrow)
    close(flat(narrow).double(), flat(wide), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sample_needs_damping(dtype: torch.dtype) -> None:
    shapes = WIDTHS[3]
    generator = torch.Generator().manual_seed(5)
    a_rows = [torch.randn(1, width, generator=generator, dtype=dtype) for _, width in shapes]
    g_rows = [torch.randn(1, out, generator=generator, dtype=dtype) for out, _ in shapes]
    (a, a_cross), (g, g_cross) = moments(a_rows), moments(g_rows)
    with pytest.raises(FactorError, match="A_0 is not positive definite"):
        chain_inverse(a, g, a_cross, g_cross)
    (a, a_cross), (g, g_cross) = moments(a_rows, 0.05), moments(g_rows, 0.05)
    matrices = [matrix.to(dtype) for matrix in random_matrices(shapes)]
    step = flat(chain_inverse(a, g, a_cross, g_cross).apply(matrices))
    dense = chain_matrix(*Factors(a, g, a_cross, g_cross).to(F64).args())
    expected = torch.linalg.solve(dense, flat(matrices).double())
    close(step.double(), expected, 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_correlations_of_one_and_more_are_clamped(dtype: torch.dtype, factor: float) -> None:
    """Equal vectors in all layers have s = 1 (the Fisher is singular); factor > 1 is nonsense."""
    shapes = [(2, 3)] * 3
    one = random_factors([(2, 3)]).to(dtype)
    a, g = one.a * 3, one.g * 3
    inverse = chain_inverse(a, g, [factor * a[0]] * 2, [factor * g[0]] * 2)
    largest = max(float(gain.max()) for _, _, gain in inverse.layers)
    assert largest <= 1.001 / eigenvalue_floor(dtype)
    if factor > 1:
        assert largest > 0.999 / eigenvalue_floor(dtype)
    for seed in range(3):
        matrices = [matrix.to(dtype) for matrix in random_matrices(shapes, seed)]
        step = flat(inverse.apply(matrices))
        assert torch.isfinite(step).all()
        assert flat(matrices) @ step > 0


def test_scales_of_factors_do_not_matter() -> None:
    """Tiny gradients and large inputs: F-hat scales by the product, the inverse by its inverse."""
    shapes = WIDTHS[3]
    factors = random_factors(shapes, damping=0.1)
    matrices = random_matrices(shapes)
    small = Factors(
        [1e8 * m for m in factors.a],
        [1e-12 * m for m in factors.g],
        [1e8 * m for m in factors.a_cross],
        [1e-12 * m for m in factors.g_cross],
    )
    expected = 1e4 * flat(chain_inverse(*factors.args()).apply(matrices))
    close(flat(chain_inverse(*small.args()).apply(matrices)), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", range(4))
def test_entries_that_are_not_finite_are_refused(group: int, bad: float) -> None:
    factors = random_factors(WIDTHS[3])
    factors.args()[group][1][0, 0] = bad
    name = ["A_1", "G_1", "A_1,2", "G_1,2"][group]
    for function in (chain_inverse, chain_matrix):
        with pytest.raises(FactorError, match=f"factor {name} has NaN or Inf"):
            function(*factors.args())


@pytest.mark.parametrize("group", [0, 1])
def test_factors_that_are_not_positive_definite_are_refused(group: int) -> None:
    for broken in (torch.zeros(3, 3), torch.diag(torch.tensor([1.0, -1.0, 1.0]))):
        factors = random_factors([(3, 3)] * 3)
        factors.args()[group][1] = broken.to(F64)
        with pytest.raises(FactorError, match=f"{'AG'[group]}_1 is not positive definite"):
            chain_inverse(*factors.args())
    factors.args()[group][1] = torch.zeros(3, 3, dtype=F64)
    with pytest.raises(FactorError, match="own factor 1 is singular"):
        chain_matrix(*factors.args())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_factors_may_be_badly_conditioned_up_to_rounding(dtype: torch.dtype) -> None:
    g, matrix = torch.eye(2, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    a = torch.ones(3, dtype=dtype)
    a[1] = 20 * torch.finfo(dtype).eps
    (step,) = chain_inverse([a.diag()], [g], [], []).apply([matrix])
    close(step, matrix / a, 1e-6)
    a[1] /= 4
    with pytest.raises(FactorError, match="A_0 is not positive definite"):
        chain_inverse([a.diag()], [g], [], [])


def test_overflow_is_refused() -> None:
    factors = random_factors(WIDTHS[2]).to(torch.float32)
    factors.a_cross[0] = factors.a_cross[0] * 1e30
    with pytest.raises(FactorError, match="factor A_0,1: factor has NaN or Inf"):
        chain_inverse(*factors.args())
    factors.g[1] = torch.full_like(factors.g[1], 3e38)
    with pytest.raises(FactorError, match="factor G_1: factor has NaN or Inf"):
        chain_inverse(factors.a, factors.g, [0 * factors.a_cross[0]], factors.g_cross)
    eye = torch.eye(2, dtype=F64)
    with pytest.raises(FactorError, match="inverse of the chain has NaN or Inf"):
        chain_inverse([1e300 * eye, 1e-305 * eye], [eye, eye], [1e5 * eye], [eye])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_state_round_trip_is_bit_exact(layers: int, dtype: torch.dtype) -> None:
    shapes = WIDTHS[layers]
    inverse = chain_inverse(*random_factors(shapes).to(dtype).args())
    tensors = inverse.tensors()
    assert len(tensors) == 5 * layers - 2
    assert all(tensor.is_contiguous() for tensor in tensors)
    stored = load(save({str(i): t for i, t in enumerate(tensors)}))
    restored = ChainInverse.from_tensors([stored[str(i)] for i in range(len(stored))], layers)
    matrices = [matrix.to(dtype) for matrix in random_matrices(shapes)]
    for first, second in zip(inverse.apply(matrices), restored.apply(matrices), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(tensors, restored.tensors(), strict=True):
        assert torch.equal(first, second)


def test_apply_takes_nothing_from_the_host() -> None:
    """On the meta device there are no values to read: any synchronisation would raise."""
    shapes = WIDTHS[4]
    inverse = chain_inverse(*random_factors(shapes).args())
    meta = [tensor.to("meta") for tensor in inverse.tensors()]
    result = ChainInverse.from_tensors(meta, len(shapes)).apply(
        [m.to("meta") for m in random_matrices(shapes)]
    )
    assert [tuple(matrix.shape) for matrix in result] == shapes
