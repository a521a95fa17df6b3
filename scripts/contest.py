"""A comparison of tuned optimizers: what scripts.race and scripts.supervised share.

Every optimizer is tuned on a grid with a seed of its own, and then runs with the best setting and
each seed. Every run has a CSV file, whose first line says all that decides its outcome; the same
command reads what is finished and makes the rest.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from acktr.kfac import FactorError
from acktr.report.tables import as_csv
from scripts.campaign import Progress, read_own
from scripts.common import ScriptError, given_once, integer, parsed, save

TUNE_SEED = 1000
_LOSSES = ("seconds", "train_loss", "test_loss")

Setting = dict[str, float]
"""The tuned values of an optimizer, for example {"lr": 0.01}; empty for one as it comes."""


@dataclass(frozen=True)
class Row:
    """An evaluation."""

    update: int
    seconds: float
    """Seconds of training until then, evaluations left out."""
    train_loss: float
    """Loss on the measured training samples; infinite if the run diverged."""
    test_loss: float

    @classmethod
    def of(cls, update: int, seconds: float, losses: Sequence[float]) -> Row:
        """The evaluation with these losses, which are infinite unless they are finite."""
        train, test = (loss if math.isfinite(loss) else math.inf for loss in losses)
        return cls(update, seconds, train, test)


class Spec(Protocol):
    """All that decides the outcome of a run, apart from the machine."""

    @property
    def optimizer(self) -> str:
        """Its name."""

    @property
    def seed(self) -> int:
        """Of network, batches and sampled targets."""

    @property
    def setting(self) -> Setting:
        """The tuned values."""

    @property
    def size(self) -> float:
        """Updates to make."""

    def identity(self) -> str:
        """One line of JSON."""

    def counted(self, rows: Sequence[Row]) -> list[Row] | None:
        """The evaluations that count; None if the run is too short."""


Each = TypeVar("Each", bound=Spec)
Report = Callable[[Row, float], None]
"""Takes the last evaluation of a run, and how much of its size is done."""


class Plan(Protocol[Each]):
    """The runs of a comparison."""

    @property
    def optimizers(self) -> Sequence[str]:
        """Names of the optimizers."""

    @property
    def seeds(self) -> Sequence[int]:
        """Seeds of the full runs."""

    def tuning_specs(self, name: str) -> list[Each]:
        """The tuning runs of an optimizer; none for one as it comes."""

    def full_spec(self, name: str, seed: int, setting: Setting) -> Each:
        """A full run."""


@dataclass
class Outcome:
    """What a comparison found."""

    tuning: dict[str, list[tuple[Setting, Row]]] = field(default_factory=dict)
    """Setting and last evaluation of every tuning run, by optimizer."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Setting of the full runs, by optimizer."""
    runs: dict[tuple[str, int], list[Row]] = field(default_factory=dict)
    """Evaluations of every full run, by optimizer and seed."""

    def edges(self) -> str:
        """Names of tuned values at an end of their grid, where a better one may lie outside."""
        names = []
        for name, tried in self.tuning.items():
            for key, value in self.settings[name].items():
                values = {setting[key] for setting, _ in tried}
                if len(values) > 2 and value in (min(values), max(values)):
                    names.append(f"{name} {key}")
        return f"At an end of its grid: {', '.join(names)}." if names else ""


