"""One run: training with evaluations, and its CSV file."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from acktr.files import reason, write_atomic
from acktr.kfac import FactorError
from acktr.runs.tables import read_table
from scripts.supervised.errors import SupervisedError
from scripts.supervised.problems import Problem, batches
from scripts.supervised.settings import Setting
from scripts.supervised.steppers import Curvature, Stepper, make_stepper

COLUMNS = ("optimizer", "seed", "setting", "update", "epoch", "seconds", "train_loss", "test_loss")
_CHECK = 20
"""Updates between looks at whether the loss is still finite."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the outcome of a run, apart from the machine."""

    problem: str
    data: str
    """SHA-256 of the data set."""
    widths: tuple[int, ...]
    optimizer: str
    seed: int
    setting: Setting
    batch: int
    updates: int
    eval_every: int
    device: str
    curvature: Curvature | None
    """None for optimizers without."""
    constants: dict[str, object] = field(default_factory=dict)
    """Untuned settings of K-FAC, empty for the other optimizers."""
    measured: int | None = None
    """Images of each split that losses are measured on; None for all."""

    def identity(self) -> str:
        """One line of JSON."""
        found = asdict(self)
        if self.measured is None:
            del found["measured"]
        return json.dumps(found, sort_keys=True)


@dataclass(frozen=True)
class Row:
    """An evaluation."""

    update: int
    seconds: float
    """Seconds of training until then, evaluations left out."""
    train_loss: float
    """Loss on the measured training images; infinite if the run diverged."""
    test_loss: float


def describe(setting: Setting) -> str:
    """For example lr=1,damping=9."""
    return ",".join(f"{name}={value:g}" for name, value in setting.items())


def train(spec: RunSpec, problem: Problem, report: Callable[[list[Row], int], None]) -> list[Row]:
    """Train and evaluate; a run that diverges ends at once with an infinite loss.

    Args:
        spec: The run.
        problem: Network and data.
        report: Called after each update with the evaluations so far and the number of updates.
    """
    device = problem.mean.device
    torch.manual_seed(spec.seed)
    network = problem.network().to(device)
    curvature = spec.curvature or Curvature(statistics_part=1, statistics_every=1, refresh_every=1)
    step = make_stepper(spec.optimizer, problem, network, spec.setting, curvature, spec.seed)
    rows = [_evaluation(spec, problem, network, 0, 0.0)]
    seconds = 0.0
    stream = batches(len(problem.train), spec.batch, spec.seed)
    for update in range(1, spec.updates + 1):
        started = time.perf_counter()
        inputs, targets = problem.batch(problem.train, next(stream).to(device))
        due = update % spec.eval_every == 0 or update == spec.updates
        healthy = _attempt(step, inputs, targets, check=due or update % _CHECK == 0)
        if due and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - started
        if not healthy:
            rows.append(Row(update, seconds, math.inf, math.inf))
        elif due:
            rows.append(_evaluation(spec, problem, network, update, seconds))
        report(rows, update)
        if not math.isfinite(rows[-1].train_loss):
            break
    return rows


def _attempt(step: Stepper, inputs: Tensor, targets: Tensor, *, check: bool) -> bool:
    """Make an update; False if it breaks down, or if ``check`` finds the loss not finite."""
    try:
        loss = step(inputs, targets)
    except FactorError:
        return False
    return not check or math.isfinite(float(loss))


def _evaluation(
    spec: RunSpec, problem: Problem, network: nn.Module, update: int, seconds: float
) -> Row:
    found = [
        problem.evaluate(network, split, spec.measured) for split in (problem.train, problem.test)
    ]
    train_loss, test_loss = (value if math.isfinite(value) else math.inf for value in found)
    return Row(update, seconds, train_loss, test_loss)


def write_rows(path: Path, spec: RunSpec, rows: Sequence[Row], updates_per_epoch: int) -> None:
    """Write or replace the CSV file of a run; its first line is the run's identity.

    Raises:
        SupervisedError: It cannot be written.
    """
    text = io.StringIO()
    text.write(f"#{spec.identity()}\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        fixed = (spec.optimizer, spec.seed, describe(spec.setting), row.update)
        numbers = (row.update / updates_per_epoch, row.seconds, row.train_loss, row.test_loss)
        writer.writerow([*fixed, *(f"{number:.9g}" for number in numbers)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.getvalue().encode())
    except OSError as error:
        raise SupervisedError(f"{path}: cannot write: {reason(error)}") from error


def is_finished(path: Path) -> bool:
    """Whether a run's file is there.

    Raises:
        SupervisedError: There can be no such file, for example because its name is too long.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise SupervisedError(f"{path}: cannot read: {reason(error)}") from error
    return True


def read_rows(path: Path, spec: RunSpec) -> list[Row] | None:
    """The evaluations of a finished run; None if there is no such file.

    Raises:
        SupervisedError: The file is damaged or belongs to another run.
    """
    if not is_finished(path):
        return None
    try:
        content = read_table(path)
        rows = [
            Row(
                int(row["update"]),
                float(row["seconds"]),
                float(row["train_loss"]),
                float(row["test_loss"]),
            )
            for row in content.rows
        ]
    except OSError as error:
        raise SupervisedError(f"{path}: cannot read: {reason(error)}") from error
    except KeyError as error:
        raise SupervisedError(f"{path}: no column {error.args[0]}") from error
    except ValueError as error:
        raise SupervisedError(f"{path}: {error}".removeprefix(f"{path}: {path}: ")) from error
    if content.comment != f"#{spec.identity()}" or not rows:
        raise SupervisedError(
            f"{path}: {_difference(content.comment, spec)}; choose another --out or delete the file"
        )
    return rows


def _difference(comment: str | None, spec: RunSpec) -> str:
    """The first value in which a file's identity differs."""
    try:
        found = json.loads((comment or "#").removeprefix("#"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return "not a run's file"
    wanted = json.loads(spec.identity())
    name = ""
    while isinstance(found, dict) and isinstance(wanted, dict):
        key = next((key for key in wanted if found.get(key) != wanted[key]), None)
        if key is None:
            return "made by another version of this script"
        name, found, wanted = f"{name}{'.' if name else ''}{key}", found.get(key), wanted[key]
    return f"made with {name} {_short(found)}, not {_short(wanted)}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
