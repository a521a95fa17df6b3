"""K-FAC inside ordinary training loops: precision, momentum, samples, schedulers, copies."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from acktr.kfac import KFAC, CategoricalLoss, Preconditioner
from tests.tools.kfac import build, factors, kfac, mlp, plain_config, randn, set_gradients

LABELS = torch.arange(12) % 3


def step(model: nn.Module, optimizer: KFAC, inputs: torch.Tensor) -> None:
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, CategoricalLoss())
    optimizer.zero_grad()
    loss = CategoricalLoss()(output, LABELS)
    loss.backward()
    optimizer.step()


def test_statistics_inside_autocast_are_those_outside_of_it() -> None:
    inputs = randn(12, 4).float()
    found = []
    for inside in (True, False):
        model = mlp().float()
        optimizer = kfac(model)
        with torch.autocast("cpu", torch.bfloat16):
            with optimizer.capture() as captured:
                output = model(inputs)
            if inside:
                optimizer.observe(captured, output, CategoricalLoss())
        if not inside:
            optimizer.observe(captured, output, CategoricalLoss())
        found.append([*factors(optimizer, "0"), *factors(optimizer, "2")])
    assert all(a.dtype == torch.float32 for a in found[0])
    assert all(map(torch.equal, *found))


def test_a_step_inside_autocast_is_that_outside_of_it() -> None:
    directions = []
    for inside in (True, False):
        model = mlp().float()
        optimizer = kfac(model)
        with optimizer.capture() as captured:
            output = model(randn(12, 4).float())
        optimizer.observe(captured, output, CategoricalLoss())
        set_gradients(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            optimizer.refresh()
            directions.append(optimizer.direction())
    assert all(torch.equal(directions[0][n], directions[1][n]) for n in directions[1])


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tridiagonal"])
def test_half_precision_parameters_step_like_single_ones(structure: str) -> None:
    moved = []
    for dtype in (torch.bfloat16, torch.float32):
        model = mlp().to(dtype)
        if dtype == torch.float32:
            model.load_state_dict(mlp().bfloat16().state_dict())
        before = [p.detach().float().clone() for p in model.parameters()]
        optimizer = kfac(
            model, kl_clip=None, lr=0.5, momentum=0.0, damping=0.1, structure=structure
        )
        step(model, optimizer, randn(12, 4).to(dtype))
        assert factors(optimizer, "0")[0].dtype == torch.float32
        after = [p.detach().float() for p in model.parameters()]
        moved.append(torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)]))
    assert torch.nn.functional.cosine_similarity(moved[0], moved[1], dim=0) > 0.98


def test_the_trust_region_counts_the_momentum_of_the_torch_optimizer() -> None:
    scales = []
    for lr, momentum in ((0.1, 0.9), (1.0, 0.0)):
        model = mlp()
        curvature = Preconditioner(model, plain_config(kl_clip=1e-6))
        with curvature.capture() as captured:
            output = model(randn(12, 4))
        curvature.observe(captured, output, CategoricalLoss())
        set_gradients(model)
        info = curvature.precondition(lr=lr, momentum=momentum)
        assert info is not None
        scales.append(float(info.scale))
    assert scales[0] == pytest.approx(scales[1], rel=1e-9)
    assert scales[0] < 1


def test_the_number_of_samples_may_differ_from_the_leading_dimension() -> None:
    """Positions flattened into the batch: G is still a mean over samples."""
    model = build(nn.Linear(4, 3))
    noise, inputs = randn(24, 3, seed=3), randn(24, 4)
    found = []
    for samples in (None, 6):
        optimizer = kfac(model)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.update_curvature(captured, (noise * output).sum(), samples=samples)
        found.append(factors(optimizer, "0"))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], noise.mT @ noise / 6, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0][1], noise.mT @ noise / 24, rtol=1e-12, atol=0)


def test_schedulers_go_on_after_a_resume() -> None:
    model = mlp()
    optimizer = kfac(model, lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(3):
        step(model, optimizer, randn(12, 4))
        scheduler.step()
    resumed = kfac(mlp(), lr=0.9)
    resumed.load_state_dict(optimizer.state_dict())
    again = torch.optim.lr_scheduler.StepLR(resumed, 2, gamma=0.5, last_epoch=2)
    assert again.base_lrs == [0.4]
    torch.optim.lr_scheduler.OneCycleLR(kfac(mlp()), 0.1, total_steps=10)


def test_copies_are_refused() -> None:
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(kfac(mlp()))


def test_weight_decay_reaches_matrices_without_a_block() -> None:
    model = build(nn.Linear(4, 3))
    model.register_parameter("extra", nn.Parameter(randn(2, 2)))
    with pytest.warns(UserWarning, match="extra"):
        optimizer = kfac(model, weight_decay=0.5)
    gradients = set_gradients(model)
    expected = gradients["extra"] + 0.5 * model.extra.detach()
    torch.testing.assert_close(optimizer.direction()["extra"], expected, rtol=1e-14, atol=0)
    assert torch.equal(optimizer.direction()["0.bias"], gradients["0.bias"])


def test_a_chain_that_cannot_be_inverted_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = build(nn.Linear(4, 3), nn.Linear(3, 2))
    config = {"structure": "tridiagonal", "damping": 1e-40}
    optimizer = kfac(model, refresh_interval=1, **config)
    with caplog.at_level(logging.WARNING), optimizer.capture() as captured:
        output = model(randn(1, 4))
    optimizer.update_curvature(captured, output.sum())
    optimizer.refresh()
    assert optimizer.failures == 1
    assert "K-FAC chain keeps its former decomposition" in caplog.text


def test_a_delay_beyond_the_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refresh_delay must be at most refresh_interval \(2\)"):
        plain_config(refresh_interval=2, refresh_delay=3)
