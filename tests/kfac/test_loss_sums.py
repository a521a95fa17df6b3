"""Sums of losses: scales and curvature against the GGN of the objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Empirical, Exact, Preconditioner, dense_kfac
from acktr.kfac.losses.likelihoods import CategoricalLoss, GaussianLoss, Reduction
from acktr.kfac.losses.sums import SumLoss
from tests.tools.kfac import plain_config, randn, seeded
from tests.tools.losses import (
    MAKERS,
    REDUCTIONS,
    close,
    dense,
    gradient,
    hessian,
    jacobian,
    made_output,
    made_target,
    moments,
    spread_targets,
)
from tests.tools.product_cases import filled

every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
HEADS = {"categorical": (3, 2, 4), "gaussian": (3, 1), "bernoulli": (3, 3, 2), "learnt": (3, 2, 1)}
WEIGHTS = (0.5, 3.0, 1.0, 0.25)


def heads(theta: Tensor) -> tuple[Tensor, ...]:
    """Four outputs of one parameter vector (5,), with different numbers of terms."""
    found = []
    for index, (kind, shape) in enumerate(HEADS.items()):
        like = made_output(kind, shape)
        found.append((randn(*like.shape, 5, seed=20 + index) @ theta).tanh() + 0.1 * like)
    return tuple(found)


def sum_loss(reduction: Reduction, weights: tuple[float, ...] | None = WEIGHTS) -> SumLoss:
    return SumLoss(parts=tuple(MAKERS[kind](reduction) for kind in HEADS), weights=weights)


def sum_targets() -> tuple[Tensor, ...]:
    return tuple(made_target(kind, shape) for kind, shape in HEADS.items())


def sum_scales(reduction: Reduction, weights: tuple[float, ...]) -> list[float]:
    """w_k Z_0 / Z_k, by hand: Z is (6, 3, 9, 6) for "mean" and the same for all otherwise."""
    sizes = (6, 3, 9, 6) if reduction == "mean" else (1, 1, 1, 1)
    return [weight * sizes[0] / size for weight, size in zip(weights, sizes, strict=True)]


def ggn_of_objective(loss: SumLoss, theta: Tensor) -> Tensor:
    """J^T (expected Hessian of h) J by autograd alone."""
    outputs = heads(theta)
    jacobians = jacobian(heads, theta)
    stacked = torch.cat([j.reshape(-1, 5) for j in jacobians])
    sizes = [o.numel() for o in outputs]

    def objective(vector: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
        pieces = torch.split(vector, sizes)
        return loss(
            tuple(p.reshape(o.shape) for p, o in zip(pieces, outputs, strict=True)), targets
        )

    # Two targets for the learnt Gaussian, see spread_targets.
    spread = [spread_targets(kind, o) for kind, o in zip(HEADS, outputs, strict=True)]
    flat = torch.cat([o.flatten() for o in outputs])
    pair = [tuple(options[side % len(options)] for options in spread) for side in range(2)]
    curvature = torch.stack([hessian(lambda v, y=y: objective(v, y), flat) for y in pair]).mean(0)
    return stacked.mT @ curvature @ stacked


@every_reduction
@pytest.mark.parametrize("weights", [WEIGHTS, None])
def test_the_curvature_of_a_sum_is_the_ggn_of_its_objective(
    reduction: Reduction, weights: tuple[float, ...] | None
) -> None:
    loss, theta = sum_loss(reduction, weights), randn(5, seed=9).requires_grad_()
    outputs = heads(theta)
    z = {"mean": 6.0, "batchmean": 3.0, "sum": None}[reduction]
    assert loss.reduction == reduction
    assert loss.normalizer(outputs) == z
    truth = ggn_of_objective(loss, theta.detach())
    jacobians = jacobian(heads, theta.detach())

    tangents = [tuple(j[..., i] for j in jacobians) for i in range(5)]
    products = [loss.hessian_product(outputs, tangent) for tangent in tangents]
    by_product = torch.stack(
        [
            sum(torch.einsum("...p,...->p", j, h) for j, h in zip(jacobians, p, strict=True))  # type: ignore[misc]
            for p in products
        ]
    )
    close(by_product / (z or 1), truth)

    # Per sample, because the columns of the roots are shared by the samples.
    rebuilt = torch.zeros(5, 5, dtype=torch.float64)
    for scalar in loss.roots(outputs):
        columns = torch.autograd.grad(scalar, outputs, retain_graph=True, materialize_grads=True)
        for sample in range(3):
            row = sum(
                torch.einsum("...p,...->p", j[sample], c[sample])
                for j, c in zip(jacobians, columns, strict=True)
            )
            assert isinstance(row, Tensor)
            rebuilt += torch.outer(row, row)
    close(rebuilt / (z or 1), truth)


@every_reduction
def test_the_value_and_the_scales_of_a_sum(reduction: Reduction) -> None:
    loss, outputs, targets = sum_loss(reduction), heads(randn(5, seed=9)), sum_targets()
    values = [MAKERS[k](reduction)(o, y) for k, o, y in zip(HEADS, outputs, targets, strict=True)]
    wanted = sum(weight * value for weight, value in zip(WEIGHTS, values, strict=True))
    assert isinstance(wanted, Tensor)
    close(loss(outputs, targets), wanted)


class TwoHeads(nn.Module):
    """One value for every sample, and one for every position of another input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x[:, 0]), self.second(x)


