"""Convolutions: groups, dilation, stride, padding, one to three dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    CategoricalLoss,
    GaussianLoss,
    Preconditioner,
)
from acktr.kfac.config import Sharing
from tests.tools.exact import Apply, Seen, close, gap, observed, pairs, stored, within_groups
from tests.tools.kfac import build, plain_config, randn

every_sharing = pytest.mark.parametrize("sharing", ["expand", "reduce"])
DIMENSIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# dimensions, groups, settings, input size; 4 input channels throughout
LAYERS: list[tuple[int, int, dict[str, Any], tuple[int, ...]]] = [
    (1, 1, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}, (9,)),
    (1, 2, {"kernel_size": 4, "padding": "same", "padding_mode": "circular"}, (6,)),
    (1, 4, {"kernel_size": 2, "padding": 1, "padding_mode": "replicate", "bias": False}, (5,)),
    (2, 2, {"kernel_size": 3}, (5, 4)),
    (2, 2, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 2), "bias": False}, (6, 5)),
    (2, 4, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (5, 4)),
    (2, 4, {"kernel_size": (3, 2), "dilation": (2, 1), "padding": "same"}, (6, 5)),
    (2, 2, {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect"}, (6, 7)),
    (2, 1, {"kernel_size": 3, "padding": "valid", "stride": 2}, (7, 6)),
    (3, 1, {"kernel_size": (2, 1, 3), "padding": (1, 0, 1), "stride": (1, 2, 2)}, (3, 4, 5)),
    (3, 2, {"kernel_size": 2, "dilation": (1, 2, 1)}, (3, 4, 3)),
    (3, 4, {"kernel_size": (1, 2, 2), "padding": 1, "padding_mode": "circular"}, (2, 3, 3)),
]
every_layer = pytest.mark.parametrize(("dims", "groups", "settings", "size"), LAYERS)


def conv(dims: int, groups: int, **settings: Any) -> nn.Module:
    return DIMENSIONS[dims](4, 8, groups=groups, **settings)


def patches(layer: Any, inputs: Tensor) -> Tensor:
    """Patches (N, T, C *kernel) by torch's own convolution with a one-hot kernel per entry."""
    channels = inputs.shape[1]
    width = channels * layer.weight[0, 0].numel()
    probe = type(layer)(
        channels,
        width,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        padding_mode=layer.padding_mode,
        bias=False,
    ).double()
    with torch.no_grad():
        probe.weight.copy_(torch.eye(width).reshape(probe.weight.shape))
        found: Tensor = probe(inputs)
    return found.flatten(2).mT


def explicit(
    layer: Any, inputs: Tensor, gradient: Tensor, group: int, sharing: Sharing
) -> tuple[Tensor, Tensor]:
    """A and G of one group from loops over samples and positions."""
    per_in, per_out = inputs.shape[1] // layer.groups, gradient.shape[1] // layer.groups
    a_rows = patches(layer, inputs[:, group * per_in : (group + 1) * per_in])
    if layer.bias is not None:
        a_rows = torch.cat([a_rows, torch.ones_like(a_rows[..., :1])], -1)
    g_rows = gradient[:, group * per_out : (group + 1) * per_out].flatten(2).mT
    num, spots = a_rows.shape[:2]
    a = torch.zeros(a_rows.shape[-1], a_rows.shape[-1], dtype=torch.float64)
    g = torch.zeros(per_out, per_out, dtype=torch.float64)
    for n in range(num):
        if sharing == "reduce":
            mean, total = a_rows[n].mean(0), g_rows[n].sum(0)
            a += torch.outer(mean, mean) / num
            g += torch.outer(total, total) / num
            continue
        for t in range(spots):
            a += torch.outer(a_rows[n, t], a_rows[n, t]) / (num * spots)
            g += torch.outer(g_rows[n, t], g_rows[n, t]) / num
    return a, g


def linear_readout(model: nn.Module, inputs: Tensor, noise: Tensor, **settings: Any) -> Seen:
    """Statistics with the given gradient of the model's output."""
    seen = Seen(model, inputs, GaussianLoss(), Preconditioner(model, plain_config(**settings)))
    with seen.curvature.capture() as captured:
        output = model(inputs)
    seen.curvature.update_curvature(captured, (noise * output).sum())
    return seen


@every_sharing
@every_layer
def test_factors_equal_explicit_sums_over_patches(
    dims: int, groups: int, settings: dict[str, Any], size: tuple[int, ...], sharing: Sharing
) -> None:
    model = build(conv(dims, groups, **settings))
    inputs = randn(3, 4, *size, seed=5)
    noise = randn(*model(inputs).shape, seed=6)
    seen = linear_readout(model, inputs, noise, conv_sharing=sharing)
    found = pairs(seen.layer("0"))
    assert len(found) == groups
    for group, (a, g) in enumerate(found):
        wanted_a, wanted_g = explicit(model[0], inputs, noise, group, sharing)
        close(a, wanted_a)
        close(g, wanted_g)


