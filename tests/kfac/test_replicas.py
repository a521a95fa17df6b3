"""Replicas are convolutions with groups: outputs, factors, squares and steps are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Exact, GaussianLoss, Preconditioner, Replicas, dense_fisher
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.config import Structure
from tests.tools.kfac import plain_config, randn, set_gradients

COUNT, WIDTH, HIDDEN = 3, 4, 5


class Squeezed(nn.Module):
    """Replicas, or convolutions, with one output each: (N, S)."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        self.convolutions = convolutions
        if convolutions:
            self.first: nn.Module = nn.Conv1d(COUNT * WIDTH, COUNT * HIDDEN, 1, groups=COUNT)
            self.last: nn.Module = nn.Conv1d(COUNT * HIDDEN, COUNT, 1, groups=COUNT, bias=False)
        else:
            self.first = Replicas(COUNT, WIDTH, HIDDEN)
            self.last = Replicas(COUNT, HIDDEN, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.convolutions:
            inputs = inputs.flatten(1)[..., None]
        output: Tensor = self.last(self.first(inputs).tanh())
        return output[..., 0]


def pair() -> tuple[Squeezed, Squeezed]:
    convolutions, replicas = Squeezed(True).double(), Squeezed(False).double()
    with torch.no_grad():
        for name, parameter in replicas.named_parameters():
            drawn = randn(parameter.numel(), seed=len(name))
            parameter.copy_(drawn.reshape(parameter.shape))
            convolutions.get_parameter(name).copy_(
                drawn.reshape(convolutions.get_parameter(name).shape)
            )
    return convolutions, replicas


@pytest.mark.parametrize("structure", ["kfac", "kfac_factored", "cholesky", "ekfac", "diagonal"])
def test_steps_are_those_of_a_convolution_with_groups(structure: Structure) -> None:
    steps = []
    for model in pair():
        curvature = Preconditioner(model, plain_config(structure=structure))
        for seed in (1, 2):  # the second one finds the basis of corrected eigenvalues
            with curvature.capture() as captured:
                output = model(randn(7, COUNT, WIDTH, seed=seed))
            curvature.observe(captured, output, GaussianLoss(std=0.6), source=Exact())
            curvature.refresh()
        set_gradients(model)
        steps.append(curvature.direction(curvature.gradients()))
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name].flatten(), step.flatten())


@pytest.mark.filterwarnings("ignore::acktr.kfac.blocks.registry.LargeFactorWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_whose_weight_has_no_factors_has_its_fisher(frozen: bool) -> None:
    """Its weight is frozen, or its factors are too large: that of many replicas has no diagonal."""
    model, inputs, loss = pair()[1], randn(7, COUNT, WIDTH), GaussianLoss(std=0.6)
    model.first.weight.requires_grad_(not frozen)
    limit = None if frozen else HIDDEN - 1
    curvature = Preconditioner(model, plain_config(max_factor_size=limit))
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, loss, source=Exact())
    block = curvature.stats["first.bias"]
    assert isinstance(block, VectorBlock)
    truth = dense_fisher(model, (inputs,), loss, ["first.bias"])
    torch.testing.assert_close(block.moment.mean(), truth)


def test_weights_begin_as_those_of_linear_layers() -> None:
    layer = Replicas(100, 9, 20)
    assert layer.weight.abs().max() <= 1 / 3
    assert float(layer.weight.detach().std()) == pytest.approx(1 / 3 / 3**0.5, rel=0.05)
    assert layer.bias is not None and layer.bias.shape == (100, 20)
