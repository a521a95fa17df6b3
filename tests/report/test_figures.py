"""Legends below the panels stay within the figure, and the axes fit what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from acktr.report import figures, plot
from acktr.report.figures import legend_below, panels, picture
from acktr.report.page import ReportSettings, write_report
from tests.tools.run_folders import write_run


@pytest.mark.parametrize(
    ("panel_count", "names", "columns"),
    [(1, 2, 4), (1, 5, 2), (3, 5, 4), (3, 60, 4)],
)
def test_a_legend_has_the_columns_that_there_is_room_for(
    panel_count: int, names: int, columns: int
) -> None:
    figure, _, _ = panels(panel_count, columns=3)
    handles = [Line2D([], [], label=f"an algorithm, its source {i}") for i in range(names)]
    legend_below(figure, handles)
    (legend,) = figure.legends
    assert legend._ncols == columns
    picture(figure, "png")
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert box.y0 >= 0 and box.y1 <= figure.bbox.height
    bottom = min(axis.get_tightbbox().y0 for axis in figure.axes if axis.get_visible())
    assert box.y1 <= bottom
    assert all(axis.get_window_extent().height > 3 * figure.dpi for axis in figure.axes)


def test_no_two_of_35_labels_look_alike() -> None:
    names = [str(i) for i in range(35)]
    found = figures.looks(names)
    assert [*found] == names
    assert len({(look["color"], look["linestyle"]) for look in found.values()}) == 35
    assert {look["linestyle"] for look in list(found.values())[:7]} == {"-"}


def test_a_name_that_is_wider_than_the_figure_stands_alone() -> None:
    figure, _, _ = panels(1, columns=1)
    legend_below(figure, [Line2D([], [], label="x" * 200), Line2D([], [], label="y")])
    (legend,) = figure.legends
    assert legend._ncols == 1


@pytest.mark.parametrize("kind", ["plot", "report"])
def test_axes_end_where_the_runs_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The published curves of Breakout reach 400 at 10M steps, and 11 and 16 at 1M."""
    drawn: list[Figure] = []
    module = plot if kind == "plot" else figures
    monkeypatch.setattr(module, "picture", lambda figure, _: drawn.append(figure) or b"")
    returns = [k / 100 for k in range(1000)]
    run = write_run(tmp_path, "BreakoutNoFrameskip-v4", "acktr", 0, returns, total=1_000_000)
    if kind == "plot":
        plot.plot_runs([run], tmp_path / "x.png", published=["acktr"])
        rows = (tmp_path / "x.csv").read_text()
        assert ",9800000,434.78" in rows  # the whole published curve
    else:
        write_report([run], tmp_path / "out", ReportSettings({}, resamples=20), ["acktr"])
    axis = drawn[0].axes[0]
    assert len(axis.lines) == (4 if kind == "plot" else 3)
    assert axis.get_xlim()[1] == pytest.approx(1_000_000, rel=0.06)
    assert 15 < axis.get_ylim()[1] < 18


@pytest.mark.parametrize(
    ("title", "label"), [("Pixels/Hopper-v5", "agent steps"), ("Hopper-v5", "environment steps")]
)
def test_steps_are_named(title: str, label: str) -> None:
    (axis,) = panels(1, columns=1)[1]
    figures.step_axis(axis, title)
    assert axis.get_xlabel() == label
