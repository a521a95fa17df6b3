"""Masks and weights of terms: in the objective, in sampled targets, in factors and blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from acktr.kfac import (
    KFAC,
    BernoulliLoss,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    Sampled,
    SumLoss,
    dense_fisher,
)
from acktr.kfac.losses.base import with_weights
from acktr.kfac.losses.sources import Source
from tests.tools.exact import close, gap, stored, within_four_standard_errors
from tests.tools.kfac import build, plain_config, randn, seeded
from tests.tools.losses import MAKERS, REDUCTIONS, autograd_hessian, dense, made_output, made_target
from tests.tools.product_cases import filled

every_kind = pytest.mark.parametrize("kind", MAKERS)


def tokens(*shape: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(size, shape, generator=seeded(seed))


# --- cross-entropy as torch has it ----------------------------------------------------------------

# --- weights of the terms -------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("graded", [False, True])
def test_the_weighted_hessian_is_that_of_the_weighted_objective(
    kind: str, reduction: Any, graded: bool
) -> None:
    output = made_output(kind, (3, 2, 3))
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    weights = weights * torch.tensor([2.0, 0.3], dtype=torch.float64) if graded else weights > 0
    loss = with_weights(MAKERS[kind](reduction), output, weights)
    z = loss.normalizer(output) or 1.0
    assert z == {"mean": float(weights.sum()), "batchmean": 3, "sum": 1}[reduction]
    exact = autograd_hessian(loss, kind, output) * z
    close(dense(loss, output), exact, rtol=1e-9)
    leaf = output.clone().requires_grad_()
    rows = [torch.autograd.grad(r, leaf)[0].reshape(3, -1) for r in loss.roots(leaf)]
    grams = torch.block_diag(*[sum(r[n].outer(r[n]) for r in rows) for n in range(3)])  # type: ignore[arg-type]
    close(grams, exact, rtol=1e-9)
    target = made_target(kind, (3, 2, 3))
    plain = MAKERS[kind](reduction)
    close(loss(output, target), plain(output, target, weights=weights))  # type: ignore[call-arg]
    alone = torch.stack(
        [
            MAKERS[kind]("sum")(output[n : n + 1, t : t + 1], target[n : n + 1, t : t + 1])
            for n in range(3)
            for t in range(2)
        ]
    )
    close(loss(output, target), (weights.flatten() * alone).sum() / z)


@every_kind
def test_what_is_in_masked_terms_does_not_matter(kind: str) -> None:
    output, target = made_output(kind, (4, 3)), made_target(kind, (4, 3))
    mask = torch.tensor([True, False, True, True])
    loss = MAKERS[kind]("mean")
    right = loss(output[mask], target[mask])
    output[1] = torch.nan
    target[1] = -100 if kind == "categorical" else torch.nan
    leaf = output.clone().requires_grad_()
    found = loss(leaf, target, weights=mask)  # type: ignore[call-arg]
    close(found, right)
    bound = with_weights(loss, leaf, mask)
    for scalar in (found, bound.sampled(leaf, seeded(1)), *bound.roots(leaf)):
        (gradient,) = torch.autograd.grad(scalar, leaf)
        assert float(gradient[1].abs().max()) == 0
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), "for the terms"),
        (torch.ones(4, 2, 2), "for the terms"),
        (torch.zeros(4), "not all zero"),
        (-torch.ones(4, 2), ">= 0"),
        (torch.full((4,), torch.nan), "finite"),
        ([1.0] * 4, "for the terms"),
    ],
)
def test_weights_that_do_not_fit(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"GaussianLoss: weights must.*{message}"):
        GaussianLoss()(torch.zeros(4, 2, 3), torch.zeros(4, 2, 3), weights=weights)


def test_observe_wants_the_targets_that_decide_on_weights() -> None:
    model = build(nn.Linear(3, 4))
    optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output = model(randn(5, 3))
    with pytest.raises(ValueError, match=r"observe\(..., target=targets\)"):
        optimizer.observe(captured, output, CategoricalLoss(ignore_index=-100))


# --- factors and blocks ---------------------------------------------------------------------------


def folded(
    model: nn.Module,
    inputs: Tensor,
    loss: OutputLoss[Any],
    source: Source | None = None,
    splits: tuple[slice, ...] = (slice(None),),
    weights: Any = None,
    target: Any = None,
    **settings: Any,
) -> Preconditioner:
    """The curvature after one batch, in micro-batches."""
    curvature = Preconditioner(model, plain_config(**settings))
    for part in splits:
        with curvature.capture() as captured:
            output = model(inputs[part])
        curvature.observe(
            captured,
            output,
            loss,
            source=source or Exact(),
            weights=weights[part] if isinstance(weights, Tensor) else weights,
            target=None if target is None else target[part],
            last=part is splits[-1],
        )
    return curvature


class Tagger(nn.Module):
    """A term for every position, and no position sees another one."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.first = nn.Embedding(5, 3) if embedding else nn.Linear(3, 3)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_padding_counts_nowhere(embedding: bool, structure: Any) -> None:
    """All statistics are those of the positions without padding, each as a sample of its own."""
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 2])[:, None]
    inputs = tokens(5, 4, size=5) if embedding else randn(5, 4, 3)
    model = filled(Tagger(embedding))
    settings = {"structure": structure}
    masked = folded(model, inputs, CategoricalLoss(), weights=mask, **settings)
    alone = folded(model, inputs[mask], CategoricalLoss(), **settings)
    labels = tokens(5, 4, size=4).where(mask, -100)
    ignoring = CategoricalLoss(ignore_index=-100)
    by_target = folded(model, inputs, ignoring, target=labels, **settings)
    parts = (slice(0, 2), slice(2, 5))
    split = folded(model, inputs, CategoricalLoss(), splits=parts, weights=mask, **settings)
    for name in ("first", "head"):
        expected = stored(alone.stats[name])  # type: ignore[arg-type]
        for found in (masked, by_target, split):
            close(stored(found.stats[name]), expected)  # type: ignore[arg-type]
    unmasked = folded(model, inputs, CategoricalLoss(), **settings)
    assert gap(stored(unmasked.stats["head"]), stored(alone.stats["head"])) > 0.01  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tridiagonal"])
