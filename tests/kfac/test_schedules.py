"""Schedulers of torch on a trust region that binds: they take their part of a step, or are told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from acktr.kfac import KFAC, CategoricalLoss, Exact, GaussianLoss, SumLoss, dense_fisher
from tests.tools.kfac import build, parameters, plain_config, randn

FULL, CLIP = 0.5, 1e-5


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 3, 2), nn.GroupNorm(1, 3)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.conv(x[:, None])).tanh().flatten(1))
        return output


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden)


def made(kind: str, **settings: Any) -> tuple[nn.Module, Any, KFAC]:
    """A network, its loss, and an optimizer whose radius binds at every step."""
    bound: Any = (CLIP, CLIP) if kind == "heads" else CLIP
    model = build(Heads() if kind == "heads" else Convolutional())[0]
    loss: Any = SumLoss(CategoricalLoss(), GaussianLoss()) if kind == "heads" else CategoricalLoss()
    rule = settings.pop("step_rule", "trust_region")
    config = plain_config(**{"lr": FULL, "kl_clip": bound, "momentum": 0.9, **settings})
    return model, loss, KFAC(model, config, step_rule=rule)


def take(model: nn.Module, loss: Any, optimizer: KFAC, index: int) -> Tensor:
    """A step on a batch; the change of the parameters."""
    x = randn(60, 4, seed=index)
    with optimizer.capture() as captured:
        output = model(x)
    optimizer.observe(captured, output, loss, source=Exact())
    label = x[:, :3].argmax(1)
    optimizer.zero_grad()
    loss(output, (label, x[:, :1]) if isinstance(output, tuple) else label).backward()
    before = parameters(model)
    optimizer.step()
    moves = [(p.detach() - before[n]).flatten() for n, p in model.named_parameters()]
    return torch.cat(moves)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["conv", "heads"])
def test_a_schedule_takes_its_part_of_every_step(kind: str, momentum: float) -> None:
    """Beside a twin that is set back to the same state and takes the whole step."""
    model, loss, optimizer = made(kind, momentum=momentum)
    whole, _, other = made(kind, momentum=momentum)
    schedule = lr_scheduler.StepLR(optimizer, 2, 0.3)
    for index in range(6):
        part = 0.3 ** (index // 2)
        whole.load_state_dict(model.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["lr"] = FULL
        other.load_state_dict(state)
        fisher = dense_fisher(model, (randn(60, 4, seed=index),), loss)
        step, full = take(model, loss, optimizer, index), take(whole, loss, other, index)
        torch.testing.assert_close(step, part * full, rtol=1e-6, atol=1e-12)
        mine, theirs = optimizer.last_step, other.last_step
        assert mine is not None and theirs is not None
        promised = float(mine.predicted_kl)
        assert promised == pytest.approx(part**2 * float(theirs.predicted_kl), rel=1e-6)
        spent = float(step @ fisher @ step) / 2
        assert 0.4 < spent / promised < 2.5
        if kind == "conv" and momentum == 0:
            assert promised == pytest.approx(part**2 * CLIP / 2, rel=1e-6)
        schedule.step()


def test_steps_of_length_zero_leave_nothing_that_breaks_the_promise() -> None:
    model, loss, optimizer = made("conv")
    schedule = lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, max(0.0, (n - 2) / 4)))
    for index in range(9):
        fisher = dense_fisher(model, (randn(60, 4, seed=index),), loss)
        step = take(model, loss, optimizer, index)
        info = optimizer.last_step
        assert info is not None
        spent, promised = float(step @ fisher @ step) / 2, float(info.predicted_kl)
        if index <= 2:
            assert spent == promised == 0
        else:
            part = min(1.0, (index - 2) / 4)
            assert 0.4 < spent / promised < 2.5
            assert promised <= part**2 * CLIP / 2 * (1 + 1e-9)
        schedule.step()


def test_no_schedule_lengthens_a_step_beyond_the_radius() -> None:
    model, loss, optimizer = made("conv", momentum=0.0)
    optimizer.param_groups[0]["lr"] = 3 * FULL
    take(model, loss, optimizer, 0)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.predicted_kl) == pytest.approx(CLIP / 2)


def test_a_step_size_that_is_set_keeps_the_radius_also_after_a_resume() -> None:
    model, loss, optimizer = made("conv", momentum=0.0)
    take(model, loss, optimizer, 0)
    optimizer.lr = 0.1
    again, _, resumed = made("conv", momentum=0.0)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for mine, net in ((optimizer, model), (resumed, again)):
        take(net, loss, mine, 1)
        assert mine.last_step is not None
        assert float(mine.last_step.predicted_kl) == pytest.approx(CLIP / 2)
    resumed.load_state_dict(made("conv", momentum=0.0)[2].state_dict())
    resumed.param_groups[0]["lr"] = 0.1  # of 0.5 again
    take(again, loss, resumed, 2)
    assert resumed.last_step is not None
    assert float(resumed.last_step.predicted_kl) == pytest.approx(0.2**2 * CLIP / 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_state_brings_its_full_step_size_to_an_optimizer_made_with_another(groups: int) -> None:
    def grouped(lr: float) -> tuple[nn.Module, KFAC]:
        model = build(Convolutional())[0]
        parts = [[*model.conv.parameters(), *model.norm.parameters()], [*model.head.parameters()]]
        config = plain_config(lr=lr, kl_clip=CLIP)
        return model, KFAC(
            model, config, param_groups=[{"params": p} for p in parts] if groups == 2 else None
        )

    (model, optimizer), (other, resumed) = grouped(0.1), grouped(FULL)
    take(model, CategoricalLoss(), optimizer, 0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for index in (1, 2):
        steps = [
            take(net, CategoricalLoss(), each, index)
            for net, each in ((model, optimizer), (other, resumed))
        ]
        assert torch.equal(*steps)


def test_a_state_without_a_full_step_size_leaves_that_of_the_construction() -> None:
    model, loss, optimizer = made("conv", momentum=0.0)
    state = optimizer.state_by_name()  # as files of former versions have it
    state["groups"] = [{**group, "lr": 0.1} for group in state["groups"]]
    for group in state["groups"]:
        del group["full_lr"]
    optimizer.load_state_dict(state)
    take(model, loss, optimizer, 0)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.predicted_kl) == pytest.approx(0.2**2 * CLIP / 2)


@pytest.mark.parametrize("settings", [{"quadratic": "kronecker"}, {"quadratic": "exact"}], ids=str)
def test_a_schedule_without_effect_is_told_once(settings: dict[str, Any]) -> None:
    for clip in (CLIP, 1e9):
        model, loss, optimizer = made("conv", kl_clip=clip, **settings)
        schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for index in range(4):
                take(model, loss, optimizer, index)
                schedule.step()
        told = [w for w in seen if "schedule of lr has no effect: kl_clip binds" in str(w.message)]
        assert len(told) == (1 if clip == CLIP else 0)
        assert all(w.filename == __file__ for w in told)


def test_a_schedule_of_a_rate_that_no_step_has_is_told() -> None:
    model, loss, optimizer = made("conv", step_rule="quadratic_model")
    schedule = lr_scheduler.StepLR(optimizer, 1, 0.5)
    take(model, loss, optimizer, 0)
    schedule.step()
    with pytest.warns(UserWarning, match="no effect: step_rule="):
        take(model, loss, optimizer, 1)


@pytest.mark.filterwarnings("error")
def test_a_step_size_that_is_set_by_hand_is_no_schedule() -> None:
    model, loss, optimizer = made("conv", quadratic="kronecker")
    for index in range(3):
        optimizer.lr = FULL / (1 + index)
        take(model, loss, optimizer, index)
