"""Curvature matrices against matrices written out and against the steps taken."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    FactorError,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    UnsupportedParameterWarning,
)
from acktr.kfac.dense import (
    curved_names,
    dense_inverse,
    dense_kfac,
    kfac_error,
    relative_error,
)
from acktr.kfac.fisher.flat import flattened, unflattened
from tests.tools.kfac import build, mlp, parameters, plain_config, randn, set_gradients
from tests.tools.product_cases import Case, LogStd, close, filled, joined, written_out

KINDS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "factored": {"structure": "kfac_factored"},
    "cholesky": {"structure": "cholesky"},
    "ekfac": {"structure": "ekfac"},
    "tridiagonal": {"structure": "tridiagonal"},
}


def learnt(
    model: nn.Module, inputs: Tensor, loss: OutputLoss[Any], **settings: Any
) -> Preconditioner:
    """A curvature whose statistics are exact and whose decompositions are those of them."""
    known = settings.pop("known_fisher", None)
    config = plain_config(**({"damping": 0.02, "stat_decay": 0.0} | settings))
    curvature = Preconditioner(model, config, known_fisher=known)
    for turn in range(2):
        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss, source=Exact())
        if turn == 0 or config.structure != "ekfac":  # whose second turn counts in this basis
            curvature.refresh()
    return curvature


def three_layers() -> nn.Sequential:
    return build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


class Mixed(nn.Module):
    """A grouped convolution, an embedding, a normalisation and parameters outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.table = nn.Embedding(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0, 0] > 0).long()
        hidden = self.norm(self.conv(x).mean(2) + self.table(tokens)).tanh()
        output: Tensor = self.head(hidden) * self.scale
        return output


# --- flat vectors ---------------------------------------------------------------------------------


def test_flat_vectors_and_back() -> None:
    model = mlp()
    named = parameters(model)
    flat = flattened(named, list(named))
    close(flat, joined(named))
    back = unflattened(flat, list(named), model)
    assert all(torch.equal(back[name], named[name]) for name in named)
    with pytest.raises(ValueError, match=r"must be of shape \(43,\), got \(42,\)"):
        unflattened(flat[1:], list(named), model)
    with pytest.raises(ValueError, match=r"needs a tensor for 9\.weight"):
        flattened(named, ["9.weight"])
    with pytest.raises(ValueError, match=r"no parameter '9\.weight'"):
        unflattened(flat, ["9.weight"], model)


# --- the approximation ----------------------------------------------------------------------------


def test_one_sample_and_one_layer_give_the_exact_matrix() -> None:
    """Where the Kronecker form is exact the two matrices agree entry by entry, biases included."""
    model = build(nn.Linear(4, 3))
    case = Case(model, randn(1, 4, seed=1), CategoricalLoss())
    curvature = learnt(case.model, case.inputs, case.loss)
    close(dense_kfac(curvature), written_out(case))
    error = kfac_error(curvature)
    assert error.whole < 1e-12
    assert error.diagonal < 1e-12
    assert list(error.blocks) == ["0.weight"]


def test_one_sample_gives_exact_diagonal_blocks_and_nothing_beside_them() -> None:
    case = Case(three_layers(), randn(1, 3, seed=1), GaussianLoss(std=0.5))
    found = dense_kfac(learnt(case.model, case.inputs, case.loss))
    exact = written_out(case)
    layer = torch.tensor([0] * 16 + [1] * 15 + [2] * 8)
    mask = (layer[:, None] == layer).double()
    close(found, exact * mask)
    assert (exact * (1 - mask)).abs().max() > 0.01


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_inverse_is_what_direction_applies(kind: str) -> None:
    model = three_layers()
    curvature = learnt(model, randn(40, 3, seed=2), GaussianLoss(), **KINDS[kind])
    named = set_gradients(model)
    before = dict(curvature.seconds)
    inverse = dense_inverse(curvature)
    assert curvature.seconds == before
    names = curved_names(curvature)
    close(inverse @ flattened(named, names), flattened(curvature.direction(named), names))
    off = inverse[:16, 16:31].abs().max()
    assert (off > 1e-3) if kind == "tridiagonal" else (off == 0)
    assert inverse[:16, 31:].abs().max() == 0


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_damped_matrix_is_the_inverse_of_the_inverse(kind: str) -> None:
    model = three_layers()
    settings = {**KINDS[kind], "weight_decay": 0.03}
    curvature = learnt(model, randn(40, 3, seed=2), GaussianLoss(), **settings)
    product = dense_kfac(curvature, damped=True) @ dense_inverse(curvature)
    close(product, torch.eye(len(product), dtype=torch.float64))
    bare = dense_kfac(curvature) @ dense_inverse(curvature)
    assert relative_error(bare, product) > 0.01


