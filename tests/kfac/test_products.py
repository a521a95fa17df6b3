"""Exact Fisher products against matrices written out by other means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call

from acktr.kfac.fisher.products import (
    dense_fisher,
    fisher_gram,
    fisher_vector_product,
    inner_products,
    output_tangents,
)
from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    OutputLoss,
    Reduction,
)
from tests.tools.kfac import build, mlp, randn
from tests.tools.product_cases import LogStd, cases, close, directions, filled, joined, written_out

NAMES = list(cases("mean"))
REDUCTIONS: tuple[Reduction, ...] = ("mean", "batchmean", "sum")


# --- the Fisher matrix ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_products_equal_the_matrix_written_out(name: str, reduction: Reduction) -> None:
    case = cases(reduction)[name]
    fisher = written_out(case)
    args = (case.inputs,)
    assert float(fisher.abs().max()) > 0.05
    close(dense_fisher(case.model, args, case.loss), fisher)
    matrix, vectors = directions(case.model, 3)
    gram = fisher_gram(case.model, args, case.loss, vectors)
    close(gram, matrix @ fisher @ matrix.mT)
    assert torch.equal(gram, gram.mT)
    product = fisher_vector_product(case.model, args, case.loss, vectors[0])
    assert list(product) == [n for n, _ in case.model.named_parameters()]
    close(joined(product), fisher @ matrix[0])


def test_a_value_computed_by_hand() -> None:
    # z = w x with x = 1, 2, 3 and std = 2: F = (1/3) (1 + 4 + 9) / 4.
    model = build(nn.Linear(1, 1, bias=False))
    args = (torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64),)
    loss = GaussianLoss(std=2.0)
    expected = 14 / 12
    direction = {"0.weight": torch.tensor([[3.0]], dtype=torch.float64)}
    assert float(dense_fisher(model, args, loss)) == pytest.approx(expected, rel=1e-14)
    assert float(fisher_gram(model, args, loss, [direction])) == pytest.approx(9 * expected)
    product = fisher_vector_product(model, args, loss, direction)
    assert float(product["0.weight"]) == pytest.approx(3 * expected)


def objective_of(model: nn.Module, names: Sequence[str], call: Callable[[Any], Tensor]) -> Tensor:
    """Hessian of an objective in some parameters."""
    values = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [values[n].numel() for n in names]

    def function(flat: Tensor) -> Tensor:
        parts = zip(names, torch.split(flat, sizes), strict=True)
        chosen = {n: part.reshape(values[n].shape) for n, part in parts}
        return call({**values, **chosen})

    start = torch.cat([values[n].flatten() for n in names])
    result: Tensor = functional.hessian(function, start)  # type: ignore[no-untyped-call]
    return result


CLASSES = torch.tensor([0, 2, 1, 1, 0])
REAL_TARGETS: list[tuple[OutputLoss[Any], Tensor]] = [
    (GaussianLoss(std=0.7), randn(5, 3, seed=8)),
    (CategoricalLoss(), CLASSES),
    (BernoulliLoss(reduction="batchmean"), randn(5, 3, seed=9).sigmoid()),
]


@pytest.mark.parametrize(("loss", "targets"), REAL_TARGETS, ids=["mse", "ce", "bce"])
def test_fisher_of_a_linear_model_is_its_hessian(loss: OutputLoss[Any], targets: Tensor) -> None:
    model, inputs = build(nn.Linear(4, 3)), randn(5, 4, seed=1)
    names = ["0.weight", "0.bias"]
    true = objective_of(
        model, names, lambda values: loss(functional_call(model, values, (inputs,)), targets)
    )
    close(dense_fisher(model, (inputs,), loss), true)


@pytest.mark.parametrize(("loss", "targets"), REAL_TARGETS, ids=["mse", "ce", "bce"])
def test_blocks_of_a_piecewise_linear_net_are_its_hessian(
    loss: OutputLoss[Any], targets: Tensor
) -> None:
    model = build(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), seed=2)
    inputs = randn(5, 4, seed=1)
    args = (inputs,)

    def call(values: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(model, values, args), targets)

    for layer in ("0", "2", "4"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        true = objective_of(model, names, call)
        assert float(true.abs().max()) > 1e-3
        close(dense_fisher(model, args, loss, names), true)
    both = ["2.weight", "4.weight"]
    difference = dense_fisher(model, args, loss, both) - objective_of(model, both, call)
    assert float(difference.abs().max()) > 1e-3  # across layers the two are different matrices


# --- names ----------------------------------------------------------------------------------------


def test_names_that_are_missing_are_zero() -> None:
    model, args, loss = mlp(), (randn(5, 4),), CategoricalLoss()
    matrix, (full,) = directions(model, 1)
    partial = {name: full[name] for name in ("2.bias", "0.weight")}
    padded = {n: full[n] if n in partial else torch.zeros_like(full[n]) for n in full}
    fisher = dense_fisher(model, args, loss)
    row = joined(padded)
    gram = fisher_gram(model, args, loss, [partial, {}, full])
    expected = torch.stack([row, torch.zeros_like(row), matrix[0]])
    close(gram, expected @ fisher @ expected.mT)
    product = fisher_vector_product(model, args, loss, partial)
    close(joined(product), fisher @ row)


def test_chosen_names_give_the_submatrix_in_their_order() -> None:
    model, args, loss = mlp(), (randn(5, 4),), CategoricalLoss()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    starts = {n: sum(list(sizes.values())[:i]) for i, n in enumerate(sizes)}
    names = ["2.bias", "0.bias", "2.weight"]
    index = torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in names])
    full = dense_fisher(model, args, loss)
    close(dense_fisher(model, args, loss, names), full[index][:, index])


def test_frozen_parameters_are_constants() -> None:
    model, args, loss = mlp(), (randn(5, 4),), CategoricalLoss()
    whole = dense_fisher(model, args, loss)
    _, (full,) = directions(model, 1)
    model[0].requires_grad_(False)
    names = ["2.weight", "2.bias"]
    block = dense_fisher(model, args, loss)
    close(block, whole[25:, 25:])
    product = fisher_vector_product(model, args, loss, {n: full[n] for n in names})
    assert list(product) == names
    flat = torch.cat([full[n].flatten() for n in names])
    close(joined(product), block @ flat)


# --- output tangents ------------------------------------------------------------------------------


def test_tangents_of_several_outputs() -> None:
    model = filled(LogStd())
    inputs = randn(5, 4, seed=1)
    _, (full,) = directions(model, 1, seed=6)
    step = {"log_std": full["log_std"], "value.weight": full["value.weight"]}
    output, (everything, some, none) = output_tangents(model, (inputs,), [full, step, {}])
    torch.testing.assert_close(output, model(inputs))
    assert all(not part.requires_grad for part in (*output, *everything))
    mean = inputs @ full["mean.weight"].mT + full["mean.bias"]
    spread = full["log_std"].expand(5, 2)
    value = inputs @ full["value.weight"][0]
    close(everything[0], torch.cat([mean, spread], -1))
    close(everything[1], value + full["value.bias"])
    close(some[0], torch.cat([torch.zeros_like(mean), spread], -1))
    close(some[1], value)
    assert [part.shape for part in none] == [(5, 4), (5,)]
    assert all(not part.any() for part in none)


def test_no_vector_gives_the_output_alone() -> None:
    model, inputs = mlp(), randn(5, 4)
    output, tangents = output_tangents(model, (inputs,), [])
    assert tangents == []
    torch.testing.assert_close(output, model(inputs).detach())


def test_several_arguments_and_other_objects() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

        def forward(self, x: Tensor, y: Tensor, power: int) -> Tensor:
            return self.weight * x + y**power

    x, y = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([[3.0, 4.0]])
    vector = {"weight": torch.tensor([10.0, 20.0])}
    output, (tangent,) = output_tangents(Scaled(), (x, y, 2), [vector])
    assert isinstance(output, Tensor)
    assert isinstance(tangent, Tensor)
    assert output.tolist() == [[11.0, 22.0]]
    assert not output.requires_grad
    assert tangent.tolist() == [[10.0, 40.0]]


# --- inner products -------------------------------------------------------------------------------


def test_inner_products() -> None:
    u = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
    v = {"b": torch.tensor([[5.0]]), "c": torch.tensor([7.0])}
    w = {"c": torch.tensor([11.0])}
    assert inner_products([u, v], [u, v, w]).tolist() == [[14.0, 15.0, 0.0], [15.0, 74.0, 77.0]]


# --- bad input ------------------------------------------------------------------------------------


def test_vectors_that_do_not_fit() -> None:
    model, args, loss = mlp(), (randn(5, 4),), CategoricalLoss()
    good = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no parameter '3\.bias'"):
        output_tangents(model, args, [{"3.bias": good}])
    with pytest.raises(ValueError, match=r"'2\.bias' must be torch.float64 of shape \(3,\)"):
        fisher_gram(model, args, loss, [{"2.bias": good[:2]}])
    with pytest.raises(ValueError, match=r"'2\.bias' must be torch.float64.*got torch.float32"):
        fisher_vector_product(model, args, loss, {"2.bias": good.float()})
    with pytest.raises(ValueError, match="at least one vector"):
        fisher_gram(model, args, loss, [])
    with pytest.raises(ValueError, match="share a parameter"):
        inner_products([{"a": good}], [{"b": good}])


@pytest.mark.parametrize(
    ("names", "got"), [(["0.weight", "x"], "x"), (["2.bias"] * 2, "2.bias, 2.bias"), ([], "none")]
)
def test_names_that_do_not_fit(names: list[str], got: str) -> None:
    with pytest.raises(ValueError, match=f"distinct names of the module's parameters, got {got}$"):
        dense_fisher(mlp(), (randn(5, 4),), CategoricalLoss(), names)


def test_a_module_without_tensor_output() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"output": super().forward(x)}

    with pytest.raises(ValueError, match="tensor or a tuple of tensors, got dict"):
        output_tangents(Wrong(4, 3), (torch.zeros(1, 4),), [])


def test_a_diverged_network_gives_nan_and_no_error() -> None:
    model, loss = mlp(), GaussianLoss()
    _, vectors = directions(model, 2)
    inputs = torch.full((5, 4), math.nan, dtype=torch.float64)
    assert fisher_gram(model, (inputs,), loss, vectors).isnan().all()
