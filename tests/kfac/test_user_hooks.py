"""A user's hooks are part of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kfac.test_guard import observed
from tests.tools.kfac import (
    block,
    build,
    dense_fisher,
    kronecker,
    randn,
    softmax_fisher,
)


def hooked_mlp() -> tuple[nn.Sequential, Tensor]:
    model = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3))
    model[0].register_forward_hook(lambda _m, _i, output: 2 * output)
    model[2].register_forward_hook(lambda _m, _i, output: output.mul_(3))
    model[4].register_forward_pre_hook(lambda _m, given: (given[0] - 0.5,))
    return model, randn(1, 4, seed=3)


def hooked_conv() -> tuple[nn.Sequential, Tensor]:
    model = build(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4, 3), seed=1)
    model[0].register_forward_pre_hook(lambda _m, given: (given[0].roll(1, -1),))
    model[0].register_forward_hook(lambda _m, _i, output: output.sin())
    return model, randn(1, 2, 3, 3, seed=4)


@pytest.mark.parametrize("case", [hooked_mlp, hooked_conv])
def test_hooks_that_change_inputs_and_outputs_are_part_of_the_model(case: Any) -> None:
    """For one sample without positions A (x) G is the exact block."""
    model, inputs = case()
    optimizer = observed(model, inputs)
    fisher = softmax_fisher(model(inputs))
    for found in optimizer.curvature.stats.values():
        right = dense_fisher(model, block(optimizer, found.name), inputs, fisher)
        torch.testing.assert_close(kronecker(optimizer, found.name), right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [hooked_mlp, hooked_conv])
def test_hooks_on_the_whole_model_run_once_in_the_exact_quadratic_form(case: Any) -> None:
    model, inputs = case()
    model.register_forward_pre_hook(lambda _m, given: (given[0] * 2,))
    optimizer = observed(model, inputs, quadratic="exact")
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    vector = torch.cat([torch.ones(p.numel()).double() for p in model.parameters()])
    rows = [torch.autograd.grad(z, list(model.parameters())) for z in _entries(model, inputs)]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    moved = jacobian @ vector
    right = moved @ softmax_fisher(model(inputs))[0] @ moved
    torch.testing.assert_close(optimizer.curvature.region.quadratic(direction), right)


def _entries(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    return [model(inputs)[0, place] for place in range(3)]