def test_a_sample_of_weight_two_is_two_samples(sharing: Any, structure: Any) -> None:
    model = build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs, weights = randn(4, 3), torch.tensor([2.0, 0.0, 1.0, 3.0])
    repeated = inputs.repeat_interleave(weights.long(), 0)
    settings = {"structure": structure, "linear_sharing": sharing}
    found = folded(model, inputs, GaussianLoss(std=0.5), weights=weights, **settings)
    right = folded(model, repeated, GaussianLoss(std=0.5), **settings)
    for mine, other in zip(found.stats.values(), right.stats.values(), strict=True):
        for a, b in zip(mine.averages, other.averages, strict=True):
            if float(b.weight):
                close(a.mean(), b.mean())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_weights_of_pictures(sharing: Any) -> None:
    model = build(
        nn.Conv2d(2, 4, 3, stride=2, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    )
    inputs, weights = randn(4, 2, 5, 6), torch.tensor([2, 0, 1, 1])
    repeated = inputs.repeat_interleave(weights, 0)
    found = folded(model, inputs, CategoricalLoss(), weights=weights, conv_sharing=sharing)
    right = folded(model, repeated, CategoricalLoss(), conv_sharing=sharing)
    for name, block in found.stats.items():
        close(stored(block), stored(right.stats[name]))  # type: ignore[arg-type]


class Recurrent(nn.Module):
    """A term for every sequence, whose padding is packed away."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0, 0] > 0).long() + (x[:, 1, 0] > 0)
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.cells(packed)[1][0])


class Attention(nn.Module):
    """A term for every position, each of which sees all others."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = functional.pad(x, (0, 1), value=1.0)
        return self.head(self.mix(wide, wide, wide, need_weights=False)[0])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("kind", [Recurrent, Attention])
def test_weights_of_samples_in_recurrence_and_attention(
    kind: type[nn.Module], structure: Any, sharing: Any
) -> None:
    model, inputs, weights = filled(kind()), randn(4, 3, 3), torch.tensor([2, 0, 1, 3])
    inputs[:, :2, 0] = torch.tensor([[1.0, 1], [1, -1], [-1, -1], [-1, -1]])  # lengths 3, 2, 1, 1
    repeated = inputs.repeat_interleave(weights, 0)
    settings = {"structure": structure, "linear_sharing": sharing}
    found = folded(model, inputs, CategoricalLoss(), weights=weights, **settings)
    right = folded(model, repeated, CategoricalLoss(), **settings)
    for mine, other in zip(found.stats.values(), right.stats.values(), strict=True):
        for a, b in zip(mine.averages, other.averages, strict=True):
            if float(b.weight):
                torch.testing.assert_close(a.mean(), b.mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("deep", [False, True])
def test_the_weighted_block_is_exact_where_the_factorisation_is(deep: bool) -> None:
    """Linear nets with squared error: g g^T is the same for every term."""
    layers = [nn.Linear(3, 3), nn.Linear(3, 2)] if deep else [nn.Linear(3, 2)]
    model, inputs = build(*layers), randn(4, 3, 3)
    weights = torch.rand(4, 3, generator=seeded(6), dtype=torch.float64)
    weights[1, 2] = weights[3] = 0
    loss = GaussianLoss(std=0.7)
    found = folded(model, inputs, loss, weights=weights)
    bound = with_weights(loss, model(inputs), weights)
    for name, block in found.stats.items():
        names = [f"{name}.weight", f"{name}.bias"]
        fisher = dense_fisher(model, (inputs,), bound, names)
        width, out = layers[0].in_features, layers[int(name)].out_features
        order = torch.cat(
            [
                torch.arange(out * width).reshape(out, width),
                out * width + torch.arange(out)[:, None],
            ],
            1,
        )
        order = order.flatten()
        close(stored(block), fisher[order][:, order])  # type: ignore[arg-type]


def test_a_token_without_a_label_counts_where_a_gradient_reaches_it() -> None:
    """The first layer sees all tokens that others attend to, the head the labelled ones alone."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            hidden = self.first(x)
            score = (hidden @ hidden.mT).masked_fill(~seen[:, None], -torch.inf)
            return self.head(hidden + score.softmax(-1) @ hidden)

    model, inputs = filled(Mixing()), randn(4, 3, 3)
    seen = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]) > 0
    labelled = seen & torch.tensor([True, False, True])
    curvature = Preconditioner(model)
    with curvature.capture() as captured:
        output = model(inputs, seen)
    curvature.observe(captured, output, CategoricalLoss(), weights=labelled)
    ones = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1)
    first, head = (curvature.stats[name].a.mean() for name in ("first", "head"))  # type: ignore[union-attr]
    close(first, ones[seen].mT @ ones[seen] / int(seen.sum()))
    hidden = model.first(inputs)
    score = (hidden @ hidden.mT).masked_fill(~seen[:, None], -torch.inf)
    mixed = hidden + score.softmax(-1) @ hidden
    rows = torch.cat([mixed, torch.ones_like(mixed[..., :1])], -1)[labelled].detach()
    close(head, rows.mT @ rows / len(rows))


def test_the_parts_of_a_sum_have_weights_of_their_own() -> None:
    policy, value = randn(4, 3, 2), randn(4, 1)
    targets = tokens(4, 3, size=2), randn(4, 1, seed=2)
    present = torch.rand(4, 3, generator=seeded(1)) < 0.6
    loss = SumLoss(parts=(CategoricalLoss(), GaussianLoss()), weights=(1.0, 0.5))
    found = loss((policy, value), targets, weights=(present, None))
    right = CategoricalLoss()(policy[present], targets[0][present]) + 0.5 * GaussianLoss()(
        value, targets[1]
    )
    close(found, right)
    bound = with_weights(loss, (policy, value), (present, None))
    assert bound.normalizer((policy, value)) == int(present.sum())
    tangent = randn(4, 3, 2, seed=8), randn(4, 1, seed=9)
    curved = bound.hessian_product((policy, value), tangent)
    close(curved[0][present], CategoricalLoss().hessian_product(policy, tangent[0])[present])
    close(curved[1], tangent[1] * 0.5 * int(present.sum()) / 4)
    shared = torch.tensor([1.0, 0.0, 2.0, 1.0])
    both = loss((policy, value), targets, weights=shared)
    each = CategoricalLoss()(policy, targets[0], weights=shared) + 0.5 * GaussianLoss()(
        value, targets[1], weights=shared
    )
    close(both, each)


def test_sampled_and_empirical_scores_of_weighted_terms() -> None:
    model = build(nn.Linear(3, 3))
    inputs, weights = randn(5, 3), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    exact = folded(model, inputs, BernoulliLoss(), weights=weights).stats["0"]
    sampled, draws = Preconditioner(model, plain_config(stat_decay=0.0)), []
    for _ in range(150):
        with sampled.capture() as captured:
            output = model(inputs)
        sampled.observe(captured, output, BernoulliLoss(), source=Sampled(8), weights=weights)
        draws.append(sampled.stats["0"].g.mean())  # type: ignore[union-attr]
    within_four_standard_errors(torch.stack(draws), exact.g.mean())  # type: ignore[union-attr]
    target = made_target("bernoulli", (5, 3))
    found = folded(model, inputs, BernoulliLoss(), Empirical(target), weights=weights).stats["0"]
    rows = model(inputs).sigmoid() - target
    right = (weights[:, None] * rows).mT @ rows / weights.sum()
    close(found.g.mean(), right.detach())  # type: ignore[union-attr]
