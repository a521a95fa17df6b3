"""Padded nodes and words that are pooled: what is in them counts nowhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, Exact, Preconditioner, Sampled
from acktr.kfac.config import Structure
from acktr.kfac.losses.sources import Source
from tests.tools.exact import pairs, stored
from tests.tools.kfac import build, plain_config, randn, seeded

COUNT, NODES, WIDTH = 5, 6, 4
LENGTHS = torch.tensor([6, 1, 3, 4, 2])
PRESENT = torch.arange(NODES) < LENGTHS[:, None]


class Graph(nn.Module):
    """Attention between nodes, whose mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.key = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.value, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, nodes: Tensor) -> Tensor:
        hidden = self.enter(nodes).tanh()
        scores = (hidden @ self.key(hidden).mT).masked_fill(~PRESENT[:, None], -math.inf)
        hidden = hidden + scores.softmax(-1) @ self.value(hidden)
        pooled = (hidden * PRESENT[..., None]).sum(1) / LENGTHS[:, None]
        output: Tensor = self.head(pooled)
        return output


class Text(nn.Module):
    """Torch's transformer, positions first, of which a mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.enter(words.transpose(0, 1))
        hidden = self.layer(hidden, src_key_padding_mask=~PRESENT).transpose(0, 1)
        output: Tensor = self.head((hidden * PRESENT[..., None]).sum(1) / LENGTHS[:, None])
        return output


def statistics(
    kind: type[nn.Module],
    padding: float,
    structure: Structure = "kfac",
    source: Source | None = None,
) -> tuple[nn.Module, Preconditioner]:
    torch.manual_seed(0)
    module = kind().double()
    curvature = Preconditioner(module, plain_config(structure=structure))
    inputs = randn(COUNT, NODES, 3).masked_fill(~PRESENT[..., None], padding)
    with curvature.capture() as captured:
        output = module(inputs)
    curvature.observe(captured, output, CategoricalLoss(), source=source, present=PRESENT)
    return module, curvature


@pytest.mark.parametrize("kind", [Graph, Text])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("source", [Sampled(), Exact()])
def test_what_is_in_padding_does_not_matter(
    kind: type[nn.Module], structure: Structure, source: Source
) -> None:
    _, first = statistics(kind, 0.0, structure, source)
    _, second = statistics(kind, 7.0, structure, source)
    assert len(first.blocks) == len(second.blocks) > 3
    for a, b in zip(first.blocks, second.blocks, strict=True):
        torch.testing.assert_close(stored(b), stored(a), rtol=1e-12, atol=1e-14)


def test_a_factor_is_that_of_the_present_rows() -> None:
    _, curvature = statistics(Graph, 7.0)
    rows = randn(COUNT, NODES, 3)[PRESENT]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    [(factor, _)] = pairs(next(block for block in curvature.blocks if block.name == "enter"))
    torch.testing.assert_close(factor, rows.mT @ rows / len(rows), rtol=1e-12, atol=0.0)


def test_samples_that_the_output_leaves_out_may_be_named() -> None:
    """The factors of output[kept] are those of a batch of these samples alone."""
    kept, inputs = torch.tensor([True, False, True, True, False]), randn(COUNT, 3)
    factors = []
    for part in (False, True):
        module = build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        curvature = Preconditioner(module)
        with curvature.capture() as captured:
            output = module(inputs[kept] if part else inputs)
        observed, present = (output, None) if part else (output[kept], kept)
        curvature.observe(captured, observed, CategoricalLoss(), source=Exact(), present=present)
        factors.append([stored(block) for block in curvature.blocks])
    for a, b in zip(*factors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "change",
    [lambda m: m.double(), lambda m: m[:4], lambda m: m & False],
    ids=["numbers", "length", "empty"],
)
def test_masks_that_do_not_fit_are_told(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module = Graph().double()
    curvature = Preconditioner(module)
    with curvature.capture() as captured:
        output = module(torch.rand(COUNT, NODES, 3, generator=seeded(0)).double())
    with pytest.raises(ValueError, match=r"present: masks must be bool tensors .* N = 5"):
        curvature.observe(captured, output, CategoricalLoss(), present=change(PRESENT))
