"""Steps with the diagonal of the Fisher, and states of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    FactorError,
    GaussianLoss,
    Preconditioner,
    curved_names,
    dense_inverse,
    dense_kfac,
)
from acktr.kfac.blocks import diagonal
from acktr.kfac.blocks.diagonal import PRIOR
from tests.kfac.test_diagonal import NETS, Pooling, Recurrent, every_net, moments, observed, rest
from tests.tools.kfac import plain_config, randn, same, snapshot
from tests.tools.product_cases import filled


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_entries_are_drawn_to_their_mean_by_the_batches_seen(decay: float) -> None:
    model = filled(Pooling())
    curvature = observed(model, randn(4, 3, 3), GaussianLoss(), stat_decay=decay)
    for turn in range(4):
        if turn:
            with curvature.capture() as captured:
                output = model(randn(4, 3, 3, seed=turn))
            curvature.observe(captured, output, GaussianLoss())
        weights = decay ** torch.arange(turn + 1, dtype=torch.float64)
        batches = float(weights.sum().square() / weights.square().sum())
        for block in rest(curvature).values():
            moment = block.moment.mean()
            wanted = (batches * moment + PRIOR * moment.mean()) / (batches + PRIOR)
            torch.testing.assert_close(block.fisher(), wanted, rtol=1e-12, atol=0)
            assert float(block.fisher().mean()) == pytest.approx(float(moment.mean()), rel=1e-12)


def first_step(seed: int) -> float:
    """Length of a step after one batch, over that with the exact diagonal of its Fisher."""
    torch.manual_seed(seed)
    model, inputs = nn.Bilinear(6, 6, 8).double(), randn(32, 6, seed=seed)
    curvature = Preconditioner(model, plain_config(damping=1e-8), seed=seed)
    with curvature.capture() as captured:
        output = model(inputs, inputs)
    curvature.observe(captured, output, GaussianLoss())
    GaussianLoss()(output, randn(32, 8, seed=seed + 50)).backward()
    gradients = curvature.gradients()
    fisher = (inputs[:, :, None] * inputs[:, None]).square().mean(0)
    step = curvature.direction(gradients)["weight"].detach()
    return float(step.norm() / (gradients["weight"] / fisher).detach().norm())


def test_the_first_step_is_not_wild(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch's squares many are near zero: by themselves they would make steps of any length.

    Without a prior the median is 2000 times the right length.
    """
    lengths = [first_step(seed) for seed in range(20)]
    assert max(lengths) < 1.5 and min(lengths) > 0.5
    monkeypatch.setattr(diagonal, "PRIOR", 1e-6)
    assert max(first_step(seed) for seed in range(3)) > 100


@every_net
def test_dense_views_and_directions_agree(name: str) -> None:
    make, shape = NETS[name]
    model, inputs = filled(make()), randn(*shape)
    curvature = observed(model, inputs, GaussianLoss(), damping=0.07)
    curvature.refresh()
    assert curved_names(curvature) == [n for n, _ in model.named_parameters()]
    product = dense_kfac(curvature, damped=True) @ dense_inverse(curvature)
    torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-9)


def test_there_is_no_warning_and_a_step_of_the_right_length() -> None:
    model = filled(Pooling())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, plain_config(kl_clip=None, lr=1.0, momentum=0.0))
    with optimizer.capture() as captured:
        output = model(randn(4, 3, 3))
    optimizer.observe(captured, output, GaussianLoss())
    GaussianLoss()(output, torch.ones_like(output)).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, block in rest(optimizer.curvature).items():
        parameter = dict(model.named_parameters())[name]
        wanted = before[name] - parameter.grad / (block.fisher() + 0.01)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delay", [None, 1])
def test_training_resumes_bit_exactly(delay: int | None) -> None:
    def run(optimizer: KFAC, model: nn.Module, steps: range) -> None:
        for step in steps:
            inputs = randn(4, 3, 3, seed=step)
            with optimizer.capture() as captured:
                output = model(inputs)
            optimizer.observe(captured, output, CategoricalLoss(), source=Exact())
            optimizer.zero_grad()
            CategoricalLoss()(output, torch.arange(4) % 3).backward()
            optimizer.step()

    settings = plain_config(refresh_interval=2, refresh_delay=delay)
    model = filled(Recurrent())
    optimizer = KFAC(model, settings)
    run(optimizer, model, range(5))
    other = Recurrent().double()
    other.load_state_dict(model.state_dict())
    resumed = KFAC(other, settings, seed=9)
    resumed.load_state_dict(snapshot(optimizer))
    run(optimizer, model, range(5, 9))
    run(resumed, other, range(5, 9))
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    optimizer.close()
    resumed.close()


def test_a_state_of_another_setting_is_refused() -> None:
    model = filled(Recurrent())
    for setting in ("gradient", "dense"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = Preconditioner(model, plain_config(small_parameters=setting))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"no statistics of .*made with another small_param"):
            Preconditioner(model).load_state_dict(other.state_dict())


def test_batches_of_nan_are_counted_and_are_an_error_in_the_end() -> None:
    model = filled(Pooling())
    curvature = Preconditioner(model, plain_config(max_failures=3))
    for turn in range(4):
        with curvature.capture() as captured:
            output = model(randn(4, 3, 3) * (1.0 if turn == 0 else torch.nan))
        curvature.observe(captured, output, GaussianLoss())
        if turn < 3:
            curvature.refresh()
            assert bool(torch.isfinite(moments(curvature)).all())
    with pytest.raises(FactorError, match="parameter 'query': the statistics of 3 batches"):
        curvature.refresh()


def test_a_first_batch_of_nan_leaves_the_plain_gradient() -> None:
    model = filled(Pooling())
    curvature = observed(model, randn(4, 3, 3) * torch.nan, GaussianLoss())
    model(randn(4, 3, 3)).sum().backward()
    gradients = curvature.gradients()
    assert same(curvature.direction(gradients), gradients)
