"""What a GPU would show of our tensors, on a pretended one: same bits, checkpoints both ways."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from acktr import A2C, ACKTR, TRPO
from acktr.config import Config, merge, preset
from tests.tools.pretended_gpu import OnGPU, pretended_gpu
from tests.tools.rank_trainings import KRONECKER, TRAININGS

STEPS, UPDATES = 4, 2
KINDS = {"acktr": ACKTR, "a2c": A2C, "trpo": TRPO}


def settings(env: str, algo: str) -> Config:
    small = replace(preset(env, algo)[0], num_envs=2, num_steps=STEPS, precision="float32")
    return merge(small, {"network": {"hidden": (8,), "critic_hidden": (8,)}})


def parameters(agent: ACKTR | A2C | TRPO) -> dict[str, Tensor]:
    return {n: p.detach().cpu() for n, p in agent.trainer.network.named_parameters()}


def statistics(agent: ACKTR | A2C | TRPO) -> dict[str, Tensor]:
    """The factors of the actor."""
    layers = agent.trainer.learner.state_dict()["actor"]["curvature"]["layers"]
    return {f"{n} {k}": v.cpu() for n, s in layers.items() for k, v in s.items() if k in "ag"}


class Screens(gymnasium.Env[Any, Any]):
    """Random pictures, of which some actions are not allowed."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._draw(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._draw(), float(action), False, self.steps == 3, {}

    def action_masks(self) -> Any:
        return np.array([True, self.steps % 2 == 0, True])

    def _draw(self) -> Any:
        return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)


def trained(device: str, algo: str, env: str, memory: str | None) -> dict[str, Tensor]:
    config = settings(env, algo)
    if memory is not None:
        config = merge(config, {"network": {"memory": memory, "memory_width": 4}})
    with KINDS[algo](env, config, device=device) as agent:
        agent.learn(2 * STEPS * UPDATES)
        return parameters(agent)


@pytest.mark.parametrize(
    ("algo", "env", "memory"),
    [
        pytest.param("trpo", "Pendulum-v1", None, marks=pytest.mark.slow),
        ("a2c", "CartPole-v1", "lstm"),
    ],
)
def test_training_gives_the_bits_of_the_cpu(algo: str, env: str, memory: str | None) -> None:
    expected = trained("cpu", algo, env, memory)
    with pretended_gpu():
        found = trained("cuda", algo, env, memory)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_masks_and_pictures() -> None:
    """Their rollouts have memory of their own, on the device and beside it."""
    found = []
    for device, place in (("cpu", nullcontext()), ("cuda", pretended_gpu())):
        with place, ACKTR(Screens, settings("own", "acktr"), device=device) as agent:
            agent.learn(2 * STEPS * UPDATES)
            found.append(parameters(agent))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tridiagonal", marks=pytest.mark.slow),
        pytest.param("embedding and norm", marks=pytest.mark.slow),
        "delayed",
    ],
)
def test_kfac_alone_gives_the_bits_of_the_cpu(name: str) -> None:
    """What torch.func differentiates cannot be pretended: the exact and the corrected form."""
    training = TRAININGS[name]
    training = replace(training, steps=3, settings=training.settings | KRONECKER)
    expected = training.run(None)
    with pretended_gpu():
        found = {k: v.cpu() for k, v in replace(training, device="cuda").run(None).items()}
    assert all(torch.equal(found[n], v) for n, v in expected.items() if n != "generator")


def test_acktr_on_the_gpu_and_its_checkpoints_on_both(tmp_path: Path) -> None:
    """The bits of the CPU; few waits, of which none is for every layer; checkpoints both ways.

    From one kind of device to the other noise begins anew, as generators know no state of the other
    kind's, and all else goes on. K-FAC refused such a checkpoint for the size of that state.
    """
    env, config = "Pendulum-v1", settings("Pendulum-v1", "acktr")
    expected = trained("cpu", "acktr", env, None)
    with pretended_gpu(), ACKTR(env, config, device="cuda") as agent:
        waits = [OnGPU.waits for _ in agent.trainer.run(2 * STEPS * UPDATES)]
        agent.save(tmp_path / "gpu")
        weights, curvature = parameters(agent), statistics(agent)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # For the actions of a step twice, for the values twice, and once for each of: whether they are
    # finite, the metrics, the eigenvalues of actor and critic, the policy's deviation.
    assert min(b - a for a, b in pairwise(waits)) <= 2 * STEPS + 7
    with ACKTR.load(tmp_path / "gpu", device="cpu") as agent:
        assert all(torch.equal(parameters(agent)[n], value) for n, value in weights.items())
        assert all(torch.equal(statistics(agent)[n], value) for n, value in curvature.items())
        agent.learn(2 * STEPS)
        agent.save(tmp_path / "cpu")
    with pretended_gpu(), ACKTR.load(tmp_path / "cpu", device="cuda") as agent:
        agent.learn(2 * STEPS)


@pytest.mark.parametrize(
    "fault",
    [
        lambda here, there: here + there,
        lambda here, _: here.numpy(),
        lambda *_: torch.rand(2, generator=torch.Generator("cuda")),
        lambda _, there: there.index_select(0, torch.tensor([0], device="cuda")),
    ],
)
def test_faults_of_a_gpu_are_seen(fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pretended_gpu(), pytest.raises((RuntimeError, TypeError)):
        fault(torch.ones(2, device="cuda"), torch.ones(2))
