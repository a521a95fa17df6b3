"""Tables and figure of the regression; the numbers behind them are in the files of the sets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from acktr.report.figures import COLOURS, GREY, bare, panels, picture
from acktr.report.tables import as_csv
from acktr.report.tables import markdown as table
from acktr.runs.tables import read_table
from scripts.bayes.data import Splits
from scripts.bayes.methods import DROPOUT, METHODS, Method
from scripts.bayes.training import TEST_SAMPLES, Budget, Score
from scripts.common import described_machine

Measure = Literal["rmse", "log_likelihood"]
MEASURES: tuple[Measure, ...] = ("rmse", "log_likelihood")
Found = Mapping[tuple[str, Method], Sequence[Score]]

_TITLES = {"rmse": "RMSE", "log_likelihood": "Log-likelihood"}
_FORMS: tuple[Method, ...] = ("mvg", "mvg-factored")
_PUBLISHED = Path(__file__).with_name("published.csv")
_SOURCES = ("talk", "paper", "dropout logs")


class Paired(NamedTuple):
    """One method against another, split by split."""

    set: str
    measure: Measure
    method: Method
    other: Method
    difference: float
    """Mean of method less other; positive is better for log-likelihoods, worse for RMSE."""
    error: float
    """Standard error of that mean over splits."""
    better: int
    """Splits on which the method is better."""
    splits: int
    """Splits that are no tie."""
    p: float
    """Of the two-sided sign test."""


def values(scores: Sequence[Score], measure: Measure) -> list[float]:
    """A measure, split by split."""
    return [score.rmse if measure == "rmse" else score.log_likelihood for score in scores]


def mean_error(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error of one number is not a number."""
    count = len(numbers)
    spread = statistics.stdev(numbers) / count**0.5 if count > 1 else math.nan
    return statistics.fmean(numbers), spread


def summary(scores: Sequence[Score], measure: Measure) -> str:
    """Mean and standard error over splits."""
    if not all(score.finite for score in scores):
        return "diverged"
    numbers = values(scores, measure)
    return with_error(numbers, 4 if abs(statistics.fmean(numbers)) < 0.01 else 3)


