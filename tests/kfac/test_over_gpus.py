"""K-FAC over processes with GPUs; written for what torch promises, and not run on any yet."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acktr.kfac import Ranks
from tests.tools.rank_trainings import TRAININGS, distance
from tests.tools.ranks import on_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
NAMES = ("kfac", "cholesky of convolutions", "corrected, estimated", "delayed")
"""Trainings that end as those of one process do."""


def on_gpu(name: str, ranks: Ranks | None) -> dict[str, Tensor]:
    training = dataclasses.replace(TRAININGS[name], device="cuda")
    return {key: value.cpu() for key, value in training.run(ranks).items()}


def all_on_gpu(ranks: Ranks) -> list[dict[str, Tensor]]:
    return [on_gpu(name, ranks) for name in NAMES]


def agree(found: list[Any]) -> None:
    """All ranks have the same bits, which are near those of one process (in float64)."""
    for place, name in enumerate(NAMES):
        first, *others = (mine[place] for mine in found)
        assert all(torch.equal(mine[key], first[key]) for mine in others for key in first)
        assert distance(first, on_gpu(name, None)) < 1e-9, name


def test_processes_that_share_a_gpu(tmp_path: Path) -> None:
    """Through gloo: nccl does not take two processes on one GPU."""
    agree(on_ranks({"all": all_on_gpu}, 2, tmp_path)["all"])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_processes_with_gpus_of_their_own(tmp_path: Path) -> None:
    agree(on_ranks({"all": all_on_gpu}, 2, tmp_path, "nccl")["all"])


def waits(ranks: Ranks) -> list[int]:
    """How often a step waits for the GPU, with few and with many layers."""
    found = []
    for name in ("kfac", "many layers"):
        training = dataclasses.replace(TRAININGS[name], device="cuda", steps=2)
        training.run(ranks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training.run(ranks)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append(sum("synchroniz" in str(warning.message) for warning in caught))
    return found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_messages_do_not_wait_for_every_layer(tmp_path: Path) -> None:
    for few, many in on_ranks({"waits": waits}, 2, tmp_path, "nccl")["waits"]:
        assert many <= few + 4
