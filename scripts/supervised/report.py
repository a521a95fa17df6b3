"""summary.json and summary.md of a campaign."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from acktr.files import reason, write_atomic
from acktr.runs.folder import versions
from scripts.machine import cpu_model
from scripts.supervised.campaign import Outcome, Plan
from scripts.supervised.errors import SupervisedError
from scripts.supervised.runs import Row, describe

_BASELINES = ("sgd", "adam")
_OTHERS = ("gymnasium", "ale-py", "mujoco")
"""Packages that have no part in this."""


def machine() -> dict[str, Any]:
    """Versions, processor, threads and commit; what is unknown is left out."""
    found: dict[str, Any] = {
        key: value for key, value in versions().items() if value is not None and key not in _OTHERS
    }
    return {**found, "cpu": cpu_model()}


def threshold_of(outcome: Outcome, given: float | None) -> tuple[float, str]:
    """The training loss to reach, and where it comes from.

    It is the largest final loss over the seeds of sgd, so that every one of its runs reaches it;
    without sgd the largest final loss of all runs.
    """
    if given is not None:
        return given, "given on the command line"
    finals = {key: rows[-1].train_loss for key, rows in outcome.runs.items()}
    of_sgd = [loss for (name, _), loss in finals.items() if name == "sgd"]
    chosen, source = (of_sgd, "sgd") if of_sgd else (list(finals.values()), "all runs")
    return max(chosen), f"largest final training loss over the seeds of {source}"


def reached(rows: Sequence[Row], threshold: float) -> Row | None:
    """The first evaluation at or below the threshold."""
    return next((row for row in rows if row.train_loss <= threshold), None)


def summarize(
    plan: Plan,
    outcome: Outcome,
    *,
    command: str,
    data: Mapping[str, object],
    threshold: float | None,
) -> dict[str, Any]:
    """Everything that summary.json holds; infinite losses are None."""
    goal, source = threshold_of(outcome, threshold)
    base = plan.base
    return {
        "command": command,
        "problem": base.problem,
        "data": dict(data),
        "machine": machine(),
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
                    {
                        "setting": setting,
                        "train_loss": _finite(row.train_loss),
                        "seconds": round(row.seconds, 3),
                    }
                    for setting, row in found
                ]
                for name, found in outcome.tuning.items()
            },
        },
        "chosen": outcome.chosen,
        "threshold": {"train_loss": _finite(goal), "source": source},
        "runs": [_run(name, seed, rows, goal) for (name, seed), rows in outcome.runs.items()],
        "means": _means(outcome),
        "ratios": _ratios(plan, outcome, goal),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _run(name: str, seed: int, rows: Sequence[Row], goal: float) -> dict[str, Any]:
    last, hit = rows[-1], reached(rows, goal)
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


def _means(outcome: Outcome) -> dict[str, Any]:
    """Mean over the seeds of the final losses of each optimizer; None if a run diverged."""
    means: dict[str, Any] = {}
    for name in outcome.chosen:
        last = [rows[-1] for (of, _), rows in outcome.runs.items() if of == name]
        means[name] = {
            "train_loss": _finite(statistics.fmean(row.train_loss for row in last)),
            "test_loss": _finite(statistics.fmean(row.test_loss for row in last)),
        }
    return means


def _ratios(plan: Plan, outcome: Outcome, goal: float) -> dict[str, Any]:
    """Baseline over K-FAC, of updates and seconds to the threshold, per seed and on average."""
    ratios: dict[str, Any] = {}
    for baseline in (name for name in _BASELINES if name in plan.optimizers):
        for name in (name for name in plan.optimizers if name.startswith("kfac")):
            updates: dict[str, float | None] = {}
            seconds: dict[str, float | None] = {}
            for seed in plan.seeds:
                slow = reached(outcome.runs[baseline, seed], goal)
                fast = reached(outcome.runs[name, seed], goal)
                both = slow is not None and fast is not None and fast.seconds > 0
                updates[str(seed)] = slow.update / fast.update if both and slow and fast else None
                seconds[str(seed)] = slow.seconds / fast.seconds if both and slow and fast else None
            ratios[f"{baseline}/{name}"] = {
                "updates": {**updates, "mean": _mean(updates)},
                "seconds": {**seconds, "mean": _mean(seconds)},
            }
    return ratios


def _mean(values: Mapping[str, float | None]) -> float | None:
    """The mean; None if a seed is missing."""
    found = [value for value in values.values() if value is not None]
    return sum(found) / len(found) if found and len(found) == len(values) else None


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as tables."""
    data, training, tuning = (summary[key] for key in ("data", "training", "tuning"))
    lines = [
        f"# {summary['problem']} on {data['name']}",
        "",
        f"Command: `{summary['command']}`",
        "",
        f"{data['train_images']:,} training and {data['test_images']:,} test images, batch"
        f" {training['batch']}, {training['updates_per_epoch']} updates per epoch, evaluated every"
        f" {training['eval_every']} updates on {training['measured'] or 'all'} images of each"
        " split; seconds are those of training, without evaluation.",
        "",
        f"Tuned for {tuning['updates']} updates with seed {tuning['seed']}; chosen by training loss"
        " at their end.",
        "",
        *_grid_table(summary),
        "",
        *_edges(summary),
        "",
        *_run_table(summary),
        "",
        *_mean_table(summary),
        "",
        *_ratio_table(summary),
        "",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in summary["machine"].items()),
    ]
    return "\n".join(lines) + "\n"


