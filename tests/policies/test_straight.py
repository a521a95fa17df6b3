"""Forward passes without the calls between modules."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from acktr.config import NetworkConfig
from acktr.policies import action_head, build_network, straight

SPACES = {
    "vector": gymnasium.spaces.Box(-1, 1, (5,), np.float32),
    "table": gymnasium.spaces.Box(-1, 1, (5, 2), np.float32),
    "number": gymnasium.spaces.Discrete(4),
    "pair": gymnasium.spaces.Dict(
        {"a": gymnasium.spaces.Box(-1, 1, (3,), np.float32), "b": gymnasium.spaces.Discrete(2)}
    ),
}


def observed(space: gymnasium.Space[Any], rows: int) -> Any:
    """Observations as a network takes them."""
    if isinstance(space, gymnasium.spaces.Dict):
        return {name: observed(part, rows) for name, part in space.spaces.items()}
    if isinstance(space, gymnasium.spaces.Discrete):
        return torch.randint(int(space.n), (rows,))
    return torch.randn(rows, *(space.shape or ()))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("rows", [1, 8, 200])
@pytest.mark.parametrize("activation", ["tanh", "relu", "elu"])
def test_same_bits(name: str, rows: int, activation: Any) -> None:
    torch.manual_seed(0)
    space = SPACES[name]
    head = action_head(gymnasium.spaces.Box(-1, 1, (2,), np.float32))
    config = NetworkConfig(shared=False, activation=activation)
    actor = build_network(space, head, config).actor
    called = straight(actor)
    for _ in range(2):
        seen = observed(space, rows)
        assert torch.equal(called(seen), actor(seen))
        with torch.no_grad():  # as optimizers change parameters
            for parameter in actor.parameters():
                parameter.add_(0.1)


def test_whoever_listens_to_a_module_still_hears() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    heard: list[nn.Module] = []
    net[1][1].register_forward_hook(lambda module, _, output: heard.append(module))
    net[0].register_forward_pre_hook(lambda module, given: (given[0] + 1,))
    seen = torch.randn(5, 3)
    assert torch.equal(straight(net)(seen), net(seen))
    assert heard == [net[1][1]] * 2


def test_modules_of_ones_own_are_asked_for_their_pass() -> None:
    class Doubled(nn.Sequential):
        def forward(self, given: Any) -> Any:
            return 2 * super().forward(given)

    net = nn.Sequential(Doubled(nn.Linear(3, 4)), nn.ReLU())
    seen = torch.randn(5, 3)
    assert torch.equal(straight(net)(seen), net(seen))