class Separate(nn.Module):
    """A grouped convolution as k convolutions of a split input."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        per_in, per_out = whole.in_channels // whole.groups, whole.out_channels // whole.groups
        for k in range(whole.groups):
            part = type(whole)(
                per_in,
                per_out,
                whole.kernel_size,
                stride=whole.stride,
                padding=whole.padding,
                dilation=whole.dilation,
                bias=whole.bias is not None,
                padding_mode=whole.padding_mode,
            ).double()
            with torch.no_grad():
                part.weight.copy_(whole.weight[k * per_out : (k + 1) * per_out])
                if part.bias is not None:
                    part.bias.copy_(whole.bias[k * per_out : (k + 1) * per_out])
            self.parts.append(part)

    def forward(self, inputs: Tensor) -> Tensor:
        chunks = inputs.chunk(len(self.parts), 1)
        return torch.cat([p(x) for p, x in zip(self.parts, chunks, strict=True)], 1)


@every_sharing
@every_layer
def test_groups_have_the_factors_of_separate_convolutions(
    dims: int, groups: int, settings: dict[str, Any], size: tuple[int, ...], sharing: Sharing
) -> None:
    head = (nn.Tanh(), nn.Flatten(1), nn.LazyLinear(3))
    whole = nn.Sequential(conv(dims, groups, **settings), *head)
    inputs = randn(3, 4, *size, seed=5)
    whole(inputs.float())
    whole = build(*whole)
    split = nn.Sequential(Separate(whole[0]), *list(whole)[1:])
    torch.testing.assert_close(split(inputs), whole(inputs), rtol=1e-12, atol=1e-12)
    one = observed(whole, inputs, CategoricalLoss(), conv_sharing=sharing)
    many = observed(split, inputs, CategoricalLoss(), conv_sharing=sharing)
    found = pairs(one.layer("0"))
    assert len(found) == groups
    for group, (a, g) in enumerate(found):
        ((wanted_a, wanted_g),) = pairs(many.layer(f"0.parts.{group}"))
        close(a, wanted_a)
        close(g, wanted_g)


@every_sharing
def test_a_grouped_step_is_that_of_separate_convolutions(sharing: Sharing) -> None:
    whole = build(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    split = nn.Sequential(Separate(whole[0]), *list(whole)[1:])
    inputs = randn(3, 4, 3, 3, seed=5)
    steps = []
    for model in (whole, split):
        seen = observed(model, inputs, CategoricalLoss(), conv_sharing=sharing)
        seen.curvature.refresh()
        model.zero_grad()
        model(inputs).square().sum().backward()
        steps.append(seen.curvature.direction(seen.curvature.gradients()))
    for key in ("weight", "bias"):
        wanted = torch.cat([steps[1][f"0.parts.{k}.{key}"] for k in range(2)])
        close(steps[0][f"0.{key}"], wanted)


# --- against the exact block ----------------------------------------------------------------------


@every_sharing
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_one_position_and_one_datum_are_exact_in_every_group(
    groups: int, dims: int, bias: bool, sharing: Sharing
) -> None:
    kernel = (3, 2, 2)[:dims]
    model = build(
        conv(dims, groups, kernel_size=kernel, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )
    seen = observed(model, randn(1, 4, *kernel), CategoricalLoss(), conv_sharing=sharing)
    truth = seen.truth("0")
    close(stored(seen.block("0")), within_groups(truth, groups))
    if groups > 1:  # what no pair of factors holds
        assert gap(within_groups(truth, groups), truth) > 0.05


@pytest.mark.parametrize("groups", [2, 4])
def test_many_data_are_exact_in_every_group_of_a_linear_net(groups: int) -> None:
    """Reduce before a spatial sum, and expand where every position is a term of its own."""
    settings: dict[str, Any] = {"kernel_size": (2, 3), "padding": 1, "dilation": (2, 1)}
    inputs = randn(5, 4, 5, 4)
    pooled = build(
        conv(2, groups, **settings), Apply(lambda y: y.sum((2, 3))), nn.Linear(8, 3), seed=1
    )
    terms = build(conv(2, groups, **settings), Apply(lambda y: y.flatten(2).mT), nn.Linear(8, 3))
    for model, sharing in ((pooled, "reduce"), (terms, "expand")):
        seen = observed(model, inputs, GaussianLoss(std=0.6), conv_sharing=sharing)
        close(stored(seen.block("0")), within_groups(seen.truth("0"), groups))
