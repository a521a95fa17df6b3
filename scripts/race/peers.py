"""The peers of K-FAC that take more than a line to build: what scripts.race and its cost share."""

from __future__ import annotations

import torch
from torch import nn


def muon(network: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, Adam for embeddings, the head behind them, convolutions and vectors."""
    tables = [m for m in network.modules() if isinstance(m, nn.Embedding)]
    apart = {id(m.weight) for m in tables}
    if tables:
        apart |= {id(p) for p in list(network.children())[-1].parameters()}
    matrices = [p for p in network.parameters() if p.dim() == 2 and id(p) not in apart]
    taken = {id(p) for p in matrices}
    rest = [p for p in network.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0),
        torch.optim.Adam(rest, lr=1e-3),
    ]


def heavyball(name: str, network: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """An optimizer of heavyball, its bases renewed every ten updates, without a compiler."""
    import heavyball as package
    from heavyball import utils

    utils.compile_mode = None
    made = getattr(package, name)
    return [
        made(
            network.parameters(),
            lr=lr,
            precondition_frequency=10,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
    ]
