"""What the algorithms share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acktr.learner import (
    load_optimizer_state,
    optimizer_state,
    scheduled_lr,
    standardised,
    to_floats,
    value_metrics,
)
from acktr.rollout import Batch


def test_schedules() -> None:
    assert scheduled_lr(0.25, 0.0, "linear") == 0.25
    assert scheduled_lr(0.25, 0.4, "linear") == pytest.approx(0.15)
    assert scheduled_lr(0.25, 1.0, "linear") == 0.0
    assert scheduled_lr(0.25, 1.0, "linear", 1.1) == pytest.approx(0.25 / 11)
    assert scheduled_lr(0.25, 1.2, "linear", 1.1) == 0.0
    assert scheduled_lr(0.25, 0.7, "constant") == 0.25


def test_standardised_has_mean_zero_and_deviation_one() -> None:
    found = standardised(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    expected = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert torch.equal(standardised(torch.full((4,), 3.0)), torch.zeros(4))


def test_value_metrics() -> None:
    returns, values = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 2.0])
    batch = Batch(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2), returns, values)
    found = to_floats(value_metrics(torch.tensor(0.5), batch))
    assert found == {"train/value_loss": 0.5, "train/explained_variance": 0.75}


@pytest.mark.parametrize("stepped", [False, True])
def test_optimizer_state_round_trip(stepped: bool) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(module.state_dict())
    first = torch.optim.Adam(module.parameters(), 0.1)
    second = torch.optim.Adam(other.parameters(), 0.1)

    def step(net: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        net.zero_grad()
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    if stepped:
        step(module, first)
        other.load_state_dict(module.state_dict())
    state = optimizer_state(first)
    load_optimizer_state(second, state, other)
    for _ in range(2):
        step(module, first)
        step(other, second)
    assert torch.equal(module.weight, other.weight)
    assert not stepped or float(state["0"]["step"]) == 1  # the saved state is a copy


def test_foreign_optimizer_state_is_refused() -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer)
    deep = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="another network"):
        load_optimizer_state(torch.optim.Adam(deep.parameters()), state, deep)
    wide = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="does not fit parameter 0"):
        load_optimizer_state(torch.optim.Adam(wide.parameters()), state, wide)
