"""What a K-FAC update costs beside one of SGD."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.supervised.problems import Problem, batches
from scripts.supervised.report import machine, save
from scripts.supervised.settings import Setting
from scripts.supervised.steppers import Curvature, KFACStepper, Stepper, make_stepper

PARTS = (
    "Parts are means in milliseconds per update: fisher is the backward pass of sampled targets,"
    " factors their covariances, refresh the inverses, apply the rest of the step."
)
"""What the columns of :func:`table` mean."""

_SEED = 0


class Stopwatch:
    """Sums up the seconds of the parts of updates."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0
        self.seconds: dict[str, float] = {}

    def start(self) -> None:
        """Begin a part."""
        self._last = self._now()

    def __call__(self, part: str) -> None:
        """End a part and begin the next one."""
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass
class _Contestant:
    """An optimizer with its clock."""

    step: Stepper
    watch: Stopwatch
    blocks: list[float] = field(default_factory=list)
    """Seconds per update of each block."""
    warm: dict[str, float] = field(default_factory=dict)
    """What :meth:`inside` gave after warm-up."""

    def inside(self) -> dict[str, float]:
        """Seconds inside of K-FAC so far, by part."""
        if not isinstance(self.step, KFACStepper):
            return {}
        return dict(self.step.optimizer.curvature.seconds)


def measure(
    problem: Problem,
    *,
    batch: int,
    curvature: Curvature,
    settings: Mapping[str, Setting],
    blocks: int,
    block_updates: int,
    warm_up: int,
) -> dict[str, Any]:
    """Time SGD, K-FAC, and K-FAC with statistics only before a refresh, in alternating blocks.

    Args:
        problem: Network and data.
        batch: Images per update.
        curvature: When statistics and inverses are renewed.
        settings: Settings of sgd and kfac.
        blocks: Blocks of each contestant.
        block_updates: Updates per block, a multiple of the refresh period.
        warm_up: Updates of each contestant before the first block.

    Returns:
        Per contestant the median milliseconds per update, the median ratio to the SGD block beside
        it, and the mean milliseconds of its parts.
    """
    rare = replace(curvature, statistics_every=curvature.refresh_every)
    contestants = {
        "sgd": _contestant("sgd", problem, settings["sgd"], curvature),
        "kfac": _contestant("kfac", problem, settings["kfac"], curvature),
        f"kfac, statistics every {rare.statistics_every}": _contestant(
            "kfac", problem, settings["kfac"], rare
        ),
    }
    stream = batches(len(problem.train), batch, _SEED)
    for contestant in contestants.values():
        _block(contestant, problem, stream, warm_up)
        contestant.watch.seconds.clear()
        contestant.warm = contestant.inside()
    for _ in range(blocks):
        for contestant in contestants.values():
            before = contestant.watch.total
            _block(contestant, problem, stream, block_updates)
            contestant.blocks.append((contestant.watch.total - before) / block_updates)
    baseline = contestants["sgd"].blocks
    return {
        "batch": batch,
        "blocks": blocks,
        "block_updates": block_updates,
        "warm_up": warm_up,
        "statistics_part": curvature.statistics_part,
        "refresh_every": curvature.refresh_every,
        "machine": machine(),
        "contestants": {
            name: _result(contestant, baseline, blocks * block_updates)
            for name, contestant in contestants.items()
        },
    }


def _contestant(name: str, problem: Problem, setting: Setting, curvature: Curvature) -> _Contestant:
    torch.manual_seed(_SEED)
    device = problem.mean.device
    watch = Stopwatch(device)
    network = problem.network().to(device)
    step = make_stepper(name, problem, network, setting, curvature, _SEED, watch)
    return _Contestant(step, watch)


def _block(
    contestant: _Contestant, problem: Problem, stream: Iterator[Tensor], updates: int
) -> None:
    device = problem.mean.device
    contestant.watch.start()
    for _ in range(updates):
        inputs, targets = problem.batch(problem.train, next(stream).to(device))
        contestant.watch("data")
        contestant.step(inputs, targets)


def _result(contestant: _Contestant, baseline: Sequence[float], updates: int) -> dict[str, Any]:
    """Milliseconds per update; observe and step are split into what they consist of."""
    parts = dict(contestant.watch.seconds)
    inside = {name: value - contestant.warm[name] for name, value in contestant.inside().items()}
    if inside:
        parts["fisher"] = inside["fisher"]
        parts["factors"] = parts.pop("observe") - inside["fisher"]
        parts["refresh"] = inside["refresh"]
        parts["apply"] = parts.pop("step") - inside["refresh"]
    ratios = [mine / sgd for mine, sgd in zip(contestant.blocks, baseline, strict=True)]
    return {
        "milliseconds": round(1000 * statistics.median(contestant.blocks), 4),
        "ratio_to_sgd": round(statistics.median(ratios), 4),
        "parts": {part: round(1000 * value / updates, 4) for part, value in parts.items()},
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """The contestants of a measurement as lines of a table."""
    contestants: Mapping[str, Any] = found["contestants"]
    parts = list(dict.fromkeys(part for each in contestants.values() for part in each["parts"]))
    lines = [
        f"| optimizer | ms per update | ratio to sgd | {' | '.join(parts)} |",
        "|---|---:|---:|" + "---:|" * len(parts),
    ]
    for name, each in contestants.items():
        cells = " | ".join(f"{each['parts'][p]:.3f}" if p in each["parts"] else "" for p in parts)
        lines.append(
            f"| {name} | {each['milliseconds']:.3f} | {each['ratio_to_sgd']:.3f} | {cells} |"
        )
    return lines


def markdown(found: Mapping[str, Any], command: str) -> str:
    """The measurement as a report."""
    described = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    lines = [
        "# Cost of an update",
        "",
        f"Command: `{command}`",
        "",
        f"Medians over {found['blocks']} alternating blocks of {found['block_updates']} updates"
        f" after {found['warm_up']} to warm up; batch {found['batch']}, statistics from 1/"
        f"{found['statistics_part']} of it, inverses every {found['refresh_every']} updates."
        f" {PARTS}",
        "",
        *table(found),
        "",
        f"Machine: {described}",
    ]
    return "\n".join(lines) + "\n"


def write(out: Path, found: Mapping[str, Any], command: str) -> None:
    """Write overhead.json and overhead.md.

    Raises:
        SupervisedError: One of them cannot be written.
    """
    text = json.dumps({"command": command, **found}, indent=2) + "\n"
    save(out / "overhead.json", text.encode())
    save(out / "overhead.md", markdown(found, command).encode())
