"""Parameters without a Kronecker block."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, UnsupportedParameterWarning
from tests.tools.kfac import (
    block,
    build,
    kfac,
    mlp,
    moved,
    observe,
    parameters,
    plain_config,
    randn,
    set_gradients,
)


class Mixed(nn.Module):
    """Layers with every kind of block, and a parameter without any."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.layer_norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 8)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied_again = nn.Linear(8, 8, bias=False)
        self.tied_again.weight = self.tied.weight
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.grouped(self.norm(self.conv(inputs)).tanh()).flatten(1)
        hidden = self.linear(self.layer_norm(hidden)).tanh()
        return self.tied_again(self.tied(hidden).tanh()) * self.scale


PLAIN = {"scale"}
CURVED = {
    "conv.weight",
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "grouped.weight",
    "grouped.bias",
    "layer_norm.weight",
    "layer_norm.bias",
    "linear.weight",
    "linear.bias",
    "tied.weight",
}


def test_unsupported_parameters_step_by_their_gradient_and_count_in_q() -> None:
    model = Mixed().double()
    with pytest.warns(UnsupportedParameterWarning) as caught:
        optimizer = kfac(model, momentum=0.0, small_parameters="gradient")
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in PLAIN)
    assert not any(n in str(caught[0].message) for n in CURVED)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = observe(optimizer, model, randn(5, 2, 4, 4))
        output.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        before = parameters(model)
        optimizer.step()
    assert set(gradients) == set(before)
    step = optimizer.direction()
    q = sum(float((gradients[n] * step[n]).sum()) for n in gradients)
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.quadratic) == pytest.approx(q, rel=1e-9)
    rate = optimizer.lr * float(optimizer.last_step.scale)
    changes = moved(before, model)
    for name in PLAIN:
        torch.testing.assert_close(changes[name], rate * gradients[name], rtol=1e-8, atol=1e-14)
    assert set(before) == {*PLAIN, *CURVED}
    for name in CURVED:
        assert not torch.allclose(changes[name], rate * gradients[name], rtol=1e-3)


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(UnsupportedParameterWarning) as caught:
        KFAC(Mixed(), plain_config(small_parameters="gradient"))
    assert caught[0].filename == __file__


def test_no_warning_when_every_parameter_has_a_block() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kfac(mlp())


def test_frozen_parameters_are_ignored() -> None:
    model = build(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 2))
    for frozen in (*model[0].parameters(), *model[1].parameters(), model[2].bias):
        frozen.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = kfac(model)
    output = observe(optimizer, model, randn(6, 4))
    assert block(optimizer, "2").a.mean().shape == (5, 5)  # no bias coordinate
    assert block(optimizer, "3").a.mean().shape == (4, 4)
    output.square().mean().backward()
    before = parameters(model)
    optimizer.step()
    still = {n for n, p in parameters(model).items() if torch.equal(p, before[n])}
    assert still == {"0.weight", "0.bias", "1.weight", "1.bias", "2.bias"}


def test_the_bias_of_a_frozen_weight_has_a_block_of_its_own() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = kfac(model, damping=0.3)
    with optimizer.capture() as captured:
        output = model(randn(6, 4))
    noise = randn(6, 3, seed=2)
    optimizer.update_curvature(captured, (noise * output).sum())
    optimizer.refresh()
    hidden = model[0](randn(6, 4)).tanh()
    rows = (noise @ model[2].weight) * (1 - hidden.square())
    fisher = rows.mT @ rows / 6 + 0.3 * torch.eye(5).double()
    gradients = set_gradients(model)
    expected = torch.linalg.solve(fisher, gradients["0.bias"])
    torch.testing.assert_close(optimizer.direction()["0.bias"], expected, rtol=1e-9, atol=1e-12)


def test_known_fisher() -> None:
    model = mlp()
    model.register_parameter("log_std", nn.Parameter(torch.zeros(3).double()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = kfac(model, damping=0.5, known_fisher={"log_std": 2.0})
    observe(optimizer, model, randn(6, 4))
    gradients = set_gradients(model)
    before = parameters(model)
    optimizer.step()
    step = optimizer.direction()
    torch.testing.assert_close(step["log_std"], gradients["log_std"] / 2.5, rtol=1e-15, atol=0)
    assert optimizer.last_step is not None
    q = sum(float((gradients[n] * step[n]).sum()) for n in step)
    assert float(optimizer.last_step.quadratic) == pytest.approx(q, rel=1e-9)
    rate = optimizer.lr * 0.1 * float(optimizer.last_step.scale)
    change = moved(before, model)["log_std"]
    torch.testing.assert_close(change, rate * gradients["log_std"] / 2.5, rtol=1e-9, atol=1e-15)


def test_known_fisher_of_no_parameter() -> None:
    with pytest.raises(ValueError, match=r"\['sigma'\]"):
        kfac(mlp(), known_fisher={"sigma": 2.0})


@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
def test_known_fisher_of_a_layer_keeps_q_positive() -> None:
    """The parameter is taken out of the layer's block: q must stay >= 0."""
    model = build(nn.Linear(1, 1))
    optimizer = kfac(model, known_fisher={"0.weight": 2.0})
    with optimizer.capture() as captured:
        output = model(torch.ones(1, 1).double())
    optimizer.update_curvature(captured, 10 * output.sum())
    model[0].weight.grad = torch.full((1, 1), 1.0).double()
    model[0].bias.grad = torch.full((1,), 0.5).double()
    optimizer.step()
    assert optimizer.last_step is not None
    assert float(optimizer.last_step.quadratic) >= 0


def test_a_module_registered_twice_is_one_layer() -> None:
    layer = nn.Linear(3, 3)
    model = build(layer, nn.Tanh(), layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = kfac(model)
    observe(optimizer, model, randn(6, 3))
    assert [b.names for b in optimizer.blocks] == [("0.weight", "0.bias")]
