"""Acting compiled gives what it gives uncompiled, and says so where torch cannot compile."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from acktr.agent import ACKTR
from acktr.config import ConfigError, NetworkConfig, preset
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout.acting import Acting

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
IMAGES = spaces.Box(0, 255, (4, 44, 44), np.uint8)
VECTORS = spaces.Box(-1.0, 1.0, (5,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)


def acting(
    space: spaces.Box, actions: spaces.Space[Any], compiled: bool, place: str = "cpu"
) -> Acting:
    """The same network and noise at every call."""
    torch.manual_seed(0)
    head = action_head(actions)
    shared = space is IMAGES
    network = build_network(space, head, NetworkConfig(shared=shared)).to(place)
    return Acting(network, head, torch.Generator(place).manual_seed(1), nullcontext, compiled)


def shown(space: spaces.Box, times: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    if space is IMAGES:
        return [torch.rand(6, *IMAGES.shape, generator=draw) for _ in range(times)]
    return [torch.randn(6, *VECTORS.shape, generator=draw) for _ in range(times)]


@compiler
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("space", "actions"), [(VECTORS, BOX), (IMAGES, spaces.Discrete(4))], ids=["vectors", "images"]
)
def test_compiled_acting_is_the_same(
    space: spaces.Box, actions: spaces.Space[Any], place: str
) -> None:
    """Step after step, also after the weights have changed; no answer changes afterwards."""
    plain, compiled = (acting(space, actions, which, place) for which in (False, True))
    answers = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for step, observations in enumerate(shown(space, 6)):
            if step == 3:
                for each in (plain, compiled):
                    with torch.no_grad():
                        for parameter in each.network.parameters():
                            parameter.mul_(0.5)
            answers.append((plain(observations.to(place)), compiled(observations.to(place))))
    for ours, theirs in answers:
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        assert not bool(theirs[2])
    assert torch.equal(plain.generator.get_state(), compiled.generator.get_state())


@compiler
def test_compiled_acting_sees_numbers_that_are_not_finite() -> None:
    compiled = acting(VECTORS, BOX, True)
    observations = shown(VECTORS, 1)[0]
    assert not bool(compiled(observations)[2])
    observations[2, 1] = torch.nan
    assert bool(compiled(observations)[2])


@pytest.mark.usefixtures("no_compiler")
def test_a_policy_that_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"cannot compile the policy \(no working compiler\); set"
    ):
        acting(VECTORS, BOX, True)(shown(VECTORS, 1)[0])


@compiler
def test_training_compiled_takes_the_same_actions() -> None:
    config, _ = preset("CartPole-v1")
    config = dataclasses.replace(config, num_envs=4, num_steps=8)
    agents = []
    for compiled in (False, True):
        agent = ACKTR("CartPole-v1", dataclasses.replace(config, compile=compiled), device="cpu")
        agents.append(agent.learn(64))
    first, second = (dict(agent.trainer.network.named_parameters()) for agent in agents)
    for name, parameter in first.items():
        torch.testing.assert_close(second[name], parameter, rtol=1e-4, atol=1e-5)
