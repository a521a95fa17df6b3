"""Callbacks that are given to a second agent begin anew; to the same one they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from acktr import ACKTR
from acktr.callbacks import Evaluations, Logs, StopAt
from tests.tools.toys import CountingEnv


def counting(length: int) -> ACKTR:
    """An agent whose returns follow from the length of episodes alone."""
    kwargs: dict[str, Any] = {"terminate_at": length}
    return ACKTR(
        CountingEnv, num_envs=2, num_steps=4, hidden=(4,), env_kwargs=kwargs, env_workers=1, seed=0
    )


def test_a_second_agent_needs_episodes_of_its_own() -> None:
    stop = StopAt(0.0, episodes=8)
    steps = []
    for _ in range(2):
        with counting(2) as agent:
            agent.learn(1_000, stop)
            steps.append(agent.num_timesteps)
            agent.learn(1_000, stop)  # the same agent has had its episodes
            assert agent.num_timesteps == steps[-1] + 8
    assert steps == [16, 16]


def test_the_best_of_a_second_agent_is_saved(tmp_path: Path) -> None:
    best = tmp_path / "best.zip"
    evaluations = Evaluations(every=8, episodes=2, best=best)
    with counting(5) as agent:
        agent.learn(8, evaluations)
        former = evaluations.score
        best.unlink()
        agent.learn(8, evaluations)
        assert evaluations.score == former and not best.exists()  # it was no better
    with counting(3) as agent:
        agent.learn(8, evaluations)
    assert evaluations.score < former and best.exists()


def test_a_second_agent_has_a_folder_of_logs_of_its_own(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    for name in ("acktr_1", "acktr_2"):
        with counting(3) as agent:
            agent.learn(8, logs).learn(8, logs)
        assert logs.folder == tmp_path / name
        assert len((logs.folder / "progress.csv").read_text().splitlines()) == 3
