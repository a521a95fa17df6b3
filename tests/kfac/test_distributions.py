"""Distributions against expectations over all their outcomes, and the losses against them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from acktr.kfac import (
    Bernoulli,
    BernoulliLoss,
    Categorical,
    CategoricalLoss,
    DiagonalGaussian,
    Distribution,
    Gaussian,
    GaussianLoss,
    LearntGaussianLoss,
    MultiCategorical,
    OutputLoss,
    SumLoss,
)
from tests.tools.kfac import randn, seeded
from tests.tools.losses import close, gradient

STD = 0.7
SIZES = (2, 3)
MAKERS: dict[str, Callable[[Tensor], Distribution]] = {
    "categorical": Categorical,
    "several": lambda logits: MultiCategorical(logits, SIZES),
    "bits": Bernoulli,
    "gaussian": lambda mean: Gaussian(mean, STD),
    "diagonal": DiagonalGaussian,
}
WIDTHS = {"categorical": 4, "several": 5, "bits": 3, "gaussian": 2, "diagonal": 4}
LOSSES: dict[str, OutputLoss[Tensor]] = {
    "categorical": CategoricalLoss(reduction="sum"),
    "bits": BernoulliLoss(reduction="sum"),
    "gaussian": GaussianLoss(std=STD, reduction="sum"),
    "diagonal": LearntGaussianLoss(reduction="sum"),
}
NODES = ((0.0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6))
"""Gauss-Hermite quadrature, exact for the fourth powers of the noise that occur here."""

every = pytest.mark.parametrize("name", MAKERS)


def outcomes(name: str, row: Tensor) -> list[tuple[Tensor, float]]:
    """Targets (1, ...) and their probabilities, written out; nodes and weights for Gaussians."""
    if name == "categorical":
        return [(torch.tensor([k]), float(p)) for k, p in enumerate(row.softmax(-1))]
    if name == "several":
        first, second = (part.softmax(-1) for part in row.split(SIZES))
        pairs = itertools.product(range(SIZES[0]), range(SIZES[1]))
        return [(torch.tensor([[i, j]]), float(first[i] * second[j])) for i, j in pairs]
    if name == "bits":
        bits = torch.tensor(list(itertools.product((0, 1), repeat=len(row))))
        p = torch.where(bits == 1, row.sigmoid(), 1 - row.sigmoid()).prod(-1)
        return [(bit[None], float(mass)) for bit, mass in zip(bits, p, strict=True)]
    mean, std = row, torch.full_like(row, STD)
    if name == "diagonal":
        mean, std = row[:2], row[2:].exp()
    grid = itertools.product(NODES, repeat=2)
    return [
        (mean[None] + std * torch.tensor([[a, b]], dtype=row.dtype), u * v)
        for (a, u), (b, v) in grid
    ]


def expected(name: str, row: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """E[of(target)]."""
    return torch.stack([mass * of(target) for target, mass in outcomes(name, row)]).sum(0)


def constant(name: str) -> float:
    """What the log-density of a Gaussian with a known deviation leaves out of -log p."""
    return 2 * (math.log(STD) + 0.5 * math.log(2 * math.pi)) if name == "gaussian" else 0.0


def dense_fisher(name: str, row: Tensor) -> Tensor:
    """E[score score^T], score by autograd."""

    def outer(target: Tensor) -> Tensor:
        point = row[None].clone().requires_grad_()
        score = gradient(MAKERS[name](point).log_prob(target).sum(), point)[0]
        return torch.outer(score, score)

    return expected(name, row, outer)


@every
def test_log_probabilities_are_those_of_the_outcomes(name: str) -> None:
    row = randn(WIDTHS[name], seed=1)
    if name in ("gaussian", "diagonal"):
        mean, log_std = (row, torch.full_like(row, math.log(STD)))
        if name == "diagonal":
            mean, log_std = row.chunk(2)
        target = randn(1, len(mean), seed=2)
        normal = torch.distributions.Normal(mean, log_std.exp()).log_prob(target).sum()
        close(MAKERS[name](row[None]).log_prob(target)[0] - constant(name), normal)
        return
    dist = MAKERS[name](row[None])
    for target, mass in outcomes(name, row):
        assert float(dist.log_prob(target).exp()) == pytest.approx(mass, rel=1e-12)
    assert expected(name, row, lambda target: torch.ones(())) == pytest.approx(1)
    assert dist.log_prob(dist.mode()).exp() == pytest.approx(max(m for _, m in outcomes(name, row)))


@every
def test_entropy_and_kl_are_expectations(name: str) -> None:
    row, other = randn(WIDTHS[name], seed=1), randn(WIDTHS[name], seed=2)
    p, q = MAKERS[name](row[None]), MAKERS[name](other[None])
    close(p.entropy(), expected(name, row, lambda y: -p.log_prob(y)) + constant(name))
    close(p.kl(other[None]), expected(name, row, lambda y: p.log_prob(y) - q.log_prob(y)))


@every
def test_fisher_products_and_forms_are_those_of_the_scores_outer_products(name: str) -> None:
    row = randn(WIDTHS[name], seed=1)
    truth = dense_fisher(name, row)
    rows = MAKERS[name](row.repeat(len(row), 1))
    close(rows.fisher_product(torch.eye(len(row), dtype=row.dtype)), truth)
    tangents = randn(len(row), len(row), seed=3)
    close(rows.fisher_quadratic(tangents), ((tangents @ truth) * tangents).sum(-1))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_distribution(name: str) -> None:
    """Objective, curvature, roots and samples, the same numbers from one seed."""
    loss, output = LOSSES[name], randn(3, WIDTHS[name], seed=1).requires_grad_()
    dist = MAKERS[name](output)
    drawn = dist.sample(dist.noise(seeded(5)))
    target = drawn.double() if name == "bits" else drawn
    close(loss(output, target), -dist.log_prob(drawn).sum())
    sampled = gradient(loss.sampled(output, seeded(5)), output)
    close(sampled, gradient(-dist.log_prob(drawn).sum(), output))
    tangent = randn(*output.shape, seed=3)
    close(loss.hessian_product(output, tangent), dist.fisher_product(tangent).detach())
    columns = torch.stack([gradient(root, output) for root in loss.roots(output)])
    for index, row in enumerate(output.detach()):
        close(columns[:, index].mT @ columns[:, index], dense_fisher(name, row))


def test_several_categoricals_are_a_sum_of_losses() -> None:
    output = randn(3, sum(SIZES), seed=1)
    dist, parts = MultiCategorical(output, SIZES), output.split(SIZES, -1)
    loss = SumLoss(parts=(CategoricalLoss(reduction="sum"),) * 2)
    target = dist.sample(dist.noise(seeded(5)))
    close(loss(parts, tuple(target.unbind(-1))), -dist.log_prob(target).sum())
    tangent = randn(*output.shape, seed=3)
    products = loss.hessian_product(parts, tangent.split(SIZES, -1))
    close(dist.fisher_product(tangent), torch.cat(products, -1))


@every
def test_noise_does_not_depend_on_the_parameters_and_samples_have_no_gradient(name: str) -> None:
    first, second = (randn(6, WIDTHS[name], seed=s).requires_grad_() for s in (1, 2))
    noise = MAKERS[name](first).noise(seeded(0))
    assert torch.equal(noise, MAKERS[name](second).noise(seeded(0)))
    whole = MAKERS[name](first).sample(noise)
    parts = [MAKERS[name](first[rows]).sample(noise[rows]) for rows in (slice(2), slice(2, 6))]
    assert torch.equal(torch.cat(parts), whole) and not whole.requires_grad


def test_masked_classes_count_nothing() -> None:
    """A logit of -inf has the probability 0: KL, entropy and their gradients are those without."""
    logits, other = (randn(3, 4, seed=seed).requires_grad_() for seed in (0, 1))
    masked = torch.tensor([False, True, False, True])
    for name in ("kl", "entropy"):
        values, gradients = [], []
        for drop in (False, True):
            parts = [
                t[:, ~masked] if drop else t.masked_fill(masked, -math.inf) for t in (logits, other)
            ]
            first = Categorical(parts[0])
            value = first.kl(parts[1]) if name == "kl" else first.entropy()
            values.append(value)
            gradients.append(torch.autograd.grad(value.sum(), logits)[0])
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients)
    loss = CategoricalLoss()
    before, after = (t.masked_fill(masked, -math.inf) for t in (logits, other))
    assert 0 < float(loss.kl(before, after)) < math.inf