def with_error(numbers: Sequence[float], digits: int) -> str:
    """Their mean and its standard error, where there is one."""
    value, error = mean_error(numbers)
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if math.isfinite(error) else "")


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of a count of signs that are equally likely; 1 without any."""
    count, least = better + worse, min(better, worse)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2.0**count)


def pairs(found: Found) -> list[Paired]:
    """Both forms of mvg, or else the first method, against others, where no split diverged."""
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        methods = [method for of, method in found if of == name]
        firsts = [method for method in _FORMS if method in methods] or methods[:1]
        for place, first in enumerate(firsts):
            for other in (method for method in methods if method not in firsts[: place + 1]):
                own, others = found[name, first], found[name, other]
                if all(score.finite for score in (*own, *others)):
                    rows += [_paired(name, m, first, other, own, others) for m in MEASURES]
    return rows


def _paired(
    name: str,
    measure: Measure,
    method: Method,
    other: Method,
    own: Sequence[Score],
    others: Sequence[Score],
) -> Paired:
    both = zip(values(own, measure), values(others, measure), strict=True)
    differences = [mine - theirs for mine, theirs in both]
    sign = -1 if measure == "rmse" else 1
    better, worse = (sum(sign * way * d > 0 for d in differences) for way in (1, -1))
    p = sign_test(better, worse)
    mean, error = mean_error(differences)
    return Paired(name, measure, method, other, mean, error, better, better + worse, p)


def paired_csv(found: Found) -> bytes:
    """All pairs as a CSV file."""
    rows = [[f"{v:.9g}" if isinstance(v, float) else v for v in row] for row in pairs(found)]
    return as_csv(Paired._fields, rows)


def cap(splits: Splits, budget: Budget) -> float:
    """The largest log-likelihood that the prior of the noise lets a network without errors reach.

    The precision is at most (a + n / 2) / b, so that the mean over splits is at most
    1/2 log(tau / 2 pi) - log s_y.
    """
    shape, rate = budget.noise_prior
    most = (shape + splits.data_size / 2) / rate
    return 0.5 * math.log(most / (2 * math.pi)) - float(splits.scale.log().mean())


def markdown(
    sets: Sequence[Splits], found: Found, budgets: Mapping[str, Budget], command: str
) -> str:
    """What was compared and what was found, as tables."""
    shape, rate = budgets[sets[0].name].noise_prior
    about = [
        f"{s.name}: {s.count} splits of {s.data_size} and {len(s.y_test)} rows, batch"
        f" {budgets[s.name].batch}, {budgets[s.name].epochs} epochs,"
        f" {budgets[s.name].hidden} units."
        for s in sets
    ]
    parts = [
        "# Regression on the UCI sets\n",
        f"Command: `{command}`\n",
        "\n".join(about) + "\n",
        f"Noise precision: Gamma({shape:g}, {rate:g}) prior, learnt. Prior of weights N(0, 1), KL"
        f" weight 1, one weight sample per step, {TEST_SAMPLES} in the test; dropout {DROPOUT:g};"
        " a tenth of the step size from half time on; no selection, last epoch. ± is the standard"
        " error over splits.\n",
    ]
    for measure in MEASURES:
        parts += [f"## {_TITLES[measure]}\n", _measure_table(sets, found, budgets, measure)]
    if rows := pairs(found):
        parts += ["## Paired over splits\n", _paired_table(rows)]
    parts += ["## Beside published numbers\n", _beside(sets, found), _NOTE, described_machine()]
    return "\n".join(parts)


_NOTE = """The columns of the talk are preliminary numbers whose ± cannot be over splits. Those of
the paper (Zhang et al. 2018) are recalled, not verified, and were made on other splits, and on
another target for naval. Dropout logs: Gal's code, 4,000 epochs, on these splits.
"""


def _measure_table(
    sets: Sequence[Splits], found: Found, budgets: Mapping[str, Budget], measure: Measure
) -> str:
    methods = _methods(found)
    body = []
    for s in sets:
        known = {m: summary(found[s.name, m], measure) for m in methods if (s.name, m) in found}
        last = [f"{cap(s, budgets[s.name]):.2f}"] if measure == "log_likelihood" else []
        body.append([s.name, *(known.get(m, "") for m in methods), *last])
    head = ["set", *methods, *(["cap of the noise prior"] if measure == "log_likelihood" else [])]
    return table(head, body)


def _methods(found: Found) -> list[Method]:
    names = {method for _, method in found}
    return [method for method in METHODS if method in names]


def _paired_table(rows: Sequence[Paired]) -> str:
    body = []
    for row, likelihood in zip(rows[::2], rows[1::2], strict=True):
        cells = [
            cell
            for one in (row, likelihood)
            for cell in (
                f"{one.difference:+.3f}" + (f" ± {one.error:.3f}" if one.splits > 1 else ""),
                f"{one.better}/{one.splits}",
                f"{one.p:.2g}",
            )
        ]
        body.append([row.set, f"{row.method} - {row.other}", *cells])
    head = ["set", "difference", "RMSE", "better", "p", "log-likelihood", "better", "p"]
    return table(head, body, left=2)


def published() -> dict[tuple[str, str, str, str], str]:
    """Published numbers by set, measure, source and method."""
    found = {}
    for row in read_table(_PUBLISHED).rows:
        error = f" ± {row['error']}" if row["error"] else ""
        found[row["set"], row["measure"], row["source"], row["method"]] = row["value"] + error
    return found


def _beside(sets: Sequence[Splits], found: Found) -> str:
    known = published()
    columns = list(dict.fromkeys((source, method) for _, _, source, method in known))
    body = []
    for s in sets:
        for measure in MEASURES:
            ours = [
                summary(found[s.name, form], measure) if (s.name, form) in found else ""
                for form in _FORMS
            ]
            cells = [known.get((s.name, measure, *column), "") for column in columns]
            body.append([s.name, _TITLES[measure], *ours, *cells])
    names = {"paper": "paper (recalled)"}
    head = [
        "set",
        "",
        *(f"{form} here" for form in _FORMS),
        *(f"{names.get(s, s)}: {m}" for s, m in columns),
    ]
    return table(head, body, left=2)


def figure(sets: Sequence[Splits], found: Found) -> bytes:
    """Means with standard errors by method, a column of panels for each set."""
    drawn, axes, _ = panels(2 * len(sets), len(sets), height=3.2)
    methods, known = _methods(found), published()
    for place, axis in enumerate(axes):
        measure, s = MEASURES[place // len(sets)], sets[place % len(sets)]
        for x, method in enumerate(methods):
            scores = found.get((s.name, method), ())
            if scores and all(score.finite for score in scores):
                mean, error = mean_error(values(scores, measure))
                colour = COLOURS[METHODS.index(method)]
                axis.errorbar(x, mean, error if error > 0 else 0, fmt="o", color=colour, capsize=3)
            # The paper's noisy K-FAC has the factored damping.
            theirs = "mvg" if method == "mvg-factored" else method if method != "mvg" else ""
            recalled = known.get((s.name, measure, "paper", theirs))
            if recalled:
                axis.plot(x, float(recalled.split()[0]), marker="_", ms=14, color=GREY)
        axis.set_xticks(range(len(methods)), methods, rotation=40, ha="right")
        axis.set_title(s.name if measure == "rmse" else "")
        axis.set_ylabel(_TITLES[measure])
        bare(axis)
    drawn.suptitle("Mean and standard error over splits; grey: the paper's, recalled")
    return picture(drawn, "png")
