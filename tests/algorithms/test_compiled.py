"""An update whose forward and backward passes torch compiles is the update without it."""

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
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from acktr.algorithms.a2c import A2CLearner
from acktr.algorithms.acktr import ACKTRLearner
from acktr.algorithms.auxiliary import Auxiliary
from acktr.algorithms.kfac_step import KFACStep
from acktr.compute import Compiled
from acktr.config import ACKTRConfig, Config, NetworkConfig, SampledKFACConfig
from acktr.kfac import GaussianLoss
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.rollout import Batch
from tests.tools.networks import Small

IMAGES = spaces.Box(0, 255, (4, 44, 44), np.uint8)
VECTORS = spaces.Box(-1.0, 1.0, (5,), np.float32)
BOX = spaces.Box(-1.0, 1.0, (3,), np.float32)
KRONECKER = SampledKFACConfig(lr=0.1, stat_interval=2, refresh_interval=2, cold_steps=0)
SAMPLED = dataclasses.replace(KRONECKER, stat_fraction=0.25)
FOUR = spaces.Discrete(4)
SUM = {"sum": Auxiliary(GaussianLoss(), target=lambda batch: batch.observations[:, :3])}
SIZES = (24, 24, 21, 23, 24, 22)
"""Of the batches: environments' resets are no samples."""


def learner(name: str, compiled: bool, place: str) -> ACKTRLearner | A2CLearner:
    """The same network and noise at every call."""
    settings = ACKTRConfig(
        actor=SAMPLED if name in ("acktr, images", "acktr, own") else KRONECKER,
        critic=KRONECKER,
        critic_steps=3,
    )
    config = Config(
        env="X-v0",
        compile=compiled,
        micro_batch=9 if name == "acktr, in parts" else None,
        network=NetworkConfig(shared="images" in name),
        acktr=settings,
    )
    torch.manual_seed(0)
    space = IMAGES if "images" in name else VECTORS
    actions: spaces.Space[Any] = BOX if name in ("acktr", "acktr, in parts") else FOUR
    head = action_head(actions)
    own, auxiliary = (Small, SUM) if "own" in name else (None, {})
    network = build_network(
        space, head, config.network, own, action_space=actions, auxiliary=[*auxiliary]
    ).to(place)
    kind = A2CLearner if "a2c" in name else ACKTRLearner
    noise = torch.Generator(place).manual_seed(1)
    return kind(network, head, config, noise, nullcontext, auxiliary)


def batches(name: str, place: str) -> list[Batch]:
    images, four = "images" in name, name not in ("acktr", "acktr, in parts")
    draw = torch.Generator().manual_seed(2)

    def one(size: int) -> Batch:
        shape = IMAGES.shape if images else VECTORS.shape
        seen = torch.rand(size, *shape, generator=draw)
        if images:
            seen = seen.contiguous(memory_format=torch.channels_last)
        actions = torch.randint(4, (size,), generator=draw)
        if not four:
            actions = torch.randn(size, 3, generator=draw)
        rest = (torch.randn(size, generator=draw).to(place) for _ in range(3))
        return Batch(seen.to(place), actions.to(place), *rest)

    return [one(size) for size in SIZES]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("acktr, images", marks=pytest.mark.slow),
        "acktr",
        "acktr, in parts",
        pytest.param("a2c, images", marks=pytest.mark.slow),
    ],
)
def test_compiled_updates_are_the_same(name: str, place: str) -> None:
    """Batch after batch of unequal sizes, without a warning."""
    compare(name, place)


@pytest.mark.parametrize("name", ["acktr, own", "a2c, own"])
def test_networks_of_ones_own_with_auxiliary_losses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as ever, with derivatives of the trace, but without the minutes of a compiler."""
    compiler = torch.compile
    called = []

    def traced(function: Any, *, mode: str | None, dynamic: bool | None) -> Any:
        def backend(graph: Any, examples: Any) -> Any:
            called.append(graph)
            return aot_eager(graph, examples)

        return compiler(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    compare(name, "cpu")
    assert called


def compare(name: str, place: str) -> None:
    plain, compiled = (learner(name, which, place) for which in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for number, batch in enumerate(batches(name, place)):
            expected = plain.update(batch, number / 20)
            found = compiled.update(batch, number / 20)
            for key in ("train/policy_loss", "train/value_loss"):
                assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)
    for ours, theirs in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert uses(compiled) and not uses(plain)


def uses(agent: ACKTRLearner | A2CLearner) -> list[Compiled[Any, Tensor]]:
    if isinstance(agent, ACKTRLearner):
        steps = [step for step in vars(agent).values() if isinstance(step, KFACStep)]
        return [step.compiled for step in steps if step.compiled is not None]
    return [agent._forward] if isinstance(agent._forward, Compiled) else []
