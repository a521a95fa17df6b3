"""Posteriors of noisy K-FAC are the exact ones where theory says so, and not where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from acktr.kfac import (
    BernoulliLoss,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    Sampled,
    dense_fisher,
    dense_kfac,
    flattened,
)
from acktr.kfac.losses.likelihoods import Reduction
from acktr.kfac.noisy import NoisyKFAC
from tests.tools.kfac import build, mlp, parameters, randn
from tests.tools.noisy import (
    ETA,
    LAMBDA,
    TAU,
    by_rows,
    context,
    covariance,
    gaussian,
    linear_data,
    linear_model,
    linear_posterior,
    names_of,
    noisy,
    refreshed,
)

REDUCTIONS: tuple[Reduction, ...] = ("mean", "batchmean")


def close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert float((found - exact).abs().max()) <= tolerance * float(exact.abs().max())


def far(found: Tensor, exact: Tensor, least: float = 0.02) -> None:
    assert float((found - exact).norm()) > least * float(exact.norm())


def after_a_batch(count: int = 50, data_size: int | None = None, **settings: object) -> NoisyKFAC:
    """Linear regression after one full batch, at the exact mean if everything is right."""
    inputs, targets, _ = linear_data(count)
    optimizer = noisy(linear_model(), data_size or count, **settings)
    context(optimizer, inputs, targets, gaussian())
    optimizer.step()
    return optimizer


def mean_of(model: nn.Module) -> Tensor:
    layer = model.get_submodule("0")
    assert isinstance(layer, nn.Linear)
    return torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], dim=1)


# --- linear regression ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("structure", ["mvg", "emvg"])
def test_one_batch_gives_the_exact_posterior(reduction: Reduction, structure: str) -> None:
    """Covariance and, as the first pass is at the mean and lr is 1, the mean; bias included."""
    inputs, targets, rows = linear_data()
    optimizer = noisy(linear_model(), len(inputs), structure=structure)
    context(optimizer, inputs, targets, gaussian(reduction=reduction))
    optimizer.step()
    mean, sigma = linear_posterior(rows, targets)
    close(mean_of(optimizer.module), mean, 1e-12)
    found = by_rows(covariance(optimizer), 2, 6)
    close(found, torch.block_diag(sigma, sigma), 1e-12)
    variances = torch.cat([v.square().flatten() for v in optimizer.posterior_std().values()])
    close(by_rows(variances.diag(), 2, 6).diagonal()[:7], sigma.diagonal(), 1e-12)


def test_external_damping_changes_the_path_and_not_the_posterior() -> None:
    _, targets, rows = linear_data()
    damped = after_a_batch(external_damping=0.5)
    mean, sigma = linear_posterior(rows, targets)
    close(by_rows(covariance(damped), 2, 6), torch.block_diag(sigma, sigma), 1e-12)
    far(mean_of(damped.module), mean)


@pytest.mark.parametrize("wrong", ["batch", "root", "real"])
def test_the_equality_has_the_power_to_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With N of a batch, with noise whose square root is mistaken, or with real targets."""
    inputs, targets, rows = linear_data()
    optimizer = noisy(linear_model(), len(inputs))
    if wrong == "batch":
        optimizer.posterior.data_size = 10
    source = Empirical(targets) if wrong == "real" else Exact()
    context(optimizer, inputs, targets, gaussian(), source)
    optimizer.step()
    if wrong == "root":
        monkeypatch.setattr(Tensor, "sqrt", lambda variance: variance)
    sigma = linear_posterior(rows, targets)[1]
    far(by_rows(covariance(optimizer), 2, 6), torch.block_diag(sigma, sigma))


