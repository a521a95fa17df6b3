"""The page to read is the algorithm of the library: both train the same networks in float64."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import pytest
import torch
from torch import Tensor, nn

from acktr.config import preset
from acktr.environments import training_envs
from acktr.train import Trainer
from scripts import acktr_in_one_file as page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def flat(network: nn.Module) -> Tensor:
    """All parameters as one vector, the log standard deviation first."""
    named = sorted(network.named_parameters(), key=lambda pair: not pair[0].endswith("log_std"))
    return torch.cat([parameter.detach().flatten() for _, parameter in named])


@pytest.mark.parametrize(
    ("env_id", "updates"), [("CartPole-v1", 10), ("HalfCheetah-v5", 9)], ids=["vector", "mujoco"]
)
@pytest.mark.usefixtures("float64")
def test_both_train_the_same_networks(env_id: str, updates: int) -> None:
    """From the same seed, rollouts included: with truncated episodes on HalfCheetah alone."""
    settings, seed = page.SETTINGS[env_id], 3
    config = dataclasses.replace(preset(env_id)[0], seed=seed, env_workers=1)
    agent = page.ACKTR(gymnasium.make(env_id), settings, seed)
    rollouts = page.Rollouts(env_id, agent, settings, seed)
    envs = training_envs(config)
    trainer = Trainer(config, envs)
    begun = flat(agent.actor), flat(agent.critic)
    training = trainer.run(config.total_timesteps)
    for update in range(updates):
        next(training)
        batch = rollouts.collect()
        agent.update(batch, update * len(batch.returns) / settings.steps)
    envs.close()
    assert not trainer.network.shared
    theirs = trainer.network.actor, trainer.network.critic
    for own, other, before in zip((agent.actor, agent.critic), theirs, begun, strict=True):
        assert (flat(own) - flat(other)).norm() <= 1e-10 * flat(other).norm()
        assert (flat(other) - before).norm() > 0.1  # they have learned something
    assert list(rollouts.finished)


@pytest.mark.parametrize("env_id", sorted(page.SETTINGS))
def test_its_settings_are_those_of_the_preset(env_id: str) -> None:
    settings, (config, _) = page.SETTINGS[env_id], preset(env_id)
    assert settings.steps == config.total_timesteps
    for name in ("num_envs", "num_steps", "gamma", "gae_lambda"):
        assert getattr(settings, name) == getattr(config, name)
    assert settings.critic_steps == config.acktr.critic_steps
    for own, other in (
        (settings.actor, config.acktr.actor),
        (settings.critic, config.acktr.critic),
    ):
        assert own.exact == (other.quadratic == "exact")
        for field in dataclasses.fields(own):
            if field.name != "exact":
                assert getattr(own, field.name) == getattr(other, field.name), field.name


def test_it_runs_as_a_command() -> None:
    command = [sys.executable, "-m", "scripts.acktr_in_one_file", "CartPole-v1", "--steps", "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2,048 steps" in done.stdout


def test_it_needs_nothing_of_the_library() -> None:
    imports = re.findall(r"^(?:from|import) (\w+)", Path(page.__file__).read_text(), re.MULTILINE)
    assert set(imports) - set(sys.stdlib_module_names) == {"gymnasium", "numpy", "torch"}
