"""The bound, its gradient, and the steps that are made of that gradient."""

from __future__ import annotations

import copy
import math
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

from acktr.kfac import Exact, NoisyKFAC, gaussian_log_prob
from acktr.kfac.blocks.kronecker import KroneckerBlock
from tests.kfac.test_noisy_exact import close, log_probabilities, mean_of
from tests.tools.kfac import mlp, parameters, randn
from tests.tools.noisy import (
    ETA,
    LAMBDA,
    STRUCTURES,
    TAU,
    context,
    covariance,
    gaussian,
    linear_data,
    linear_model,
    linear_posterior,
    noisy,
    refreshed,
)
from tests.tools.product_cases import filled

SIZE = 40


def observed(structure: str, form: str, **settings: Any) -> NoisyKFAC:
    settings |= {"structure": structure, "damping_form": form}
    optimizer = noisy(mlp(), SIZE, **settings)
    context(optimizer, randn(20, 4), randn(20, 3, seed=5), gaussian())
    refreshed(optimizer)
    optimizer.zero_grad()
    optimizer.forget()
    return optimizer


@pytest.mark.parametrize("structure, form", STRUCTURES)
def test_the_bound_is_the_mean_over_samples_less_the_whole_divergence(
    structure: str, form: str
) -> None:
    optimizer = observed(structure, form)
    inputs, targets = randn(8, 4, seed=2), randn(8, 3, seed=3)
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    found = optimizer.elbo(inputs, targets, log_probabilities, samples=5, generator=seeds[0])
    drawn, terms = optimizer.sample(5, seeds[1]), []
    for place in range(5):
        weights = {name: values[place] for name, values in drawn.items()}
        terms.append(log_probabilities(functional_call(optimizer.module, weights, inputs), targets))
    bound = SIZE * torch.stack(terms).mean() - optimizer.kl()
    assert float(optimizer.kl()) > 1
    assert float(found) == pytest.approx(float(bound.detach()), rel=1e-12)


@pytest.mark.parametrize("factored", [True, False])
def test_the_divergence_of_a_layer_is_that_of_its_factors(factored: bool) -> None:
    """MN(M; Sigma_G, Sigma_A): traces and determinants of n and p square matrices alone."""
    optimizer = observed("mvg", "factored" if factored else "exact")
    total = 0.0
    for block in optimizer.posterior.prior.sampled:
        assert isinstance(block, KroneckerBlock)
        weight, bias = (optimizer.module.get_parameter(name).detach() for name in block.names)
        mean = torch.cat([weight, bias[:, None]], dim=1)
        p, n = mean.shape
        a, g = block.a.mean(), block.g.mean()
        scale = LAMBDA / SIZE
        gamma = scale / ETA
        if factored:
            pi = (a.trace() / n / (g.trace() / p)).sqrt()
            left = scale**0.5 * torch.linalg.inv(a + pi * gamma**0.5 * torch.eye(n).double())
            right = scale**0.5 * torch.linalg.inv(g + gamma**0.5 / pi * torch.eye(p).double())
            trace = left.trace() * right.trace()
            log_det = p * torch.logdet(left) + n * torch.logdet(right)
        else:
            v = scale / (torch.outer(torch.linalg.eigvalsh(g), torch.linalg.eigvalsh(a)) + gamma)
            trace, log_det = v.sum(), v.log().sum()
        divergence = (trace + mean.square().sum()) / ETA + n * p * (math.log(ETA) - 1) - log_det
        total += 0.5 * float(divergence)
    assert float(optimizer.kl()) == pytest.approx(total, rel=1e-10)


