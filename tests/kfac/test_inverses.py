"""Damped inverses of the blocks against dense inverses, and batched decompositions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, Exact, FactorError, KroneckerBlock
from acktr.kfac.linalg import Inverse, Parts, Request, decompose
from tests.tools.exact import Block, Seen, gap, observed, pairs
from tests.tools.kfac import basis, build, randn, same, seeded
from tests.tools.kfac import scales as scales_of

DAMPING = 0.03
MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "factored": {"structure": "kfac_factored"},
    "factored cholesky": {"structure": "cholesky"},
    "ekfac": {"structure": "ekfac", "stat_decay": 0.3},
}


def nets() -> dict[str, tuple[nn.Sequential, Tensor]]:
    head = (nn.Tanh(), nn.Flatten())
    return {
        "linear": (build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), randn(6, 4)),
        "linear without bias": (
            build(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 4)),
            randn(6, 2, 4),
        ),
        "conv": (build(nn.Conv2d(2, 3, 2), *head, nn.Linear(12, 4)), randn(6, 2, 3, 3)),
        "grouped": (
            build(nn.Conv2d(4, 6, 2, groups=2), *head, nn.Linear(24, 4)),
            randn(6, 4, 3, 3),
        ),
        "depthwise": (
            build(nn.Conv1d(4, 4, 2, groups=4, bias=False), *head, nn.Linear(8, 4)),
            randn(6, 4, 3),
        ),
        "embedding": (
            build(nn.Embedding(7, 3, padding_idx=1), nn.Tanh(), nn.Linear(3, 4)),
            torch.randint(6, (9, 2), generator=seeded(0)),  # the last token never comes
        ),
        "norm": (build(nn.LayerNorm(4), nn.Linear(4, 4)), randn(6, 4)),
    }


def damped(block: Block, mode: str, scales: list[Tensor]) -> list[Tensor]:
    """F + lambda of every group in float64, written out."""
    if not isinstance(block, KroneckerBlock):
        matrix = block.moment.mean().double()
        return [matrix + DAMPING * torch.eye(len(matrix)).double()]
    found = []
    for k, pair in enumerate(pairs(block)):
        a, g = (factor.double() for factor in pair)
        eye_a, eye_g = torch.eye(len(a)).double(), torch.eye(len(g)).double()
        if mode.startswith("factored"):
            pi = math.sqrt(float((a.trace() / len(a)) / (g.trace() / len(g))))
            root = math.sqrt(DAMPING)
            found.append(torch.kron(g + root / pi * eye_g, a + root * pi * eye_a))
        elif mode == "exact":
            found.append(torch.kron(g, a) + DAMPING * torch.kron(eye_g, eye_a))
        else:
            _, a_vectors, _, g_vectors = basis(block)
            q_a = eye_a if a_vectors is None else a_vectors.double().reshape(-1, *a.shape)[k]
            q = torch.kron(g_vectors.double().reshape(-1, *g.shape)[k], q_a)
            size = torch.kron(eye_g, eye_a)
            found.append(q @ scales[k].double().flatten().diag() @ q.mT + DAMPING * size)
    return found


def flat(block: Block, tensors: dict[str, Tensor]) -> Tensor:
    if isinstance(block, KroneckerBlock):
        return block.layer.matrix(tensors).flatten()
    return torch.cat([tensors[name].flatten() for name in block.names])


def random_gradients(seen: Seen) -> dict[str, Tensor]:
    named = seen.curvature.named
    return {n: randn(*p.shape, seed=50 + i).to(p.dtype) for i, (n, p) in enumerate(named.items())}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("net", nets())
def test_the_direction_is_that_of_the_dense_inverse(
    net: str, mode: str, dtype: torch.dtype, limit: float
) -> None:
    model, inputs = nets()[net]
    model.to(dtype)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    seen = observed(model, inputs, CategoricalLoss(), damping=DAMPING, **MODES[mode])
    seen.curvature.refresh()
    seen.again(Exact())  # for EKFAC, whose scales now differ from the products of eigenvalues
    if mode != "ekfac":
        seen.curvature.refresh()
    gradients = random_gradients(seen)
    step = seen.curvature.direction(gradients)
    for name, block in seen.curvature.stats.items():
        scales = []
        if mode == "ekfac" and isinstance(block, KroneckerBlock):
            mean = scales_of(block)
            scales = list(mean) if mean.dim() == 3 else [mean]
        matrices = damped(block, mode, scales)
        wanted = torch.linalg.solve(torch.block_diag(*matrices), flat(block, gradients).double())
        assert step[block.names[0]].dtype == dtype
        assert gap(flat(block, step).double(), wanted) < limit, name
        assert gap(flat(block, gradients).double() / DAMPING, wanted) > 0.01  # it is no SGD step


@pytest.mark.parametrize("net", ["linear", "conv", "grouped", "embedding"])
def test_the_three_inverses_differ_from_each_other_but_not_from_cholesky(net: str) -> None:
    model, inputs = nets()[net]
    steps = {}
    for mode, settings in MODES.items():
        seen = observed(model, inputs, CategoricalLoss(), damping=DAMPING, **settings)
        seen.curvature.refresh()
        seen.again()
        step = seen.curvature.direction(random_gradients(seen))
        steps[mode] = torch.cat([step[name].flatten() for name in sorted(step)])
    assert gap(steps["factored cholesky"], steps["factored"]) < 1e-10
    assert gap(steps["factored"], steps["exact"]) > 0.01
    assert gap(steps["ekfac"], steps["exact"]) > 0.01


# --- batched decompositions -----------------------------------------------------------------------


def requests(method: Inverse, dtype: torch.dtype) -> list[Request]:
    """Factors of several sizes, most of them more than once, with stacks and diagonals between."""
    found: list[Request] = []
    for index, shape in enumerate(
        [(5, 5), (3, 3), (5, 5), (2, 4, 4), (6,), (5, 5), (2, 4, 4), (1, 1), (1, 1), (3, 3), (6,)]
    ):
        rows = randn(*shape, seed=index)
        if len(shape) == 1:
            found.append((rows.abs().add(0.1).to(dtype), method))
            continue
        matrix = rows @ rows.mT + (0.1 if method == "cholesky" else 0.0) * torch.eye(shape[-1])
        found.append((matrix.to(dtype), method))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["eigen", "cholesky"])
def test_batched_decompositions_equal_single_ones_bit_for_bit(
    method: Inverse, dtype: torch.dtype
) -> None:
    batch = requests(method, dtype)
    together = decompose(batch)
    for request, found in zip(batch, together, strict=True):
        (alone,) = decompose([request])
        assert same(found, alone)
        assert isinstance(found, tuple)
        matrix = request[0].double()
        tolerance = 1e-3 if dtype == torch.float32 else 1e-10
        full = matrix.diag() if matrix.dim() == 1 else matrix
        torch.testing.assert_close(rebuilt(found, method), full, rtol=tolerance, atol=tolerance)
        assert all(part.dtype == dtype and part.is_contiguous() for part in found)


def rebuilt(parts: Parts, method: Inverse) -> Tensor:
    """The matrix that was decomposed."""
    wide = [part.double() for part in parts]
    if method == "cholesky":
        return (1 / wide[0]).diag() if wide[0].dim() == 1 else torch.linalg.inv(wide[0])
    if len(wide) == 1:
        return wide[0].diag()
    return wide[1] @ torch.diag_embed(wide[0]) @ wide[1].mT


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["eigen", "cholesky"])
@pytest.mark.parametrize("place", [0, 2, 3, 4])
def test_a_bad_factor_in_a_batch_spoils_no_other(place: int, method: Inverse, bad: float) -> None:
    batch = requests(method, torch.float64)
    clean = decompose(batch)
    broken = batch[place][0].clone()
    broken[..., -1] = bad
    batch[place] = (broken, method)
    found = decompose(batch)
    assert isinstance(found[place], FactorError)
    for index, (now, before) in enumerate(zip(found, clean, strict=True)):
        if index != place:
            assert same(now, before)


def test_an_indefinite_factor_in_a_batch_spoils_no_other() -> None:
    batch = requests("cholesky", torch.float64)
    clean = decompose(batch)
    batch[2] = (-torch.eye(5).double(), "cholesky")
    found = decompose(batch)
    assert isinstance(found[2], FactorError)
    assert "not positive definite" in str(found[2])
    for index in (0, 1, 3, 5, 9):
        assert same(found[index], clean[index])


def test_equal_sizes_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh
    shapes: list[tuple[int, ...]] = []

    def eigh(matrix: Tensor) -> Any:
        shapes.append(tuple(matrix.shape))
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    decompose(requests("eigen", torch.float64))
    assert sorted(shapes) == [(2, 1, 1), (2, 2, 4, 4), (2, 3, 3), (3, 5, 5)]


def test_a_refresh_with_one_bad_block_renews_the_others() -> None:
    model = build(*[nn.Linear(4, 4) for _ in range(3)])
    seen = observed(model, randn(6, 4), CategoricalLoss())
    seen.curvature.refresh()
    kept = [basis_of(seen.layer(name)) for name in "012"]
    seen.inputs = randn(6, 4, seed=9)
    seen.again()
    middle = seen.layer("1")
    middle.a.value[0, 0] = math.nan
    seen.curvature.refresh()
    assert seen.curvature.failures == 1
    now = [basis_of(seen.layer(name)) for name in "012"]
    assert [same(a, b) for a, b in zip(now, kept, strict=True)] == [False, True, False]


def basis_of(layer: KroneckerBlock) -> list[Tensor]:
    return [part.clone() for part in basis(layer) if part is not None]
