"""Subclasses of torch's layers: the parent's block if they keep its forward pass, and only then."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss
from acktr.kfac.blocks.vectors import VectorBlock
from tests.tools.exact import close, observed, stored
from tests.tools.kfac import build, randn
from tests.tools.product_cases import filled


class MyLinear(nn.Linear):
    """Only its initial values are its own."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)


class MyConv(nn.Conv2d):
    """More arguments, the same forward pass."""

    def __init__(self, width: int) -> None:
        super().__init__(2, width, 2, padding=1)
        self.extra = width


class MyEmbedding(nn.Embedding):
    """Nothing is changed."""


class MyNorm(nn.LayerNorm):
    """Nothing is changed."""


class Deeper(MyLinear):
    """A subclass of a subclass."""


class Conv(nn.Module):
    """A convolution and a normalisation with the given classes."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.conv: nn.Module = MyConv(4) if own else nn.Conv2d(2, 4, 2, padding=1)
        self.norm = (MyNorm if own else nn.LayerNorm)(16)
        self.head = (Deeper if own else nn.Linear)(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.conv(x).flatten(2)).tanh().flatten(1))
        return output


class Words(nn.Module):
    """Tokens, two linear layers with one weight."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.words = (MyEmbedding if own else nn.Embedding)(6, 3, padding_idx=1)
        self.first = nn.Linear(3, 3)
        self.second = (MyLinear if own else nn.Linear)(3, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(self.words(x)).tanh())
        return output


NETS: dict[str, tuple[Any, Tensor]] = {
    "conv": (Conv, randn(5, 2, 3, 3)),
    "words": (Words, torch.tensor([[0, 2], [1, 5], [4, 4]])),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", NETS)
def test_subclasses_that_keep_the_forward_pass_have_the_blocks_of_their_parents(
    name: str, structure: str
) -> None:
    make, inputs = NETS[name]
    own, usual = (
        observed(filled(make(kept)), inputs, CategoricalLoss(), structure=structure)
        for kept in (True, False)
    )
    assert list(own.curvature.stats) == list(usual.curvature.stats)
    for key in own.curvature.stats:
        close(stored(own.block(key)), stored(usual.block(key)))
        if isinstance(own.block(key), VectorBlock):
            close(stored(own.block(key)), own.truth(key))


# --- forward passes of their own ------------------------------------------------------------------


class LoRA(nn.Linear):
    """A low-rank change of a linear layer, as a subclass."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.down = nn.Parameter(torch.zeros(2, width))
        self.up = nn.Parameter(torch.zeros(out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.mT @ self.up.mT


class Standardised(nn.Conv2d):
    """Weight standardisation in the method that the parent's forward pass calls."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def patched() -> nn.Module:
    layer = nn.Linear(3, 4)

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.linear(x.square(), self.weight, self.bias)

    layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    return layer


OTHERS: dict[str, tuple[list[nn.Module], Tensor, tuple[str, ...]]] = {
    "lora": ([LoRA(3, 4)], randn(5, 3), ("0.weight", "0.bias", "0.down", "0.up")),
    "standardised": ([Standardised(2, 4, 2)], randn(5, 2, 2, 2), ("0.weight", "0.bias")),
    "patched": ([patched()], randn(5, 3), ("0.weight", "0.bias")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_with_a_forward_pass_of_their_own_have_the_exact_block_of_any_parameters(
    name: str,
) -> None:
    layers, inputs, names = OTHERS[name]
    model = build(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    seen = observed(model, inputs, CategoricalLoss(), small_parameters="dense")
    assert seen.vector("small_parameters").names == names
    close(stored(seen.block("small_parameters")), seen.truth("small_parameters"))


def test_a_parametrized_layer_keeps_the_exact_block_of_its_bias() -> None:
    model = build(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh())
    seen = observed(model, randn(5, 3), CategoricalLoss(), small_parameters="dense")
    for name in ("small_parameters", "0.bias"):
        close(stored(seen.block(name)), seen.truth(name))
