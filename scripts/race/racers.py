"""Who races: how each optimizer is built, and the grid that it is tuned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, KFACConfig, LMConfig
from scripts.contest import Setting, grid
from scripts.race.peers import heavyball, muon
from scripts.race.problems import Problem, objective

Step = Callable[[Tensor, Tensor], Tensor]
"""Makes an update on inputs and targets and returns the loss before it."""


_ADAM = grid(lr=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2))
_MUON = grid(lr=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16))
_SOAP = grid(lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))
_KFAC = {
    "autoencoder": grid(kl_clip=(10.0, 30.0), damping=(0.001, 0.01)),
    "convnet": grid(kl_clip=(0.3, 1.0), damping=(0.0003, 0.001)),
    "transformer": grid(kl_clip=(0.1, 0.3), damping=(0.0003, 0.001)),
}
_ADAPTIVE = {
    "autoencoder": grid(kl_clip=(10.0, 30.0), damping=(0.1, 0.3)),
    "convnet": grid(kl_clip=(0.03, 0.1), damping=(0.01, 0.1)),
    "transformer": grid(kl_clip=(0.1, 0.3), damping=(0.01, 0.1)),
}
GRIDS: dict[str, dict[str, tuple[Setting, ...]]] = {
    problem: {
        "kfac": _KFAC[problem],
        "kfac-adaptive": _ADAPTIVE[problem],
        "kfac-default": ({},),
        "muon": _MUON,
        "soap": _SOAP,
        "adam": _ADAM,
        "adam-default": ({},),
        "sgd": grid(
            lr=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
            if problem == "autoencoder"
            else (3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
        ),
    }
    for problem in _KFAC
}
"""By problem and optimizer. The peers have six settings where K-FAC has four: K-FAC's were narrowed
by tries on the seed of the tuning, the peers' span what is usual."""
RACERS = tuple(GRIDS["autoencoder"])
NEEDS = {"soap": "heavyball"}
"""Package without which an optimizer cannot run."""

_MOST_STATISTICS = 4
"""Statistics of the tuned K-FACs come from 1/k of a batch, in a forward pass of its own."""
_TUNED = KFACConfig(stat_interval=1, stat_decay=0.9, kl_clip=1.0)
"""Every setting has a kl_clip and a damping of its own; these name the runs that were made."""
_LEAST_DAMPING = {"autoencoder": 1e-3, "convnet": 1e-3, "transformer": 1e-3}


def missing(name: str) -> str | None:
    """The package that an optimizer needs and that is not installed."""
    package = NEEDS.get(name)
    return package if package and find_spec(package) is None else None


def constants(name: str, problem: str) -> dict[str, Any]:
    """All that decides what an optimizer does, apart from the tuned values."""
    if name == "kfac-default":
        return asdict(KFACConfig())
    if name == "kfac":
        return {**asdict(_TUNED), "part": _MOST_STATISTICS}
    if name == "kfac-adaptive":
        return {**asdict(_TUNED), "part": _MOST_STATISTICS, "lm": asdict(_lm(problem))}
    return {}


def build(name: str, problem: Problem, network: nn.Module, setting: Setting, seed: int) -> Step:
    """The update of an optimizer, to be called with one batch after another."""
    if name == "kfac-default":
        return _natural(KFAC(network, seed=seed), problem, network, part=1)
    if name.startswith("kfac"):
        config = replace(_TUNED, kl_clip=setting["kl_clip"], damping=setting["damping"])
        optimizer = (
            KFAC(network, config, seed=seed)
            if name == "kfac"
            else KFAC(
                network, config, step_rule="quadratic_model", adaptive=_lm(problem.name), seed=seed
            )
        )
        return _natural(optimizer, problem, network, _MOST_STATISTICS)
    return _plain(_OTHERS[name](network, setting), problem, network)


def _lm(problem: str) -> LMConfig:
    return LMConfig(factor=0.9, minimum=_LEAST_DAMPING[problem])


def _natural(optimizer: KFAC, problem: Problem, network: nn.Module, part: int) -> Step:
    """K-FAC's update: one pass over the whole batch, or another one for a part's statistics."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        seen = inputs if part == 1 else inputs[: len(inputs) // part]
        with optimizer.capture() as captured:
            output = network(seen)
        optimizer.observe(captured, output, problem.loss)
        if part > 1:
            output = network(inputs)
        optimizer.zero_grad()
        loss = problem.loss(output, targets)
        torch.autograd.backward(loss)
        if optimizer.adaptive is None:
            optimizer.step()
        else:
            optimizer.step(objective=lambda: problem.loss(network(inputs), targets))
        return loss.detach()

    return step


def _plain(
    optimizers: Sequence[torch.optim.Optimizer], problem: Problem, network: nn.Module
) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = objective(problem, network(inputs), targets)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return step


_OTHERS: dict[str, Callable[[nn.Module, Setting], list[torch.optim.Optimizer]]] = {
    "muon": lambda net, setting: muon(net, setting["lr"]),
    "soap": lambda net, setting: heavyball("SOAP", net, setting["lr"]),
    "adam": lambda net, setting: [torch.optim.Adam(net.parameters(), lr=setting["lr"])],
    "adam-default": lambda net, _: [torch.optim.Adam(net.parameters())],
    "sgd": lambda net, setting: [torch.optim.SGD(net.parameters(), lr=setting["lr"], momentum=0.9)],
}
