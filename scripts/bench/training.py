"""Our algorithms: speed of training, where the time goes, and the two limits of the speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from acktr.compute import one_thread
from acktr.config import Config
from acktr.envs import AnyVectorEnv, group_count
from acktr.rollout import make_batch
from acktr.runs.saved import limit_threads
from acktr.train import Trainer, training_envs
from scripts.bench.cases import Timing
from scripts.bench.memory import peak_mib
from scripts.bench.windows import Windows

_ENDLESS = 10**12
"""Steps of a training that is stopped before; step sizes stay those of the beginning."""
_POOL = 256
"""Random actions that are drawn beforehand and used in turn."""
_ROLLOUT = ("env", "forward", "update")
"""Parts of training by their tags time/..., of which forward is acting."""
_RENAMED = {"factors": "statistics", "apply": "precondition"}
_INSIDE_STEP = ("refresh", "apply")


def measure_training(config: Config, timing: Timing) -> dict[str, Any]:
    """Train and time it.

    Returns:
        JSON values of :class:`Windows`, and the ``shares`` of its parts over the same windows.

    Raises:
        EnvError: The environment cannot be made.
    """
    envs = _environments(config)
    try:
        trainer = Trainer(config, envs)
        windows = Windows(timing)
        rollout, before = dict.fromkeys(_ROLLOUT, 0.0), trainer.learner.seconds
        for stats in trainer.run(_ENDLESS):
            counts = windows.warm
            windows.end_update(stats.timesteps)
            if counts:
                for part in _ROLLOUT:
                    rollout[part] += stats.metrics.get(f"time/{part}", 0.0)
            else:
                before = trainer.learner.seconds
            if windows.done:
                break
        inside = {name: s - before.get(name, 0.0) for name, s in trainer.learner.seconds.items()}
        parts = shares(windows.seconds, rollout, inside)
        return windows.result() | {"shares": parts, "peak_mib": peak_mib()}
    finally:
        envs.close()


def _environments(config: Config) -> AnyVectorEnv:
    envs = training_envs(config)
    limit_threads(envs.single_observation_space)  # as acktr train does
    return envs


def shares(
    elapsed: float, rollout: Mapping[str, float], inside: Mapping[str, float]
) -> dict[str, float]:
    """Disjoint parts of the time, which sum to 1.

    Args:
        elapsed: Seconds of the whole.
        rollout: Seconds in the environments (env), of acting (forward) and of the update.
        inside: Seconds by part of the update, as learners keep them: ``step`` holds ``refresh`` and
            ``apply``.

    Returns:
        By part: ``batch`` is what remains of the whole, ``step`` what remains of the step, and
        ``rest`` what remains of the update.
    """
    parts = dict(inside)
    known = sum(parts.values()) - sum(parts.get(name, 0.0) for name in _INSIDE_STEP)
    if "step" in parts:
        parts["step"] -= sum(parts.get(name, 0.0) for name in _INSIDE_STEP)
    seconds = {"env": rollout["env"], "act": rollout["forward"]}
    seconds["batch"] = elapsed - sum(rollout[part] for part in _ROLLOUT)
    seconds |= {_RENAMED.get(name, name): value for name, value in parts.items()}
    seconds["rest"] = rollout["update"] - known
    return {name: value / elapsed for name, value in seconds.items()}


def measure_environment(config: Config, timing: Timing) -> dict[str, Any]:
    """Step the environments of a training with random actions, and do nothing else."""
    envs = _environments(config)
    try:
        envs.reset(seed=config.seed)
        envs.action_space.seed(config.seed)
        pool = [envs.action_space.sample() for _ in range(_POOL)]
        windows = Windows(timing)
        steps = 0
        while not windows.done:
            for _ in range(config.num_steps):
                envs.step(pool[steps % _POOL])
                steps += 1
            windows.end_update(steps * config.num_envs)
        return windows.result()
    finally:
        envs.close()


def measure_compute(config: Config, timing: Timing) -> dict[str, Any]:
    """Act on fixed observations and learn from a fixed batch, without any environment.

    The parameters are put back after every update, which is not timed, so that all updates are
    alike but for what K-FAC does at intervals. Acting takes a group of environments at a time.
    """
    envs = _environments(config)
    try:
        trainer = Trainer(config, envs)
        trainer.collector.reset(config.seed)
        rollout = trainer.collector.collect(config.num_steps)
        parts = group_count(envs)
    finally:
        envs.close()
    batch = make_batch(rollout, config.gamma, config.gae_lambda, trainer.device)
    shown = batch.observations[: config.num_envs // parts].clone()
    act = _acting(trainer, shown, batch.observations, config.num_steps * parts)
    named = dict(trainer.network.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in named.items()}
    spent = 0.0
    windows = Windows(timing, lambda: spent)
    updates = 0
    while not windows.done:
        started = time.perf_counter()
        act()
        trainer.learner.update(batch, 0.0)
        spent += time.perf_counter() - started
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(start[name])
        updates += 1
        windows.end_update(updates * rollout.env_steps)
    return windows.result()


def _acting(
    trainer: Trainer, observations: Tensor, batch: Tensor, times: int
) -> Callable[[], None]:
    """The forward passes of a rollout: to act, and one for the values that those leave out.

    Args:
        trainer: Network, precision and action noise.
        observations: Of one step of a group of environments.
        batch: Of a whole rollout.
        times: How often the policy acts.
    """
    acting = trainer.collector.acting
    last = observations if acting.gives_values else batch

    @torch.no_grad()
    def act() -> None:
        with one_thread():
            for _ in range(times):
                acting(observations)
        acting.values(last)

    return act