class Contest(Generic[Each]):
    """Runs a plan in a folder; finished runs are read, the others made.

    Args:
        script: Its name, for messages.
        plan: The runs.
        out: The folder.
        make: Makes a run and reports its evaluations.
        write: Writes the file of a run.
        goal: Training loss at which runs end; None if they all have the same length.
    """

    def __init__(
        self,
        script: str,
        plan: Plan[Each],
        out: Path,
        make: Callable[[Each, Report], list[Row]],
        write: Callable[[Path, Each, Sequence[Row]], None],
        goal: float | None = None,
    ) -> None:
        self._plan, self._out, self._make, self._write = plan, out, make, write
        self._goal = goal
        full = [plan.full_spec(name, seed, {}) for name in plan.optimizers for seed in plan.seeds]
        tuning = [spec for name in plan.optimizers for spec in plan.tuning_specs(name)]
        self._progress = Progress(script, sum(spec.size for spec in (*tuning, *full)))

    def run(self) -> Outcome:
        """Do what is left to do.

        Raises:
            ScriptError: A file in the folder belongs to another comparison or cannot be written,
                or every setting of an optimizer diverged.
        """
        plan, outcome = self._plan, Outcome()
        with closing(self._progress.display):
            for name in plan.optimizers:
                specs, folder = plan.tuning_specs(name), self._out / "tune" / name
                files = [folder / f"{describe(spec.setting)}.csv" for spec in specs]
                pairs = zip(files, specs, strict=True)
                tried = [(spec.setting, self._rows(path, spec)[-1]) for path, spec in pairs]
                outcome.settings[name] = self._best(name, tried) if tried else {}
                outcome.tuning |= {name: tried} if tried else {}
            for seed in plan.seeds:
                for name in plan.optimizers:
                    spec = plan.full_spec(name, seed, outcome.settings[name])
                    path = self._out / "runs" / name / f"seed{seed}.csv"
                    outcome.runs[name, seed] = self._rows(path, spec)
        return outcome

    def _best(self, name: str, tried: Sequence[tuple[Setting, Row]]) -> Setting:
        """The setting with the fewest updates to the goal, or the lowest loss at the end."""

        def rank(pair: tuple[Setting, Row]) -> tuple[float, float]:
            row = pair[1]
            there = self._goal is not None and row.train_loss <= self._goal
            return (row.update if there else math.inf, row.train_loss)

        setting, best = min(tried, key=rank)
        if not math.isfinite(best.train_loss):
            raise ScriptError(f"{name}: every setting diverged in the tuning")
        self._progress.display.note(
            f"{name}: {describe(setting)} chosen, training loss {best.train_loss:.5g}"
            f" after {best.update} updates"
        )
        return setting

    def _rows(self, path: Path, spec: Each) -> list[Row]:
        """Read a finished run, or make it and write its file at the end; what counts of it."""
        finished = read_rows(path, spec)
        counted = spec.counted(finished) if finished else None
        made = counted is None
        if counted is None:
            label = f"{spec.optimizer} seed {spec.seed} {describe(spec.setting)}"

            def report(row: Row, part: float) -> None:
                said = f"training loss {row.train_loss:.5g} after {row.update:,} updates"
                self._progress.tell(f"{label}: {said}", part)

            rows = self._make(spec, report)
            self._write(path, spec, rows)
            counted = spec.counted(rows) or rows
            last = rows[-1]
            self._progress.display.note(
                f"{label}: training loss {last.train_loss:.5g}, test loss {last.test_loss:.5g},"
                f" {last.update} updates in {last.seconds:.1f} s"
            )
        self._progress.end(spec.size, made)
        return counted


def grid(**values: tuple[float, ...]) -> tuple[Setting, ...]:
    """All combinations of some values."""
    return tuple(dict(zip(values, each, strict=True)) for each in product(*values.values()))


def describe(setting: Setting) -> str:
    """For example lr=1,damping=9."""
    return ",".join(f"{name}={value:g}" for name, value in setting.items()) or "as it comes"


def attempt(
    step: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, targets: Tensor, *, check: bool = True
) -> bool:
    """Make an update; False if it breaks down, or if ``check`` finds the loss not finite."""
    try:
        loss = step(inputs, targets)
    except FactorError:
        return False
    return not check or math.isfinite(float(loss))


def write_rows(
    path: Path, spec: Spec, rows: Sequence[Row], extra: Callable[[Row], dict[str, object]]
) -> None:
    """Write or replace the CSV file of a run; its first line is the run's identity.

    Args:
        path: The file.
        spec: The run.
        rows: Its evaluations.
        extra: The columns of an evaluation before seconds and losses.
    """
    losses = [(row.seconds, row.train_loss, row.test_loss) for row in rows]
    body = [
        [*extra(row).values(), *(f"{number:.9g}" for number in numbers)]
        for row, numbers in zip(rows, losses, strict=True)
    ]
    head = (*extra(rows[0]), *_LOSSES)
    save(path.parent, {path.name: as_csv(head, body, spec.identity())})


def read_rows(path: Path, spec: Spec) -> list[Row] | None:
    """The evaluations of a finished run; None if there is no such file.

    Raises:
        ScriptError: The file is damaged or belongs to another run.
    """
    found = read_own(path, spec.identity())
    if found is None:
        return None
    try:
        return [Row(int(row["update"]), *(float(row[name]) for name in _LOSSES)) for row in found]
    except (KeyError, ValueError) as error:
        raise ScriptError(f"{path}: not a run's file: {error}") from error


def add_options(
    parser: argparse.ArgumentParser, problems: Sequence[str], optimizers: Sequence[str], data: str
) -> None:
    """Give a parser the options that every comparison has.

    Args:
        parser: The parser.
        problems: Names of the problems.
        optimizers: Names of the optimizers.
        data: What the file of ``--data`` holds.
    """
    add = parser.add_argument
    add("problem", choices=tuple(problems), help="network, loss and data")
    what = f"{data}; without it a small built-in set is used"
    add("--data", type=Path, metavar="FILE", help=what)
    add("--out", type=Path, required=True, help="folder of the results")
    add("--optimizers", nargs="+", choices=optimizers, default=list(optimizers), metavar="NAME")
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED")


def options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    asked = parsed(parser, argv)
    given_once(asked, "optimizers", "seeds")
    if TUNE_SEED in asked.seeds:
        raise ScriptError(f"argument --seeds: {TUNE_SEED} is the seed of the tuning")
    return asked


def shown(argv: Sequence[str]) -> list[str]:
    """A command line without the folder of its data, which differs between machines."""
    return [
        Path(word).name if at and argv[at - 1] == "--data" else word for at, word in enumerate(argv)
    ]
