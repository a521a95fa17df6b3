"""Callbacks: what they may be, what they return, the ready ones, and how training leaves them."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3
import numpy as np
import pytest
import torch

from acktr import ACKTR, CheckpointError, Config, TrainStats, preset
from acktr.callbacks import Checkpoints, Evaluations, ProgressBar, StopAt, Videos
from acktr.envs import EnvError
from acktr.learning import Lessons
from acktr.listeners import listeners, tell
from acktr.runs.folder import RunError
from acktr.runs.tables import read_table
from acktr.train import Episode
from tests.runs.test_video import BlackBoxEnv, PaintedEnv, register
from tests.tools.toys import CountingEnv


def tiny(**changes: Any) -> Config:
    return dataclasses.replace(preset("CartPole-v1")[0], num_envs=2, num_steps=8, **changes)


def agent(**arguments: Any) -> ACKTR:
    return ACKTR("CartPole-v1", tiny(), seed=0, **arguments)


def stats(**metrics: float) -> TrainStats:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return TrainStats(16, 1, named, (Episode(10.0, 10, 1.0),))


FALSE = [False, np.False_, np.array(False), np.array([False]), torch.tensor(False)]


@pytest.mark.parametrize("answer", FALSE, ids=repr)
def test_false_stops_after_the_first_update(answer: Any) -> None:
    with agent() as learner:
        assert learner.learn(160, lambda stats: answer).num_timesteps == 16


@pytest.mark.parametrize("answer", [None, True, np.True_, torch.tensor(True), 0, 0.0, "", []])
def test_all_else_goes_on(answer: Any) -> None:
    assert tell(listeners(lambda stats: answer), stats(), print)


def test_all_callbacks_are_told_though_one_stops() -> None:
    seen: list[str] = []

    def first(stats: TrainStats) -> bool:
        seen.append("first")
        return False

    with agent() as learner:
        learner.learn(160, [first, lambda stats: seen.append("second")])
    assert seen == ["first", "second"]


def test_a_dict_is_seen_by_later_callbacks_and_recorded(tmp_path: Path) -> None:
    shown: list[float] = []
    with agent(tensorboard_log=tmp_path / "logs") as learner:
        learner.learn(
            64,
            [
                lambda stats: {"own/share": np.float32(0.5), "own/steps": stats.timesteps},
                lambda stats: shown.append(stats.metrics["own/steps"]),
            ],
        )
        learner.learn(32)
    assert shown == [16, 32, 48, 64]
    rows = read_table(tmp_path / "logs/acktr_1/progress.csv").rows
    assert [row["timesteps"] for row in rows] == ["16", "32", "48", "64", "80", "96"]
    assert [row["own/share"] for row in rows] == ["0.5"] * 4 + [""] * 2
    assert all(float(row["train/learning_rate"]) > 0 for row in rows)
    assert (tmp_path / "logs/acktr_1/monitor.csv").is_file()
    assert points(tmp_path / "logs/acktr_1", "own/steps")[0] == (16, 16.0)


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows for a tag."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_metric_of_few_updates_is_not_lost_between_two_points(tmp_path: Path) -> None:
    with agent(tensorboard_log=tmp_path) as learner:
        learner.learn(160, lambda stats: {"own/rare": 7.0} if stats.timesteps == 96 else None)
    assert points(tmp_path / "acktr_1", "own/rare") == [(96, 7.0)]


def test_each_agent_has_a_log_folder_of_its_own(tmp_path: Path) -> None:
    for _ in range(2):
        agent(tensorboard_log=tmp_path).learn(16).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acktr_1", "acktr_2"]
    (tmp_path / "file").write_text("")
    with agent(tensorboard_log=tmp_path / "file") as learner:
        with pytest.raises(RunError, match="file: cannot make a folder for logs: File exists"):
            learner.learn(16)
        assert learner.num_timesteps == 0


@pytest.mark.parametrize("answer", [{"a": "x"}, {1: 2.0}, {"a": [1.0, 2.0]}, {"a\n": 1.0}])
def test_metrics_of_ones_own_are_numbers_by_name(answer: Any) -> None:
    with pytest.raises(TypeError, match="numbers by name") as caught:
        tell(listeners(lambda stats: answer), stats(), print)
    assert "\n" not in str(caught.value)


class SB3Callback:
    def on_step(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (
            SB3Callback(),
            "must be a function of acktr.TrainStats, .* got SB3Callback of Stable-Baselines3",
        ),
        (StopAt, "StopAt is a class: give StopAt"),
        ([None], "or a list of them, got NoneType"),
        (7, "got int"),
        (
            lambda locals, globals: True,
            r"\(locals, globals\) cannot be called .* write .*\(stats\)",
        ),
        (lambda: True, r"with the one argument that it gets, a acktr.TrainStats"),
    ],
)
def test_what_is_no_callback(callback: Any, line: str) -> None:
    with agent() as learner, pytest.raises(TypeError, match=line) as caught:
        learner.learn(16, callback)
    assert "\n" not in str(caught.value)
    assert learner.num_timesteps == 0


class Told:
    """Notes what it is told."""

    def __init__(self, fails: str = "") -> None:
        self.told: list[str] = []
        self._fails = fails

    def begin(self, agent: Any, total_timesteps: int) -> None:
        self._note(f"begin {agent.num_timesteps} {total_timesteps}")

    def __call__(self, stats: TrainStats) -> None:
        self._note(f"update {stats.timesteps}")

    def end(self) -> None:
        self._note("end")

    def _note(self, text: str) -> None:
        self.told.append(text)
        if self._fails and text.startswith(self._fails):
            raise ZeroDivisionError(text)


def test_a_listener_is_told_beginning_and_end() -> None:
    listener = Told()
    with agent() as learner:
        learner.learn(32, listener)
        learner.learn(16, [listener])
    assert listener.told == [
        "begin 0 32", "update 16", "update 32", "end", "begin 32 48", "update 48", "end",
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["begin", "update 32", "end"])
def test_an_exception_comes_out_and_the_agent_goes_on(fails: str) -> None:
    """The same numbers come as without it."""
    before, failing, after = Told(), Told(fails), Told()
    constant = {"learning_rate": 0.1}
    with agent(**constant) as learner, agent(**constant) as undisturbed:
        with pytest.raises(ZeroDivisionError):
            learner.learn(64, [before, failing, after])
        assert before.told[-1] == "end"
        assert after.told[-1:] == ([] if fails == "begin" else ["end"])
        done = learner.num_timesteps
        assert done == {"begin": 0, "update 32": 32, "end": 64}[fails]
        if done:
            undisturbed.learn(done)
        learner.learn(32), undisturbed.learn(32)
        kept, wanted = learner.get_parameters(), undisturbed.get_parameters()
        assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_checkpoints_are_files_that_can_be_loaded(tmp_path: Path) -> None:
    with agent() as learner:
        learner.learn(100, Checkpoints(tmp_path / "made" / "here", every=40))
        learner.learn(20, Checkpoints(tmp_path / "made" / "here", every=40))
    names = sorted(path.name for path in (tmp_path / "made" / "here").iterdir())
    assert names == ["step_128.zip", "step_48.zip", "step_80.zip"]
    with ACKTR.load(tmp_path / "made" / "here" / "step_80.zip") as again:
        assert again.num_timesteps == 80
    (tmp_path / "file").write_text("")
    with agent() as learner, pytest.raises(CheckpointError, match="cannot make it"):
        learner.learn(16, Checkpoints(tmp_path / "file", every=16))


def test_videos_are_filmed_and_change_nothing(tmp_path: Path) -> None:
    name = register("filmed", PaintedEnv)
    kept = []
    for callbacks in ([Videos(tmp_path / "films", every=32, max_steps=3)], []):
        with ACKTR(name, num_envs=2, num_steps=8, seed=0) as learner:
            kept.append(learner.learn(64, callbacks).get_parameters())
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])
    films = {path.name: imageio.v3.imread(path) for path in (tmp_path / "films").iterdir()}
    assert sorted(films) == ["step_32.mp4", "step_64.mp4"]
    assert all(len(film) == 4 and film.std() > 10 for film in films.values())


def test_what_no_file_brings_back_is_not_filmed(tmp_path: Path) -> None:
    envs = gymnasium.vector.SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    with ACKTR(envs, tiny(), seed=0) as learner, pytest.raises(CheckpointError, match="env="):
        learner.learn(16, Videos(tmp_path))


def test_what_cannot_be_filmed_ends_before_the_first_update(tmp_path: Path) -> None:
    name = register("unfilmed", BlackBoxEnv)
    with ACKTR(name, num_envs=2, num_steps=8, seed=0) as learner:
        with pytest.raises(EnvError, match="renders no pictures"):
            learner.learn(16, Videos(tmp_path))
        assert learner.num_timesteps == 0
    assert not list(tmp_path.iterdir())


def test_evaluations_keep_the_best(tmp_path: Path) -> None:
    """A deterministic policy that gets worse: the better one is what is saved."""
    found: list[float] = []

    def spoil(stats: TrainStats) -> None:
        found.append(stats.metrics["eval/mean_reward"])
        if len(found) == 1:  # from now on always to the left
            zeros = {name: torch.zeros_like(x) for name, x in learner.get_parameters().items()}
            learner.set_parameters(zeros)

    best = tmp_path / "best.zip"
    evaluations = Evaluations(every=16, episodes=3, best=best)
    with agent() as learner:
        learner.set_parameters(balancing(learner))
        learner.learn(32, [evaluations, spoil])
    assert found[0] > 100 > found[1]
    assert evaluations.score == found[0]
    with ACKTR.load(best) as again:
        assert again.num_timesteps == 16
        assert again.evaluate(episodes=3).mean == found[0]


def balancing(learner: ACKTR) -> dict[str, torch.Tensor]:
    """A network that pushes to where the pole falls, which lasts for longer than 100 steps."""
    values = learner.get_parameters()
    linear = [name for name in values if "value" not in name and "critic" not in name]
    weights = [name for name in linear if name.endswith("weight")]
    for name in linear:
        values[name] = torch.zeros_like(values[name])
    values[weights[0]][0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for name in weights[1:-1]:
        values[name][0, 0] = 1.0
    values[weights[-1]][:, 0] = torch.tensor([-1.0, 1.0])
    return values


def test_the_best_by_a_number_of_infos(tmp_path: Path) -> None:
    """On another environment, whose episodes end with the number of their steps."""
    counts = {"best_by": "count", "every": 16, "episodes": 2}
    kind = partial(CountingEnv, truncate_at=5)
    evaluations = Evaluations(kind, best=tmp_path / "best.zip", **counts)  # type: ignore[arg-type]
    shown: list[dict[str, float]] = []
    env = partial(CountingEnv, terminate_at=3)
    with ACKTR(env, tiny(), record=("count",)) as learner:
        learner.learn(16, [evaluations, lambda stats: shown.append(stats.metrics)])
        assert evaluations.score == shown[0]["eval/mean_count"] == 5.0
        assert shown[0]["eval/mean_reward"] == 15.0
        found = learner.evaluate(episodes=3, best_by="count")
        assert (found.score, found.mean, found.lengths) == (3.0, 6.0, (3, 3, 3))
        with pytest.raises(ValueError, match="no episode's last infos have a number 'ratio'"):
            learner.evaluate(episodes=1, best_by="ratio")
    with ACKTR.load(tmp_path / "best.zip", env=env) as again:
        assert again.num_timesteps == 16


def test_stop_at_a_reward() -> None:
    """A mean over few episodes does not count, one of an evaluation does."""
    of_training, of_evaluation = StopAt(5.0, episodes=3), StopAt(5.0, "eval/mean_reward")
    assert [of_training(stats(rollout__ep_rew_mean=9.0)) for _ in range(3)] == [True, True, False]
    assert of_training(stats(rollout__ep_rew_mean=4.0))
    assert of_training(stats(rollout__ep_rew_mean=float("nan")))
    assert of_evaluation(stats())
    assert not of_evaluation(stats(eval__mean_reward=5.0))
    with agent() as learner:
        learner.learn(10_000, [StopAt(1.0, episodes=10)])
        assert learner.num_timesteps < 2_000


@pytest.mark.parametrize(
    ("metric", "found"),
    [
        ("train/aprox_kl", "it has train/approx_kl"),
        ("rollout/ep_rew_meen", "it has rollout/ep_rew_mean"),
        ("own/thing", "it has "),
        ("eval/mean_rewrd", "it has eval/mean_reward"),
    ],
)
def test_stop_at_a_metric_that_never_comes(metric: str, found: str) -> None:
    """The first statistics that should have it say so, and what they have."""
    said = rf"waits for the metric '{metric}', which update \d+ has not; {found}"
    with agent() as learner:
        with pytest.raises(ValueError, match=said) as caught:
            learner.learn(10_000, [Evaluations(every=48, episodes=1), StopAt(1.0, metric)])
        assert "\n" not in str(caught.value) and learner.num_timesteps < 1_000


def test_stop_at_an_evaluation_that_is_never_made() -> None:
    waiting = StopAt(1.0, "eval/mean_reward")
    with agent() as learner:
        with pytest.raises(ValueError, match="StopAt must stand after the Evaluations"):
            learner.learn(64, [waiting, Evaluations(every=16, episodes=1)])
        with pytest.warns(UserWarning, match="there was no evaluation: give Evaluations before"):
            learner.learn(64, waiting)


def test_means_are_over_the_last_hundred_episodes() -> None:
    def window(stats: TrainStats) -> TrainStats:
        return lessons._told([], stats)[0]

    lessons = Lessons()
    assert window(TrainStats(16, 1, {"a": 1.0}, ())).metrics == {"a": 1.0}
    rewards = np.random.default_rng(0).normal(size=130)
    for start in range(0, 130, 10):
        ended = tuple(Episode(r, 7, 0.0) for r in rewards[start : start + 10].tolist())
        shown = window(TrainStats(16, 1, {"a": 1.0}, ended))
    assert shown.episodes == ended
    means = {"rollout/ep_rew_mean": rewards[30:].mean(), "rollout/ep_len_mean": 7.0}
    assert shown.metrics == pytest.approx({"a": 1.0, **means})
    infos = ({"ratio": 0.5}, {}, {"ratio": 0.25}, {"ratio": float("nan")}, {"none": float("nan")})
    ended = tuple(Episode(0.0, 7, 0.0, info) for info in infos)
    shown = window(TrainStats(16, 1, {}, ended))
    assert shown.metrics["rollout/ratio_mean"] == 0.375 and "rollout/none_mean" not in shown.metrics


@pytest.mark.parametrize(
    "arguments", [{"verbose": 1}, {"progress_bar": True}, {"callback": [ProgressBar()]}]
)
def test_progress_is_shown_once(
    arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [Evaluations(every=16, episodes=1), *arguments.get("callback", [])]
    with agent(verbose=arguments.get("verbose", 0)) as learner:
        learner.learn(16, given, progress_bar=arguments.get("progress_bar", False))
    shown = capsys.readouterr().err
    assert shown.count("steps 16/16 (100.0%)") == 1
    assert shown.count("evaluation at step 16: ") == 1
    first = "acktr in 2 x CartPole-v1, device cpu, precision float32, torch threads 1, no action"
    assert shown.startswith(f"{first} masks\n") != ("callback" in arguments)


def test_nothing_is_shown_by_default(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "acktr"), agent() as learner:
        learner.learn(16, Evaluations(every=16, episodes=1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "10"])
def test_intervals_are_counts(every: Any) -> None:
    kinds = (
        lambda: Checkpoints("x", every),
        lambda: Evaluations(every=every),
        lambda: Videos("x", every),
    )
    for kind in kinds:
        with pytest.raises(ValueError, match="every must be an integer >= 1"):
            kind()  # type: ignore[no-untyped-call]
