"""Step and damping from the quadratic model, against dense solves and hand-computed cases."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acktr.kfac.fisher.products import dense_fisher, fisher_gram, inner_products
from acktr.kfac.losses.likelihoods import BernoulliLoss, CategoricalLoss, GaussianLoss, OutputLoss
from acktr.kfac.quadratic import model_change, reduction_ratio, solve_step
from tests.tools.kfac import NoHostSync, build, randn

DAMPING, DECAY = 0.3, 0.05


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Curve(nn.Module):
    """z = a tanh(b x + c): three parameters, not linear in them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(tensor(1.3))
        self.b = nn.Parameter(tensor(0.7))
        self.c = nn.Parameter(tensor(-0.4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * (self.b * x + self.c).tanh()


def problem(kind: str) -> tuple[nn.Module, Tensor, OutputLoss[Any], Tensor]:
    """A net of three parameters, its inputs, loss and targets."""
    x = randn(7, 1, seed=1)
    if kind == "gaussian curve":
        return Curve(), x, GaussianLoss(std=0.6), randn(7, 1, seed=2)
    if kind == "bernoulli curve":
        return Curve(), x, BernoulliLoss(), randn(7, 1, seed=2).sigmoid()
    if kind == "linear":
        return build(nn.Linear(2, 1), seed=4), randn(7, 2), GaussianLoss(std=0.6), randn(7, 1)
    model = build(nn.Linear(1, 3, bias=False), seed=4)
    return model, x, CategoricalLoss(), torch.tensor([0, 1, 2, 2, 1, 0, 0])


KINDS = ["gaussian curve", "bernoulli curve", "linear", "softmax"]


def value_and_gradient(
    model: nn.Module, inputs: Tensor, loss: OutputLoss[Any], targets: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    weights = list(model.parameters())
    value = loss(model(inputs), targets) + 0.5 * decay * sum(w.square().sum() for w in weights)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])
    return value.detach(), gradient


def named(model: nn.Module, flat: Tensor) -> dict[str, Tensor]:
    sizes = [p.numel() for p in model.parameters()]
    pieces = zip(model.named_parameters(), torch.split(flat, sizes), strict=True)
    return {name: piece.reshape(p.shape) for (name, p), piece in pieces}


def moved(model: nn.Module, step: Tensor) -> None:
    with torch.no_grad():
        for name, value in named(model, step).items():
            model.get_parameter(name).add_(value)


# --- alpha and mu ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_and_mu_equal_a_dense_solve(kind: str) -> None:
    model, inputs, loss, targets = problem(kind)
    args = (inputs,)
    value, gradient = value_and_gradient(model, inputs, loss, targets, DECAY)
    assert float(value) > 0
    basis = randn(2, 3, seed=5)
    vectors = [named(model, row) for row in basis]
    dots = inner_products(vectors, vectors)
    gram = fisher_gram(model, args, loss, vectors) + (DAMPING + DECAY) * dots
    slopes = inner_products([named(model, gradient)], vectors)[0]
    found = solve_step(gram, slopes)

    curvature = dense_fisher(model, args, loss) + (DAMPING + DECAY) * torch.eye(3).double()
    expected = -torch.linalg.solve(basis @ curvature @ basis.mT, basis @ gradient)
    close(found, expected)
    step = basis.mT @ expected
    change = gradient @ step + 0.5 * step @ curvature @ step
    close(model_change(gram, slopes, found), change)
    close(change, 0.5 * slopes @ found)
    assert float(change) < 0


@pytest.mark.parametrize("kind", KINDS)
def test_three_directions_give_the_whole_damped_step(kind: str) -> None:
    model, inputs, loss, targets = problem(kind)
    _, gradient = value_and_gradient(model, inputs, loss, targets, 0.0)
    vectors = [named(model, row) for row in torch.eye(3).double()]
    gram = fisher_gram(model, (inputs,), loss, vectors) + DAMPING * torch.eye(3).double()
    curvature = dense_fisher(model, (inputs,), loss) + DAMPING * torch.eye(3).double()
    close(solve_step(gram, gradient), -torch.linalg.solve(curvature, gradient))


def test_one_direction_is_a_line_search_on_the_model() -> None:
    # M = -6 c + 1/2 4 c^2: c = 1.5, M = -4.5.
    gram, slopes = tensor([4.0]), tensor(-6.0)
    found = solve_step(gram, slopes)
    assert found.tolist() == [1.5]
    assert float(model_change(gram, slopes, found)) == -4.5


def test_two_directions_by_hand() -> None:
    # 2 a + b = 3, a + 2 b = 0: a = 2, b = -1; M = 1/2 (-3 2 + 0) = -3.
    gram, slopes = tensor([2.0, 1.0], [1.0, 2.0]), tensor(-3.0, 0.0)
    found = solve_step(gram, slopes)
    close(found, tensor(2.0, -1.0))
    assert float(model_change(gram, slopes, found)) == pytest.approx(-3.0)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 4),
    spread=st.floats(-6, 6),
    distance=st.floats(-3, 1),
)
def test_no_other_coefficients_are_better(
    seed: int, count: int, spread: float, distance: float
) -> None:
    scales = torch.logspace(0, spread, count, dtype=torch.float64)
    rows = randn(6, count, seed=seed) * scales
    gram, slopes = rows.mT @ rows, randn(count, seed=seed + 1) * scales
    found = solve_step(gram, slopes)
    best = float(model_change(gram, slopes, found))
    assert best < 0
    away = randn(20, count, seed=seed + 2) / scales * 10**distance
    for other in away:
        assert float(model_change(gram, slopes, found + other)) >= best


