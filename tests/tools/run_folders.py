"""Run folders made up by tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from acktr.runs.folder import RunFolder
from acktr.runs.logger import RunLogger
from acktr.train import Episode, TrainStats

Floats = NDArray[np.float64]


def make_run(
    path: Path, returns: Floats, per_update: int = 3, env: str = "HalfCheetah-v5", seed: int = 0
) -> Path:
    """A run whose update k has 1000 steps and ``per_update`` episodes."""
    folder = RunFolder.create(path)
    folder.write_config({"env": env, "algo": "acktr", "seed": seed})
    with RunLogger(folder, env) as logger:
        for k in range(0, len(returns), per_update):
            ended = tuple(Episode(float(r), 7, 0.1 * k) for r in returns[k : k + per_update])
            update = k // per_update + 1
            logger.write(TrainStats(1000 * update, update, {}, ended))
    return path


def write_run(
    root: Path,
    env: str,
    label: str,
    seed: int,
    returns: Sequence[float],
    *,
    evaluation: Sequence[float] | None = (1.0, 3.0),
    total: int = 10_000,
    algo: str = "acktr",
    commit: str = "abc",
) -> Path:
    """ROOT/ENV/LABEL/seedN with equally spaced episodes, the last ending at ``total``.

    Without an evaluation the run is unfinished.
    """
    run = root / env.replace("/", "_") / label / f"seed{seed}"
    run.mkdir(parents=True)
    config = {"env": env, "algo": algo, "seed": seed, "total_timesteps": total, "num_envs": 1}
    (run / "config.json").write_text(json.dumps(config))
    (run / "versions.json").write_text(json.dumps({"git_commit": commit, "torch": "2.0"}))
    (run / "command.txt").write_text(f"acktr train --env {env} --run-dir {root}\n")
    rows = [
        f"{value!r},5,{60 * k},{total * k // len(returns)}\n"
        for k, value in enumerate(map(float, returns), 1)
    ]
    (run / "monitor.csv").write_text("#{}\nr,l,t,step\n" + "".join(rows))
    if evaluation is not None:
        mean, std = np.mean(evaluation), np.std(evaluation)
        listed = ";".join(map(repr, evaluation))
        (run / "eval.csv").write_text(
            "timesteps,mean_reward,std_reward,mean_length,episodes,returns\n"
            f"1,0,0,5,1,0.0\n{total + 9},{mean:.9g},{std:.9g},5,{len(evaluation)},{listed}\n"
        )
    return run
