"""Every number that the comparison fixes: grids, epochs and constants of each optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from acktr.kfac import KFACConfig, LMConfig
from scripts.contest import Setting, grid

ProblemName = Literal["autoencoder", "convnet"]

OPTIMIZERS = ("kfac", "kfac-adaptive", "sgd", "adam")
SGD_MOMENTUM = 0.9


@dataclass(frozen=True)
class Curvature:
    """When K-FAC's curvature is renewed, and from what."""

    statistics_part: int = 8
    """Statistics come from the first 1/k of the batch, in a forward pass of its own if k > 1."""
    statistics_every: int = 1
    """Updates between statistics."""
    refresh_every: int = 10
    """Updates between inverses."""


@dataclass(frozen=True)
class Recipe:
    """What belongs to one optimizer on one problem."""

    grid: tuple[Setting, ...]
    """Settings to choose from; all optimizers of a problem have equally many."""
    epochs: int
    """Epochs of a full run."""
    small_epochs: int
    """Epochs of a full run on the built-in data."""


RECIPES: dict[ProblemName, dict[str, Recipe]] = {
    "autoencoder": {
        "kfac": Recipe(grid(kl_clip=(3.0, 10.0), damping=(0.1, 0.3)), 10, 10),
        "kfac-adaptive": Recipe(grid(damping=(1.0, 3.0, 9.0, 27.0)), 10, 10),
        "sgd": Recipe(grid(lr=(1e-3, 3e-3, 1e-2, 3e-2)), 30, 40),
        "adam": Recipe(grid(lr=(3e-4, 1e-3, 3e-3, 1e-2)), 30, 40),
    },
    "convnet": {
        "kfac": Recipe(grid(kl_clip=(0.01, 0.03), damping=(0.001, 0.003)), 3, 5),
        "kfac-adaptive": Recipe(grid(damping=(0.1, 0.3, 1.0, 3.0)), 3, 5),
        "sgd": Recipe(grid(lr=(3e-3, 1e-2, 3e-2, 0.1)), 6, 10),
        "adam": Recipe(grid(lr=(3e-4, 1e-3, 3e-3, 1e-2)), 6, 10),
    },
}

_FIXED = KFACConfig.for_rl()
"""Settings that do not change with the library's defaults."""

KFAC_CONSTANTS = replace(_FIXED, lr=1.0, structure="cholesky", stat_decay=0.95)
"""K-FAC settings that are not tuned; the tuned ones and L2 are filled in."""

LM: dict[ProblemName, LMConfig] = {
    "autoencoder": LMConfig(minimum=0.1),
    "convnet": LMConfig(minimum=1e-3),
}
"""How kfac-adaptive adapts its damping; without a floor the noise of batches takes over."""

ADAPTIVE_CLIP: dict[ProblemName, float | None] = {"autoencoder": 10.0, "convnet": 0.03}
"""kl_clip of kfac-adaptive's steps, which the quadratic model scales."""

WEIGHT_DECAY: dict[ProblemName, float] = {"autoencoder": 1e-5, "convnet": 0.0}
"""L2 coefficient of weight matrices, the same for all optimizers; not part of the reported loss."""

BATCH: dict[ProblemName, int] = {"autoencoder": 1000, "convnet": 128}
SMALL_BATCH = 64
"""Batch on the built-in data."""

WIDTHS: tuple[int, ...] = (1000, 500, 250, 30)
"""Encoder of the autoencoder, after the input; the decoder mirrors it."""
SMALL_WIDTHS: tuple[int, ...] = (128, 64, 32, 8)
"""The same for the built-in data."""

TUNE_EPOCHS = 3


def constants(problem: ProblemName, optimizer: str) -> dict[str, object]:
    """K-FAC's settings that are fixed here and not by the library, to tell runs apart by."""
    if not optimizer.startswith("kfac"):
        return {}
    defaults = asdict(_FIXED)
    fixed = asdict(KFAC_CONSTANTS)
    differing = {name: value for name, value in fixed.items() if value != defaults[name]}
    if differing.pop("structure") == "cholesky":  # the words of the files that are published
        differing |= {"inverse": "cholesky", "factored_damping": True}
    if optimizer == "kfac":
        return differing
    return {**differing, "adaptive": {**asdict(LM[problem]), "kl_clip": ADAPTIVE_CLIP[problem]}}
