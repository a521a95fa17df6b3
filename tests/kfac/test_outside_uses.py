"""Weights that are used outside of their layers are told, once, and only those."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from acktr.kfac import CategoricalLoss, Exact, Preconditioner, UnsupportedParameterWarning
from acktr.kfac.fisher.graph import own_parameters
from acktr.kfac.noisy import BayesByBackprop
from tests.tools.kfac import randn
from tests.tools.product_cases import filled


class Functional(nn.Module):
    """A layer, and its weight once more."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(6, 3)
        self.layer = nn.Linear(3, 3)
        self.conv = nn.Conv1d(3, 3, 1)
        self.head = nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.conv(self.layer(self.table(tokens)).mT).mT.tanh()
        if self.how == "table":
            hidden = hidden + (hidden @ self.table.weight.T) @ self.table.weight
        elif self.how == "linear":
            hidden = functional.linear(hidden, self.layer.weight.T)
        elif self.how == "conv":
            hidden = functional.conv1d(hidden.mT, self.conv.weight.transpose(0, 1)).mT
        elif self.how == "penalty":
            hidden = hidden / self.head.weight.norm()
        output: Tensor = self.head(hidden)
        return output


def told(model: nn.Module, *inputs: Tensor, autocast: bool = False) -> list[str]:
    """Warnings of two batches."""
    curvature = Preconditioner(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            narrow = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
            with narrow, curvature.capture() as captured:
                output = model(*inputs)
            curvature.observe(captured, output.double(), CategoricalLoss(), source=Exact())
    return [str(w.message) for w in caught if w.category is UnsupportedParameterWarning]


TOKENS = torch.tensor([[0, 2], [1, 5], [4, 4]])


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("table", "table.weight"),
        ("linear", "layer.weight"),
        ("conv", "conv.weight"),
        ("penalty", "head.weight"),
    ],
)
def test_a_use_outside_of_the_layer_is_told_once(how: str, name: str) -> None:
    messages = told(filled(Functional(how)), TOKENS)
    assert len(messages) == 1
    assert messages[0].startswith(f"{name} is also used outside of its layer")


class Busy(nn.Module):
    """Layers that are used several times, over positions, in a checkpoint, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3)
        self.twice = nn.Linear(3, 3, bias=False)
        self.unused = nn.Linear(3, 3)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.conv = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular", groups=3)
        self.up = nn.ConvTranspose1d(3, 3, 1)
        self.head = nn.Linear(3, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.twice(self.twice(self.table(tokens)).tanh())
        hidden = checkpoint(self.twice, hidden, use_reentrant=False)
        hidden = self.attention(hidden, hidden, hidden)[0]
        hidden = self.recurrent(hidden)[0]
        output: Tensor = self.head(self.up(self.conv(hidden.mT)).mT)
        return output


@pytest.mark.parametrize("autocast", [False, True])
def test_uses_by_modules_are_not_told(autocast: bool) -> None:
    model: Any = filled(Busy())
    assert told(model.float() if autocast else model, TOKENS, autocast=autocast) == []


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (5, 2, 2, 3)])
def test_linear_layers_over_any_positions_are_not_told(shape: tuple[int, ...], bias: bool) -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 4, bias)))
    assert told(model, randn(*shape)) == []


class Force(nn.Module):
    """The gradient of an energy, in whose graph layers are used again, backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.energy = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            places = inputs.detach().requires_grad_()
            total = self.energy(self.layer(places).tanh()).sum()
            return torch.autograd.grad(total, places, create_graph=True)[0]


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_a_use_by_a_gradient_inside_is_told(shape: tuple[int, ...]) -> None:
    messages = told(filled(Force()), randn(*shape))
    assert len(messages) == 1
    assert messages[0].startswith("layer.weight is also used outside of its layer")


def test_an_output_that_is_a_transposed_weight_depends_on_it() -> None:
    layer = nn.Linear(3, 4)
    assert own_parameters((layer.weight.T, layer.bias * 2), dict(layer.named_parameters())) == {
        "weight": 1,
        "bias": 2,
    }


def test_outputs_of_layers_used_by_a_gradient_inside_are_not_drawn() -> None:
    """Their weights are: the noise of an output would not reach the gradient."""
    posterior = BayesByBackprop(filled(Force()), data_size=10, local=True)
    posterior(randn(5, 3))
    assert not posterior._layers
