"""Limit cases in which the update is a known one: SGD, and the natural gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    Preconditioner,
    dense_fisher,
)
from acktr.kfac.config import Quadratic
from tests.tools.exact import close, gap
from tests.tools.kfac import build, parameters, plain_config, randn, seeded
from tests.tools.product_cases import filled


class Everything(nn.Module):
    """One of every kind of block: embedding, linear, grouped convolution, norm, own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.mix = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.slope = nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(self.table(x)).tanh()
        pooled = self.conv(hidden.mT).tanh().mean(2)
        output: Tensor = self.head(self.norm(pooled) * self.slope)
        return output


def everything() -> tuple[nn.Module, Tensor, Tensor]:
    inputs = torch.randint(5, (6, 3), generator=seeded(0))
    return filled(Everything()), inputs, torch.tensor([0, 1, 2, 2, 1, 0])


MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "factored": {"structure": "kfac_factored"},
    "cholesky": {"structure": "cholesky"},
    "ekfac": {"structure": "ekfac"},
    "diagonals": {"small_parameters": "diagonal", "dense_limit": 1},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def updates(optimizer: KFAC, model: nn.Module, inputs: Tensor, target: Tensor, count: int) -> None:
    loss = CategoricalLoss()
    for _ in range(count):
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss, source=Exact())
        optimizer.zero_grad()
        loss(output, target).backward()
        optimizer.step()


# --- infinite damping -----------------------------------------------------------------------------


@every_mode
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_infinite_damping_is_sgd(mode: str, momentum: float) -> None:
    """lr = eta lambda and lambda to infinity: theta <- theta - eta v, step by step."""
    model, inputs, target = everything()
    reference, damping, eta = copy.deepcopy(model), 1e12, 0.2
    settings = {"small_parameters": "dense", **MODES[mode]}
    config = plain_config(
        lr=eta * damping,
        damping=damping,
        kl_clip=None,
        momentum=momentum,
        refresh_interval=1,
        **settings,
    )
    updates(KFAC(model, config), model, inputs, target, 4)
    sgd = torch.optim.SGD(reference.parameters(), lr=eta * (1 - momentum), momentum=momentum)
    start = parameters(reference)
    for _ in range(4):
        sgd.zero_grad()
        CategoricalLoss()(reference(inputs), target).backward()
        sgd.step()
    for name, value in parameters(model).items():
        change = parameters(reference)[name] - start[name]
        # pi adds relative errors of order sqrt(F / lambda) where the damping is split
        limit = 1e-3 if mode in ("factored", "cholesky") else 1e-6
        assert gap(value - start[name], change) < limit, name


@every_mode
@pytest.mark.parametrize("quadratic", ["kronecker", "corrected", "exact"])
def test_infinite_damping_has_the_direction_of_sgd_inside_the_trust_region(
    mode: str, quadratic: Quadratic
) -> None:
    """The step's length is the trust region's, its direction that of the gradient."""
    model, inputs, target = everything()
    reference = copy.deepcopy(model)
    settings = {"small_parameters": "dense", "quadratic": quadratic, **MODES[mode]}
    config = plain_config(lr=1e13, damping=1e12, kl_clip=0.01, momentum=0.0, **settings)
    optimizer = KFAC(model, config)
    start = parameters(model)
    updates(optimizer, model, inputs, target, 1)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.scale) < 1
    CategoricalLoss()(reference(inputs), target).backward()
    change = torch.cat([(start[n] - v).flatten() for n, v in parameters(model).items()])
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    assert float(nn.functional.cosine_similarity(change, gradient, 0)) == pytest.approx(1, abs=1e-9)
    # lr^2 q = c for the step lr U that was taken; q = g . U = lambda |U|^2, or U^T F U.
    fisher = dense_fisher(reference, (inputs,), CategoricalLoss())
    q = 1e12 * change @ change if quadratic == "kronecker" else change @ fisher @ change
    assert float(q) == pytest.approx(0.01, rel=1e-4)


@every_mode
def test_small_damping_is_not_sgd(mode: str) -> None:
    model, inputs, target = everything()
    reference = copy.deepcopy(model)
    settings = {"small_parameters": "dense", **MODES[mode]}
    config = plain_config(lr=0.1, damping=1e-3, kl_clip=None, momentum=0.0, **settings)
    start = parameters(model)
    updates(KFAC(model, config), model, inputs, target, 1)
    CategoricalLoss()(reference(inputs), target).backward()
    change = torch.cat([(start[n] - v).flatten() for n, v in parameters(model).items()])
    gradient = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    assert float(nn.functional.cosine_similarity(change, gradient, 0)) < 0.95


