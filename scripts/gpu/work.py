"""Does one stage: ``python -m scripts.gpu.work FOLDER``, with a process of its own.

Rows are written one after another, so that those of a stage that is stopped are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from acktr.config import preset
from acktr.files import read_object, write_atomic
from acktr.kfac import KFAC, CategoricalLoss, Empirical, KFACConfig
from scripts.bench.cases import Timing
from scripts.bench.measure import measure_training
from scripts.common import cores
from scripts.gpu.bounds import BOUNDS, distance, farthest
from scripts.gpu.stages import Row, Stage
from scripts.gpu.updates import State, Subject, acting_difference, computing, updated

TASK, ROWS, OUTPUT = "task.json", "rows.json", "output.txt"
"""Files of a task: what to do, what was found, and what the process said."""

_CPU = torch.device("cpu")
_FAULT = 1.02
"""What an injected fault multiplies the device's numbers by."""
_ALONE = {  # of K-FAC alone; the last one decomposes on a stream of its own
    "kfac": {"structure": "kfac", "quadratic": "kronecker"},
    "cholesky": {"structure": "cholesky", "quadratic": "corrected"},
    "tridiagonal": {"structure": "tridiagonal", "quadratic": "kronecker"},
    "exact form": {"structure": "kfac", "quadratic": "exact"},
    "delayed": {"structure": "kfac", "quadratic": "kronecker", "refresh_delay": 1},
}
_SHARES = {"env": ("env",), "forward": ("act",), "refresh": ("refresh",)}
"""Parts of training by those that scripts.bench tells apart; the update is the rest."""


@dataclass(frozen=True)
class Task:
    """A stage, where and how it is done."""

    stage: Stage
    device: str
    """cuda, or cpu in a dry run."""
    dry: bool = False
    """Whether sizes are tiny."""
    fault: bool = False
    """Whether the device's numbers are spoilt, to see that it is found out."""

    def write(self, folder: Path) -> None:
        """Leave it in a folder."""
        (folder / TASK).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Task:
        """That of a folder."""
        values = read_object(folder / TASK)
        return cls(**{**values, "stage": Stage(**values["stage"])})


def work(folder: Path) -> None:
    """Do the task of a folder; rows appear there as they are found."""
    task = Task.read(folder)
    rows: list[Row] = []
    for row in _KINDS[task.stage.kind](task):
        rows.append(row)
        write_atomic(folder / ROWS, json.dumps(rows).encode())


def _updates(task: Task) -> Iterator[Row]:
    """Updates of the learners: parameters and statistics, after one and after several."""
    yield from _compared(task, ("acktr", "a2c"), pictures=True)
    if task.stage.precision == "float32":
        yield from _compared(task, ("acktr", "a2c", "trpo"), pictures=False)


def _compile(task: Task) -> Iterator[Row]:
    """Compiled updates beside those of the CPU, and CUDA graphs beside plain acting."""
    yield from _compared(task, ("acktr", "a2c"), pictures=True)
    for pictures in (True, False):
        subject = _subject(task, "acktr", pictures)
        gap = acting_difference(subject, torch.device(task.device), 3)
        what = f"acting by CUDA graphs beside plain, {subject.what}"
        # Products of 2^-24 in sums of 10^3 numbers; an action that flips differs by 1.
        yield {"what": what, "value": gap, "bound": 1e-4, "right": gap <= 1e-4}


def _subject(task: Task, algo: str, pictures: bool) -> Subject:
    rows = (8 if pictures else 32) if task.dry else (128 if pictures else 1024)
    return Subject(algo=algo, pictures=pictures, rows=rows, side=36 if task.dry else 84)  # type: ignore[arg-type]


def _compared(task: Task, algos: tuple[str, ...], pictures: bool) -> Iterator[Row]:
    counts = (1, 2) if task.dry else (1, 5)
    precision, compiled = task.stage.precision, task.stage.compiled
    for algo in algos:
        subject = _subject(task, algo, pictures)
        begun, truth = updated(subject, _CPU, "float64", counts)
        _, beside = updated(subject, _CPU, precision, counts)
        with _elsewhere(task):
            device = torch.device(task.device)
            _, found = updated(subject, device, precision, counts, compiled)
        for count, mine, other, wanted in zip(counts, found, beside, truth, strict=True):
            what = f"{subject.what}, {_times(count, 'update')}"
            yield from _judged(task, what, precision, mine, other, wanted, begun)


def _kfac(task: Task) -> Iterator[Row]:
    """K-FAC alone, on a convolutional classifier."""
    counts = (1, 3) if task.dry else (1, 8)
    for name in list(_ALONE)[:2] if task.dry else _ALONE:
        begun, truth = _classified(task, name, _CPU, torch.float64, counts)
        _, beside = _classified(task, name, _CPU, torch.float32, counts)
        with _elsewhere(task):
            device = torch.device(task.device)
            _, found = _classified(task, name, device, torch.float32, counts)
        for count, mine, other, wanted in zip(counts, found, beside, truth, strict=True):
            what = f"K-FAC, {name}, {_times(count, 'step')}"
            yield from _judged(task, what, "float32", mine, other, wanted, begun)