@every_reduction
def test_the_empirical_curvature_at_typical_targets_is_the_exact_one(reduction: Reduction) -> None:
    """Targets one deviation away from a normal mean have the score that is typical of it."""
    model, inputs = filled(TwoHeads()), randn(4, 2, 3)
    parts = GaussianLoss(reduction=reduction), GaussianLoss(reduction=reduction)
    loss = SumLoss(parts=parts, weights=(0.25, 3.0))
    found = []
    for empirical in (False, True):
        curvature = Preconditioner(model, plain_config())
        with curvature.capture() as captured:
            outputs = model(inputs)
        targets = tuple(output.detach() + 1 for output in outputs)
        source = Empirical(targets) if empirical else Exact()
        curvature.observe(captured, outputs, loss, source=source)
        found.append(dense_kfac(curvature))
    close(found[1], found[0])


@every_reduction
def test_a_sum_samples_its_parts_by_turns_with_root_scales(reduction: Reduction) -> None:
    loss = sum_loss(reduction)
    outputs = tuple(o.detach().requires_grad_() for o in heads(randn(5, seed=9)))
    found = torch.autograd.grad(loss.sampled(outputs, seeded(2)), outputs)
    generator = seeded(2)
    for kind, output, scale, score in zip(
        HEADS, outputs, sum_scales(reduction, WEIGHTS), found, strict=True
    ):
        plain = gradient(MAKERS[kind](reduction).sampled(output, generator), output)
        close(score, math.sqrt(scale) * plain)


def test_sampled_gradients_of_a_sum_are_uncorrelated_between_parts() -> None:
    draws = 40_000
    loss = SumLoss(parts=(CategoricalLoss(), GaussianLoss()), weights=(2.0, 0.5))
    logits = randn(1, 3).repeat(draws, 1).requires_grad_()
    mean = randn(1, 2).repeat(draws, 1).requires_grad_()
    scores = torch.cat(
        torch.autograd.grad(loss.sampled((logits, mean), seeded(6)), (logits, mean)), 1
    )
    truth = torch.zeros(5, 5, dtype=torch.float64)
    truth[:3, :3] = 2 * dense(CategoricalLoss(), logits[:1].detach())
    truth[3:, 3:] = 0.5 * dense(GaussianLoss(), mean[:1].detach())
    second, error = moments(scores[:, :, None] * scores[:, None, :])
    assert bool(((second - truth).abs() <= 4 * error + 1e-12).all())
