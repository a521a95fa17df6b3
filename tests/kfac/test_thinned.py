"""Factors from a part of the samples of a batch, where positions make rows enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, Exact
from acktr.kfac.blocks.kronecker import KroneckerBlock
from tests.tools.kfac import plain_config, randn
from tests.tools.product_cases import close


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out


class Pictures(nn.Module):
    """Two groups of channels, and a layer without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.last = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh().flatten(1))
        return out


NETS: dict[str, tuple[nn.Module, Tensor, dict[str, Any], list[str]]] = {
    "tokens with a mask": (
        Tokens().double(),
        randn(70, 6, 4),
        {"weights": randn(70, 6, seed=3) < 0.5},
        ["first", "last"],
    ),
    "pictures": (Pictures().double(), randn(70, 2, 6, 6), {}, ["first"]),
}


def observed(model: nn.Module, inputs: Tensor, given: Any, rows: int | None, turn: int) -> KFAC:
    loss = CategoricalLoss(reduction="batchmean")
    optimizer = KFAC(model, plain_config(stat_decay=0.0, factor_rows=rows))
    optimizer.curvature.batches = turn
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, loss, source=Exact(), **given)
    return optimizer


def factors(optimizer: KFAC) -> dict[str, Tensor]:
    blocks = (block for block in optimizer.blocks if isinstance(block, KroneckerBlock))
    return {f"{b.name} {k}": v.mean() for b in blocks for k, v in (("a", b.a), ("g", b.g))}


@pytest.mark.parametrize("name", NETS)
def test_the_mean_of_all_turns_is_the_factor_of_the_batch(name: str) -> None:
    model, inputs, given, thinned = NETS[name]
    whole = factors(observed(model, inputs, given, None, 0))
    parts = [factors(observed(model, inputs, given, 8, turn)) for turn in range(4)]
    shares = torch.tensor([len(inputs[turn::4]) for turn in range(4)]).double() / len(inputs)
    for key, expected in whole.items():
        few = any(key.startswith(layer) for layer in thinned)
        assert torch.allclose(parts[0][key], expected) != few
        if name == "pictures" or key.endswith(" g"):  # A of weighted rows is a ratio
            mean = sum(share * part[key] for share, part in zip(shares, parts, strict=True))
            close(mean, expected)


@pytest.mark.parametrize("turn", range(4))
def test_inputs_of_weighted_rows_are_those_of_their_samples(turn: int) -> None:
    """A is the sum of w a a^T by the sum of w, over the samples of this turn."""
    model, inputs, given, _ = NETS["tokens with a mask"]
    found = factors(observed(model, inputs, given, 8, turn))
    weights = given["weights"][turn::4].double()
    taken = inputs[turn::4]
    for name, x in (("first", taken), ("last", model.get_submodule("first")(taken).tanh())):
        a = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        close(found[f"{name} a"], torch.einsum("nt,nti,ntj->ij", weights, a, a) / weights.sum())


def test_rows_that_are_not_enough_are_all_taken() -> None:
    model, inputs, given, _ = NETS["tokens with a mask"]
    whole, same = (factors(observed(model, inputs, given, rows, 0)) for rows in (None, 999))
    for key, expected in whole.items():
        close(same[key], expected)
