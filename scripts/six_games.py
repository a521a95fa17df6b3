"""Curves of Atari games beside the published ones, also of runs that have stopped early.

Usage: python -m scripts.six_games RUNS [RUNS ...] --out DIR

RUNS are run folders, folders with runs, or archives, each of acktr or a2c on a game of which curves
were published. A run needs not be finished: its row says how many steps of its schedule it has
made, and what it returned at steps that it has passed (mean of the last 100 episodes). Beside it
stand the published returns at the same steps, whose end is the mean over the last tenth of the
curve, and the step at which each ACKTR curve passes the end of A2C: of its own source where it is
published, of every source where it is ours. The end of our A2C is the mean over its runs, wherever
they have stopped. Writes games.md, games.csv and games.png, in which a run is a line of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from acktr.report.archives import unpacked
from acktr.report.figures import (
    COLOURS,
    DASHES,
    GREY,
    Dash,
    legend_below,
    own_style,
    panels,
    picture,
    step_axis,
)
from acktr.report.references import PublishedCurve, environment_name, published_curves
from acktr.report.results import Result, find_runs, read_results
from acktr.report.statistics import steps_to_threshold
from acktr.report.tables import as_csv, markdown
from acktr.runs.folder import RunError
from scripts.common import on_files, parsed, save
from scripts.returns_at import returned_at

ALGOS = ("acktr", "a2c")
STEPS = (1_000_000, 2_000_000, 4_000_000)
SCHEDULE = 10_000_000
OURS = "ours"
_NAMES = {"acktr": "ACKTR", "a2c": "A2C"}
_END = 0.1


@dataclass(frozen=True)
class Row:
    """A run of ours, or a published curve."""

    game: str
    algo: str
    by: str
    """Who made it: ours, or the source."""
    seed: int | None
    steps: int
    """Steps done."""
    at: tuple[float | None, ...]
    """Return at each of STEPS; None behind the last step."""
    last: float
    """Of ours the mean of the last 100 episodes, of a published curve that of its last tenth."""
    passes: dict[str, int | None]
    """By source the first step at the end of its A2C or above; None for never."""


def end_of(curve: PublishedCurve) -> float:
    """Mean return over the last tenth of the steps."""
    return float(curve.returns[curve.steps > (1 - _END) * curve.steps[-1]].mean())


def ends(game: str, runs: Sequence[Result]) -> dict[str, float]:
    """Where A2C ends, by source; ours is left out where no episode has ended."""
    found = {curve.source: end_of(curve) for curve in published_curves(game, ["a2c"])}
    mine = [run for run in runs if run.algo == "a2c" and environment_name(run.env) == game]
    lasts = [run.last100 for run in mine if run.last100 is not None]
    return found | ({OURS: float(np.mean(lasts))} if lasts else {})


def published_row(game: str, curve: PublishedCurve, levels: Mapping[str, float]) -> Row:
    """The row of a published curve."""
    at = tuple(float(np.interp(step, curve.steps, curve.returns)) for step in STEPS)
    passes: dict[str, int | None] = {}
    if curve.algo == "acktr" and curve.source in levels:
        above = curve.returns >= levels[curve.source]
        passes[curve.source] = int(curve.steps[np.argmax(above)]) if above.any() else None
    steps, end = int(curve.steps[-1]), end_of(curve)
    return Row(game, curve.algo, curve.source, None, steps, at, end, passes)


def own_row(run: Result, levels: Mapping[str, float]) -> Row:
    """The row of a run.

    Raises:
        RunError: It is of another algorithm, game or schedule, or no episode has ended.
    """
    game, curve = environment_name(run.env), run.curve
    if run.algo not in ALGOS or not published_curves(game, ALGOS):
        raise RunError(f"{run.folder}: no run of acktr or a2c on a game with published curves")
    if run.total_steps != SCHEDULE:
        raise RunError(f"{run.folder}: the schedule must be of {SCHEDULE:,} steps")
    if curve is None or run.last100 is None:
        raise RunError(f"{run.folder}: no episode has ended yet")
    at = tuple(returned_at(run, step) for step in STEPS)
    passes: dict[str, int | None] = {}
    if run.algo == "acktr":
        passes = {source: steps_to_threshold(curve, end) for source, end in levels.items()}
    return Row(game, run.algo, OURS, run.seed, run.steps, at, run.last100, passes)


def rows_of(runs: Sequence[Result]) -> list[Row]:
    """All rows: by game and algorithm the published ones, then ours."""
    rows = []
    for game in sorted({environment_name(run.env) for run in runs}):
        levels = ends(game, runs)
        mine = [own_row(run, levels) for run in runs if environment_name(run.env) == game]
        others = [published_row(game, one, levels) for one in published_curves(game, ALGOS)]
        for algo in ALGOS:
            rows += [row for row in (*others, *mine) if row.algo == algo]
    return rows


def table(rows: Sequence[Row]) -> bytes:
    """A row per curve as CSV; what is not known is empty."""
    head = ["game", "algo", "by", "seed", "steps", *(f"at_{step}" for step in STEPS), "last"]
    sources = sorted({source for row in rows for source in row.passes})
    head += [f"passes_a2c_of_{source}" for source in sources]
    body = [
        [
            *(row.game, row.algo, row.by, row.seed, row.steps),
            *(None if value is None else round(value, 2) for value in row.at),
            round(row.last, 2),
            *(row.passes.get(source) for source in sources),
        ]
        for row in rows
    ]
    return as_csv(head, body)


def millions(steps: int) -> str:
    """Steps in millions, with two digits behind the point."""
    return f"{steps / 1e6:.2f}M"


def words(rows: Sequence[Row]) -> bytes:
    """The same as Markdown."""
    sources = sorted({source for row in rows for source in row.passes})
    head = ["game", "algorithm", "by", "seed", "steps of 10M"]
    head += [f"{step // 1_000_000}M" for step in STEPS]
    goals = ["our A2C's last" if by == OURS else f"A2C's end of {by}" for by in sources]
    head += ["last", *(f"passes {goal}" for goal in goals)]
    body = []
    for row in rows:
        cells = [row.game, _NAMES[row.algo], row.by, "" if row.seed is None else str(row.seed)]
        cells += [millions(row.steps)]
        cells += ["" if value is None else f"{value:,.1f}" for value in (*row.at, row.last)]
        for source in sources:
            step = row.passes.get(source)
            never = "not yet" if row.by == OURS and row.steps < SCHEDULE else "never"
            known = source in row.passes
            cells.append(("" if not known else never) if step is None else millions(step))
        body.append(cells)
    return markdown(head, body, left=3).encode()


@own_style()
def figure(runs: Sequence[Result]) -> bytes:
    """A panel per game: published curves in grey, runs in colour, one line each."""
    games = sorted({environment_name(run.env) for run in runs})
    made, axes, first_column = panels(len(games), 3, height=3.6)
    dashes: dict[str, Dash] = {}
    for axis, game in zip(axes, games, strict=True):
        for curve in published_curves(game, ALGOS):
            name = f"{_NAMES[curve.algo]}, {curve.source}"
            dash = dashes.setdefault(name, DASHES[len(dashes) % len(DASHES)])
            axis.plot(curve.steps, curve.returns, color=GREY, linewidth=1.2, linestyle=dash)
        for run in runs:
            if environment_name(run.env) == game and run.curve is not None:
                colour = COLOURS[ALGOS.index(run.algo)]
                done = run.curve.steps <= run.steps  # behind, the grid repeats the last return
                steps, returns = run.curve.steps[done], run.curve.returns[done]
                axis.plot(steps, returns, color=colour, linewidth=1.6)
        step_axis(axis, game)
        axis.set_xlim(0, SCHEDULE)
    for axis in first_column:
        axis.set_ylabel("return, mean of 100 episodes")
    handles = [
        Line2D([], [], color=COLOURS[ALGOS.index(algo)], linewidth=2, label=f"{_NAMES[algo]}, ours")
        for algo in ALGOS
        if any(run.algo == algo for run in runs)
    ]
    handles += [
        Line2D([], [], color=GREY, linewidth=1.2, linestyle=dash, label=name)
        for name, dash in dashes.items()
    ]
    legend_below(made, handles)
    return picture(made, "png")


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(prog="six_games", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    asked = parsed(parser, argv)
    with unpacked(asked.runs) as folders:
        runs = read_results(find_runs(folders))
    rows = rows_of(runs)
    save(asked.out, {"games.csv": table(rows), "games.md": words(rows), "games.png": figure(runs)})


def main(argv: Sequence[str]) -> int:
    """Run a command line; 0, or 2 on bad input."""
    return on_files("six_games", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
