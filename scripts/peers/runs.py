"""One run of a peer: a folder in the format of our own runs, made when the run has ended."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecNormalize

from acktr.envs import AnyVectorEnv, EnvFault, make_vec, one_line
from acktr.evaluate import Evaluation, Player, evaluate
from acktr.files import safe_name
from acktr.runs.folder import RunFolder, new_folder, versions
from acktr.runs.logger import RunLogger
from acktr.runs.progress import Progress, duration
from acktr.runs.session import EVALUATION_ENVS, EVALUATION_SEED, TrainingFault
from acktr.train import Episode, TrainStats
from scripts.common import ScriptError
from scripts.peers.models import make_model

_NEVER = 10**12
"""Updates between the library's own logs."""
_PACKAGES = ("stable-baselines3", "sb3-contrib")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to make."""

    peer: str
    env: str
    seed: int
    total_timesteps: int
    eval_episodes: int
    settings: Any
    """A dataclass that says what to build, ``num_envs`` among it; of peers, settings.Settings."""
    source: str
    """Where the settings come from."""

    @property
    def name(self) -> str:
        """For the user."""
        return f"{self.peer} {self.env} seed {self.seed}"

    def path(self, run_dir: Path) -> Path:
        """RUN_DIR/ENV/PEER/seedN, with characters not for file names replaced by ``_``."""
        return run_dir / safe_name(self.env) / self.peer / f"seed{self.seed}"

    def config(self) -> dict[str, Any]:
        """What goes into config.json: every value that decides the outcome."""
        head = {
            "env": self.env,
            "algo": self.peer,
            "seed": self.seed,
            "total_timesteps": self.total_timesteps,
            "eval_episodes": self.eval_episodes,
            "source": self.source,
        }
        values: dict[str, Any] = json.loads(json.dumps(head | asdict(self.settings)))
        return values


def is_finished(job: Job, run_dir: Path) -> bool:
    """Whether the run's folder is there and complete; False if there is none.

    Raises:
        ScriptError, RunError: There is a folder of another run, or one that no run left.
    """
    path = job.path(run_dir)
    if not path.exists():
        return False
    folder = RunFolder.open(path)
    stored = folder.read_config()
    for key, wanted in job.config().items():
        if key != "source" and stored.get(key) != wanted:
            raise ScriptError(
                f"{path} holds a run with another {key}; choose another --run-dir or delete it"
            )
    if folder.last_evaluation() < job.total_timesteps:
        raise ScriptError(f"{path} holds a run without final evaluation; delete it")
    return True


Build = Callable[[Job, AnyVectorEnv], tuple[OnPolicyAlgorithm, Player]]
"""Makes the model of a run, ready to learn, and who plays with it in evaluations."""


def build(job: Job, envs: AnyVectorEnv) -> tuple[OnPolicyAlgorithm, Player]:
    """The model of a peer, ready to learn, and who plays with it in evaluations.

    Raises:
        ScriptError: The observations are no vectors.
    """
    space = envs.single_observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ScriptError(f"{job.env}: peers need vectors as observations, not {space}")
    model, normalized = make_model(job.settings, envs, job.seed, job.total_timesteps)
    return model, _Player(model, normalized)


def make(job: Job, run_dir: Path, argv: Sequence[str], build: Build = build) -> str:
    """Train, evaluate and write the run's folder.

    The folder gets its name when everything is in it (until then it is ``.seedN.tmp-...``, which a
    killed process leaves behind); a run that is stopped or fails is made from the start the next
    time. As in our own runs, ``step`` in monitor.csv counts up to the end of the batch.

    Args:
        job: The run.
        run_dir: Folder of all runs.
        argv: The command line, for command.txt.
        build: Makes the model and the player.

    Returns:
        A line that sums the run up.

    Raises:
        ScriptError: The folder is taken or cannot be written.
        EnvError: The environment cannot be made.
        TrainingFault: Training or the environment broke.
    """
    path = job.path(run_dir)
    if is_finished(job, run_dir):
        raise ScriptError(f"{path} already holds this run, finished; choose another --run-dir")
    torch.set_num_threads(1)
    hidden = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    with ExitStack() as stack:
        envs = make_vec(job.env, job.settings.num_envs, job.seed)
        stack.callback(envs.close)
        model, player = build(job, envs)
        folder = stack.enter_context(new_folder(hidden, stack))
        with RunLogger(folder, job.env) as logger:
            folder.write_config(job.config())
            packages = {name: metadata.version(name) for name in _PACKAGES}
            folder.write_json(folder.versions, {**versions(), **packages})
            folder.write_command(argv)
            with Progress(job.total_timesteps) as progress:
                progress.note(f"{job.name}: {job.source}")
                reporter = _Reporter(logger, progress)
                _learn(job, model, reporter)
            found = _evaluate(job, player)
            logger.write_evaluation(model.num_timesteps, found.returns, found.lengths)
        (hidden / "checkpoints").rmdir()  # there are none
        hidden.rename(path)
    recent = logger.ep_rew_mean
    training = "no training episode ended" if recent is None else f"training return {recent:,.1f}"
    return (
        f"done: {job.name}, {job.total_timesteps:,} steps in {duration(reporter.seconds)};"
        f" evaluation return {found.mean:,.1f} +- {found.std:,.1f} ({len(found.returns)} episodes);"
        f" {training} (last 100 episodes); {path}"
    )


class _Reporter(BaseCallback):
    """Hands what the model did to the log and to the progress, as our trainer does."""

    def __init__(self, logger: RunLogger, progress: Progress) -> None:
        super().__init__()
        self.seconds = 0.0
        self._log = logger
        self._progress = progress
        self._episodes: list[Episode] = []
        self._reported = 0
        self._updates = 0
        self._origin = 0.0

    def _on_training_start(self) -> None:
        self._origin = time.perf_counter()

    def _on_step(self) -> bool:
        now = time.perf_counter() - self._origin
        for info in self.locals["infos"]:
            if "episode" in info:
                episode = info["episode"]
                self._episodes.append(Episode(episode["r"], int(episode["l"]), now))
        return True

    def _on_rollout_start(self) -> None:
        self._report()

    def _on_training_end(self) -> None:
        self._report()

    def _report(self) -> None:
        """Report the update that has been made since the last call, if there was one."""
        if self.num_timesteps == self._reported:
            return
        self.seconds = time.perf_counter() - self._origin
        self._reported = self.num_timesteps
        self._updates += 1
        values = self.model.logger.name_to_value
        metrics = {tag: float(values[tag]) for tag in values if tag.startswith("train/")}
        metrics["time/fps"] = self.num_timesteps / self.seconds
        stats = TrainStats(self.num_timesteps, self._updates, metrics, tuple(self._episodes))
        self._episodes = []
        self._log.write(stats)
        self._progress.update(stats, self._log.ep_rew_mean)


def _learn(job: Job, model: OnPolicyAlgorithm, reporter: _Reporter) -> None:
    try:
        model.learn(job.total_timesteps, callback=reporter, log_interval=_NEVER)
    except EnvFault as error:
        raise TrainingFault(f"{job.name}: {error}", environment=True) from error
    except ScriptError:
        raise
    except (ValueError, ArithmeticError) as error:  # how NaN shows in torch's distributions
        text = f"{job.name}: training broke at step {model.num_timesteps}: {one_line(error)}"
        raise TrainingFault(text[:300], environment=False) from error


class _Player:
    """The model with frozen statistics."""

    def __init__(self, model: OnPolicyAlgorithm, normalized: VecNormalize) -> None:
        self._model = model
        self._normalized = normalized

    def act(
        self,
        observations: NDArray[Any],
        deterministic: bool = False,
        masks: NDArray[np.bool_] | None = None,
    ) -> NDArray[Any]:
        """Actions, clipped to the bounds, of a batch of raw observations (N, ...)."""
        scaled = self._normalized.normalize_obs(observations)
        assert isinstance(scaled, np.ndarray)
        if isinstance(self._model, MaskablePPO):
            return self._model.predict(scaled, deterministic=deterministic, action_masks=masks)[0]
        return self._model.predict(scaled, deterministic=deterministic)[0]


def _evaluate(job: Job, player: Player) -> Evaluation:
    """The evaluation at the end of our own runs: same environments, seeds and actions."""
    seed = job.seed + EVALUATION_SEED
    envs = make_vec(job.env, min(job.eval_episodes, EVALUATION_ENVS), seed, training=False)
    try:
        return evaluate(player, envs, job.eval_episodes, seed=seed)
    except EnvFault as error:
        raise TrainingFault(f"{job.name}: {error}", environment=True) from error
    finally:
        envs.close()
