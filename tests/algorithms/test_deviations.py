"""The Fisher of log standard deviations: known in the built-in networks, else estimated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

from acktr import ACKTRUpdate, preset
from acktr.algorithms.acktr import ACKTRLearner
from acktr.config import NetworkConfig
from acktr.policies import action_head, build_network, free_deviation

ROWS, ACTIONS = 4096, spaces.Box(-1, 1, (6,))
USES: dict[str, tuple[int, Callable[[Tensor], Tensor], float]] = {
    "one for all actions": (1, lambda p: p.expand(6), 12.0),
    "beyond a limit": (6, lambda p: p.clamp(-20, -0.5), 0.0),
    "softplus": (6, lambda p: functional.softplus(p).log(), 0.5 / math.log(2) ** 2),
    "free": (6, lambda p: 1 * p, 2.0),
}
"""Size of a parameter named log_std, what becomes of it, and its Fisher at zero."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Policy(nn.Module):
    def __init__(self, use: str) -> None:
        super().__init__()
        size, self.deviation, self.fisher = USES[use]
        self.mean, self.log_std = nn.Linear(3, 6), nn.Parameter(torch.zeros(size))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(observations), self.deviation(self.log_std)


def block_of(learner: Any, name: str) -> Any:
    (block,) = (each for each in learner.actor.curvature.blocks if name in each.names)
    return block


@pytest.mark.parametrize("use", USES)
def test_the_fisher_of_a_log_std_of_ones_own_is_estimated(use: str) -> None:
    """The diagonal of a batch is (sum of the scores of sampled actions)^2 / B."""
    policy = Policy(use)
    update = ACKTRUpdate((policy, nn.Linear(3, 1)), ACTIONS, preset("own", "acktr")[0])
    noise = torch.Generator()
    noise.set_state(update._learner.generator.get_state())
    for _ in range(update.config.acktr.critic_steps):  # comes first
        torch.randn(ROWS, 1, generator=noise)
    inner: Any = torch.autograd.functional.jacobian(policy.deviation, policy.log_std.detach())
    scores = (torch.randn(ROWS, 6, generator=noise).square() - 1) @ inner
    draw = torch.Generator().manual_seed(1)
    seen, acted, advantages, returns = (
        torch.randn(ROWS, *width, generator=draw) for width in ((3,), (6,), (), ())
    )
    update(seen, acted, advantages, returns)
    block = block_of(update._learner, "network.log_std")
    torch.testing.assert_close(block.moment.mean(), scores.sum(0).square() / ROWS)
    expected = torch.full((len(policy.log_std),), policy.fisher)
    torch.testing.assert_close(scores.square().mean(0), expected, rtol=0.1, atol=0)


def test_that_of_built_in_networks_is_known() -> None:
    head, space = action_head(ACTIONS), spaces.Box(-np.inf, np.inf, (3,), np.float64)
    network = build_network(space, head, NetworkConfig(log_std_init=-1.0))
    config, noise = preset("own", "acktr")[0], torch.Generator()
    learner = ACKTRLearner(network, head, config, noise, torch.no_grad)
    assert block_of(learner, "policy.log_std").fisher == 2
    assert free_deviation(network) == pytest.approx(math.exp(-1))


def test_no_deviation_is_told_of_a_parameter_of_that_name_of_ones_own() -> None:
    update = ACKTRUpdate((Policy("softplus"), nn.Linear(3, 1)), ACTIONS)
    assert free_deviation(update.network) is None