@pytest.mark.parametrize("kind", ["kfac", "factored", "ekfac"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_every_kind_of_block_has_its_place(kind: str, diagonal: bool) -> None:
    model = filled(Mixed())
    small = "diagonal" if diagonal else "dense"
    curvature = learnt(
        model,
        randn(30, 4, 3, seed=2),
        GaussianLoss(),
        small_parameters=small,
        known_fisher={"log_std": 2.0},
        **KINDS[kind],
    )
    matrix, inverse = dense_kfac(curvature, damped=True), dense_inverse(curvature)
    names = curved_names(curvature)
    assert names == [name for name, _ in model.named_parameters()]
    close(matrix @ inverse, torch.eye(len(matrix), dtype=torch.float64))
    named = set_gradients(model)
    close(inverse @ flattened(named, names), flattened(curvature.direction(named), names))
    sizes = [p.numel() for p in model.parameters()]
    start = sum(sizes[: names.index("log_std")])
    corner = dense_kfac(curvature)[start : start + 3, start : start + 3]
    close(corner, 2 * torch.eye(3, dtype=torch.float64))
    error = kfac_error(curvature)
    vectors = ["norm.weight"] if diagonal else ["norm.weight", "scale"]
    assert all(error.blocks[name] < 1e-12 for name in vectors)
    assert error.blocks["conv.weight"] > 0.01


def test_parameters_without_curvature_are_left_out() -> None:
    model = filled(LogStd())
    with pytest.warns(UnsupportedParameterWarning):
        curvature = Preconditioner(model, plain_config(small_parameters="gradient"))
    assert curved_names(curvature) == ["mean.weight", "mean.bias", "value.weight", "value.bias"]
    assert dense_inverse(curvature).shape == (15, 15)
    lone = nn.Module()
    lone.weight = nn.Parameter(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = Preconditioner(lone, plain_config(small_parameters="gradient"))
    with pytest.raises(ValueError, match="no parameter of the module has a curvature block"):
        dense_inverse(plain)


def test_groups_of_an_optimizer_bring_their_own_weight_decay() -> None:
    model = mlp()
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters()), "weight_decay": 0.5},
        {"params": list(model[2].parameters())},
    ]
    optimizer = KFAC(model, plain_config(damping=0.1), param_groups=groups)
    with optimizer.capture() as captured:
        output = model(randn(20, 4))
    optimizer.observe(captured, output, GaussianLoss(), source=Exact())
    optimizer.refresh()
    difference = dense_kfac(optimizer, damped=True) - dense_kfac(optimizer)
    close(difference, torch.tensor([0.6] * 25 + [0.1] * 18, dtype=torch.float64).diag())
    product = dense_kfac(optimizer, damped=True) @ dense_inverse(optimizer)
    close(product, torch.eye(43, dtype=torch.float64))
    some = KFAC(model, plain_config(damping=0.1), param_groups=groups[1:])
    assert curved_names(some) == ["2.weight", "2.bias"]
    assert dense_inverse(some).shape == (18, 18)


# --- errors ---------------------------------------------------------------------------------------