# --- degenerate directions ------------------------------------------------------------------------


def test_the_first_step_has_no_last_one() -> None:
    gram, slopes = tensor([4.0, 0.0], [0.0, 0.0]), tensor(-2.0, 0.0)
    assert solve_step(gram, slopes).tolist() == [0.5, 0.0]
    assert solve_step(gram.flip(0, 1), slopes.flip(0)).tolist() == [0.0, 0.5]
    assert solve_step(torch.zeros(2, 2), torch.zeros(2)).tolist() == [0.0, 0.0]
    assert solve_step(torch.zeros(1, 1), torch.zeros(1)).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, -1.0, 1e-4, -3e5])
def test_parallel_directions_make_the_step_of_one(factor: float, dtype: torch.dtype) -> None:
    one = randn(5, seed=1).to(dtype)
    curvature = randn(9, 5, seed=2).to(dtype)
    curvature, gradient = curvature.mT @ curvature, randn(5, seed=3).to(dtype)
    basis = torch.stack([one, factor * one])
    gram, slopes = basis @ curvature @ basis.mT, basis @ gradient
    alone = -(gradient @ one) / (one @ curvature @ one) * one
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    close(basis.mT @ solve_step(gram, slopes), alone, tolerance)
    three = torch.stack([one, factor * one, torch.zeros_like(one)])
    gram, slopes = three @ curvature @ three.mT, three @ gradient
    close(three.mT @ solve_step(gram, slopes), alone, tolerance)


def test_nearly_parallel_directions_are_still_told_apart() -> None:
    basis = tensor([1.0, 0.0], [1.0, 1e-3])
    gradient = tensor(1.0, 2.0)
    found = basis.mT @ solve_step(basis @ basis.mT, basis @ gradient)
    close(found, -gradient, 1e-6)


def test_a_direction_of_negative_curvature_is_left_out() -> None:
    gram, slopes = tensor([4.0, 1.0], [1.0, -1e-12]), tensor(-2.0, 5.0)
    assert solve_step(gram, slopes).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_values_that_are_not_finite_give_no_step(bad: float, count: int) -> None:
    gram, slopes = torch.eye(count), torch.ones(count)
    wrong_gram, wrong_slopes = gram.clone(), slopes.clone()
    wrong_gram[-1, 0] = wrong_slopes[-1] = bad
    close(solve_step(gram, slopes), -slopes, 1e-6)
    assert solve_step(wrong_gram, slopes).tolist() == [0.0] * count
    assert solve_step(gram, wrong_slopes).tolist() == [0.0] * count


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_that_overflows_is_none(count: int) -> None:
    gram, slopes = 1e-30 * torch.eye(count), torch.full((count,), 1e30)
    assert solve_step(gram, slopes).tolist() == [0.0] * count