def test_densities_at_samples_average_to_the_variance_of_weights_and_noise() -> None:
    """Linear model: N(y; x^T mu, x^T Sigma x + 1 / tau), here in 4 standard errors."""
    inputs, targets, _ = linear_data(8, outputs=1)
    optimizer = noisy(linear_model(outputs=1), len(inputs))
    context(optimizer, inputs, targets, gaussian(), Exact())
    optimizer.step()
    ahead, target = randn(1, 6, seed=8), torch.tensor([[1.5]]).double()
    row = torch.cat([ahead, torch.ones(1, 1).double()], dim=1)
    variance = row @ covariance(optimizer) @ row.mT + 1 / TAU
    assert float(variance) > 1.2 / TAU
    mean = optimizer.module(ahead).detach()
    exact, certain = (Normal(mean, d).log_prob(target).exp() for d in (variance.sqrt(), TAU**-0.5))
    densities = gaussian_log_prob(optimizer.predict(ahead, 2000), target, TAU).exp()
    error = densities.std() / len(densities) ** 0.5
    assert float((densities.mean() - exact).abs()) < 4 * float(error)
    assert float((densities.mean() - certain).abs()) > 8 * float(error)


def test_the_precision_of_the_weights_is_an_average_of_those_of_batches() -> None:
    """Lambda <- (1 - beta) Lambda + beta (N / lambda) (F_batch + gamma_in), from (N / lambda) c."""
    optimizer = noisy(linear_model(), SIZE, structure="ffg", stat_decay=0.9, initial_curvature=0.3)
    scale = LAMBDA / SIZE
    precision = torch.full((7,), (0.3 + scale / ETA) / scale, dtype=torch.float64)
    for seed in (1, 2, 3):
        inputs = randn(20, 6, seed=seed)
        rows = torch.cat([inputs, torch.ones(20, 1).double()], dim=1)
        context(optimizer, inputs, inputs[:, :2], gaussian(), Exact())
        refreshed(optimizer)
        fisher = TAU * rows.square().mean(0)
        precision = 0.9 * precision + 0.1 * (fisher + scale / ETA) / scale
        deviations = optimizer.posterior_std()
        close(deviations["0.weight"][0].square(), 1 / precision[:6], 1e-12)
        close(deviations["0.bias"].square()[:1], 1 / precision[6:], 1e-12)