def _classified(
    task: Task, name: str, device: torch.device, dtype: torch.dtype, counts: tuple[int, ...]
) -> tuple[State, list[State]]:
    """K-FAC's steps on batches of random pictures and labels."""
    rows, width = (16, 4) if task.dry else (512, 32)
    torch.manual_seed(0)
    hidden = 49 * width
    layers: tuple[nn.Module, ...] = (nn.Conv2d(3, width, 3, stride=2), nn.Tanh(), nn.Flatten())
    if name == "tridiagonal":  # which is for chains of linear layers
        hidden = 8 * width
        layers = (nn.Flatten(), nn.Linear(768, hidden), nn.Tanh())
    network = nn.Sequential(*layers, nn.Linear(hidden, 10)).to(device, dtype)
    config = KFACConfig(lr=0.1, damping=0.01, refresh_interval=2, stat_interval=1, **_ALONE[name])  # type: ignore[arg-type]
    draw, loss, found = torch.Generator().manual_seed(2), CategoricalLoss(), []
    with computing(dtype):
        optimizer = KFAC(network, config)
        begun = _kfac_state(network, optimizer)
        for number in range(counts[-1]):
            shown = torch.randn(rows, 3, 16, 16, generator=draw, dtype=torch.float64)
            inputs = shown.to(device, dtype)
            labels = torch.randint(10, (rows,), generator=draw).to(device)
            optimizer.zero_grad()
            with optimizer.capture() as captured:
                output = network(inputs)
            optimizer.observe(captured, output, loss, source=Empirical(labels))
            torch.autograd.backward(loss(output, labels))
            optimizer.step()
            if number + 1 in counts:
                found.append(_kfac_state(network, optimizer))
    return begun, found


def _kfac_state(network: nn.Module, optimizer: KFAC) -> State:
    parameters = {n: p.detach().to("cpu", copy=True) for n, p in network.named_parameters()}
    statistics: dict[str, Tensor] = {}
    for layer, values in optimizer.curvature.state_dict()["layers"].items():
        statistics |= {f"{layer} {k}": values[k].cpu() for k in ("a", "g") if k in values}
    return {"parameters": parameters, "statistics": statistics}


def _judged(
    task: Task, what: str, precision: str, mine: State, other: State, wanted: State, begun: State
) -> Iterator[Row]:
    """Errors of parameters and statistics against float64, beside those of the CPU."""
    bound = BOUNDS[precision]
    for kind in ("parameters", "statistics"):
        if not wanted[kind]:
            continue
        found = mine[kind]
        if task.fault:
            found = {name: _FAULT * tensor for name, tensor in found.items()}
        if kind == "parameters":
            error = distance(found, wanted[kind], begun[kind])
            cpu = distance(other[kind], wanted[kind], begun[kind])
        else:
            error, cpu = farthest(found, wanted[kind]), farthest(other[kind], wanted[kind])
        limit = bound.limit(cpu)
        yield {
            "what": f"{what}: {kind}",
            "value": error,
            "cpu": cpu,
            "bound": limit,
            "right": error <= limit,  # False where one is NaN
        }


@contextmanager
def _elsewhere(task: Task) -> Iterator[None]:
    """A dry run has another number of threads where a GPU would be."""
    before = torch.get_num_threads()
    if task.dry:
        torch.set_num_threads(2 if before == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speed(task: Task) -> Iterator[Row]:
    """Steps per second of training, and where the time goes."""
    config = replace(preset(task.stage.env)[0], device=task.device, compile=task.stage.compiled)
    timing = Timing(threads=cores(), seconds=4.0, windows=3, warm_up=3.0, warm_up_updates=12)
    if task.dry:
        config = replace(config, num_envs=2, num_steps=4)
        timing = replace(timing, seconds=0.01, windows=1, warm_up=0.0, warm_up_updates=1)
    found = measure_training(config, timing)
    rates, shares = sorted(found["rates"]), dict(found["shares"])
    yield {
        "what": f"{config.env}, steps/s (median of {len(rates)})",
        "value": rates[len(rates) // 2],
    }
    yield {"what": f"{config.env}, steps/s of every window", "value": found["rates"]}
    for name, parts in _SHARES.items():
        share = sum(shares.pop(part, 0.0) for part in parts)
        yield {"what": f"{config.env}, share of {name}", "value": share}
    yield {
        "what": f"{config.env}, share of update, refresh left out",
        "value": sum(shares.values()),
    }


def _times(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


_KINDS: dict[str, Callable[[Task], Iterator[Row]]] = {
    "updates": _updates,
    "kfac": _kfac,
    "compile": _compile,
    "speed": _speed,
}


if __name__ == "__main__":
    work(Path(sys.argv[1]))
