"""A report's numbers as Markdown and CSV tables."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from acktr.files import blanked, spreadsheet_text
from acktr.report.results import Result
from acktr.report.statistics import Interval
from acktr.report.study import AGGREGATES, AggregateRow, EnvironmentRow, StepsRow, Study

_UNIT = ("", "_low", "_high")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are words, the others numbers."""
    lines = [head, ["---" if i < left else "---:" for i in range(len(head))], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(head: Sequence[str], rows: Iterable[Sequence[object]], comment: str = "") -> bytes:
    """A CSV file; ``comment`` is a line of its own before the header.

    Names, which come from the files of others, are no formulas in it.
    """
    text = io.StringIO()
    text.write(comment and f"#{comment}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[_safe(value) for value in row] for row in (head, *rows)])
    return text.getvalue().encode()


def _safe(value: object) -> object:
    """The value; text that is no number so that no spreadsheet takes it for a formula."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        return spreadsheet_text(value)
    return value


def cell(text: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", blanked(text))


def number(value: float) -> str:
    """About four digits."""
    decimals = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{decimals}f}"


def ranged(found: Interval, runs: int | None = None, digits: int | None = None) -> str:
    """Value [low, high]; no interval where there is but one run."""
    ends = (float(found.value), float(found.low), float(found.high))
    value, low, high = (number(x) if digits is None else f"{x:.{digits}f}" for x in ends)
    return value if runs == 1 else f"{value} [{low}, {high}]"


def environments_table(rows: Sequence[EnvironmentRow]) -> str:
    """Final returns, both metrics, a row per environment and label."""
    body = []
    for (env, label, runs), of in groupby(rows, lambda row: (row.env, row.label, row.runs)):
        shown = [ranged(found, runs) for row in of for found in (row.mean, row.iqm)]
        body.append([cell(env), cell(label), str(runs), *shown])
    head = ["environment", "algorithm", "runs", "last 100: mean", "IQM", "evaluation: mean", "IQM"]
    return markdown(head, body, left=2)


def aggregates_table(study: Study, rows: Sequence[AggregateRow], metric: str) -> str:
    """Aggregates of one metric, a row per label."""
    of = {(row.label, row.statistic): row.estimate for row in rows if row.metric == metric}
    body = [
        [cell(label), *(ranged(of[label, name], _most(study, label), 3) for name in AGGREGATES)]
        for label in study.labels
    ]
    return markdown(["algorithm", *AGGREGATES], body)


def _most(study: Study, *labels: str) -> int:
    """The most runs that one of the labels has of an environment; of one alone no interval."""
    return max((len(study.of(env, label)) for env in study.envs for label in labels), default=0)


def improvement_table(study: Study, rows: Sequence[AggregateRow], metrics: Sequence[str]) -> str:
    """Probability of improvement, a row per pair."""
    of = {(row.label, row.other, row.metric): row.estimate for row in rows}
    body = [
        [cell(x), cell(y), *(ranged(of[x, y, m], _most(study, x, y), 3) for m in metrics)]
        for x, y in dict.fromkeys((row.label, row.other) for row in rows)
    ]
    return markdown(["X", "Y", *(f"P(X > Y), {metric}" for metric in metrics)], body, left=2)


def steps_table(study: Study, rows: Sequence[StepsRow]) -> str:
    """Steps to thresholds: median over runs, runs that got there, ratio to the baseline."""
    body = []
    for (env, threshold), of in groupby(rows, lambda row: (row.env, row.threshold)):
        cells = {row.label: _steps_cell(row, study.baseline) for row in of}
        shown = (cells.get(label, "") for label in study.labels)
        body.append([cell(env), number(threshold), *shown])
    return markdown(["environment", "threshold", *map(cell, study.labels)], body)


def _steps_cell(row: StepsRow, baseline: str) -> str:
    ratio = ""
    if row.label != baseline and row.ratio is not None and math.isfinite(row.ratio):
        ratio = f" x{row.ratio:.2f}"
    median = "never" if math.isinf(row.median) else f"{row.median:,.0f}"
    return f"{median} ({row.reached}/{row.runs}){ratio}"


def references_table(study: Study) -> str:
    """References of the environments."""
    body = []
    for env in study.envs:
        found = study.reference(env)
        if found is not None:
            ends = ["" if x is None else number(x) for x in (found.low, found.high)]
            goals = ", ".join(number(x) for x in found.thresholds)
            body.append([cell(env), *ends, goals, cell(found.source)])
    return markdown(["environment", "0", "1", "thresholds", "source"], body)


def versions_table(results: Sequence[Result]) -> str:
    """What the runs were made with, and how many with each."""
    names = sorted({name for result in results for name in result.versions})
    body = []
    for name in names:
        counts = Counter(result.versions.get(name, "unknown") for result in results)
        values = (f"{cell(value)} ({count})" for value, count in sorted(counts.items()))
        body.append([cell(name), ", ".join(values)])
    return markdown(["", "version (runs)"], body, left=2)


def runs_csv(results: Sequence[Result]) -> bytes:
    """A row per run, unfinished ones too."""
    head = ["env", "label", "algo", "seed", "total_steps", "steps", "finished", "last100_mean"]
    head += ["eval_mean", "eval_std", "eval_episodes", "minutes", "commit"]
    body = []
    for run in results:
        final = run.final
        row = [run.env, run.label, run.algo, run.seed, run.total_steps, run.steps]
        row += ["yes" if run.finished else "no", _digits(run.last100)]
        row += [_digits(final.mean), _digits(final.std), final.episodes] if final else [""] * 3
        row += ["" if run.minutes is None else f"{run.minutes:.1f}"]
        body.append([*row, run.versions.get("git_commit", "")])
    return as_csv(head, body)


def environments_csv(rows: Sequence[EnvironmentRow]) -> bytes:
    """As the table, with more digits."""
    head = ["env", "label", "metric", "runs"]
    head += [f"{name}{end}" for name in ("mean", "iqm") for end in _UNIT]
    body = (
        [row.env, row.label, row.metric, row.runs, *_ends(row.mean), *_ends(row.iqm)]
        for row in rows
    )
    return as_csv(head, body)


def aggregates_csv(rows: Sequence[AggregateRow]) -> bytes:
    """Aggregates and probabilities of improvement."""
    head = ["metric", "statistic", "label", "other", *(f"value{end}" for end in _UNIT)]
    body = ([row.metric, row.statistic, row.label, row.other, *_ends(row.estimate)] for row in rows)
    return as_csv(head, body)


def steps_csv(rows: Sequence[StepsRow]) -> bytes:
    """As the table; never is inf."""
    head = ["env", "threshold", "label", "runs", "reached", "median_steps", "ratio"]
    body = []
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.6g}"
        goal = [row.env, f"{row.threshold:g}", row.label]
        body.append([*goal, row.runs, row.reached, f"{row.median:.10g}", ratio])
    return as_csv(head, body)


def _ends(found: Interval) -> list[str]:
    return [_digits(float(x)) for x in (found.value, found.low, found.high)]


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"
