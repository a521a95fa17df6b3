"""summary.json, summary.md and figure.png of a campaign."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib import ticker

from acktr.report.figures import COLOURS, GREY, bare, legend_below, panels, picture, plain
from acktr.report.tables import markdown as table
from scripts.common import machine
from scripts.supervised.campaign import Outcome, Plan
from scripts.supervised.settings import OPTIMIZERS
from scripts.supervised.training import Row, describe

_BASELINES = ("sgd", "adam")
_OTHERS = ("gymnasium", "ale-py", "mujoco")
"""Packages that have no part in this."""
_COLOURS = dict(zip(OPTIMIZERS, [COLOURS[i] for i in (0, 2, 1, 3)], strict=True))


def summarize(
    plan: Plan,
    outcome: Outcome,
    *,
    command: str,
    data: Mapping[str, object],
    threshold: float | None,
) -> dict[str, Any]:
    """Everything that summary.json holds; infinite losses are None.

    Args:
        plan: What was asked for.
        outcome: What was found.
        command: The command line.
        data: What is to be said of the images.
        threshold: Training loss to reach; None for the largest final one over the seeds of sgd, so
            that every one of its runs reaches it (without sgd the largest of all runs).
    """
    goal, source = threshold, "given on the command line"
    if goal is None:
        of = "sgd" if "sgd" in plan.optimizers else "all runs"
        finals = {key: rows[-1].train_loss for key, rows in outcome.runs.items()}
        goal = max(loss for (name, _), loss in finals.items() if of in (name, "all runs"))
        source = f"largest final training loss over the seeds of {of}"
    base = plan.base
    return {
        "command": command,
        "problem": base.problem,
        "data": dict(data),
        "machine": {key: value for key, value in machine().items() if key not in _OTHERS},
        "training": {
            "batch": base.batch,
            "updates_per_epoch": plan.updates_per_epoch,
            "eval_every": base.eval_every,
            "measured": base.measured,
            "widths": list(base.widths),
            "device": base.device,
            "curvature": None if base.curvature is None else asdict(base.curvature),
            "kfac_constants": base.constants,
        },
        "tuning": {
            "updates": plan.tune_updates,
            "seed": plan.tune_seed,
            "criterion": "training loss after these updates",
            "grids": {
                name: [
                    {"setting": setting, "train_loss": _finite(row.train_loss)}
                    | {"seconds": round(row.seconds, 3)}
                    for setting, row in tried
                ]
                for name, tried in outcome.tuning.items()
            },
        },
        "chosen": outcome.settings,
        "threshold": {"train_loss": _finite(goal), "source": source},
        "runs": [_run(name, seed, rows, goal) for (name, seed), rows in outcome.runs.items()],
        "means": {name: _mean_losses(outcome, name) for name in outcome.settings},
        "ratios": _ratios(plan, outcome, goal),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _reached(rows: Sequence[Row], goal: float) -> Row | None:
    """The first evaluation at or below the threshold."""
    return next((row for row in rows if row.train_loss <= goal), None)


def _run(name: str, seed: int, rows: Sequence[Row], goal: float) -> dict[str, Any]:
    last, hit = rows[-1], _reached(rows, goal)
    return {
        "optimizer": name,
        "seed": seed,
        "updates": last.update,
        "seconds": round(last.seconds, 3),
        "train_loss": _finite(last.train_loss),
        "test_loss": _finite(last.test_loss),
        "updates_to_threshold": None if hit is None else hit.update,
        "seconds_to_threshold": None if hit is None else round(hit.seconds, 3),
    }


def _mean_losses(outcome: Outcome, name: str) -> dict[str, float | None]:
    """Means over the seeds of the final losses; None if a run diverged."""
    last = [rows[-1] for (of, _), rows in outcome.runs.items() if of == name]
    return {
        "train_loss": _finite(statistics.fmean(row.train_loss for row in last)),
        "test_loss": _finite(statistics.fmean(row.test_loss for row in last)),
    }


def _ratios(plan: Plan, outcome: Outcome, goal: float) -> dict[str, Any]:
    """Baseline over K-FAC, of updates and seconds to the threshold, per seed and on average.

    A ratio is None if one of the two does not get there.
    """
    ratios: dict[str, Any] = {}
    for baseline in (name for name in _BASELINES if name in plan.optimizers):
        for name in (name for name in plan.optimizers if name.startswith("kfac")):
            updates: dict[str, float | None] = {}
            seconds: dict[str, float | None] = {}
            for seed in plan.seeds:
                slow = _reached(outcome.runs[baseline, seed], goal)
                fast = _reached(outcome.runs[name, seed], goal)
                both = slow is not None and fast is not None and fast.seconds > 0
                updates[str(seed)] = slow.update / fast.update if both and slow and fast else None
                seconds[str(seed)] = slow.seconds / fast.seconds if both and slow and fast else None
            ratios[f"{baseline}/{name}"] = {
                "updates": {**updates, "mean": _mean(list(updates.values()))},
                "seconds": {**seconds, "mean": _mean(list(seconds.values()))},
            }
    return ratios


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as tables."""
    data, training, tuning = (summary[key] for key in ("data", "training", "tuning"))
    goal = summary["threshold"]
    means = ([name, *map(_number, mean.values())] for name, mean in summary["means"].items())
    described = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    parts = [
        f"# {summary['problem']} on {data['name']}\n",
        f"Command: `{summary['command']}`\n",
        f"{data['train_images']:,} training and {data['test_images']:,} test images, batch"
        f" {training['batch']}, {training['updates_per_epoch']} updates per epoch, evaluated every"
        f" {training['eval_every']} updates on {training['measured'] or 'all'} images of each"
        " split; seconds are those of training, without evaluation.\n",
        f"Tuned for {tuning['updates']} updates with seed {tuning['seed']}; chosen by training loss"
        " at their end.\n",
        _grid_table(summary),
        *_edges(summary),
        f"Threshold: training loss {_number(goal['train_loss'])} ({goal['source']}); reached at the"
        " first evaluation at or below it.\n",
        _run_table(summary["runs"]),
        table(["optimizer", "mean final training loss", "mean final test loss"], means),
        *_ratio_table(summary),
        f"Machine: {described}\n",
    ]
    return "\n".join(parts)


