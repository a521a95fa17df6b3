"""Reading agents back from disk, and playing with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import torch

from acktr.compute import resolve_device
from acktr.config import Algo, Config, from_dict, refuse_imports, to_dict
from acktr.environments import evaluation_envs
from acktr.envs import AnyVectorEnv, EnvLike, one_line
from acktr.evaluate import Evaluation, evaluate
from acktr.policies import NetworkSource, Policy, tell_other
from acktr.runs.checkpoint import CheckpointError, checkpoint_exists, load_checkpoint, restoring
from acktr.runs.folder import RunError, RunFolder
from acktr.runs.trees import non_finite
from acktr.train import Trainer

_MOST_STEPS = 1 << 53
"""Counts up to here are exact as floating-point numbers too."""

_UNJUDGED = frozenset(
    {"collector/envs", "collector/observation", "collector/parts"}
    | {f"learner/{network}/curvature/pending" for network in ("actor", "critic")}
)


def run_meta(config: Config, state: Mapping[str, Any], score: float | None) -> dict[str, Any]:
    """What a run's checkpoint says beside its state.

    Args:
        config: The run.
        state: ``Trainer.state_dict()``.
        score: Score by which the best checkpoint is chosen, if it is known.
    """
    return {
        "format": "acktr-run",
        "config": to_dict(config),
        "timesteps": state["timesteps"],
        "seconds": state["seconds"],
        "score": score,
    }


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
    env_origin: str | None = None
    """What its environments were, in words, if the configuration cannot make them again."""

    network: NetworkSource | None = None
    """The network of one's own that it was trained with, which the checkpoint only names."""

    lacks_learning_rate: bool = False
    """Whether it was trained by a function of the learning rate, which no file can hold."""

    lacks_eval_env: bool = False
    """Whether its run evaluates in environments of a program's own."""

    def require_env(self) -> None:
        """Refuse an agent whose environments only Python code can make.

        Raises:
            CheckpointError: The configuration does not say all about them.
        """
        if self.env_origin is not None:
            kind = self.config.algo.upper()
            raise CheckpointError(
                f"{self.path}: its environment ({self.config.env}) was {self.env_origin}, which no"
                f" file can bring back; give it in Python: {kind}.load(path, env=...)"
            )

    def place(self, env: EnvLike | AnyVectorEnv | None) -> tuple[EnvLike | AnyVectorEnv, Config]:
        """What the agent goes on in, and its configuration there.

        One environment makes as many steps as those together that are in the configuration.

        Raises:
            CheckpointError: None is given, and its own cannot be made again.
        """
        if env is None:
            self.require_env()
            return self.config.env, self.config
        if isinstance(env, str) and env != self.config.env:
            return env, replace(self.config, env=env, env_kwargs={}, wrappers=())
        if isinstance(env, gymnasium.Env):
            samples = self.config.num_envs * self.config.num_steps
            return env, replace(self.config, num_envs=1, num_steps=samples)
        return env, self.config

    def restore(self, trainer: Trainer) -> None:
        """Let a trainer go on; its environments with new episodes if the saved ones do not fit.

        Raises:
            CheckpointError: The state belongs to another network, algorithm or environment.
        """
        state, episodes = self.state, self.state["collector"]
        with restoring(self.path):
            if episodes["envs"] is not None:
                try:
                    trainer.collector.check_episodes(episodes)
                except ValueError as error:
                    anew = {**episodes, "envs": None, "unsaved": str(error)}
                    state = {**state, "collector": anew}
            trainer.load_state_dict(state)

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
            return Policy.from_state(self.config, *spaces, self.state, device, seed, self.network)


def read_agent(path: Path) -> SavedAgent:
    """Read a checkpoint with its configuration.

    Raises:
        CheckpointError: It is missing, damaged or foreign.
    """
    state, meta = load_checkpoint(path)
    try:
        config = from_dict(meta["config"])
        refuse_imports(config)
    except Exception as error:  # nothing is known of what is in it
        raise CheckpointError(
            f"{path}: no usable configuration in it ({one_line(error):.500})"
        ) from error
    _check_state(path, state)
    score = meta.get("score")
    if type(score) is not float or not math.isfinite(score):
        score = None
    origin = meta.get("env_origin")
    return SavedAgent(
        path,
        config,
        state,
        state["timesteps"],
        score,
        env_origin=origin if isinstance(origin, str) else None,
        lacks_learning_rate=meta.get("learning_rate") is not None,
        lacks_eval_env=meta.get("eval_env") is not None,
    )


