"""Layers in unusual places: a basis leaves the trace of the exact block as it is, whatever it is.

So EKFAC's scales of a layer add up to the trace of the Fisher of its parameters, which needs no
knowledge of the layer: its uses, states, positions and masks are all in the Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, Exact, KroneckerBlock, Preconditioner
from acktr.kfac.blocks.vectors import VectorBlock
from tests.tools.kfac import plain_config, randn, scales
from tests.tools.product_cases import filled
from tests.tools.rows import Dense, Taps, softmax


class Net(nn.Module):
    """Modules and what they compute, with a head of three classes."""

    def __init__(self, function: Callable[..., Tensor], width: int, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function, self.head = function, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.function(self, x))
        return output


def translated(net: Any, x: Tensor) -> Tensor:
    """States of one recurrent module are where another begins."""
    _, state = net.first(x)
    hidden: Tensor = net.second(x.flip(1), state)[0][:, -1]
    return hidden


def attended_twice(net: Any, x: Tensor) -> Tensor:
    """One module, to all positions and to the first two, with the weights themselves in use."""
    hidden, weights = net.one(x, x, x)
    return net.one(hidden, x[:, :2], x[:, :2])[0].mean(1) + weights.mean(1)[:, :4]


def two_scales(net: Any, x: Tensor) -> Tensor:
    """A convolution and a normalisation over pictures of two sizes."""
    small = nn.functional.avg_pool2d(x, 2)
    parts = [net.norm(net.wide(part).tanh()).sin().mean((2, 3)) for part in (x, small)]
    return torch.cat(parts, 1)


def sent_to_experts(net: Any, x: Tensor) -> Tensor:
    """Rows of all samples in any order, of which each expert sees some."""
    rows = x.flatten(0, 1)
    order = torch.arange(len(rows)).roll(5)
    parts = [net.one(rows[order[:9]]), net.two(rows[order[9:]]).sin()]
    return torch.cat(parts)[order.argsort()].view(len(x), -1, 4).tanh().mean(1)


def shared() -> Net:
    """Two names of one module."""
    one = nn.MultiheadAttention(4, 2, batch_first=True)

    def both(net: Any, x: Tensor) -> Tensor:
        hidden = net.one(x, x, x)[0]
        pooled: Tensor = net.two(hidden, x, hidden)[0].mean(1)
        return pooled

    return Net(both, 4, one=one, two=one)


def attention(**settings: Any) -> Net:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
    return Net(lambda net, x: net.one(x, x.flip(1), x.sin())[0].mean(1), 4, one=layer)


WORDS, PICTURES = (4, 5, 4), (3, 2, 4, 4)
recurrent = {"hidden_size": 3, "batch_first": True}
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "projected": (
        lambda: Net(
            lambda net, x: net.one(x)[0].mean(1), 2, one=nn.LSTM(4, proj_size=2, **recurrent)
        ),
        WORDS,
    ),
    "last states": (
        lambda: Net(
            lambda net, x: torch.cat([state.sum(0) for state in net.one(x)[1]], 1),
            6,
            one=nn.LSTM(4, num_layers=2, **recurrent),
        ),
        WORDS,
    ),
    "translated": (
        lambda: Net(translated, 3, first=nn.GRU(4, **recurrent), second=nn.GRU(4, **recurrent)),
        WORDS,
    ),
    "extra key": (lambda: attention(add_bias_kv=True), WORDS),
    "zero key": (lambda: attention(add_zero_attn=True, bias=False), WORDS),
    "attended twice": (
        lambda: Net(attended_twice, 4, one=nn.MultiheadAttention(4, 2, batch_first=True)),
        WORDS,
    ),
    "shared": (shared, WORDS),
    "two scales": (
        lambda: Net(two_scales, 8, wide=nn.Conv2d(2, 4, 2), norm=nn.GroupNorm(2, 4)),
        PICTURES,
    ),
    "experts": (
        lambda: Net(sent_to_experts, 4, one=nn.Linear(4, 4), two=nn.Linear(4, 4, bias=False)),
        WORDS,
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_scales_add_up_to_the_trace_of_the_fisher(name: str) -> None:
    make, shape = NETS[name]
    model, inputs = filled(make()), randn(*shape)
    config = plain_config(structure="ekfac", stat_decay=0.0, quadratic="kronecker")
    curvature = Preconditioner(model, config)
    for _ in range(2):  # the scales are of the batch after the basis
        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, CategoricalLoss(), source=Exact())
        curvature.refresh()
    named = dict(model.named_parameters())
    dense = Dense((model(inputs),), Taps(), named, (softmax,), (1.0,))
    squares = dense.fisher.diagonal().split([p.numel() for p in named.values()])
    traces = {key: part.sum() for key, part in zip(named, squares, strict=True)}
    seen = 0
    for block in curvature.blocks:
        whole = sum(traces[key] for key in block.names)
        if isinstance(block, KroneckerBlock):
            torch.testing.assert_close(scales(block).sum(), whole, rtol=1e-10, atol=0.0)
        elif isinstance(block, VectorBlock):
            torch.testing.assert_close(block.moment.mean().trace(), whole, rtol=1e-10, atol=0.0)
        seen += isinstance(block, KroneckerBlock | VectorBlock)
    assert seen >= len(curvature.blocks) - 2  # keys and values that attention adds are apart
