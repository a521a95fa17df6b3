"""What the algorithms share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acktr.algorithms.learner import (
    load_optimizer_state,
    optimizer_state,
    scheduled_lr,
    to_floats,
    used_advantages,
    value_metrics,
)
from acktr.config import Config
from acktr.rollout import Batch


def test_schedules() -> None:
    assert scheduled_lr(0.25, 0.0, "linear") == 0.25
    assert scheduled_lr(0.25, 0.4, "linear") == pytest.approx(0.15)
    assert scheduled_lr(0.25, 1.0, "linear") == 0.0
    assert scheduled_lr(0.25, 1.0, "linear", 1.1) == pytest.approx(0.25 / 11)
    assert scheduled_lr(0.25, 1.2, "linear", 1.1) == 0.0
    assert scheduled_lr(0.25, 0.7, "constant") == 0.25


def advantages_alone(advantages: torch.Tensor) -> Batch:
    return Batch(*[torch.zeros_like(advantages)] * 2, advantages, *[advantages] * 2)


def test_standardised_has_mean_zero_and_deviation_one() -> None:
    config = Config(env="none", normalize_advantage=True)
    given = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    expected = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / (14 / 3) ** 0.5
    found = used_advantages(advantages_alone(given), config)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    equal = advantages_alone(torch.full((4,), 3.0))
    assert torch.equal(used_advantages(equal, config), torch.zeros(4))
    assert used_advantages(equal, Config(env="none")) is equal.advantages


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
    for forged, why in (
        ({"step": state["0"]["step"]}, "must have"),
        ({**state["0"], "step": torch.zeros(2, 3)}, "step does not fit"),
        ({**state["0"], "exp_avg": torch.zeros(())}, "exp_avg does not fit"),
        ({**state["0"], "exp_avg": torch.zeros(2, 3).double()}, "exp_avg does not fit"),
    ):
        with pytest.raises(ValueError, match=why):
            load_optimizer_state(optimizer, {**state, "0": forged}, module)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_optimizer_state_of_channels_last_weights(kind: str) -> None:
    """Fused optimizers walk through memory: the state must lie there as the weights do."""

    def made(module: nn.Module) -> torch.optim.Optimizer:
        if kind == "adam":
            return torch.optim.Adam(module.parameters(), 0.1, fused=True)
        return torch.optim.SGD(module.parameters(), 0.1, momentum=0.9, fused=True)

    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    nets = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]  # type: ignore[call-overload]
    optimizers = [made(net) for net in nets]

    def step(index: int) -> None:
        optimizers[index].zero_grad()
        nets[index](images).square().sum().backward()
        optimizers[index].step()

    step(0)
    nets[1].load_state_dict(nets[0].state_dict())
    stored = {
        place: {name: value.contiguous() for name, value in values.items()}
        for place, values in optimizer_state(optimizers[0]).items()
    }
    load_optimizer_state(optimizers[1], stored, nets[1])
    for index in range(2):
        step(index)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)
