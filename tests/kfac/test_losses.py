"""Losses: values, curvature against autograd, roots and sampled targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
    Reduction,
)
from tests.tools.kfac import NoHostSync, randn, seeded
from tests.tools.losses import (
    MAKERS,
    REDUCTIONS,
    SHAPES,
    STD,
    autograd_hessian,
    close,
    dense,
    divisor,
    gradient,
    made_output,
    made_target,
    moments,
)

every_kind = pytest.mark.parametrize("kind", MAKERS)
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# --- values ---------------------------------------------------------------------------------------


@every_shape
@every_reduction
def test_the_objective_is_that_of_torch(shape: tuple[int, ...], reduction: Reduction) -> None:
    z, width = divisor(shape, reduction), shape[-1]
    logits, labels = made_output("categorical", shape), made_target("categorical", shape)
    total = functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="sum")
    close(CategoricalLoss(reduction=reduction)(logits, labels), total / z)

    logits, wanted = made_output("bernoulli", shape), made_target("bernoulli", shape)
    total = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    close(BernoulliLoss(reduction=reduction)(logits, wanted), total / z)

    mean, wanted = made_output("gaussian", shape), made_target("gaussian", shape)
    total = functional.mse_loss(mean, wanted, reduction="sum") / (2 * STD**2)
    close(GaussianLoss(std=STD, reduction=reduction)(mean, wanted), total / z)

    output, wanted = made_output("learnt", shape), made_target("learnt", shape)
    mean, variance = output[..., :width], (2 * output[..., width:]).exp()
    total = functional.gaussian_nll_loss(mean, wanted, variance, full=True, reduction="sum")
    close(LearntGaussianLoss(reduction=reduction)(output, wanted), total / z)


def test_the_mean_is_over_terms_and_not_over_the_columns_of_the_event() -> None:
    logits, labels = randn(3, 2, 4), made_target("categorical", (3, 2, 4))
    close(CategoricalLoss()(logits, labels), functional.cross_entropy(logits.mT, labels))
    mean, wanted = randn(3, 2, 4), randn(3, 2, 4, seed=1)
    close(GaussianLoss()(mean, wanted), 2 * functional.mse_loss(mean, wanted))


@every_kind
@every_shape
@every_reduction
def test_normalizer_and_empirical_give_the_objective(
    kind: str, shape: tuple[int, ...], reduction: Reduction
) -> None:
    loss = MAKERS[kind](reduction)
    output, target = made_output(kind, shape), made_target(kind, shape)
    z = divisor(shape, reduction)
    assert loss.reduction == reduction
    assert loss.normalizer(output) == (None if reduction == "sum" else z)
    close(loss.empirical(output, target) / z, loss(output, target))
    close(loss.empirical(output, target), MAKERS[kind]("sum")(output, target))


# --- curvature ------------------------------------------------------------------------------------


@every_kind
@every_shape
@every_reduction
def test_the_hessian_over_z_is_that_of_the_objective(
    kind: str, shape: tuple[int, ...], reduction: Reduction
) -> None:
    loss = MAKERS[kind](reduction)
    output = made_output(kind, shape)
    truth = autograd_hessian(loss, kind, output)
    close(dense(loss, output) / divisor(shape, reduction), truth)
    t1, t2 = (randn(*output.shape, seed=seed) for seed in (5, 6))
    form = (t1 * loss.hessian_product(output, t2)).sum() / divisor(shape, reduction)
    close(form, t1.flatten() @ truth @ t2.flatten())


@every_shape
def test_the_learnt_gaussian_has_the_fisher_in_closed_form(shape: tuple[int, ...]) -> None:
    output = made_output("learnt", shape)
    log_std = output.chunk(2, -1)[1]
    wanted = torch.cat([(-2 * log_std).exp(), torch.full_like(log_std, 2)], -1)
    close(dense(LearntGaussianLoss(), output), wanted.flatten().diag())


def test_the_learnt_gaussian_fisher_is_the_expected_outer_product_of_scores() -> None:
    output = made_output("learnt", (1, 1))
    mean, log_std = output.chunk(2, -1)
    # Gauss-Hermite with three nodes is exact for the fourth powers of the noise that occur here.
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for node, weight in ((0.0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6)):
        point = output.clone().requires_grad_()
        score = gradient(LearntGaussianLoss()(point, mean + node * log_std.exp()), point)[0]
        expected += weight * torch.outer(score, score)
    close(dense(LearntGaussianLoss(), output), expected)


@every_kind
def test_the_product_leaves_the_graph_of_the_output(kind: str) -> None:
    output = made_output(kind, (3, 2)).requires_grad_()
    assert not MAKERS[kind]("mean").hessian_product(output, torch.ones_like(output)).requires_grad


# --- roots ----------------------------------------------------------------------------------------


@every_kind
@every_shape
def test_the_roots_rebuild_the_hessian_of_every_sample(kind: str, shape: tuple[int, ...]) -> None:
    output = made_output(kind, shape).requires_grad_()
    truth = autograd_hessian(MAKERS[kind]("sum"), kind, output.detach())
    count, size = len(output), output[0].numel()
    blocks = truth.reshape(count, size, count, size)
    scalars = list(MAKERS[kind]("mean").roots(output))
    assert len(scalars) == size  # (positions, columns)
    columns = [gradient(scalar, output).reshape(count, size) for scalar in scalars]
    for sample in range(count):
        rebuilt = sum(torch.outer(c[sample], c[sample]) for c in columns)
        assert isinstance(rebuilt, Tensor)
        close(rebuilt, blocks[sample, :, sample])
    for scalar, column in zip(scalars, columns, strict=True):
        close(scalar, (column * output.reshape(count, size)).sum())


def test_no_root_spans_two_positions() -> None:
    output = made_output("categorical", (3, 4, 5)).requires_grad_()
    used = [gradient(s, output).abs().sum((0, 2)) > 0 for s in CategoricalLoss().roots(output)]
    assert [int(positions.sum()) for positions in used] == [1] * 20


# --- sampled targets ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_sampled_gradients_have_the_hessian_as_second_moment(
    kind: str, shape: tuple[int, ...]
) -> None:
    loss, draws = MAKERS[kind]("mean"), 40_000
    sample = 0.8 * made_output(kind, (1, *shape), seed=3)
    output = sample.repeat(draws, *[1] * len(shape)).requires_grad_()
    scores = gradient(loss.sampled(output, seeded(11)), output).flatten(1)
    truth = dense(loss, sample)  # proved against autograd above
    mean, error = moments(scores)
    assert bool((mean.abs() <= 4 * error).all())
    second, error = moments(scores[:, :, None] * scores[:, None, :])
    assert bool(((second - truth).abs() <= 4 * error + 1e-12).all())
    assert float(error.max()) < 0.05 * float(truth.max())  # the test has the power to fail


def test_sampled_terms_are_log_likelihoods_of_possible_targets() -> None:
    logits = made_output("categorical", (50, 2, 4)).requires_grad_()
    sampled = CategoricalLoss().sampled(logits, seeded(0))
    drawn = logits.detach().softmax(-1) - gradient(sampled, logits)
    classes = drawn.argmax(-1)
    close(drawn, functional.one_hot(classes, 4).double())
    close(sampled, CategoricalLoss(reduction="sum")(logits, classes))

    logits = made_output("bernoulli", (50, 2, 4)).requires_grad_()
    sampled = BernoulliLoss().sampled(logits, seeded(0))
    drawn = (logits.detach().sigmoid() - gradient(sampled, logits)).round(decimals=12).abs()
    assert set(drawn.flatten().tolist()) == {0.0, 1.0}
    close(sampled, BernoulliLoss(reduction="sum")(logits, drawn))

    for kind in ("gaussian", "learnt"):
        loss, output = MAKERS[kind]("sum"), made_output(kind, (50, 2, 4)).requires_grad_()
        sampled = loss.sampled(output, seeded(0))
        score = gradient(sampled, output)
        mean = output.detach()[..., :4]
        variance = (2 * output.detach()[..., 4:]).exp() if kind == "learnt" else STD**2
        close(sampled, loss(output, mean - variance * score[..., :4]))


@every_kind
def test_the_generator_decides_the_sample(kind: str) -> None:
    loss = MAKERS[kind]("mean")
    output = made_output(kind, (20, 3)).requires_grad_()
    generator = seeded(4)
    first, second = (gradient(loss.sampled(output, generator), output) for _ in range(2))
    again = gradient(loss.sampled(output, seeded(4)), output)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)

    state = torch.random.get_rng_state()
    loss.sampled(output, seeded(4))
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(gradient(loss.sampled(output, None), output), first)


@every_kind
def test_sampling_and_products_do_not_wait_for_the_device(kind: str) -> None:
    output = made_output(kind, (3, 2)).requires_grad_()
    loss = MAKERS[kind]("mean")
    with NoHostSync():  # type: ignore[no-untyped-call]
        gradient(loss.sampled(output, seeded(0)), output)
        list(loss.roots(output))
        loss.hessian_product(output, torch.ones_like(output))


# --- numerical edges ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["categorical", "bernoulli"])
def test_saturated_logits_stay_finite(kind: str) -> None:
    output = torch.tensor([[1e4, -1e4, 0.0], [200.0, 0.0, -200.0]]).requires_grad_()
    loss = MAKERS[kind]("mean")
    target = made_target(kind, (2, 3)).to(torch.int64 if kind == "categorical" else torch.float32)
    found = [loss(output, target), loss.sampled(output, seeded(0)), *loss.roots(output)]
    for scalar in found:
        assert bool(torch.isfinite(scalar)) and bool(torch.isfinite(gradient(scalar, output)).all())
    assert bool(torch.isfinite(loss.hessian_product(output, torch.ones(2, 3))).all())


def test_a_masked_class_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 1.0]).repeat(500, 1).requires_grad_()
    score = gradient(CategoricalLoss().sampled(logits, seeded(0)), logits)
    assert bool(torch.isfinite(score).all()) and float(score[:, 1].abs().max()) == 0
    product = CategoricalLoss().hessian_product(logits, torch.ones(500, 3))
    torch.testing.assert_close(product, torch.zeros(500, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "learnt"])
def test_large_means_round_nothing_off_the_noise(kind: str) -> None:
    mean = torch.full((4000, 1), 1e6)
    std = 1e-3
    output = mean if kind == "gaussian" else torch.cat([mean, mean * 0 + math.log(std)], 1)
    output = output.requires_grad_()
    loss = GaussianLoss(std=std) if kind == "gaussian" else LearntGaussianLoss()
    score = gradient(loss.sampled(output, seeded(0)), output)[:, 0]
    assert float((std * score).var()) == pytest.approx(1, abs=4 * (2 / 4000) ** 0.5)


def test_outputs_that_are_not_finite_pass_through_a_sample() -> None:
    for kind, maker in MAKERS.items():
        output = torch.full_like(made_output(kind, (2, 2)), math.nan).requires_grad_()
        assert bool(gradient(maker("mean").sampled(output, seeded(0)), output).isnan().any())


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_computed_in_single(kind: str, dtype: torch.dtype) -> None:
    loss = MAKERS[kind]("mean")
    half = made_output(kind, (3, 2)).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    target = made_target(kind, (3, 2))
    assert torch.equal(loss(half, target), loss(single, target))
    assert loss.sampled(half, seeded(0)).equal(loss.sampled(single, seeded(0)))
    ones = torch.ones_like(half)
    product = loss.hessian_product(half, ones)
    assert product.dtype == dtype
    assert torch.equal(product, loss.hessian_product(single, ones.float()).to(dtype))
