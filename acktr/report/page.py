"""From run folders to a report: Markdown, CSV files and figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acktr.files import blanked, flat, reason, write_together
from acktr.report import tables
from acktr.report.archives import unpacked
from acktr.report.curves import GRID_POINTS
from acktr.report.figures import curves_figure, profiles_figure
from acktr.report.references import Reference
from acktr.report.results import Result, find_runs, read_results
from acktr.report.statistics import LEAST_EPISODES
from acktr.report.study import METRICS, AggregateRow, EnvironmentRow, StepsRow, Study
from acktr.report.tables import cell
from acktr.runs.tables import WINDOW

_TITLE = "# Comparison of runs\n"
_PAGE = "report.md"
_NAMES = (
    *("runs.csv", "environments.csv", "aggregate.csv", "steps.csv"),
    *("curves.png", "curves.svg", "profiles.png", "profiles.svg"),
)
_DEFAULT_BASELINE = "acktr"
_MOST_NAMED = 4
"""Runs that a message names."""
_NO_DIFFERENCE = ("seed", "env_workers", "env_timeout", "checkpoint_freq", "record")
"""Settings in which runs may differ without being others."""
_TASK = re.compile(
    r"env_kwargs\.|wrappers$|pixels\.|atari\.(?!num_threads$|num_groups$|reseed_steps$)"
)
"""Settings of the environment, which other algorithms are to be given alike."""


@dataclass(frozen=True)
class ReportSettings:
    """What to put into a report."""

    references: Mapping[str, Reference]
    """By environment id or name."""
    metric: str = "last100"
    """Return of the figure and of the first aggregate table: last100 or eval."""
    labels: tuple[str, ...] = ()
    """Labels to compare, in this order; all, sorted, if empty."""
    baseline: str | None = None
    """Label that others are compared with; acktr if there is one, else the first."""
    resamples: int = 2000
    """Bootstrap resamples."""
    published: bool = True
    """Whether published curves are drawn."""


def write_report(
    paths: Sequence[Path],
    out: Path,
    settings: ReportSettings,
    command: Sequence[str],
    note: Callable[[int, int], None] = lambda count, total: None,
) -> str:
    """Compare finished runs and write report.md, CSV files and figures.

    The same runs, settings and command give the same bytes. Nothing is written before everything
    is computed, and report.md last.

    Args:
        paths: Run folders, folders with run folders below them, or archives of such.
        out: Folder of the report; made if missing. An older report in it is replaced.
        settings: What to put in.
        command: Command line, for report.md.
        note: Called with the number of runs read so far and of all.

    Returns:
        What was done, one line.

    Raises:
        RunError: if there are no runs, or a config.json is damaged.
        ValueError: if a file is damaged, runs cannot be compared, a label is unknown, or the
            folder holds something else or cannot be written; one line.
    """
    _refuse_other(out)
    with unpacked(paths) as folders:
        runs = find_runs(folders)
        results = read_results(runs, lambda count: note(count, len(runs)))
        study = make_study(results, settings)  # whose messages name folders, too
    _write(out, report_files(study, settings, command))
    left = f", {len(study.unfinished)} unfinished left out" if study.unfinished else ""
    return f"{out / _PAGE}: {len(study.results)} runs{left}"


def make_study(results: Sequence[Result], settings: ReportSettings) -> Study:
    """Choose the runs of the labels.

    Raises:
        ValueError: as ``write_report``.
    """
    there = sorted({result.label for result in results if result.finished})
    if not there:
        raise ValueError(f"none of the {len(results)} runs has finished")
    labels = settings.labels or tuple(there)
    for label in labels:
        if label not in there:
            raise ValueError(f"no finished run of label {label!r}; there are {', '.join(there)}")
    default = _DEFAULT_BASELINE if _DEFAULT_BASELINE in labels else labels[0]
    baseline = default if settings.baseline is None else settings.baseline
    if baseline not in labels:
        raise ValueError(f"the baseline {baseline!r} is not in {', '.join(labels)}")
    if settings.labels:
        results = [result for result in results if result.label in labels]
    study = Study(tuple(results), labels, baseline, settings.references, settings.resamples)
    _require_one_length(study)
    return study


def _require_one_length(study: Study) -> None:
    """Refuse runs of an environment that were to make different numbers of steps.

    Raises:
        ValueError: There are such; one line with the command that leaves one length.
    """
    for env in study.envs:
        lengths: dict[int, list[Result]] = {}
        for result in study.results:
            if result.env == env:
                lengths.setdefault(result.total_steps, []).append(result)
        if len(lengths) > 1:
            parts = [_runs_of_length(steps, lengths[steps]) for steps in sorted(lengths)]
            # Of equally many runs those that are longer.
            chosen = max(lengths, key=lambda steps: (len(lengths[steps]), steps))
            folders = shlex.join(str(result.folder) for result in lengths[chosen][:_MOST_NAMED])
            more = " ..." if len(lengths[chosen]) > _MOST_NAMED else ""
            raise ValueError(
                f"runs of {env} have different lengths, which no report compares: "
                f"{', '.join(parts)}; name those of one length, such as {folders}{more}"
            )


def _runs_of_length(steps: int, results: Sequence[Result]) -> str:
    names = [f"{result.label}/seed{result.seed}" for result in results]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"{steps:,} steps in {', '.join(names[:_MOST_NAMED])}{more}"


def report_files(
    study: Study, settings: ReportSettings, command: Sequence[str]
) -> dict[str, bytes]:
    """The files of a report by name; the figure of scores only if there are scores."""
    environments = study.environment_rows()
    aggregates = study.aggregate_rows()
    improvements = study.improvement_rows()
    steps = study.steps_rows()
    metrics = sorted(METRICS, key=lambda metric: metric != settings.metric)
    sections = [
        _TITLE,
        f"    {blanked(shlex.join(command))}\n",
        *_about(study),
        *_returns(study, environments, settings.published),
        *_aggregates(study, aggregates, metrics),
        *_improvements(study, improvements, metrics),
        *_steps(study, steps),
        "## Versions\n",
        tables.versions_table(study.results),
    ]
    files = {
        "runs.csv": tables.runs_csv(study.runs),
        "environments.csv": tables.environments_csv(environments),
        "aggregate.csv": tables.aggregates_csv([*aggregates, *improvements]),
        "steps.csv": tables.steps_csv(steps),
    }
    figures = {"curves": curves_figure(study, settings.published)}
    if study.scored:
        figures["profiles"] = profiles_figure(study, settings.metric)
    files |= {f"{name}.{kind}": of[kind] for name, of in figures.items() for kind in of}
    return files | {_PAGE: "\n".join(sections).encode()}


def _about(study: Study) -> Iterator[str]:
    minutes = sum(result.minutes or 0 for result in study.results)
    yield (
        f"Finished runs: {len(study.results)}. Environments: {len(study.envs)}. "
        f"Algorithms: {', '.join(map(cell, study.labels))}. "
        f"Seeds: {_ranges({result.seed for result in study.results})}. "
        f"Wall-clock in all: {minutes / 60:.1f} hours. "
        "A row per run is in runs.csv.\n"
    )
    for env, label, settings in _unlike(study):
        yield (
            f"**Runs of {cell(label)} on {cell(env)} differ in {', '.join(map(cell, settings))}**,"
            " so that a mean over them is one over settings, too.\n"
        )
    for env, labels, settings in _other_tasks(study):
        yield (
            f"**Runs of {' and '.join(map(cell, labels))} on {cell(env)} differ in"
            f" {', '.join(map(cell, settings))}**, so that they are compared over tasks, too.\n"
        )
    lengthened = [f"{cell(run.name)} ({run.replanned})" for run in study.results if run.replanned]
    if lengthened:
        yield (
            f"**Resumed with another length: {', '.join(lengthened)}**, so that their schedules"
            " began as those of that length.\n"
        )
    if study.unfinished:
        names = ", ".join(cell(run.name) for run in study.unfinished)
        yield f"Unfinished and left out everywhere: {names}.\n"
    missing = [
        cell(f"{env}/{label}")
        for env in study.envs
        for label in study.labels
        if not study.of(env, label)
    ]
    if missing:
        yield f"Without a finished run: {', '.join(missing)}.\n"


def _unlike(study: Study) -> Iterator[tuple[str, str, list[str]]]:
    """Settings in which runs of one environment and label differ, besides their seeds."""
    for env in study.envs:
        for label in study.labels:
            settings = [flat(result.config) for result in study.of(env, label)]
            names = _comparable(settings).difference(_NO_DIFFERENCE)
            differing = sorted(n for n in names if len(_values(settings, n)) > 1)
            if differing:
                yield env, label, differing


def _other_tasks(study: Study) -> Iterator[tuple[str, list[str], list[str]]]:
    """Settings of one environment in which labels differ, whose returns are compared."""
    for env in study.envs:
        runs = {label: [flat(run.config) for run in study.of(env, label)] for label in study.labels}
        runs = {label: settings for label, settings in runs.items() if settings}
        names = filter(_TASK.match, _comparable([one for of in runs.values() for one in of]))
        differing = sorted(n for n in names if len({_values(of, n) for of in runs.values()}) > 1)
        if differing:
            yield env, [*runs], differing


def _comparable(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """Names of settings that all have, as earlier versions lack some, and of env_kwargs of any.

    An argument of the environment that is not given is one that is given otherwise.
    """
    named = {n for each in settings for n in each if n.startswith("env_kwargs.")}
    return named.union(set(settings[0]).intersection(*settings) if settings else ())


def _values(settings: Sequence[Mapping[str, Any]], name: str) -> frozenset[str]:
    """The values that a setting has in runs, as text; none is one too."""
    return frozenset(repr(each[name]) if name in each else "" for each in settings)


def _returns(study: Study, rows: Sequence[EnvironmentRow], published: bool) -> Iterator[str]:
    yield "## Final returns\n"
    yield (
        f"Of each run the mean of its last {WINDOW} training episodes (exploration included) and "
        "of its evaluation at the end; over runs their mean and interquartile mean (IQM, of fewer "
        "than four runs the mean). In brackets: 95 % bootstrap percentile intervals over runs "
        f"({study.resamples} resamples), here and below stratified by environment. With five runs "
        "such intervals are too narrow, holding the truth in about 83 of 100 cases.\n"
    )
    yield tables.environments_table(rows)
    yield "![Learning curves](curves.png)\n"
    grey = "; grey: published curves, measured on older versions" if published else ""
    yield (
        f"Mean over runs of the mean of the last {WINDOW} training episodes, with pointwise 95 % "
        f"intervals{grey}.\n"
    )


def _aggregates(
    study: Study, rows: Sequence[AggregateRow], metrics: Sequence[str]
) -> Iterator[str]:
    yield "## Aggregate scores\n"
    if not study.scored:
        yield "None: no environment has both runs of every algorithm and reference returns.\n"
        return
    used = _used(study, [*study.scored], "runs of every algorithm and reference returns")
    yield (
        f"Scores are 0 at the lower and 1 at the upper reference. {used} "
        "Of the optimality gap less is better.\n"
    )
    unscored = ", ".join(cell(env) for env in study.common if env not in study.scored)
    if unscored:
        yield f"Without reference returns, raw returns only: {unscored}.\n"
    for metric in metrics:
        yield f"{METRICS[metric][:1].upper()}{METRICS[metric][1:]}:\n"
        yield tables.aggregates_table(study, rows, metric)
    yield tables.references_table(study)
    yield f"![Performance profiles](profiles.png)\n\nOf the {METRICS[metrics[0]]}.\n"


def _improvements(
    study: Study, rows: Sequence[AggregateRow], metrics: Sequence[str]
) -> Iterator[str]:
    yield "## Probability of improvement\n"
    if not rows:
        yield "None: there are no two algorithms with runs on a common environment.\n"
        return
    yield (
        "Probability that a run of X returns more than a run of Y, averaged over environments. "
        f"{_used(study, [*study.common], 'runs of every algorithm')}\n"
    )
    yield tables.improvement_table(study, rows, metrics)


def _steps(study: Study, rows: Sequence[StepsRow]) -> Iterator[str]:
    yield "## Steps to a threshold\n"
    if not rows:
        yield "None: no environment has a threshold.\n"
        return
    yield (
        f"First step at which the mean of the last {WINDOW} training episodes (of at least "
        f"{LEAST_EPISODES}) reaches the threshold, seen at {GRID_POINTS} equidistant steps of the "
        "run: median over runs, never being infinite; in parentheses how many runs reached it; "
        f"x: ratio to {cell(study.baseline)}, where both have a median.\n"
    )
    yield tables.steps_table(study, rows)


def _used(study: Study, envs: Sequence[str], needed: str) -> str:
    """Which environments went into an aggregate."""
    if envs == [*study.envs]:
        return f"All {len(envs)} environments count."
    used = ", ".join(map(cell, envs))
    return f"Only {len(envs)} of {len(study.envs)} environments have {needed} and count: {used}."


def _ranges(numbers: Set[int]) -> str:
    """1 to 3, 7."""
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    spans = zip(starts, ends, strict=True)
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in spans)


def _refuse_other(out: Path) -> None:
    """Replace an older report, but nobody's files."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: is not a folder")
    there = [name for name in (_PAGE, *_NAMES) if (out / name).exists()]
    try:
        page = (out / _PAGE).read_bytes()[: len(_TITLE)] if _PAGE in there else b""
    except OSError as error:
        raise ValueError(f"{out / _PAGE}: cannot read: {reason(error)}") from error
    if there and page != _TITLE.encode():
        raise ValueError(f"{out / there[0]}: would be replaced by the report; choose another --out")


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, or nothing: what is left of one would be taken for others'."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_together({out / name: files[name] for name in (*_NAMES, _PAGE) if name in files})
        for name in _NAMES:
            if name not in files:
                (out / name).unlink(missing_ok=True)
    except OSError as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # empty ones only
        raise ValueError(f"{out}: cannot write: {reason(error)}") from error
