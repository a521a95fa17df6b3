"""Episodes and learning curves are read, averaged and kept."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.curves import (
    MOVING_MEAN,
    curve,
    grid,
    load_monitor,
    moving_mean,
    on_grid,
    until,
)
from tests.tools.run_folders import make_run


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
    found = moving_mean(load_monitor(make_run(tmp_path / "a", returns, per_update)), window)
    done = [min(k + per_update, 231) for k in range(0, 231, per_update)]
    assert found.steps.tolist() == [1000 * (k + 1) for k in range(len(done))]
    assert found.episodes.tolist() == [min(n, window) for n in done]
    np.testing.assert_allclose(
        found.returns, [np.mean(returns[max(0, n - window) : n]) for n in done], rtol=1e-12
    )


def test_curve_is_what_training_reported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", np.random.default_rng(2).normal(0, 9, 300))
    reported = [float(row["rollout/ep_rew_mean"]) for row in table(run / "progress.csv")]
    np.testing.assert_allclose(curve(run).returns, reported, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no episode has ended yet"),
        ("#{}\nr,l,t,step\n", "no episode has ended yet"),
        ("#{}\nr,l,step\n1,2,3\n", "columns r, l, t are needed"),
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
        curve(tmp_path)
    assert "\n" not in str(caught.value) and "monitor.csv" in str(caught.value)


@pytest.mark.parametrize("total", [1, 7, 999, 1000, 1001, 200_000, 1_000_000])
def test_grid(total: int) -> None:
    steps = grid(total)
    assert len(steps) == min(total, 1000) and steps[-1] == total and steps[0] >= 1
    assert (np.diff(steps) > 0).all()
    points = len(steps)
    assert (np.abs(steps - np.arange(1, points + 1) * total / points) < 1).all()


def test_curve_on_a_grid_is_the_mean_at_that_step(tmp_path: Path) -> None:
    returns = np.random.default_rng(3).normal(0, 100, 400).round(6)
    run = make_run(tmp_path / "a", returns, 3)  # ends at step 134000
    found = on_grid(curve(run), grid(150_000))
    monitor = load_monitor(run)
    assert found.steps.tolist() == [s for s in range(150, 150_001, 150) if s >= 1000]
    for step, episodes, value in zip(found.steps, found.episodes, found.returns, strict=True):
        ended = monitor.returns[monitor.steps <= step][-100:]
        assert episodes == len(ended)
        assert value == pytest.approx(np.mean(ended), abs=0.5001e-4)
    again = on_grid(found, grid(150_000))
    assert again.returns.tolist() == found.returns.tolist()
    assert again.steps.tolist() == found.steps.tolist()


def test_a_curve_that_begins_behind_the_grid_counts_at_its_end(tmp_path: Path) -> None:
    """Of a run whose only episodes ended in the last update, which goes beyond the total."""
    found = on_grid(curve(make_run(tmp_path / "a", np.array([1.0, 2, 6]), 3)), grid(990))
    assert (found.steps.tolist(), found.returns.tolist()) == ([990], [3.0])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("step,episodes,return\n", "needs points"),
        ("step,episodes\n1,2\n", "columns step, episodes, return are needed"),
        ("step,episodes,return\n1,2,inf\n", "finite returns"),
        ("step,episodes,return\n2,2,1\n2,2,1\n", "increasing steps"),
        ("step,episodes,return\n1,x,1\n", "invalid literal"),
        ("step,episodes,return\n1,2\n", "line 2 has 2 fields"),
    ],
)
def test_bad_stored_curve_is_one_line(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / MOVING_MEAN).write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        curve(tmp_path)
    assert "\n" not in str(caught.value) and MOVING_MEAN in str(caught.value)


def test_part_of_a_curve() -> None:
    steps, returns = np.array([2.0, 4.0, 8.0]), np.array([1.0, 3.0, 7.0])
    for end, expected in (
        (1, []),
        (3, [(2, 1), (3, 2)]),
        (4, [(2, 1), (4, 3)]),
        (9, [(2, 1), (4, 3), (8, 7)]),
    ):
        assert list(zip(*until(end, steps, returns), strict=True)) == expected