# --- identity factors -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "factored", "cholesky", "ekfac"])
@pytest.mark.parametrize("damping", [1e-9, 0.5])
def test_identity_factors_are_sgd(mode: str, damping: float) -> None:
    """Inputs sqrt(d) e_i have A = I, and a unit Gaussian loss has G = I: F = I."""
    model = build(nn.Linear(4, 3, bias=False))
    inputs, target = 2 * torch.eye(4).double(), randn(4, 3, seed=2)
    reference = copy.deepcopy(model)
    optimizer = KFAC(
        model, plain_config(lr=0.3, damping=damping, kl_clip=None, momentum=0.0, **MODES[mode])
    )
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, GaussianLoss(), source=Exact())
    GaussianLoss()(output, target).backward()
    optimizer.step()
    GaussianLoss()(reference(inputs), target).backward()
    root = damping**0.5
    scale = (1 + root) ** 2 if mode in ("factored", "cholesky") else 1 + damping
    (weight,) = reference.parameters()
    assert weight.grad is not None
    close(parameters(model)["0.weight"], weight.detach() - 0.3 / scale * weight.grad)


def test_identity_factors_are_the_gradient_in_every_layer() -> None:
    """An orthogonal deep linear net keeps the identity, and so do all blocks."""
    model = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)]).double()
    for index, layer in enumerate(model):
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(torch.linalg.qr(randn(4, 4, seed=index))[0])
    curvature = Preconditioner(model, plain_config(damping=1e-12, kl_clip=None))
    with curvature.capture() as captured:
        output = model(2 * torch.eye(4).double())
    curvature.observe(captured, output, GaussianLoss(), source=Exact())
    GaussianLoss()(output, randn(4, 4, seed=5)).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    curvature.precondition(lr=0.1)
    assert len(wanted) == 3
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, Tensor)
        close(parameter.grad, wanted[name])


# --- natural gradient -----------------------------------------------------------------------------


def natural(model: nn.Module, inputs: Tensor, loss: Any, damping: float) -> dict[str, Tensor]:
    """(F + lambda)^-1 g by a dense solve."""
    named = {n: p for n, p in model.named_parameters() if p.grad is not None}
    fisher = dense_fisher(model, (inputs,), loss)
    gradient = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    step = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)).double(), gradient)
    parts = torch.split(step, [p.numel() for p in named.values()])
    return {n: s.reshape(p.shape) for (n, p), s in zip(named.items(), parts, strict=True)}


@pytest.mark.parametrize("inverse", ["kfac", "ekfac"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("shape", [(7, 4), (5, 3, 4)])
def test_a_linear_regression_takes_the_natural_gradient(
    shape: tuple[int, ...], reduction: Any, bias: bool, inverse: Any
) -> None:
    model, inputs = build(nn.Linear(4, 3, bias=bias)), randn(*shape)
    loss = GaussianLoss(std=0.7, reduction=reduction)
    config = plain_config(lr=1.0, damping=0.05, kl_clip=None, momentum=0.0, structure=inverse)
    optimizer = KFAC(model, config)
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, loss, source=Exact())
    loss(output, randn(*output.shape, seed=3)).backward()
    wanted = natural(model, inputs, loss, 0.05)
    start = parameters(model)
    optimizer.step()
    for name, value in parameters(model).items():
        close(start[name] - value, wanted[name])


def test_a_linear_regression_is_solved_in_one_step() -> None:
    model, inputs, target = build(nn.Linear(4, 3)), randn(9, 4), randn(9, 3, seed=2)
    loss = GaussianLoss(std=0.7)
    optimizer = KFAC(model, plain_config(lr=1.0, damping=1e-12, kl_clip=None, momentum=0.0))
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, loss, source=Exact())
    loss(output, target).backward()
    optimizer.step()
    ones = torch.cat([inputs, torch.ones(9, 1).double()], 1)
    solution = torch.linalg.lstsq(ones, target).solution
    found = parameters(model)
    close(torch.cat([found["0.weight"], found["0.bias"][:, None]], 1), solution.mT)


def test_one_datum_of_a_linear_classifier_takes_the_natural_gradient() -> None:
    model, inputs, loss = build(nn.Linear(4, 3)), randn(1, 4), CategoricalLoss()
    curvature = Preconditioner(model, plain_config(damping=0.02, kl_clip=None))
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, loss, source=Exact())
    loss(output, torch.tensor([2])).backward()
    wanted = natural(model, inputs, loss, 0.02)
    curvature.precondition(lr=1.0)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, Tensor)
        close(parameter.grad, wanted[name])


def test_two_layers_do_not_take_the_full_natural_gradient() -> None:
    """The blocks between layers are left out: the theorem is of one layer only."""
    model, inputs, loss = build(nn.Linear(4, 3), nn.Linear(3, 2)), randn(7, 4), GaussianLoss()
    curvature = Preconditioner(model, plain_config(damping=0.02, kl_clip=None))
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, loss, source=Exact())
    loss(output, randn(7, 2, seed=3)).backward()
    wanted = natural(model, inputs, loss, 0.02)
    curvature.precondition(lr=1.0)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, Tensor)
        assert gap(parameter.grad, wanted[name]) > 0.01
