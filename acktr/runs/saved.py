"""Reading agents back from disk, and playing with them."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch

from acktr.compute import resolve_device
from acktr.config import Config, ConfigError, from_dict, refuse_import
from acktr.envs import make_vec
from acktr.evaluate import Evaluation, evaluate
from acktr.policies import Policy
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists, load_checkpoint, restoring
from acktr.runs.folder import RunError, RunFolder


@dataclass(frozen=True)
class SavedAgent:
    """A checkpoint whose configuration was checked; its tensors are checked when used."""

    path: Path
    """The checkpoint folder."""
    config: Config
    """The configuration of its run."""
    state: dict[str, Any]
    """``Trainer.state_dict()``."""
    timesteps: int
    """Environment steps learned from."""
    score: float | None
    """Score by which the best checkpoint is chosen, if it was known."""

    def policy(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        device: torch.device,
        seed: int = 0,
    ) -> Policy:
        """The policy, for one environment's spaces.

        Raises:
            CheckpointError: The state does not fit the spaces.
        """
        spaces = (observation_space, action_space)
        with restoring(self.path):
            return Policy.from_state(self.config, *spaces, self.state, device, seed)


def read_agent(path: Path) -> SavedAgent:
    """Read a checkpoint with its configuration.

    Raises:
        CheckpointError: It is missing, damaged or foreign.
    """
    state, meta = load_checkpoint(path)
    try:
        config = from_dict(meta["config"])
        refuse_import(config.env)
        timesteps, score = state["timesteps"], meta.get("score")
    except (KeyError, ConfigError, ValueError) as error:
        raise CheckpointError(f"{path}: no usable configuration in it ({error})") from error
    if type(timesteps) is not int or timesteps < 0:
        raise CheckpointError(f"{path}: timesteps must be a count, not {timesteps!r:.40}")
    if type(score) is not float or not math.isfinite(score):
        score = None
    return SavedAgent(path, config, state, timesteps, score)


def find_agent(path: Path, which: str) -> SavedAgent:
    """The agent in a run folder, or in a checkpoint folder itself.

    Args:
        path: The folder.
        which: last or best, for run folders.

    Raises:
        RunError: There is neither a run nor a checkpoint.
        CheckpointError: The checkpoint is missing, damaged or foreign.
    """
    if not (path / "config.json").is_file() and checkpoint_exists(path):
        return read_agent(path)
    if not path.is_dir():
        raise RunError(f"{path}: no such folder; a run folder or a checkpoint is needed")
    folder = RunFolder.open(path)
    if which == "last":
        return read_agent(folder.last)
    if not checkpoint_exists(folder.best):
        raise RunError(f"{path}: no best checkpoint yet; use --checkpoint last")
    return read_agent(folder.best)


def play(
    agent: SavedAgent, episodes: int, *, seed: int, num_envs: int, deterministic: bool, device: str
) -> Evaluation:
    """Evaluate a saved agent in new environments.

    Raises:
        EnvError: The environment cannot be made.
        CheckpointError: The agent does not fit the environment.
        ConfigError: The device is absent.
    """
    place, config = resolve_device(device), agent.config
    count = max(1, min(num_envs, episodes))
    with closing(make_vec(config.env, count, seed, training=False, atari=config.atari)) as envs:
        policy = agent.policy(envs.single_observation_space, envs.single_action_space, place, seed)
        return evaluate(policy, envs, episodes, seed=seed, deterministic=deterministic)
