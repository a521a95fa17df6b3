"""Legends below the panels stay within the figure."""

from __future__ import annotations

import pytest
from matplotlib.lines import Line2D

from acktr.report.figures import legend_below, panels, picture


@pytest.mark.parametrize(
    ("panel_count", "names", "columns"),
    [(1, 2, 4), (1, 5, 2), (3, 5, 4)],
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


def test_a_name_that_is_wider_than_the_figure_stands_alone() -> None:
    figure, _, _ = panels(1, columns=1)
    legend_below(figure, [Line2D([], [], label="x" * 200), Line2D([], [], label="y")])
    (legend,) = figure.legends
    assert legend._ncols == 1
