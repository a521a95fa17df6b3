"""One run: an optimizer's updates, and evaluations between them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from acktr.kfac import KFAC
from scripts.contest import Report, Row, Setting, attempt, describe
from scripts.contest import write_rows as write
from scripts.supervised.problems import Problem, batches
from scripts.supervised.settings import (
    ADAPTIVE_CLIP,
    KFAC_CONSTANTS,
    LM,
    SGD_MOMENTUM,
    WEIGHT_DECAY,
    Curvature,
    ProblemName,
)

_CHECK = 20
"""Updates between looks at whether the loss is still finite."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides the outcome of a run, apart from the machine."""

    problem: ProblemName
    data: str
    """SHA-256 of the data set."""
    widths: tuple[int, ...]
    optimizer: str
    seed: int
    setting: Setting
    batch: int
    updates: int
    eval_every: int
    curvature: Curvature | None
    """None for optimizers without."""
    constants: dict[str, object] = field(default_factory=dict)
    """Untuned settings of K-FAC, empty for the other optimizers."""
    measured: int | None = None
    """Images of each split that losses are measured on; None for all."""
    device: str = "cpu"
    goal: float | None = None
    """Training loss at which the run ends; None: it makes all its updates."""

    @property
    def size(self) -> float:
        """Number of updates."""
        return self.updates

    def counted(self, rows: Sequence[Row]) -> list[Row]:
        """All evaluations."""
        return list(rows)

    def identity(self) -> str:
        """One line of JSON."""
        values = asdict(self)
        for name in ("measured", "goal"):
            if values[name] is None:
                del values[name]
        return json.dumps(values, sort_keys=True)


class Stepper:
    """Trains a network one update at a time.

    Args:
        name: Optimizer, one of ``settings.OPTIMIZERS``.
        problem: Loss and objective.
        network: What is trained.
        setting: Tuned values of the optimizer.
        curvature: When K-FAC takes statistics and inverts; not used by the others.
        seed: Of K-FAC's sampled targets.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        network: nn.Module,
        setting: Setting,
        curvature: Curvature | None,
        seed: int,
    ) -> None:
        self._problem = problem
        self._network: Callable[[Tensor], Tensor] = network
        self._curvature = curvature or Curvature()
        self._updates = 0
        self.optimizer: KFAC | torch.optim.Optimizer
        if name in ("sgd", "adam"):
            self.optimizer = _torch_optimizer(name, problem.name, network, setting)
        else:
            refresh = self._curvature.refresh_every
            self.optimizer = _kfac(name, problem.name, network, setting, refresh, seed)

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one update and return the loss of the batch before it, detached."""
        output = self._forward(inputs)
        self.optimizer.zero_grad()
        loss = self._problem.objective(output, targets)
        torch.autograd.backward(loss)
        if isinstance(self.optimizer, KFAC):
            self.optimizer.step(
                objective=lambda: self._problem.objective(self._network(inputs), targets)
            )
        else:
            self.optimizer.step()
        return loss.detach()

    def _forward(self, inputs: Tensor) -> Tensor:
        """The network's output; on the way K-FAC's statistics, if they are due."""
        due = self._updates % self._curvature.statistics_every == 0
        part = self._curvature.statistics_part
        self._updates += 1
        if not (due and isinstance(self.optimizer, KFAC)):
            return self._network(inputs)
        seen = inputs if part == 1 else inputs[: max(1, len(inputs) // part)]
        with self.optimizer.capture() as captured:
            output = self._network(seen)
        self.optimizer.observe(captured, output, self._problem.loss)
        return output if part == 1 else self._network(inputs)


def _kfac(
    name: str, problem: ProblemName, network: nn.Module, setting: Setting, refresh: int, seed: int
) -> KFAC:
    config = dataclasses.replace(
        KFAC_CONSTANTS,
        damping=setting["damping"],
        kl_clip=setting["kl_clip"] if name == "kfac" else ADAPTIVE_CLIP[problem],
        weight_decay=WEIGHT_DECAY[problem],
        refresh_interval=refresh,
    )
    if name == "kfac":
        return KFAC(network, config, seed=seed)
    return KFAC(network, config, step_rule="quadratic_model", adaptive=LM[problem], seed=seed)


def _torch_optimizer(
    name: str, problem: ProblemName, network: nn.Module, setting: Setting
) -> torch.optim.Optimizer:
    decay, lr = WEIGHT_DECAY[problem], setting["lr"]
    groups = [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=SGD_MOMENTUM)


def train(spec: RunSpec, problem: Problem, report: Report) -> list[Row]:
    """Train and evaluate; a run that diverges ends at once with an infinite loss.

    Args:
        spec: The run.
        problem: Network and data.
        report: Called after each update with the last evaluation and the number of updates.
    """
    torch.manual_seed(spec.seed)
    network = problem.network()
    step = Stepper(spec.optimizer, problem, network, spec.setting, spec.curvature, spec.seed)
    rows = [_evaluation(spec, problem, network, 0, 0.0)]
    seconds = 0.0
    stream = batches(len(problem.train), spec.batch, spec.seed)
    for update in range(1, spec.updates + 1):
        started = time.perf_counter()
        inputs, targets = problem.batch(problem.train, next(stream))
        due = update % spec.eval_every == 0 or update == spec.updates
        healthy = attempt(step, inputs, targets, check=due or update % _CHECK == 0)
        seconds += time.perf_counter() - started
        if not healthy:
            rows.append(Row(update, seconds, math.inf, math.inf))
        elif due:
            rows.append(_evaluation(spec, problem, network, update, seconds))
        report(rows[-1], update)
        loss = rows[-1].train_loss
        if not math.isfinite(loss) or (spec.goal is not None and loss <= spec.goal):
            break
    return rows


def _evaluation(
    spec: RunSpec, problem: Problem, network: nn.Module, update: int, seconds: float
) -> Row:
    splits = (problem.train, problem.test)
    losses = [problem.evaluate(network, split, spec.measured) for split in splits]
    return Row.of(update, seconds, losses)


def write_rows(path: Path, spec: RunSpec, rows: Sequence[Row], updates_per_epoch: int) -> None:
    """Write or replace the CSV file of a run."""

    def place(row: Row) -> dict[str, object]:
        return {
            "optimizer": spec.optimizer,
            "seed": spec.seed,
            "setting": describe(spec.setting),
            "update": row.update,
            "epoch": f"{row.update / updates_per_epoch:.9g}",
        }

    write(path, spec, rows, place)
