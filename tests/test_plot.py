from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from acktr.log import RunError, RunFolder, RunLogger
from acktr.plot import (
    curve,
    environment_name,
    load_monitor,
    plot_runs,
    published_curves,
)
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


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_load_monitor(tmp_path: Path) -> None:
    monitor = load_monitor(make_run(tmp_path / "a", np.array([1.5, -2.0, 3.0, 4.25])))
    assert monitor.steps.tolist() == [1000, 1000, 1000, 2000]
    assert monitor.returns.tolist() == [1.5, -2.0, 3.0, 4.25]
    assert monitor.lengths.tolist() == [7] * 4
    np.testing.assert_allclose(monitor.seconds, [0, 0, 0, 0.3])


def test_monitor_of_other_tools_has_no_step(tmp_path: Path) -> None:
    (tmp_path / "monitor.csv").write_text('#{"t_start": 1}\nr,l,t\n1.0,5,0.1\n2.0,6,0.2\n3.0,9')
    assert load_monitor(tmp_path).steps.tolist() == [5, 11]


@pytest.mark.parametrize("window", [1, 4, 100])
@pytest.mark.parametrize("per_update", [1, 3])
def test_smoothing_is_the_mean_of_the_last_episodes(
    tmp_path: Path, window: int, per_update: int
) -> None:
    returns = np.random.default_rng(1).normal(1000, 300, 231).round(6)
    steps, smoothed = curve(make_run(tmp_path / "a", returns, per_update), window)
    done = [min(k + per_update, 231) for k in range(0, 231, per_update)]
    assert steps.tolist() == [1000 * (k + 1) for k in range(len(done))]
    np.testing.assert_allclose(
        smoothed, [np.mean(returns[max(0, n - window) : n]) for n in done], rtol=1e-12
    )


def test_curve_is_what_training_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.random.default_rng(2).normal(0, 9, 300))
    reported = [float(row["rollout/ep_rew_mean"]) for row in table(run / "progress.csv")]
    np.testing.assert_allclose(curve(run)[1], reported, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot read: No such file"),
        ("#{}\nr,l,t,step\n", "no episode has ended yet"),
        ("#{}\nr,l,step\n1,2,3\n", "columns r, l and t are needed"),
        ("#{}\nr,l,t,step\n1,2,x,3\n", "could not convert"),
        ("#{}\nr,l,t,step\nnan,2,1,3\n", "must be finite"),
        ("#{}\nr,l,t,step\n1,2,1,3\n1,2,1,2\n", "must not decrease"),
        ("#{}\nr,l,t,step\n1,2,1," + "9" * 30 + "\n", "too large"),
        ("", "no header line"),
    ],
)
def test_bad_monitor_is_one_line(tmp_path: Path, content: str | None, why: str) -> None:
    if content is not None:
        (tmp_path / "monitor.csv").write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        load_monitor(tmp_path)
    assert "\n" not in str(caught.value) and "monitor.csv" in str(caught.value)


def test_plotted_numbers(tmp_path: Path) -> None:
    a = make_run(tmp_path / "a", np.arange(30.0), 1, seed=1)  # steps 1000 to 30000
    b = make_run(tmp_path / "b", np.full(40, 2.0), 2, seed=2)  # steps 1000 to 20000
    c = make_run(tmp_path / "c", np.full(10, 5.0), 1, env="PongNoFrameskip-v4", seed=3)
    published = published_curves("HalfCheetah-v5") + published_curves("Hopper-v5")
    numbers = plot_runs([a, b, c], tmp_path / "x.png", published=published, title="$T$")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert numbers == tmp_path / "x.csv"
    rows = table(numbers)
    assert {(row["env"], row["kind"], row["name"]) for row in rows} == {
        ("HalfCheetah-v5", "run", "seed 1"),
        ("HalfCheetah-v5", "run", "seed 2"),
        ("HalfCheetah-v5", "mean", "acktr, mean of 2 runs"),
        ("HalfCheetah-v5", "published", published[0].label),
        ("PongNoFrameskip-v4", "run", "seed 3"),
        ("PongNoFrameskip-v4", "mean", "acktr, 1 run"),
    }
    first = [row for row in rows if row["name"] == "seed 1"]
    assert [float(row["return"]) for row in first] == [k / 2 for k in range(30)]
    assert [float(row["step"]) for row in first] == [1000.0 * (k + 1) for k in range(30)]
    mean = [row for row in rows if row["name"] == "acktr, mean of 2 runs"]
    assert float(mean[0]["step"]) == 1000 and float(mean[-1]["step"]) == 20000
    for row in mean:  # a's curve is (step / 1000 - 1) / 2, b's is 2
        expected = ((float(row["step"]) / 1000 - 1) / 2 + 2) / 2
        assert float(row["return"]) == pytest.approx(expected, abs=1e-6)


