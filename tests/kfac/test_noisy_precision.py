"""The learnt noise precision is the conjugate optimum, and what it predicts is a Student t."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Gamma, Normal, StudentT, kl_divergence

from acktr.kfac import NoisePrecision, gaussian_log_prob
from tests.tools.kfac import randn, same

SIZE, LAMBDA, A, B = 40, 0.6, 6.0, 5.0


def learnt(**settings: object) -> tuple[NoisePrecision, Tensor]:
    """After a full batch, with its sum of squared errors."""
    output, target = randn(SIZE), randn(SIZE, seed=2)
    plain: dict[str, object] = {"prior_shape": A, "prior_rate": B, "kl_weight": LAMBDA}
    found = NoisePrecision(SIZE, dtype=torch.float64, **plain | settings)  # type: ignore[arg-type]
    found.observe(output, target)
    return found, (target - output).square().sum()


def test_the_gradient_of_the_objective_vanishes_at_the_optimum() -> None:
    precision, errors = learnt()
    log_shape, log_rate = (x.log().requires_grad_() for x in (precision.shape, precision.rate))
    q = Gamma(log_shape.exp(), log_rate.exp())
    expected = 0.5 * (SIZE * (torch.digamma(q.concentration) - log_rate) - errors * q.mean)
    prior = Gamma(torch.tensor(A).double(), torch.tensor(B).double())
    objective = expected - LAMBDA * kl_divergence(q, prior)
    gradients = torch.autograd.grad(objective, [log_shape, log_rate])
    assert all(abs(float(gradient)) < 1e-8 for gradient in gradients)
    assert float(precision.shape) == pytest.approx(A + SIZE / (2 * LAMBDA), rel=1e-12)
    assert float(precision.rate) == pytest.approx(B + float(errors) / (2 * LAMBDA), rel=1e-12)
    assert float(precision.mean()) == pytest.approx(float(q.mean), rel=1e-12)
    assert float(precision.kl()) == pytest.approx(float(kl_divergence(q, prior)), rel=1e-10)
    log = float(torch.digamma(precision.shape) - precision.rate.log())
    assert float(precision.expected_log()) == pytest.approx(log, rel=1e-12)


def test_before_the_first_batch_it_is_the_prior() -> None:
    precision = NoisePrecision(SIZE, 3, prior_shape=A, prior_rate=B)
    assert precision.shape.tolist() == [A] * 3 and precision.rate.tolist() == [B] * 3
    assert precision.kl().tolist() == [0.0] * 3


def test_the_prior_of_the_precision_bounds_what_can_be_learnt() -> None:
    """E tau <= (a + N / (2 lambda)) / b, so that no error at all has a bounded log-likelihood."""
    precision, _ = learnt()
    most = (A + SIZE / (2 * LAMBDA)) / B
    zero = torch.zeros(SIZE, dtype=torch.float64)
    perfect = NoisePrecision(SIZE, prior_shape=A, prior_rate=B, kl_weight=LAMBDA, dtype=zero.dtype)
    perfect.observe(zero, zero)
    assert float(perfect.mean()) == pytest.approx(most, rel=1e-12) and precision.mean() < most
    bound = 0.5 * math.log(most / (2 * math.pi))
    for one in (precision, perfect):
        expected = 0.5 * (one.expected_log() - math.log(2 * math.pi))  # of a target without error
        assert float(expected) < bound


def test_batches_are_averaged_and_several_precisions_are_apart() -> None:
    precision = NoisePrecision(SIZE, 2, prior_rate=B, decay=0.5, dtype=torch.float64)
    first, second = randn(5, 2), randn(5, 2, seed=3)
    for errors in (first, second):
        precision.observe(errors, torch.zeros_like(errors))
    mean = (first.square().mean(0) + 2 * second.square().mean(0)) / 3
    torch.testing.assert_close(precision.rate, B + SIZE * mean / 2)
    with pytest.raises(ValueError, match=r"has the shape \(2,\), and a term of the errors \(\)"):
        precision.observe(first[:, 0], first[:, 0])


def test_the_mean_density_over_samples_is_that_of_a_student_t() -> None:
    """2 alpha degrees of freedom and the squared scale beta / alpha; the log of a mean is low."""
    precision, _ = learnt()
    target, output = torch.tensor(0.7).double(), torch.tensor(0.2).double()
    scale = (precision.rate / precision.shape).sqrt()
    exact = StudentT(2 * precision.shape, output, scale).log_prob(target)
    draws = torch.stack([precision.sample() for _ in range(20000)])
    densities = gaussian_log_prob(output, target, draws).exp()
    error = float(densities.std()) / len(draws) ** 0.5
    assert abs(float(densities.mean()) - math.exp(float(exact))) < 4 * error
    assert float(densities.log().mean()) < float(exact)
    torch.testing.assert_close(draws.mean(), precision.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    "output, target", [((50, 1), (50,)), ((50,), (50, 1)), ((5, 3), (5, 1)), ((3,), (5, 3))]
)
def test_a_target_of_another_shape_is_refused(
    output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    """Torch would take every target for every output, and say nothing."""
    first, second = torch.zeros(output), torch.zeros(target)
    with pytest.raises(ValueError, match="the target must have the output's shape"):
        gaussian_log_prob(first, second, 1.0)
    for count in (None, 3):
        precision = NoisePrecision(SIZE, count)
        with pytest.raises(ValueError, match="they must have one shape"):
            precision.observe(first, second)
        assert precision.mean().isfinite().all() and not precision._errors.weight


def test_samples_lead_the_outputs_and_the_precisions() -> None:
    outputs, target, taus = randn(4, 5, 3), randn(5, 3, seed=1), randn(4, seed=2).exp()
    found = gaussian_log_prob(outputs, target, taus[:, None, None])
    for output, tau, one in zip(outputs, taus, found, strict=True):
        exact = Normal(output, tau.rsqrt()).log_prob(target)
        torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"output \(4, 5, 3\) and a precision \(4,\)"):
        gaussian_log_prob(outputs, target, taus)
    with pytest.raises(ValueError, match=r"output \(5, 1\) and a precision \(5,\)"):
        gaussian_log_prob(target[:, :1], target[:, :1], torch.ones(5))


def test_a_state_goes_on_and_another_one_is_refused() -> None:
    precision, _ = learnt()
    other, _ = learnt(seed=5)
    other.load_state_dict(precision.state_dict())
    assert torch.equal(other.sample(), precision.sample())
    before = other.state_dict()
    with pytest.raises(ValueError, match="NoisePrecision state"):
        other.load_state_dict(NoisePrecision(SIZE, 2, dtype=torch.float64).state_dict())
    assert same(other.state_dict(), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prior_shape": 0.0}, "prior_shape must be a finite number > 0"),
        ({"kl_weight": 0.0}, "kl_weight must be a finite number > 0"),
        ({"decay": 1.0}, r"decay must be a number in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisePrecision(SIZE, **settings)  # type: ignore[arg-type]
