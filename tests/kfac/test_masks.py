"""Masked categoricals in float64 against the dense definition, softmax of the allowed logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from acktr.kfac import Categorical, CategoricalLoss, MultiCategorical
from tests.tools.kfac import randn, seeded
from tests.tools.losses import close, gradient

SIZES = (2, 3, 1)
ALLOWED = {
    "one": torch.tensor([True, False, True, True, False]),
    "several": torch.tensor([True, False, True, False, True, True]),
}
EXTREME = torch.tensor([3e38, -3e38, 1e4, -80.0, 0.0, 5.0], dtype=torch.float32)

both = pytest.mark.parametrize("name", ALLOWED)
Masked = Categorical | MultiCategorical


def made(name: str, logits: Tensor, masked: bool = True) -> Masked:
    mask = ALLOWED[name].expand_as(logits) if masked else None
    return Categorical(logits, mask) if name == "one" else MultiCategorical(logits, SIZES, mask)


def dense(name: str, row: Tensor) -> Tensor:
    """Probabilities (P,), written out: e^z / sum of those allowed, component by component."""
    weights = torch.where(ALLOWED[name], row.exp(), 0)
    parts = weights.split((len(row),) if name == "one" else SIZES)
    return torch.cat([part / part.sum() for part in parts])


def outcomes(name: str, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All targets (1, ...), forbidden ones too, with their probabilities."""
    p = dense(name, row)
    if name == "one":
        return [(torch.tensor([k]), p[k]) for k in range(len(row))]
    starts = (0, *itertools.accumulate(SIZES))
    return [
        (torch.tensor([ks]), math.prod(p[start + k] for start, k in zip(starts, ks, strict=False)))
        for ks in itertools.product(*(range(size) for size in SIZES))
    ]


def differences(of: Callable[[Tensor], Tensor], row: Tensor, step: float = 1e-6) -> Tensor:
    """Gradient of a function of a row by central differences."""
    eye = step * torch.eye(len(row), dtype=row.dtype)
    return torch.stack([(of(row + e) - of(row - e)) / (2 * step) for e in eye])


@both
def test_probabilities_entropy_and_kl_are_those_of_the_allowed(name: str) -> None:
    row, other = randn(len(ALLOWED[name]), seed=1), randn(len(ALLOWED[name]), seed=2)
    dist = made(name, row[None])
    pairs = outcomes(name, row)
    assert any(float(p) == 0 for _, p in pairs)
    for target, p in pairs:
        log_p = dist.log_prob(target)[0]
        assert float(p) > 0 or float(log_p) == -math.inf  # exactly
        close(log_p.exp(), p)
    likely = [(p, q) for (_, p), (_, q) in zip(pairs, outcomes(name, other), strict=True) if p > 0]
    close(dist.entropy()[0], -sum(p * p.log() for p, _ in likely))
    close(dist.kl(other[None])[0], sum(p * (p / q).log() for p, q in likely))
    best = max(pairs, key=lambda pair: float(pair[1]))[0]
    assert torch.equal(dist.mode(), best)


@both
def test_the_fisher_matrix_is_the_covariance_of_the_scores(name: str) -> None:
    """Of all outcomes; zero in the rows and columns of what is forbidden."""
    row = randn(len(ALLOWED[name]), seed=1)
    truth = torch.zeros(len(row), len(row), dtype=row.dtype)
    for target, p in outcomes(name, row):
        if p > 0:
            point = row[None].clone().requires_grad_()
            score = gradient(made(name, point).log_prob(target).sum(), point)[0]
            truth += p * torch.outer(score, score)
    rows = made(name, row.expand(len(row), -1))
    close(rows.fisher_product(torch.eye(len(row), dtype=row.dtype)), truth)
    assert not rows.fisher_product(torch.eye(len(row)).double())[~ALLOWED[name]].any()
    tangents = randn(len(row), len(row), seed=3)
    close(rows.fisher_quadratic(tangents), ((tangents @ truth) * tangents).sum(-1))
    if name == "one":
        p = dense(name, row)
        close(truth, torch.diag(p) - torch.outer(p, p))


@both
def test_gradients_are_those_of_differences(name: str) -> None:
    row, other = randn(len(ALLOWED[name]), seed=1), randn(len(ALLOWED[name]), seed=2)
    target = made(name, row[None]).mode()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "log_prob": lambda z: made(name, z[None]).log_prob(target)[0],
        "entropy": lambda z: made(name, z[None]).entropy()[0],
        "kl from": lambda z: made(name, z[None]).kl(other[None])[0],
        "kl to": lambda z: made(name, other[None]).kl(z[None])[0],
    }
    for what, function in functions.items():
        point = row.clone().requires_grad_()
        slope = gradient(function(point), point)
        torch.testing.assert_close(
            slope, differences(function, row), rtol=1e-6, atol=1e-9, msg=what
        )
        assert not slope[~ALLOWED[name]].any()


