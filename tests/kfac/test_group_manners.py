"""Parameter groups under a program's hands: lr 0, schedulers, divided gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from acktr.kfac import KFAC, CategoricalLoss, KFACConfig, Preconditioner


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 3


def update(optimizer: KFAC, module: nn.Module) -> None:
    loss = CategoricalLoss()
    with optimizer.capture() as captured:
        output = module(X)
    optimizer.observe(captured, output, loss)
    optimizer.zero_grad()
    loss(output, Y).backward()
    optimizer.step()


@pytest.mark.parametrize("config", [KFACConfig(), KFACConfig.for_rl()])
def test_a_group_whose_lr_is_zero_stands_still(config: KFACConfig) -> None:
    """Momentum and all, as torch's SGD; it moves again when its lr is back."""
    module = net()
    groups = [{"params": module[0].parameters()}, {"params": module[2].parameters()}]
    optimizer = KFAC(module, config, param_groups=groups)
    for _ in range(4):
        update(optimizer, module)
    lr = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in module.parameters()]
    for _ in range(3):
        update(optimizer, module)
    first, second = before[:2], before[2:]
    assert all(torch.equal(p, q) for p, q in zip(module[0].parameters(), first, strict=True))
    assert all(not torch.equal(p, q) for p, q in zip(module[2].parameters(), second, strict=True))
    optimizer.param_groups[0]["lr"] = lr
    update(optimizer, module)
    assert all(not torch.equal(p, q) for p, q in zip(module[0].parameters(), first, strict=True))


def test_all_groups_may_stand_still() -> None:
    module = net()
    optimizer = KFAC(module)
    update(optimizer, module)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in module.parameters()]
    update(optimizer, module)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_schedule_without_effect_is_told_whoever_makes_it(groups: int) -> None:
    module = net()
    parts = [{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": 0.5}]
    given: Any = None if groups == 1 else parts
    config = KFACConfig(quadratic="kronecker", kl_clip=1e-6, lr=1.0)
    optimizer = KFAC(module, config, param_groups=given)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update(optimizer, module)
        schedule.step(1.0)
        update(optimizer, module)
    schedule.step(2.0)
    with pytest.warns(UserWarning, match="the schedule of lr has no effect"):
        update(optimizer, module)


@pytest.mark.parametrize("kind", ["OneCycleLR", "CyclicLR"])
def test_schedulers_go_on_after_a_state(kind: str) -> None:
    """Their numbers lie in the groups; a scheduler that is made again finds them there."""

    def scheduled(optimizer: KFAC, last: int = -1) -> Any:
        if kind == "OneCycleLR":
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, 20, last_epoch=last)
        return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 0.5, 5, last_epoch=last)

    rates: list[list[float]] = [[], []]
    module = net()
    optimizer = KFAC(module, KFACConfig.for_rl())
    schedule = scheduled(optimizer)
    for _ in range(4):
        update(optimizer, module)
        schedule.step()
    state = optimizer.state_dict()
    for _ in range(4):
        schedule.step()
        rates[0].append(optimizer.param_groups[0]["lr"])
    other = KFAC(net(), KFACConfig.for_rl())
    other.load_state_dict(state)
    again = scheduled(other, last=4) if kind == "OneCycleLR" else scheduled(other)
    if kind == "CyclicLR":
        again.load_state_dict({**again.state_dict(), "last_epoch": 4})
    for _ in range(4):
        again.step()
        rates[1].append(other.param_groups[0]["lr"])
    if kind == "OneCycleLR":  # whose construction takes a step of its own
        assert rates[1][:3] == pytest.approx(rates[0][1:])
    else:
        assert rates[1] == pytest.approx(rates[0])


@pytest.mark.parametrize(
    ("name", "value"), [("params", 1.0), ("names", 1.0), ("max_lr", "x"), ("max_lr", float("nan"))]
)
def test_other_entries_are_refused(name: str, value: Any) -> None:
    optimizer = KFAC(net())
    optimizer.param_groups[0]["names"] = ["a"]
    state = optimizer.state_by_name()
    state["groups"] = [{**group, name: value} for group in state["groups"]]
    with pytest.raises(ValueError, match=name):
        optimizer.load_by_name(state)


@pytest.mark.parametrize("divisor", [2.0, 4.0, 64.0])
def test_gradients_may_be_divided_by_a_number_of_processes(divisor: float) -> None:
    module, loss = net(), CategoricalLoss()
    curvature = Preconditioner(module)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(4):
        with curvature.capture() as captured:
            output = module(X)
        curvature.observe(captured, output, loss)
        sgd.zero_grad()
        loss(output, Y).backward()
        curvature.precondition(lr=0.1)
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad /= divisor
        sgd.step()