def test_svg_and_repeated_plots(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.arange(5000.0), 1)
    for _ in range(2):
        plot_runs([run], tmp_path / "x.svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    rows = [row for row in table(tmp_path / "x.csv") if row["kind"] == "run"]
    assert len(rows) == 2000
    assert (rows[0]["step"], rows[-1]["step"]) == ("1000", "5000000")


def test_runs_that_do_not_overlap_have_no_mean(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        folder = RunFolder.create(tmp_path / name)
        folder.write_config({"env": "X-v0", "algo": "acktr", "seed": 0})
        with RunLogger(folder, "X-v0") as logger:
            for k in (1, 2):
                logger.write(TrainStats(first + k, k, {}, (Episode(1.0, 1, 0.0),)))
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "x.png")
    assert {row["kind"] for row in table(tmp_path / "x.csv")} == {"run"}


def test_refusals_write_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.arange(3.0))
    empty = make_run(tmp_path / "b", np.empty(0))
    odd = make_run(tmp_path / "c", np.arange(3.0), env="a\nb")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    out = tmp_path / "x.png"
    for runs, target, why in (
        ([run], tmp_path / "x.pdf", "must end in .png or .svg"),
        ([], out, "no runs"),
        ([run, empty], out, "monitor.csv: cannot read"),
        ([odd], out, "env must be a printable name"),
        ([run], run / "progress.png", "progress.csv: would be replaced"),
        ([run], tmp_path / "missing" / "x.png", "cannot write: No such file"),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            plot_runs(runs, target)
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="not a run folder"):
        plot_runs([tmp_path / "nowhere"], out)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("HalfCheetah-v5", "HalfCheetah"),
        ("PongNoFrameskip-v4", "Pong"),
        ("ALE/Pong-v5", "Pong"),
        ("PongDeterministic-v4", "Pong"),
        ("Reacher", "Reacher"),
    ],
)
def test_environment_name(env_id: str, name: str) -> None:
    assert environment_name(env_id) == name


def test_published_curves() -> None:
    (paper,) = published_curves("HalfCheetah-v5")
    assert paper.label == "ACKTR, Wu et al. 2017 (HalfCheetah-v1, older version)"
    both = published_curves("PongNoFrameskip-v4")
    assert [ref.label for ref in both] == [
        "ACKTR, OpenAI Baselines (PongNoFrameskip-v4)",
        "ACKTR, Wu et al. 2017 (PongNoFrameskip-v3, older version)",
    ]
    assert all(18 < ref.returns[-1] <= 21 and ref.returns[0] < -18 for ref in both)
    assert len(published_curves("Hopper-v5", ("acktr", "a2c", "trpo"))) == 4
    assert published_curves("CartPole-v1") == []
    for env in ("BeamRider", "Breakout", "Qbert", "Seaquest", "SpaceInvaders", "Ant", "Walker2d"):
        for ref in published_curves(f"{env}-v5"):
            assert 2 <= len(ref.steps) <= 50 and (np.diff(ref.steps) > 0).all()
            assert np.isfinite(ref.returns).all()
