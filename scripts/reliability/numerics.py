"""Hostile curvature factors, and NaN and Inf put into a training run."""

from __future__ import annotations

import math
import os
import random
import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, FactorError, KFACConfig, KroneckerBlock, Linearized, linalg
from acktr.kfac.blocks.layouts import LayerFactors
from acktr.kfac.blocks.tridiagonal import TridiagonalBlock
from acktr.runs.checkpoint import load_checkpoint
from acktr.runs.saved import broken_number
from scripts.reliability import runs
from scripts.reliability.processes import Command
from scripts.reliability.trials import Outcome, Trial, remove

BATCH = 100
"""Cases of a trial with factors."""

_DAMPING = 0.01
_STRUCTURES = ("kfac", "kfac_factored", "cholesky", "ekfac", "tridiagonal")
_NAN_ARGV = shlex.split(
    "train --seed 7 --device cpu --num-envs 4 --num-steps 16 --total-timesteps 1280 "
    "--checkpoint-freq 64 --eval-episodes 2 --run-dir runs"
)
_ENDS = (0, 70, 76)
"""Exit codes: it went on, or ended with a line about numbers or about the environment."""
_REFUSED = 2
"""Exit code of a run that never began, as the network's first look already gave NaN."""


def plan_factors(count: int, scratch: Path) -> list[Trial]:
    """So many cases, in batches."""
    return [
        Trial(f"cases {begin} to {min(begin + BATCH, count) - 1}", begin, min(BATCH, count - begin))
        for begin in range(0, count, BATCH)
    ]


def hostile_factors(trial: Trial, here: Path) -> Outcome:
    """Steps with hostile factors leave finite parameters, or there is a FactorError."""
    rungs: Counter[str] = Counter()
    wrong = []
    for number in range(trial.seed, trial.seed + trial.cases):
        try:
            factor_case(number, rungs)
        except Exception as error:
            wrong.append(f"case {number}: {type(error).__name__}: {error}")
    said = ", ".join(f"{count} {rung}" for rung, count in sorted(rungs.items()))
    return Outcome("; ".join([*wrong[:3], said]), len(wrong))


def factor_case(number: int, rungs: Counter[str]) -> None:
    """One step with one or both factors of a layer replaced; AssertionError if it goes wrong."""
    rng = random.Random(f"factor {number}")
    generator = torch.Generator().manual_seed(number)
    kind = torch.float32 if rng.random() < 0.7 else torch.float64
    first, second, third = (rng.randint(1, 24) for _ in range(3))
    model = nn.Sequential(nn.Linear(first, second), nn.Tanh(), nn.Linear(second, third)).to(kind)
    structure = rng.choice(_STRUCTURES)
    settings: Any = {"structure": structure, "damping": _DAMPING, "refresh_interval": 1}
    optimizer = KFAC(model, replace(KFACConfig.for_rl(), **settings))
    _observe(optimizer, model, generator)
    optimizer.step()
    _observe(optimizer, model, generator)
    layers: list[LayerFactors] = []
    for block in optimizer.blocks:
        if isinstance(block, TridiagonalBlock):
            layers += block.layers
        elif isinstance(block, KroneckerBlock):
            layers.append(block.layer)
    for layer in rng.sample(layers, rng.choice([1, 1, 2])):
        for side in rng.choice([("a",), ("g",), ("a", "g")]):
            average = getattr(layer, side)
            average.value = _hostile(average.value, rng, generator)
    fails = rng.choice([0, 0, 0, 0, 1, 2, 3])
    try:
        with mock.patch.object(linalg, "_attempt", _failing(linalg._attempt, fails, rungs)):
            optimizer.step()
    except FactorError:
        rungs["FactorError"] += 1
    if optimizer.failures:
        rungs["kept its former"] += 1
    for name, parameter in model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), f"{structure}: {name} is not finite"
    for name, step in optimizer.direction().items():
        assert bool(torch.isfinite(step).all()), f"{structure}: the direction of {name}"


def _observe(optimizer: KFAC, model: nn.Sequential, generator: torch.Generator) -> None:
    first = model[0].weight
    assert isinstance(first, Tensor)
    inputs = torch.randn(8, first.shape[1], generator=generator, dtype=first.dtype)
    with optimizer.capture() as captured:
        output = model(inputs)
    noise = torch.randn(output.shape, generator=generator, dtype=first.dtype)
    optimizer.update_curvature(captured, (noise * output).sum())
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=first.dtype)


def _failing(
    attempt: Callable[[Tensor], Any], fails: int, rungs: Counter[str]
) -> Callable[[Tensor], Any]:
    """Attempts of which the first ones at each matrix fail; those that succeed are counted."""
    names = ("as it is", "in float64", "with jitter")
    failed = 0

    def tried(matrix: Tensor) -> Any:
        nonlocal failed
        if matrix.dim() == 3:  # the batch of all is one attempt more, before each one's own
            return attempt(matrix) if fails == 0 else None
        if failed < fails:
            failed += 1
            return None
        found = attempt(matrix)
        rungs[names[min(failed, 2)] if found is not None else "did not converge"] += 1
        failed = 0
        return found

    return tried