def _grid_table(summary: Mapping[str, Any]) -> str:
    body = []
    for name, chosen in summary["chosen"].items():
        grid = summary["tuning"]["grids"].get(name)
        if grid is None:
            body.append([name, describe(chosen), "", "", "given"])
        for entry in grid or ():
            loss, seconds = _number(entry["train_loss"]), f"{entry['seconds']:.1f}"
            mark = "yes" if entry["setting"] == chosen else ""
            body.append([name, describe(entry["setting"]), loss, seconds, mark])
    return table(["optimizer", "setting", "training loss", "seconds", "chosen"], body, left=2)


def _edges(summary: Mapping[str, Any]) -> list[str]:
    """Names of tuned values at an end of their grid, where a better one may lie outside."""
    names = []
    for name, grid in summary["tuning"]["grids"].items():
        for key, value in summary["chosen"][name].items():
            tried = {entry["setting"][key] for entry in grid}
            if len(tried) > 2 and value in (min(tried), max(tried)):
                names.append(f"{name} {key}")
    return [f"At an end of its grid: {', '.join(names)}.\n"] if names else []


def _run_table(runs: Sequence[Mapping[str, Any]]) -> str:
    head = ["optimizer", "seed", "updates", "seconds", "training loss", "test loss"]
    head += ["updates to threshold", "seconds to threshold"]
    body = []
    for run in runs:
        updates, seconds = run["updates_to_threshold"], run["seconds_to_threshold"]
        row = [run["optimizer"], str(run["seed"]), f"{run['updates']:,}", f"{run['seconds']:.1f}"]
        row += [_number(run["train_loss"]), _number(run["test_loss"])]
        row += ["not reached", ""] if updates is None else [f"{updates:,}", f"{seconds:.1f}"]
        body.append(row)
    return table(head, body)


def _ratio_table(summary: Mapping[str, Any]) -> list[str]:
    seeds = list(dict.fromkeys(str(run["seed"]) for run in summary["runs"]))
    body = []
    for pair, of in summary["ratios"].items():
        for what in ("updates", "seconds"):
            values = (of[what][key] for key in (*seeds, "mean"))
            cells = ("-" if value is None else f"{value:.2f}" for value in values)
            body.append([pair, what, *cells])
    head = ["to the threshold", "ratio of", *(f"seed {seed}" for seed in seeds), "mean"]
    return [table(head, body, left=2)] if body else []


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.5g}"


def figure(summary: Mapping[str, Any], runs: Mapping[tuple[str, int], Sequence[Row]]) -> bytes:
    """Training loss against updates and against seconds: a line per run, a colour per optimizer."""
    drawn, axes, _ = panels(2, 2)
    goal = summary["threshold"]["train_loss"]
    for axis, of, name in zip(
        axes, ("update", "seconds"), ("updates", "seconds of training"), strict=True
    ):
        for (optimizer, seed), rows in runs.items():
            good = [row for row in rows if math.isfinite(row.train_loss)]
            first = seed == next(s for o, s in runs if o == optimizer)
            label = f"{optimizer} ({describe(summary['chosen'][optimizer])})" if first else None
            axis.plot(
                np.array([getattr(row, of) for row in good], dtype=np.float64),
                [row.train_loss for row in good],
                color=_COLOURS[optimizer],
                alpha=0.8,
                label=label,
                marker="." if len(good) <= 30 else None,
            )
        if goal is not None:
            axis.axhline(goal, color=GREY, linewidth=1, linestyle="--")
        axis.set_xlabel(name)
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ticker.LogFormatter(minor_thresholds=(2, 0.4)))
        bare(axis)
    axes[0].set_ylabel("training loss")
    legend_below(drawn, axes[0].get_lines())
    batch = summary["training"]["batch"]
    title = f"{summary['problem']}, {summary['data']['name']}, batch {batch}"
    drawn.suptitle(plain(title), fontweight="bold")
    return picture(drawn, "png")


def files(
    summary: Mapping[str, Any], runs: Mapping[tuple[str, int], Sequence[Row]]
) -> dict[str, bytes]:
    """summary.json, summary.md and figure.png."""
    return {
        "summary.json": (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode(),
        "summary.md": markdown(summary).encode(),
        "figure.png": figure(summary, runs),
    }
