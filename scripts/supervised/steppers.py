"""One update of each optimizer behind one interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, Capture
from scripts.supervised.problems import Problem
from scripts.supervised.settings import (
    ADAPTIVE_CLIP,
    KFAC_CONSTANTS,
    LM,
    SGD_MOMENTUM,
    WEIGHT_DECAY,
    Setting,
)

Mark = Callable[[str], None]
"""Told the name of each part of an update when the part ends."""


class Stepper(Protocol):
    """Trains a network one update at a time."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one update and return the loss of the batch before it, detached."""
        ...


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """When K-FAC's curvature is renewed, and from what."""

    statistics_part: int
    """Statistics come from the first 1/k of the batch, in a forward pass of its own if k > 1."""
    statistics_every: int
    """Updates between statistics."""
    refresh_every: int
    """Updates between inverses."""


def make_stepper(
    name: str,
    problem: Problem,
    network: nn.Module,
    setting: Setting,
    curvature: Curvature,
    seed: int,
    mark: Mark = lambda part: None,
) -> Stepper:
    """The stepper of an optimizer, one of ``settings.OPTIMIZERS``."""
    if name in ("sgd", "adam"):
        return PlainStepper(
            problem, network, _torch_optimizer(name, problem, network, setting), mark
        )
    base = KFAC_CONSTANTS[problem.name]
    config = dataclasses.replace(
        base,
        lr=setting.get("lr", base.lr),
        damping=setting.get("damping", base.damping),
        kl_clip=(
            setting.get("kl_clip", base.kl_clip) if name == "kfac" else ADAPTIVE_CLIP[problem.name]
        ),
        weight_decay=WEIGHT_DECAY[problem.name],
        refresh_interval=curvature.refresh_every,
    )
    optimizer = (
        KFAC(network, config, step_rule="quadratic_model", adaptive=LM[problem.name], seed=seed)
        if name == "kfac-adaptive"
        else KFAC(network, config, seed=seed)
    )
    return KFACStepper(problem, network, optimizer, curvature, mark)


def _torch_optimizer(
    name: str, problem: Problem, network: nn.Module, setting: Setting
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    decay = WEIGHT_DECAY[problem.name]
    if name == "adam":
        return torch.optim.Adam(groups, lr=setting["lr"], weight_decay=decay)
    return torch.optim.SGD(groups, lr=setting["lr"], momentum=SGD_MOMENTUM, weight_decay=decay)


class PlainStepper:
    """Gradient of the batch, then a torch optimizer."""

    def __init__(
        self, problem: Problem, network: nn.Module, optimizer: torch.optim.Optimizer, mark: Mark
    ) -> None:
        self._problem, self._network, self._optimizer = problem, network, optimizer
        self._mark = mark

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one update."""
        output = self._network(inputs)
        self._mark("forward")
        self._optimizer.zero_grad()
        loss = self._problem.objective(output, targets)
        torch.autograd.backward(loss)
        self._mark("backward")
        self._optimizer.step()
        self._mark("apply")
        return loss.detach()


class KFACStepper:
    """Statistics from part of the batch, gradient of all of it, then a K-FAC step."""

    def __init__(
        self,
        problem: Problem,
        network: nn.Module,
        optimizer: KFAC,
        curvature: Curvature,
        mark: Mark,
    ) -> None:
        self._problem, self._network, self._curvature = problem, network, curvature
        self.optimizer = optimizer
        self._mark = mark
        self._updates = 0

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Make one update."""
        due = self._updates % self._curvature.statistics_every == 0
        part = self._curvature.statistics_part
        self._updates += 1
        if due and part == 1:
            with self.optimizer.capture() as captured:
                output = self._network(inputs)
            self._mark("forward")
            self._observe(captured, output)
        else:
            if due:
                with self.optimizer.capture() as captured:
                    partial = self._network(inputs[: max(1, len(inputs) // part)])
                self._mark("capture")
                self._observe(captured, partial)
            output = self._network(inputs)
            self._mark("forward")
        self.optimizer.zero_grad()
        loss = self._problem.objective(output, targets)
        torch.autograd.backward(loss)
        self._mark("backward")
        self.optimizer.step(
            objective=lambda: self._problem.objective(self._network(inputs), targets)
        )
        self._mark("step")
        return loss.detach()

    def _observe(self, captured: Capture, output: Tensor) -> None:
        self.optimizer.observe(captured, output, self._problem.loss)
        self._mark("observe")