def test_a_bias_without_a_prior_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias begins far from zero, so that gamma_in times the bias is seen in the mean."""
    inputs, targets, rows = linear_data()
    exact = linear_posterior(rows, targets)[0]
    for forgotten in (False, True):
        optimizer = noisy(linear_model(), len(inputs))
        add_prior = optimizer._add_prior

        def without(found: dict[str, Tensor], add: Callable[..., None] = add_prior) -> None:
            bias = found["0.bias"]
            add(found)
            found["0.bias"] = bias

        if forgotten:
            monkeypatch.setattr(optimizer, "_add_prior", without)
        with torch.no_grad():
            optimizer.module.get_parameter("0.bias").fill_(3.0)
        context(optimizer, inputs, targets, gaussian())
        optimizer.step()
        gap = float((mean_of(optimizer.module) - exact).abs().max())
        assert gap > 0.01 if forgotten else gap < 1e-12


def test_factored_damping_is_too_narrow_by_the_root_of_n() -> None:
    """With the eigenvalues d of A, S = 1 and tau = eta = lambda = 1 the variances are those of the
    exact posterior times (d + gamma) / ((d + pi sqrt gamma) (1 + sqrt gamma / pi)).
    """
    divergences = []
    for count in (50, 500, 5000, 50000):
        inputs = randn(count, 6, seed=3) * torch.linspace(0.3, 1.5, 6, dtype=torch.float64)
        targets = randn(count, 1, seed=4)
        found = []
        for form in ("factored", "exact"):
            model = build(nn.Linear(6, 1, bias=False))
            plain = {"prior_variance": 1.0, "kl_weight": 1.0, "damping_form": form}
            optimizer = noisy(model, count, **plain)
            context(optimizer, inputs, targets, GaussianLoss())
            optimizer.step()
            found.append(covariance(optimizer))
        ratios = torch.linalg.eigvals(torch.linalg.solve(found[1], found[0])).real
        d, root = torch.linalg.eigvalsh(inputs.mT @ inputs / count), count**-0.5
        pi = d.mean().sqrt()
        formula = (d + root**2) / ((d + pi * root) * (1 + root / pi))
        close(ratios.sort().values, formula.sort().values, 1e-10)
        assert ratios.max() < 1
        assert count > 50 or ratios.min() < 0.5
        zero = torch.zeros(6, dtype=torch.float64)
        pair = [MultivariateNormal(zero, covariance_matrix=s) for s in found]
        divergences.append(float(kl_divergence(*pair)))
    slopes = [math.log10(a / b) for a, b in pairwise(divergences)]
    assert divergences[0] > 0.1
    assert all(0.6 < slope < 1.1 for slope in slopes)


def test_an_antithetic_pair_reaches_the_optimum_in_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs, targets, rows = linear_data()
    optimizer = after_a_batch()
    with torch.no_grad():
        for parameter in optimizer.module.parameters():
            parameter.add_(randn(*parameter.shape, seed=9))
    noise = optimizer.posterior.draw(lambda like: randn(*like.shape, seed=5))
    for sign in (1, -1):
        drawn = {name: sign * e for name, e in noise.items()}
        monkeypatch.setattr(optimizer.posterior, "draw", lambda normal, drawn=drawn: drawn)
        context(optimizer, inputs, targets, gaussian())
    optimizer.step()
    close(mean_of(optimizer.module), linear_posterior(rows, targets)[0], 1e-12)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["mvg", "emvg"])
@pytest.mark.parametrize("kind", ["one datum", "deep linear"])
def test_where_kfac_is_exact_so_is_every_layers_posterior(structure: str, kind: str) -> None:
    if kind == "one datum":
        model, inputs, loss = mlp(), randn(1, 4), CategoricalLoss()
        targets = torch.tensor([1])
    else:
        model = build(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))
        inputs, loss = randn(30, 4), gaussian()  # type: ignore[assignment]
        targets = randn(30, 3)
    optimizer = noisy(model, 30, structure=structure)
    context(optimizer, inputs, targets, loss)
    refreshed(optimizer)
    for block in optimizer.posterior.prior.sampled:
        names = list(block.names)
        fisher = dense_fisher(model, (inputs,), loss, names)
        eye = torch.eye(len(fisher), dtype=fisher.dtype)
        scale = LAMBDA / 30
        exact = scale * torch.linalg.inv(fisher + scale / ETA * eye)
        close(covariance(optimizer, names), exact, 1e-10)


# --- the diagonal ---------------------------------------------------------------------------------


def test_the_diagonal_is_the_mean_field_optimum() -> None:
    """f = tau E x^2 and 1 / sigma^2 = diag(tau X^T X / lambda) + 1 / eta."""
    _, _, rows = linear_data()
    found = after_a_batch(structure="ffg").posterior_std()
    precision = TAU * rows.square().sum(0) / LAMBDA + 1 / ETA
    close(found["0.weight"].square(), (1 / precision[:6]).expand(2, 6), 1e-12)
    close(found["0.bias"].square(), (1 / precision[6:]).expand(2), 1e-12)


def test_sampled_targets_have_the_fisher_as_their_mean() -> None:
    optimizer = noisy(linear_model(), 50, structure="ffg")
    inputs, targets, rows = linear_data()
    context(optimizer, inputs, targets, gaussian(), Sampled(600))
    optimizer.curvature.fold()
    fisher = dense_kfac(optimizer.curvature).diagonal()
    truth = TAU * rows[:, :6].square().mean(0)
    assert bool(((fisher[:6] / truth - 1).abs() < 0.05).all())


# --- evidence and divergence ----------------------------------------------------------------------


def log_evidence(rows: Tensor, targets: Tensor, eta: float) -> Tensor:
    eye = torch.eye(len(rows), dtype=rows.dtype)
    zero = torch.zeros(len(rows), dtype=rows.dtype)
    joint = MultivariateNormal(zero, eye / TAU + eta * rows @ rows.mT)
    return joint.log_prob(targets.mT).sum()


def expected_log_likelihood(optimizer: NoisyKFAC, rows: Tensor, targets: Tensor) -> Tensor:
    sigma = by_rows(covariance(optimizer), 2, 6)
    errors = targets - rows @ mean_of(optimizer.module).mT
    spread = sum(torch.einsum("ni,ij,nj->", rows, s, rows) for s in (sigma[:7, :7], sigma[7:, 7:]))
    squares = errors.square().sum() + spread
    return 0.5 * targets.numel() * math.log(TAU / (2 * math.pi)) - 0.5 * TAU * squares


def test_the_elbo_of_the_exact_posterior_is_the_log_evidence() -> None:
    """With lambda = 1; that of the factored and of the diagonal posterior is below it."""
    inputs, targets, rows = linear_data()
    evidence = log_evidence(rows, targets, ETA)
    bounds = []
    for settings in ({}, {"damping_form": "factored"}, {"structure": "ffg"}):
        optimizer = after_a_batch(kl_weight=1.0, **settings)
        precision = TAU * rows.mT @ rows + torch.eye(7, dtype=rows.dtype) / ETA
        mean = torch.linalg.solve(precision, TAU * rows.mT @ targets).mT
        with torch.no_grad():
            optimizer.module.get_parameter("0.weight").copy_(mean[:, :6])
            optimizer.module.get_parameter("0.bias").copy_(mean[:, 6])
        bounds.append(expected_log_likelihood(optimizer, rows, targets) - optimizer.kl())
        drawn = [optimizer.elbo(inputs, targets, log_probabilities, samples=1) for _ in range(100)]
        estimates = torch.stack(drawn)
        error = float(estimates.std()) / len(drawn) ** 0.5
        assert abs(float(estimates.mean() - bounds[-1])) < 4 * error
    assert float(bounds[0]) == pytest.approx(float(evidence), abs=1e-10)
    assert all(float(bound) < float(evidence) - 0.01 for bound in bounds[1:])


def log_probabilities(output: Tensor, target: Tensor) -> Tensor:
    terms = 0.5 * math.log(TAU / (2 * math.pi)) - 0.5 * TAU * (target - output).square()
    return terms.sum(-1)


@pytest.mark.parametrize(
    "structure, form",
    [
        ("mvg", "exact"),
        ("mvg", "factored"),
        ("emvg", "exact"),
        ("ffg", "exact"),
        ("tridiagonal", "factored"),
    ],
)
def test_the_divergence_from_the_prior_is_that_of_dense_gaussians(
    structure: str, form: str
) -> None:
    model = mlp()
    optimizer = noisy(model, 40, structure=structure, damping_form=form)
    context(optimizer, randn(40, 4), randn(40, 3), gaussian())
    refreshed(optimizer)
    sigma = covariance(optimizer)
    mean = flattened(parameters(model), names_of(optimizer))
    zero = torch.zeros_like(mean)
    prior = MultivariateNormal(zero, ETA * torch.eye(len(mean), dtype=mean.dtype))
    dense = kl_divergence(MultivariateNormal(mean, sigma), prior)
    assert float(optimizer.kl()) == pytest.approx(float(dense), rel=1e-10)
    deviations = flattened(optimizer.posterior_std(), names_of(optimizer))
    close(deviations.square(), sigma.diagonal(), 1e-10)


def test_the_fisher_is_the_elbos_gradient_by_the_variance_of_a_logistic_weight() -> None:
    """Gauss-Hermite: d ELBO / dv = (-N E_q F - lambda / eta + lambda / v) / 2, F the library's."""
    inputs, bits = randn(12, 1), (randn(12, 1, seed=2) > 0).double()
    nodes, weights = hermite(60)
    mean, variance = 0.4, 0.3

    def elbo(v: float) -> float:
        values = mean + v**0.5 * nodes
        logits = inputs * values  # (12, 60)
        terms = bits * logits - torch.nn.functional.softplus(logits)
        divergence = 0.5 * (v / ETA + mean**2 / ETA - 1 - math.log(v / ETA))
        return float((terms.sum(0) * weights).sum()) - LAMBDA * divergence

    model = build(nn.Linear(1, 1, bias=False))
    fishers = []
    for value in mean + variance**0.5 * nodes:
        with torch.no_grad():
            model.get_parameter("0.weight").fill_(value)
        optimizer = noisy(model, 12, structure="ffg")
        context(optimizer, inputs, bits, BernoulliLoss())
        optimizer.curvature.fold()
        fishers.append(float(dense_kfac(optimizer.curvature)))
    fisher = float((torch.tensor(fishers, dtype=torch.float64) * weights).sum())
    found = 0.5 * (-12 * fisher - LAMBDA / ETA + LAMBDA / variance)
    step = 1e-4
    slope = (elbo(variance + step) - elbo(variance - step)) / (2 * step)
    assert found == pytest.approx(slope, abs=1e-6)


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights for the standard normal distribution (Golub & Welsch 1969)."""
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors[0].square()


# --- limits ---------------------------------------------------------------------------------------
