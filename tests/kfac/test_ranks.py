"""Several processes of torch.distributed are refused, where each would follow its own samples."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from acktr.kfac import KFAC, CategoricalLoss, Preconditioner
from tests.tools.kfac import mlp, parameters, randn, same

_LOOP = "lo"


def _one_of_two(rank: int, store: str) -> None:
    """A rank: K-FAC made before the group stops at its first step, and is not made after it."""
    torch.set_num_threads(1)
    early, model, loss = mlp(), mlp(), CategoricalLoss()
    optimizer = KFAC(early)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        with optimizer.capture() as captured:
            output = early(randn(6, 4, seed=rank))
        optimizer.observe(captured, output, loss)
        torch.autograd.backward(loss(output, torch.zeros(6, dtype=torch.int64)))
        before = parameters(early)
        with pytest.raises(ValueError, match="the 2 ranks would become different models"):
            optimizer.step()
        assert same(parameters(early), before)
        for kind in (KFAC, Preconditioner):
            with pytest.raises(ValueError, match="use one process"):
                kind(model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank asserts is raised here."""
    if _LOOP in [name for _, name in socket.if_nameindex()]:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", _LOOP)
    multiprocessing.spawn(_one_of_two, (str(tmp_path / "store"),), nprocs=2)