def _grid_table(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        "| optimizer | setting | training loss | seconds | chosen |",
        "|---|---|---:|---:|---|",
    ]
    for name, chosen in summary["chosen"].items():
        grid = summary["tuning"]["grids"].get(name)
        if grid is None:
            lines.append(f"| {name} | {describe(chosen)} | | | given |")
            continue
        for entry in grid:
            mark = "yes" if entry["setting"] == chosen else ""
            lines.append(
                f"| {name} | {describe(entry['setting'])} | {_number(entry['train_loss'])}"
                f" | {entry['seconds']:.1f} | {mark} |"
            )
    return lines


def _edges(summary: Mapping[str, Any]) -> list[str]:
    """Names of tuned values at an end of their grid, where a better one may lie outside."""
    found = []
    for name, grid in summary["tuning"]["grids"].items():
        for key, value in summary["chosen"][name].items():
            tried = {entry["setting"][key] for entry in grid}
            if len(tried) > 2 and value in (min(tried), max(tried)):
                found.append(f"{name} {key}")
    return [f"At an end of its grid: {', '.join(found)}."] if found else []


def _run_table(summary: Mapping[str, Any]) -> list[str]:
    goal = summary["threshold"]
    lines = [
        f"Threshold: training loss {_number(goal['train_loss'])} ({goal['source']}); reached at the"
        " first evaluation at or below it.",
        "",
        "| optimizer | seed | updates | seconds | training loss | test loss"
        " | updates to threshold | seconds to threshold |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in summary["runs"]:
        updates, seconds = run["updates_to_threshold"], run["seconds_to_threshold"]
        lines.append(
            f"| {run['optimizer']} | {run['seed']} | {run['updates']:,} | {run['seconds']:.1f}"
            f" | {_number(run['train_loss'])} | {_number(run['test_loss'])}"
            f" | {'not reached' if updates is None else format(updates, ',')}"
            f" | {'' if seconds is None else format(seconds, '.1f')} |"
        )
    return lines


def _mean_table(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        "| optimizer | mean final training loss | mean final test loss |",
        "|---|---:|---:|",
    ]
    for name, mean in summary["means"].items():
        losses = f"{_number(mean['train_loss'])} | {_number(mean['test_loss'])}"
        lines.append(f"| {name} | {losses} |")
    return lines


def _ratio_table(summary: Mapping[str, Any]) -> list[str]:
    if not summary["ratios"]:
        return []
    seeds = list(dict.fromkeys(str(run["seed"]) for run in summary["runs"]))
    head = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| to the threshold | ratio of | {head} | mean |",
        "|---|---|" + "---:|" * (len(seeds) + 1),
    ]
    for pair, of in summary["ratios"].items():
        for what in ("updates", "seconds"):
            cells = (of[what][key] for key in (*seeds, "mean"))
            values = " | ".join("-" if value is None else f"{value:.2f}" for value in cells)
            lines.append(f"| {pair} | {what} | {values} |")
    return lines


def _number(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.5g}"


def write_report(out: Path, summary: Mapping[str, Any], picture: bytes) -> None:
    """Write summary.json, summary.md and figure.png.

    Raises:
        SupervisedError: One of them cannot be written.
    """
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    save(out / "summary.json", text.encode())
    save(out / "summary.md", markdown(summary).encode())
    save(out / "figure.png", picture)


def save(path: Path, data: bytes) -> None:
    """Write or replace a file.

    Raises:
        SupervisedError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise SupervisedError(f"{path}: cannot write: {reason(error)}") from error