@pytest.mark.parametrize("count", [2, 3])
def test_the_symmetric_part_counts(count: int) -> None:
    rows, slopes = randn(6, count), randn(count, seed=1)
    skew = torch.ones(count, count).triu(1).double()
    gram = rows.mT @ rows
    close(solve_step(gram + skew - skew.mT, slopes), solve_step(gram, slopes))


@pytest.mark.parametrize("count", [1, 2])
def test_the_solve_does_not_wait_for_the_device(count: int) -> None:
    gram, slopes = torch.eye(count), torch.ones(count)
    with NoHostSync():  # type: ignore[no-untyped-call]
        model_change(gram, slopes, solve_step(gram, slopes))


# --- reduction ratio ------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, DAMPING, 30.0])
def test_rho_is_one_on_a_quadratic_objective(damping: float) -> None:
    """The prediction holds weight decay, which is in the objective, but not the damping."""
    model, inputs, loss, targets = problem("linear")
    before, gradient = value_and_gradient(model, inputs, loss, targets, DECAY)
    basis = torch.stack([-gradient, randn(3, seed=6)])
    vectors = [named(model, row) for row in basis]
    dots = inner_products(vectors, vectors)
    undamped = fisher_gram(model, (inputs,), loss, vectors) + DECAY * dots
    slopes = inner_products([named(model, gradient)], vectors)[0]
    found = solve_step(undamped + damping * dots, slopes)
    moved(model, basis.mT @ found)
    after, _ = value_and_gradient(model, inputs, loss, targets, DECAY)

    predicted = float(model_change(undamped, slopes, found))
    rho = reduction_ratio(float(before), float(after), predicted)
    assert rho == pytest.approx(1.0, abs=1e-9)
    with_damping = float(model_change(undamped + damping * dots, slopes, found))
    wrong = reduction_ratio(float(before), float(after), with_damping)
    assert (wrong > 1.01) is (damping > 0)


def test_rho_tends_to_one_as_the_step_shrinks() -> None:
    model, inputs, loss, targets = problem("softmax")
    before, gradient = value_and_gradient(model, inputs, loss, targets, 0.0)
    direction = named(model, -gradient)
    gram = fisher_gram(model, (inputs,), loss, [direction])
    slopes = -gradient.square().sum()[None]
    start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    errors = []
    for length in (3.0, 0.3, 0.03):
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        moved(model, start - length * gradient - now)
        after, _ = value_and_gradient(model, inputs, loss, targets, 0.0)
        predicted = model_change(gram, slopes, tensor(length))
        errors.append(abs(reduction_ratio(float(before), float(after), float(predicted)) - 1))
    assert errors[0] > 10 * errors[1] > 100 * errors[2] > 0


@pytest.mark.parametrize(
    ("before", "after", "predicted", "expected"),
    [
        (5.0, 3.0, -2.0, 1.0),
        (5.0, 4.0, -2.0, 0.5),
        (5.0, 6.0, -2.0, -0.5),
        (5.0, 5.0, -2.0, 0.0),
        (5.0, math.nan, -2.0, -math.inf),
        (5.0, math.inf, -2.0, -math.inf),
        (5.0, -math.inf, -2.0, -math.inf),
        (math.nan, 3.0, -2.0, -math.inf),
        (5.0, 3.0, math.nan, -math.inf),
        (5.0, 3.0, -math.inf, -math.inf),
        (5.0, 5.0, 0.0, 0.5),
        (5.0, 4.0, 0.0, math.inf),
        (5.0, 6.0, 0.0, -math.inf),
        (5.0, 4.0, 2.0, math.inf),
        (5.0, 7.0, 2.0, -math.inf),
    ],
)
def test_ratios(before: float, after: float, predicted: float, expected: float) -> None:
    assert reduction_ratio(before, after, predicted) == expected