def test_errors_are_those_of_matrices_written_out() -> None:
    case = Case(three_layers(), randn(30, 3, seed=3), CategoricalLoss())
    curvature = learnt(case.model, case.inputs, case.loss)
    exact, found = written_out(case), dense_kfac(curvature)
    ends = {"0.weight": (0, 16), "2.weight": (16, 31), "4.weight": (31, 39)}
    error = kfac_error(curvature)
    squares = [0.0, 0.0]
    for name, (start, end) in ends.items():
        mine, right = found[start:end, start:end], exact[start:end, start:end]
        wrong, size = (mine - right).square().sum(), right.square().sum()
        assert error.blocks[name] == pytest.approx(float((wrong / size).sqrt()), rel=1e-9)
        squares = [squares[0] + float(wrong), squares[1] + float(size)]
    assert error.diagonal == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-9)
    assert error.whole == pytest.approx(float((found - exact).norm() / exact.norm()), rel=1e-9)
    assert error.whole > error.diagonal > 0.01
    eye = 0.02 * torch.eye(39, dtype=torch.float64)
    wanted = float((found - exact).norm() / (exact + eye).norm())
    assert kfac_error(curvature, damped=True).whole == pytest.approx(wanted, rel=1e-9)
    other = kfac_error(curvature, (randn(5, 3, seed=4),), case.loss)
    assert other.whole != pytest.approx(error.whole, rel=1e-3)


def test_the_error_is_that_of_the_output_that_was_observed() -> None:
    class Pair(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            output = self.net(x)
            return {"logits": output, "norm": output.square().sum()}

    model, inputs = three_layers(), randn(30, 3)
    alone = kfac_error(learnt(model, inputs, CategoricalLoss()))
    pair = Pair(model)
    curvature = Preconditioner(pair, plain_config())
    with curvature.capture() as captured:
        output = pair(inputs)
    curvature.observe(captured, output["logits"], CategoricalLoss(), source=Exact())
    assert kfac_error(curvature).whole == pytest.approx(alone.whole, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_corrected_eigenvalues_are_closer_to_every_exact_block(seed: int) -> None:
    model, inputs = three_layers(), randn(30, 3, seed=seed)
    plain = kfac_error(learnt(model, inputs, CategoricalLoss()))
    corrected = kfac_error(learnt(model, inputs, CategoricalLoss(), structure="ekfac"))
    assert all(corrected.blocks[name] < plain.blocks[name] for name in plain.blocks)
    assert corrected.whole < plain.whole


def test_chain_of_a_linear_net_is_closer_than_the_block_diagonal() -> None:
    """Two linear layers and one sample: cross blocks G_ij (x) A_ij are exact as well."""
    model = build(nn.Linear(3, 2), nn.Linear(2, 4))
    inputs, loss = randn(1, 3, seed=1), GaussianLoss()
    errors = {
        structure: kfac_error(
            learnt(model, inputs, loss, structure=structure, damping=1e-12), damped=True
        ).whole
        for structure in ("tridiagonal", "kfac_factored")
    }
    assert errors["tridiagonal"] < 1e-5
    assert errors["kfac_factored"] > 0.1


def test_zero_curvature_counts_as_exact_or_as_infinitely_wrong() -> None:
    zero, one = torch.zeros(2, 2), torch.eye(2)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == float("inf")
    assert relative_error(zero, one) == 1


def test_matrices_need_statistics() -> None:
    model = mlp()
    with pytest.raises(FactorError, match="no statistics yet"):
        dense_kfac(Preconditioner(model))
    curvature = Preconditioner(model, plain_config(structure="ekfac"))
    with pytest.raises(ValueError, match="both args and loss, or neither after an observe"):
        kfac_error(curvature)
    with pytest.raises(ValueError, match="both args and loss"):
        kfac_error(curvature, (randn(3, 4),))
    with curvature.capture() as captured:
        output = model(randn(3, 4))
    curvature.observe(captured, output, GaussianLoss())
    with pytest.raises(ValueError, match=r"EKFAC layer '0' has no eigenbasis yet: refresh\(\)"):
        dense_kfac(curvature)
    close(dense_inverse(curvature), torch.eye(43, dtype=torch.float64))