@both
def test_only_the_allowed_is_drawn_in_its_proportion(name: str) -> None:
    row = randn(len(ALLOWED[name]), seed=1)
    dist = made(name, row.repeat(20_000, 1))
    drawn = dist.sample(dist.noise(seeded(0))).reshape(20_000, -1)
    for target, p in outcomes(name, row):
        share = (drawn == target.reshape(1, -1)).all(-1).double().mean()
        deviation = math.sqrt(float(p * (1 - p)) / 20_000)
        assert abs(float(share - p)) <= 4 * deviation  # none at all where p is 0


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    logits = EXTREME[: len(ALLOWED[name])].to(dtype).repeat(4, 1)
    logits[1] = -logits[1]
    logits[2] = torch.where(ALLOWED[name], 0.0, torch.inf)  # what is masked may be anything
    logits[3] = torch.where(ALLOWED[name], 0.0, -torch.inf)
    logits.requires_grad_()
    dist = made(name, logits)
    target = dist.sample(dist.noise(seeded(0)))
    flat = torch.zeros_like(logits)
    values: list[Callable[[Masked], Tensor]] = [
        lambda dist: dist.log_prob(target),
        lambda dist: dist.entropy(),
        lambda _: made(name, flat).kl(logits),
    ]
    for of in values:
        value = of(made(name, logits))
        finite = value.isfinite()
        assert finite[2:].all()
        assert not value.isnan().any()
        slope = gradient(value[finite].sum(), logits)
        assert slope.isfinite().all()
        assert not slope[:, ~ALLOWED[name]].any()
    assert dist.fisher_quadratic(torch.ones_like(logits)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_head_under_autocast_has_finite_gradients(dtype: torch.dtype) -> None:
    layer, seen = torch.nn.Linear(4, 5), torch.randn(6, 4, generator=seeded(0))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        dist = made("one", layer(seen))
        loss = -dist.log_prob(dist.sample(dist.noise(seeded(0)))).mean() - dist.entropy().mean()
    loss.backward()
    grad = layer.weight.grad
    assert grad is not None
    assert grad.isfinite().all()
    assert not grad[~ALLOWED["one"]].any()
    assert grad[ALLOWED["one"]].any()


def test_a_mask_is_the_logit_minus_infinity_of_the_loss() -> None:
    """One idea: what CategoricalLoss computes of masked logits is what the distribution does."""
    logits = randn(3, 5, seed=1).requires_grad_()
    mask = ALLOWED["one"].expand(3, -1)
    masked = logits.masked_fill(~mask, -math.inf)
    loss, dist = CategoricalLoss(reduction="sum"), Categorical(logits, mask)
    target = dist.sample(dist.noise(seeded(5)))
    close(loss(masked, target), -dist.log_prob(target).sum())
    slope = gradient(-dist.log_prob(target).sum(), logits)
    close(gradient(loss(masked, target), logits), slope)
    tangent = randn(3, 5, seed=3)
    close(loss.hessian_product(masked, tangent), dist.fisher_product(tangent))
    leaf = masked.detach().requires_grad_()
    columns = torch.stack([gradient(root, leaf) for root in loss.roots(leaf)])
    close(torch.einsum("kbi,kbj,bj->bi", columns, columns, tangent), dist.fisher_product(tangent))


@both
def test_a_mask_that_allows_everything_changes_no_bit(name: str) -> None:
    logits, other = randn(4, len(ALLOWED[name]), seed=1), randn(4, len(ALLOWED[name]), seed=2)
    everything = torch.ones_like(logits, dtype=torch.bool)
    plain = made(name, logits, masked=False)
    masked = (
        Categorical(logits, everything)
        if name == "one"
        else MultiCategorical(logits, SIZES, everything)
    )
    noise = plain.noise(seeded(0))
    assert torch.equal(noise, masked.noise(seeded(0)))
    target = plain.sample(noise)
    assert torch.equal(target, masked.sample(noise))
    assert torch.equal(plain.log_prob(target), masked.log_prob(target))
    assert torch.equal(plain.entropy(), masked.entropy())
    assert torch.equal(plain.kl(other), masked.kl(other))


@pytest.mark.parametrize("soft", [False, True])
def test_a_row_that_allows_nothing_is_told(soft: bool) -> None:
    """Unless its weight is 0."""
    logits = randn(2, 3, 4, seed=1)
    logits[1, 2] = -math.inf
    classes = torch.zeros(2, 3, dtype=torch.long)
    target = torch.full_like(logits, 0.25) if soft else classes
    with pytest.raises(ValueError, match=r"all logits of the term \(1, 2\) are -inf: a mask must"):
        CategoricalLoss()(logits, target)
    kept = torch.ones(2, 3, dtype=torch.bool)
    kept[1, 2] = False
    expected = torch.nn.functional.cross_entropy(logits[kept], target[kept])
    close(CategoricalLoss()(logits, target, kept), expected)