def _hostile(like: Tensor, rng: random.Random, generator: torch.Generator) -> Tensor:
    """A matrix that a curvature factor might become."""
    size, dtype = len(like), like.dtype
    rank = rng.randint(0, size)
    rows = torch.randn(max(rank, 1), size, generator=generator, dtype=torch.float64)
    matrix = rows.mT @ rows / max(rank, 1) if rank else torch.zeros(size, size).double()
    kind = rng.randrange(9)
    if kind == 0:  # repeated eigenvalues
        matrix = rng.choice([1e-12, 1.0, 1e6]) * torch.eye(size).double()
    elif kind == 1:  # scales far apart
        scales = 10.0 ** torch.empty(size).double().uniform_(-15, 15, generator=generator)
        matrix = matrix * scales * scales[:, None]
    elif kind == 2:
        matrix = matrix * 10.0 ** rng.uniform(-38, 38)
    elif kind == 3:  # in one triangle only, or in both
        place = rng.randrange(size), rng.randrange(size)
        matrix[place] = rng.choice([math.nan, math.inf, -math.inf])
    elif kind == 4:
        matrix[rng.randrange(size), rng.randrange(size)] += rng.choice([1.0, 1e10, -1e30])
    elif kind == 5:  # not positive
        matrix = -matrix
    elif kind == 6:
        matrix = torch.full_like(matrix, rng.choice([math.nan, 3e38, 1e-45, 0.0]))
    return matrix.to(dtype)


KINDS = {
    "loss": 20,
    "gradient": 20,
    "factor": 40,
    "curvature": 80,
    "layer": 400,
    "observation": 1000,
    "reward": 1000,
}
"""What is struck, and one of how many calls or steps; a run may have fewer."""
_CURVED = {"factor": "acktr", "curvature": "trpo"}
"""What one algorithm alone has: eigenvectors of factors, and products with the Fisher matrix."""


def plan_nan(count: int, scratch: Path) -> list[Trial]:
    """Kinds and algorithms in turn, on CartPole and Pendulum."""
    grid = [
        f"{kind} {env} {algo}"
        for algo in runs.ALGOS
        for env in ("CartPole-v1", "Pendulum-v1")
        for kind in KINDS
        if kind not in _CURVED or _CURVED[kind] == algo
    ]
    return [Trial(grid[number % len(grid)], number) for number in range(count)]


def injected(trial: Trial, here: Path) -> str:
    """NaN or Inf at a random moment: nothing on the disk is broken, and the run can be resumed."""
    kind, env, algo = trial.what.split()
    argv = [*_NAN_ARGV, "--env", env, "--algo", algo]
    if kind in ("observation", "reward"):
        argv += ["--wrapper", "scripts.reliability.poison:Poisoned"]
    mark, at = here / "struck", random.Random(f"nan {trial.seed}").randrange(1, KINDS[kind])
    while True:
        command = Command(argv, here, lambda number=at: _poison(kind, number, mark))  # type: ignore[misc]
        code = command.wait(120)
        if mark.exists() or at == 1:
            break
        remove(here / "runs")
        at = max(1, at // 3)
    assert mark.exists(), f"a {kind} was never struck"
    assert "Traceback" not in command.said, command.said[-600:]
    folder = runs.run_folder(here, argv)
    if code == _REFUSED:
        assert "not finite" in command.said, command.said[-300:]
        assert not folder.exists(), "a run that never began left something"
        return f"call {at}: exit code {code}"
    assert code in _ENDS, f"exit code {code}: {command.said[-300:]}"
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        broken = broken_number(load_checkpoint(checkpoint)[0])
        assert broken is None, f"{checkpoint.name} holds {broken}, which is not finite"
    resume = ["train", "--resume", str(folder), "--import", "scripts.reliability.poison"]
    again = Command(resume, here)
    assert again.wait(120) == 0, f"it cannot be resumed: {again.said[-300:]}"
    return f"call {at}: exit code {code}"


def _poison(kind: str, number: int, mark: Path) -> None:
    """Strike call number so many of the kind in this process, and leave a mark."""
    if kind in ("observation", "reward"):
        os.environ["POISON"] = f"{kind} {number} {mark}"
        return
    calls = 0

    def strike(where: Any, name: str, spoil: Callable[..., Any]) -> None:
        original = getattr(where, name)

        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != number:
                return original(*args, **more)
            mark.touch()
            return spoil(original, *args, **more)

        setattr(where, name, call)

    if kind == "layer":
        strike(nn.functional, "linear", lambda do, *args, **more: _struck(do(*args, **more)))
    elif kind == "factor":
        strike(torch.linalg, "eigh", lambda do, matrix: (do(matrix)[0], _struck(do(matrix)[1])))
    elif kind == "curvature":
        strike(Linearized, "product", lambda do, *args: _one_struck(do(*args)))
    else:
        spoiled = _bad_loss if kind == "loss" else _bad_gradient
        strike(torch.autograd, "backward", spoiled)
        strike(torch.autograd, "grad", spoiled)


def _bad_loss(do: Callable[..., Any], loss: Any, *args: Any, **more: Any) -> Any:
    """Derivatives of NaN."""
    return do(loss * math.nan if isinstance(loss, Tensor) else loss, *args, **more)


def _bad_gradient(do: Callable[..., Any], loss: Any, *args: Any, **more: Any) -> Any:
    """One entry of NaN in a gradient that is returned, or in one that is added to a parameter."""
    found = do(loss, *args, **more)
    if isinstance(found, tuple):
        return (_struck(found[0]), *found[1:])
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable.grad is not None:
            variable.grad = _struck(variable.grad)
            break
        waiting += [following for following, _ in node.next_functions]
    return found


def _one_struck(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with NaN in one of them."""
    name = next(iter(tensors))
    return tensors | {name: _struck(tensors[name])}


def _struck(tensor: Tensor) -> Tensor:
    """A copy with NaN in one place."""
    copy = tensor.clone()
    with torch.no_grad():
        copy.view(-1)[copy.numel() // 2] = math.nan
    return copy