def fixed_noise(optimizer: NoisyKFAC, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the optimizer draw the noise e and -e by turns."""
    noise = optimizer.posterior.draw(lambda like: randn(*like.shape, seed=7).to(like.dtype))
    pair = cycle([noise, {name: -e for name, e in noise.items()}])
    monkeypatch.setattr(optimizer.posterior, "draw", lambda normal: next(pair))


@pytest.mark.parametrize("structure, form", STRUCTURES)
def test_the_vector_of_a_step_is_the_gradient_of_the_bound(
    structure: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mean, with common noise: -N V = d ELBO / d mu, by finite differences, lambda = 1."""
    optimizer = observed(structure, form, kl_weight=1.0)
    inputs, targets = randn(SIZE, 4, seed=2), randn(SIZE, 3, seed=3)
    fixed_noise(optimizer, monkeypatch)
    for _ in range(2):
        context(optimizer, inputs, targets, gaussian())
    vector = optimizer.curvature.gradients()
    optimizer._add_prior(vector)

    def bound() -> float:
        return float(optimizer.elbo(inputs, targets, log_probabilities, samples=2))

    step = 1e-4
    for name, parameter in optimizer.module.named_parameters():
        slopes = torch.zeros_like(parameter)
        for place in range(parameter.numel()):
            entry = parameter.detach().flatten()[place : place + 1]
            before = entry.clone()
            entry.copy_(before + step)
            above = bound()
            entry.copy_(before - step)
            slopes.flatten()[place] = (above - bound()) / (2 * step)
            entry.copy_(before)
        close(-SIZE * vector[name], slopes.detach(), 1e-6)


def test_the_prior_pulls_at_the_sample() -> None:
    """Linear regression, rate 1: from w = mu + e a step ends in mu* - e, with few and weak data."""
    inputs, targets, rows = linear_data(5)
    optimizer = noisy(linear_model(), len(inputs))
    for _ in range(3):  # the first one is at the mean
        before = parameters(optimizer.module)
        with optimizer.sampled_params(train=True) as captured:
            noise = {n: p - before[n] for n, p in parameters(optimizer.module).items()}
            output = optimizer.module(inputs)
            optimizer.observe(captured, output, gaussian(), source=Exact())
            gaussian()(output, targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        error = torch.cat([noise["0.weight"], noise["0.bias"][:, None]], dim=1)
        close(mean_of(optimizer.module), linear_posterior(rows, targets)[0] - error, 1e-12)
    assert float(error.abs().mean()) > 0.1


def recorded(
    optimizer: NoisyKFAC, monkeypatch: pytest.MonkeyPatch, given: list[dict[str, Tensor]]
) -> NoisyKFAC:
    """The optimizer, which puts what it preconditions at the end of a list."""
    direction = optimizer.curvature.direction

    def record(gradients: dict[str, Tensor]) -> Any:
        given.append({name: g.clone() for name, g in gradients.items()})
        return direction(gradients)

    monkeypatch.setattr(optimizer.curvature, "direction", record)
    return optimizer


def test_the_average_of_gradients_is_corrected_for_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """m <- rho m + (1 - rho) V over 1 - rho^t: the first step is that without momentum."""
    found: list[list[dict[str, Tensor]]] = [[], []]
    for momentum, given in zip((0.0, 0.9), found, strict=True):
        optimizer = noisy(mlp(), SIZE, lr=0.1, momentum=momentum, initial_curvature=0.1)
        recorded(optimizer, monkeypatch, given)
        for seed in (1, 2):
            context(optimizer, randn(20, 4, seed=seed), randn(20, 3, seed=seed), gaussian())
            optimizer.step()
    (first, second), (one, two) = found
    for name, gradient in first.items():
        close(one[name], gradient, 1e-12)
        close(two[name], (0.9 * gradient + second[name]) / 1.9, 1e-12)


class Late(nn.Module):
    """A network whose second layer joins later."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.whole = nn.Linear(4, 3), nn.Linear(3, 3), False

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        return self.second(hidden.tanh()) if self.whole else hidden  # type: ignore[no-any-return]


def late_steps(momentum: float, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What eight steps precondition: 0 and 4 are skipped, and before 5 the state is restored."""
    given: list[dict[str, Tensor]] = []

    def made() -> NoisyKFAC:  # with steps that are too short for a change
        settings = {"lr": 1e-300, "momentum": momentum, "initial_curvature": 0.1}
        return recorded(noisy(filled(Late()), SIZE, **settings), monkeypatch, given)

    optimizer = made()
    for step in range(8):
        if step == 5:
            state, optimizer = copy.deepcopy(optimizer.state_dict()), made()
            optimizer.load_state_dict(state)
        optimizer.module.whole = step > 2  # type: ignore[assignment]
        targets = randn(20, 3, seed=50 + step)
        if step in (0, 4):
            targets[0] = torch.inf
        context(optimizer, randn(20, 4, seed=step), targets, gaussian())
        optimizer.step()
    return given


def test_the_correction_counts_the_gradients_that_an_average_is_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """m / omega, omega <- rho omega + 1 - rho: over skipped steps, states, and a late layer."""
    gradients: dict[str, list[Tensor]] = {}
    both = zip(late_steps(0.0, monkeypatch), late_steps(0.9, monkeypatch), strict=True)
    for step, (plain, corrected) in enumerate(both):
        assert ("second.bias" in plain) == (step > 2)
        if step in (0, 4):
            continue
        for name, gradient in plain.items():
            mine = gradients.setdefault(name, [])
            mine.append(gradient)
            shares = [0.9**age for age in reversed(range(len(mine)))]
            total = torch.stack([p * g for p, g in zip(shares, mine, strict=True)]).sum(0)
            close(corrected[name], total / sum(shares), 1e-12)