def trained_agent(path: Path, algo: Algo, network: NetworkSource | None) -> SavedAgent:
    """Read what ``load`` of an agent's class does.

    Args:
        path: As :func:`find_checkpoint` takes it.
        algo: Of the class.
        network: The network of one's own that is given.

    Raises:
        CheckpointError: It is another algorithm's, its network is missing, or as `read_agent`.
    """
    saved = read_agent(find_checkpoint(path))
    if (trained := saved.config.algo) != algo:
        raise CheckpointError(f"{path}: an agent trained by {trained}; use {trained.upper()}.load")
    if (custom := saved.config.network.custom) is not None and network is None:
        raise CheckpointError(f"{path}: trained with the network {custom}: pass it as network=")
    tell_other(custom, network)
    return saved


def broken_number(state: Mapping[str, Any]) -> str | None:
    """Where a trainer's state holds NaN or Inf; None if nowhere.

    What environments show and keep is theirs, and K-FAC itself judges the matrices of a refresh
    that is under way.
    """
    return non_finite(state, _UNJUDGED)


def _check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a state that no trainer has, whatever its hashes say."""
    for name in ("network", "learner", "collector"):
        if not isinstance(state.get(name), dict):
            raise CheckpointError(f"{path}: it holds no state of the {name}")
    for name in ("timesteps", "updates", "begun"):
        count = state.get(name, 0 if name == "begun" else None)  # an earlier version has it not
        if type(count) is not int or not 0 <= count < _MOST_STEPS:
            raise CheckpointError(f"{path}: {name} must be a count, not {count!r:.40}")
    seconds = state.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise CheckpointError(f"{path}: seconds must be a duration, not {seconds!r:.40}")
    broken = broken_number(state)
    if broken is not None:
        raise CheckpointError(f"{path}: {broken:.200} is NaN or Inf; no such agent is ever saved")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a name means: a run's last, a folder or a file, also without .zip."""
    last, file = path / "checkpoints" / "last", path.with_name(f"{path.name}.zip")
    if checkpoint_exists(last):
        return last
    return file if not checkpoint_exists(path) and checkpoint_exists(file) else path


def find_agent(path: Path, which: str, network: NetworkSource | None = None) -> SavedAgent:
    """The agent in a run folder, or in a checkpoint folder itself.

    Args:
        path: The folder.
        which: last or best, for run folders.
        network: The network of one's own that it was trained with.

    Raises:
        RunError: There is neither a run nor a checkpoint.
        CheckpointError: The checkpoint is missing, damaged or foreign.
    """
    return replace(read_agent(_checkpoint(path, which)), network=network)


def _checkpoint(path: Path, which: str) -> Path:
    """The checkpoint folder that is meant."""
    if not (path / "config.json").is_file() and checkpoint_exists(path):
        return path
    if not path.is_dir():
        raise RunError(f"{path}: no such folder; a run folder or a checkpoint is needed")
    folder = RunFolder.open(path)
    if which == "last":
        return folder.last
    if not checkpoint_exists(folder.best):
        raise RunError(f"{path}: no best checkpoint yet; use --checkpoint last")
    return folder.best


def play(
    agent: SavedAgent,
    episodes: int,
    *,
    seed: int,
    num_envs: int,
    deterministic: bool,
    device: str,
    note: Callable[[int], None] = lambda ended: None,
) -> Evaluation:
    """Evaluate a saved agent in new environments; ``note`` is told how many episodes have ended.

    Raises:
        EnvError: The environment cannot be made.
        CheckpointError: The agent does not fit the environment.
        ConfigError: The device is absent.
    """
    place, config = resolve_device(device), agent.config
    count = max(1, min(num_envs, episodes))
    agent.require_env()
    with closing(evaluation_envs(config, count, seed)) as envs:
        policy = agent.policy(envs.single_observation_space, envs.single_action_space, place, seed)
        return evaluate(policy, envs, episodes, seed=seed, deterministic=deterministic, note=note)
