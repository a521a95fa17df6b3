"""Hyper-parameters by Optuna, poor trials cut short: python -m scripts.examples.optuna_search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import optuna

from acktr import ACKTR, TrainStats
from acktr.callbacks import Evaluations
from acktr.config import preset


def pruning(trial: optuna.Trial, every: int) -> Callable[[TrainStats], None]:
    """A callback that tells a trial of evaluations, which are made every so many steps."""

    def callback(stats: TrainStats) -> None:
        if "eval/mean_reward" in stats.metrics:  # of the evaluations before it in the list
            trial.report(stats.metrics["eval/mean_reward"], stats.timesteps // every)
            if trial.should_prune():
                raise optuna.TrialPruned  # leaves learn(), and is no failure to Optuna

    return callback


def objective(trial: optuna.Trial, env: str, steps: int) -> float:
    """The mean return of the agent that a trial's settings gave."""
    config, _ = preset(env, "acktr")
    actor = replace(
        config.acktr.actor,
        lr=trial.suggest_float("lr", 0.01, 1.0, log=True),
        kl_clip=trial.suggest_float("kl_clip", 1e-3, 0.1, log=True),
        damping=trial.suggest_float("damping", 1e-3, 0.1, log=True),
    )
    config = replace(
        config,
        gamma=1 - trial.suggest_float("1 - gamma", 0.001, 0.1, log=True),
        acktr=replace(config.acktr, actor=actor),
    )
    every = max(steps // 10, 1)
    with ACKTR(env, config, seed=trial.number) as agent:
        agent.learn(steps, callback=[Evaluations(every=every, episodes=5), pruning(trial, every)])
        return agent.evaluate(episodes=20).mean


def search(env: str, steps: int, trials: int) -> optuna.Study:
    """All trials; the same call again draws the same settings."""
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2),
    )
    study.optimize(lambda trial: objective(trial, env, steps), n_trials=trials)
    return study


def main(argv: Sequence[str]) -> int:
    """Search, and print the best settings."""
    parser = argparse.ArgumentParser(prog="scripts.examples.optuna_search", description=__doc__)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--trials", type=int, default=20)
    given = parser.parse_args(argv)
    study = search(given.env, given.steps, given.trials)
    pruned = sum(trial.state.name == "PRUNED" for trial in study.trials)
    best = ", ".join(f"{name} {value:.3g}" for name, value in study.best_params.items())
    print(f"{pruned} of {given.trials} trials pruned; best {study.best_value:.1f}: {best}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
