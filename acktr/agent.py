"""The Python interface: an agent that learns, predicts, saves and loads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Never, Self, Unpack

from gymnasium.vector import VectorEnv

from acktr.algorithms import Auxiliary
from acktr.callbacks import Logs, require_order
from acktr.compute import resolve_device
from acktr.config import (
    Algo,
    Config,
    LearningRate,
    Settings,
    refuse_load,
    to_dict,
    with_learning_rate,
)
from acktr.envs import EnvLike, MaskSetting, Wrapper, is_among
from acktr.evaluate import Evaluation, evaluate, usually_deterministic
from acktr.given import (
    Given,
    closed_on_failure,
    evaluation_place,
    moved,
    require_same,
    require_same_spaces,
    same_samples,
    take_envs,
)
from acktr.learning import Lesson, Lessons, asked_steps, begin, kept_by
from acktr.listeners import Callback, listeners
from acktr.policies import NetworkSource, tell_given, with_network
from acktr.predictor import Predictor
from acktr.runs.checkpoint import CheckpointError, checkpoint_path, save_checkpoint
from acktr.runs.logger import RunLogger
from acktr.runs.saved import broken_number, trained_agent
from acktr.runs.session import EVALUATION_ENVS, EVALUATION_SEED
from acktr.train import Trainer


class Agent(Predictor):
    """An agent of any algorithm; :class:`ACKTR`, :class:`A2C` and :class:`TRPO` fix which.

    In a ``with`` statement it closes the environments that it made at the end.

    Args:
        env: What to learn on: an environment's id; a class or function that makes a
            ``gymnasium.Env``; a list of such functions; one ``gymnasium.Env``; or a Gymnasium
            VectorEnv that declares its autoreset mode.
        config: Settings; the environment's preset if None. For environments that are made already
            and for lists, num_envs is their number.
        seed: Overrides config.seed if given.
        device: Overrides config.device if given.
        num_envs: Overrides config.num_envs if given.
        env_kwargs: Arguments of each environment, as ``gymnasium.make`` takes them, or the class
            or function; overrides config.env_kwargs if given.
        wrappers: Classes or functions around each environment, or their names as module:Name, the
            innermost first; overrides config.wrappers if given.
        record: Keys of the infos of episodes' last steps, for the ``info`` of the callback's
            episodes; overrides config.record if given.
        network: A network of one's own, or (actor, critic): a torch.nn.Module, or a class or
            function that makes one of the observation space and the action space. What it gets and
            returns is in :mod:`acktr.policies.contract`.
        auxiliary: Losses of its further outputs, by name.
        masks: Overrides config.masks unless auto: where action masks come from.
        learning_rate: Step size of the policy (or the shared network): a number, which is constant,
            or a function of the part of a call of ``learn`` that remains, from 1 to 0, as in
            Stable-Baselines3. None: the configuration's, with its schedule.
        verbose: 1 shows how training goes on standard error, 0 nothing.
        tensorboard_log: Folder whose ALGO_N gets TensorBoard events, progress.csv and monitor.csv.
        settings: Settings in place of the configuration's, such as gamma=0.98 or hidden=(32,):
            those of :class:`acktr.config.Settings`.

    Raises:
        EnvError: The environment cannot be made or has unsupported spaces.
        ConfigError: A setting cannot be used, or the configuration is another algorithm's.
        ValueError: The vector environment declares no supported autoreset mode.
    """

    algo: ClassVar[Algo]

    def __init__(
        self,
        env: EnvLike | VectorEnv[Any, Any, Any],
        config: Config | None = None,
        seed: int | None = None,
        device: str | None = None,
        *,
        num_envs: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] | None = None,
        record: Sequence[str] | None = None,
        network: NetworkSource | None = None,
        auxiliary: Mapping[str, Auxiliary] | None = None,
        masks: MaskSetting = "auto",
        learning_rate: float | LearningRate | None = None,
        verbose: int = 0,
        tensorboard_log: str | Path | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        keys = (record,) if isinstance(record, str) else record
        asked = {"seed": seed, "device": device, "record": None if keys is None else tuple(keys)}
        changes: dict[str, Any] = {k: value for k, value in asked.items() if value is not None}
        if masks != "auto":
            changes["masks"] = masks
        resolve_device(device or str(getattr(config, "device", "auto")))
        given = take_envs(
            env,
            config,
            self.algo,
            changes,
            num_envs=num_envs,
            env_kwargs=env_kwargs,
            wrappers=wrappers,
            settings=settings,
        )
        self.verbose = verbose
        self._logs = None if tensorboard_log is None else Logs(tensorboard_log)
        self._lessons = Lessons()
        self._lacks_learning_rate = False
        self._network, self._auxiliary = network, auxiliary
        with closed_on_failure(given):
            config = with_network(given.config, network)
            config, self._learning_rate = with_learning_rate(config, learning_rate)
            given = dataclasses.replace(given, config=config)
            self._take(given, self._new_trainer(given))
        tell_given(network)

    def _take(self, given: Given, trainer: Trainer) -> None:
        """Go on with these environments and what learns in them."""
        self._given, self.trainer = given, trainer
        self._envs, self._policy = given.envs, trainer.policy(given.config.seed)

    @property
    def logger(self) -> RunLogger | None:
        """What writes the files of the latest call of ``learn`` that wrote any; it has a path."""
        return self._lessons.logger or (None if self._logs is None else self._logs.logger)

    def _new_trainer(self, given: Given) -> Trainer:
        network, auxiliary, rate = self._network, self._auxiliary, self._learning_rate
        return Trainer(given.config, given.envs, network, auxiliary, rate)

    @property
    def num_timesteps(self) -> int:
        """Environment steps learned from so far."""
        return self.trainer.timesteps

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | Sequence[Callback] | None = None,
        progress_bar: bool = False,
        *,
        run_dir: str | Path | None = None,
        label: str | None = None,
        eval_freq: int | None = None,
        eval_env: EnvLike | VectorEnv[Any, Any, Any] | None = None,
        tensorboard: bool = True,
        **others: Never,
    ) -> Self:
        """Train for this many more environment steps (rounded up to whole updates).

        A schedule runs over the steps of this call, as in Stable-Baselines3; episodes of an earlier
        call go on. An exception, of a callback too, leaves the agent as after the last update.

        With ``run_dir`` this is a run as ``acktr train`` makes it, in the folder
        RUN_DIR/ENV/LABEL/seedN: logs, evaluations, checkpoints, the best agent and the learning
        curve; signals that stop it save it first. Another call with the same folder goes on in it.

        Args:
            total_timesteps: Steps, summed over the parallel environments.
            callback: Function of the :class:`TrainStats` of each update; returning False stops. Or
                one of :mod:`acktr.callbacks`, or a list of them.
            progress_bar: Show how training goes, as ``verbose=1`` does.
            run_dir: Folder of all runs; None: nothing is written.
            label: Name of the run's folder in place of the algorithm's.
            eval_freq: Steps between evaluations; None: the configuration's, 0: only at the end.
            eval_env: Where to evaluate, as in :meth:`evaluate`.
            tensorboard: Whether the run's folder gets events for TensorBoard.
            others: There are none.

        Returns:
            The agent itself.

        Raises:
            ValueError: total_timesteps is not positive, or what is for a run has no run_dir.
            ConfigError, TypeError: There is no such argument; the callback is none.
            EnvFault, NonFiniteError, FactorError: As :meth:`Trainer.run`; of a run TrainingFault.
            RunError: The folder holds another run, or cannot be written.
        """
        asked = asked_steps(total_timesteps)
        if self._lacks_learning_rate:
            raise ValueError(
                "the agent was trained with a learning_rate function, which no file can hold: give"
                " it to load(path, learning_rate=...)"
            )
        kept = kept_by(run_dir, label, eval_freq, eval_env, tensorboard, others)
        masks, told = begin(self.trainer), listeners(callback, self._logs)
        require_order(told)
        shown = bool(self.verbose or progress_bar)
        end = self.trainer.timesteps + asked
        lesson = Lesson(self, self.trainer, end, told, shown, masks)
        if kept is None:
            self._lessons.learn(lesson)
        else:
            self._lessons.learn_in_run(lesson, self._given, kept, self._meta())
        return self

    def evaluate(
        self,
        env: EnvLike | VectorEnv[Any, Any, Any] | None = None,
        episodes: int = 100,
        *,
        deterministic: bool | None = None,
        best_by: str | None = None,
        seed: int | None = None,
    ) -> Evaluation:
        """Play whole episodes, in the environment's own reward and with frozen statistics.

        Args:
            env: In any form that the constructor takes, without arguments and wrappers. None: new
                ones of its kind. Training goes on with new episodes in the very ones it learns in.
            episodes: How many.
            deterministic: The most likely actions; None: except in Atari games.
            best_by: Key of the infos of last steps whose mean is the result's ``score``, besides
                the keys of config.record; None: the return.
            seed: Of environments and sampled actions; None: one that goes with the agent's.

        Raises:
            EnvError: They cannot be made, or have other spaces than the agent's.
            ValueError: episodes is not positive, or no episode's infos had the key.
        """
        seed = self.config.seed + EVALUATION_SEED if seed is None else seed
        if deterministic is None:
            deterministic = usually_deterministic(self.config.env)
        count, collector = max(1, min(episodes, EVALUATION_ENVS)), self.trainer.collector
        try:
            with evaluation_place(self._given, env, count, seed, best_by) as envs:
                policy = self.trainer.policy(seed)
                found = evaluate(policy, envs, episodes, seed=seed, deterministic=deterministic)
        finally:
            if collector.begun and is_among(env, self.envs):
                collector.reset(self.config.seed + self.num_timesteps)
        if best_by is not None and math.isnan(found.mean_of(best_by)):
            raise ValueError(f"no episode's last infos have a number {best_by!r}")
        return dataclasses.replace(found, best_by=best_by)

    def set_env(
        self,
        env: EnvLike | VectorEnv[Any, Any, Any],
        *,
        num_envs: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] | None = None,
    ) -> None:
        """Go on learning in another environment with the same spaces, in new episodes.

        The network, its statistics and the curvature are kept, in new objects, and so are the
        samples of an update: num_steps follows. Former environments that the agent made are closed.

        Args:
            env: As in the constructor.
            num_envs: As in the constructor.
            env_kwargs: Of the new ones; none if None.
            wrappers: Of the new ones; none if None.

        Raises:
            EnvError: It cannot be made or has other spaces; the agent is as it was.
            ValueError: The vector environment declares no supported autoreset mode.
            RuntimeError: ``learn`` is under way.
        """
        self._lessons.require_over()
        given = moved(self._given, env, num_envs, env_kwargs, wrappers)
        with closed_on_failure(given):
            require_same_spaces(self.envs, given.envs)
            trainer = self._new_trainer(given)
            state = self.trainer.state_dict()
            # Episodes of the former environments do not go on, as was asked for.
            state["collector"] |= {"envs": None, "unsaved": None}
            trainer.load_state_dict(state)
        self.close()
        self._take(given, trainer)

    def save(self, path: str | Path) -> None:
        """Write everything to a folder, or to one file if the name ends in .zip.

        Both hold safetensors and JSON with hashes.

        Raises:
            CheckpointError: It cannot be written, or holds NaN or Inf; an older one is intact.
            ConfigError: The network has a state that no file holds.
        """
        target, state = checkpoint_path(path), self.trainer.state_dict()
        if (broken := broken_number(state)) is not None:
            raise CheckpointError(f"{path}: not saved: {broken} is NaN or Inf")
        kept = {"format": "acktr-agent", "config": to_dict(self.config)}
        save_checkpoint(target, state, kept | self._meta())

    def _meta(self) -> dict[str, Any]:
        """What no file can bring back of the agent, for its checkpoints."""
        rate = None if self._learning_rate is None else "function"
        return {"env_origin": self._given.origin, "learning_rate": rate}

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: EnvLike | VectorEnv[Any, Any, Any] | None = None,
        *,
        device: str | None = None,
        num_envs: int | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] | None = None,
        network: NetworkSource | None = None,
        auxiliary: Mapping[str, Auxiliary] | None = None,
        learning_rate: float | LearningRate | None = None,
        verbose: int = 0,
        tensorboard_log: str | Path | None = None,
        **others: Never,
    ) -> Self:
        """Read an agent written by :meth:`save`, or the checkpoint of a training run.

        Args:
            path: The folder or file, or a run's folder.
            env: What to learn on, as the constructor takes it, with the saved arguments and
                wrappers unless others are given. None: the saved environment id, made anew; an
                agent of other environments than an id's needs them again.
            device: Overrides the saved device.
            num_envs: Overrides the saved number of environments; num_steps follows.
            env_kwargs: Arguments of each environment given.
            wrappers: Wrappers of each environment given.
            network: The network of one's own that was trained: a checkpoint has its weights and its
                name. An agent that has this very module gets them too: give its class or a copy.
            auxiliary: The auxiliary losses that it was trained with.
            learning_rate: As in the constructor. A function must be given again to go on training.
            verbose: As in the constructor.
            tensorboard_log: As in the constructor.
            others: There are none: settings stay those of training.

        Raises:
            CheckpointError: It is damaged, foreign, or fits another environment, algorithm or
                network; or its environments cannot be made again.
            ConfigError: No such argument or device, or other arguments than the saved without env.
        """
        refuse_load(others)
        saved = trained_agent(checkpoint_path(path), cls.algo, network)
        if env is None:
            require_same(saved.config, env_kwargs, wrappers)
        agent = cls(
            *same_samples(*saved.place(env), num_envs),
            device=device,
            num_envs=num_envs,
            env_kwargs=env_kwargs,
            wrappers=wrappers,
            network=network,
            auxiliary=auxiliary,
            learning_rate=learning_rate,
            verbose=verbose,
            tensorboard_log=tensorboard_log,
        )
        agent._lacks_learning_rate = saved.lacks_learning_rate and learning_rate is None
        with closed_on_failure(agent._given):
            saved.restore(agent.trainer)
        return agent

    def close(self) -> None:
        """Close the environments, if the agent made them."""
        if self._given.owned:
            self.envs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ACKTR(Agent):
    """An agent trained by ACKTR (Wu et al. 2017); arguments as :class:`Agent`."""

    algo = "acktr"


class A2C(Agent):
    """An agent trained by A2C (Mnih et al. 2016); arguments as :class:`Agent`."""

    algo = "a2c"


class TRPO(Agent):
    """An agent trained by TRPO (Schulman et al. 2015); arguments as :class:`Agent`."""

    algo = "trpo"
