"""Transposed convolutions, against ordinary ones over inputs with zeros in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, GaussianLoss, Preconditioner
from acktr.kfac.config import Sharing, Structure
from acktr.kfac.statistics import factors
from tests.tools.exact import Apply, close, gap, observed, pairs, stored, within_groups
from tests.tools.kfac import build, plain_config, randn
from tests.tools.product_cases import filled

LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
every_sharing = pytest.mark.parametrize("sharing", ["expand", "reduce"])

# dimensions, groups, settings, input size; 4 input and 6 output channels throughout
CASES: list[tuple[int, int, dict[str, Any], tuple[int, ...]]] = [
    (1, 1, {"kernel_size": 3}, (5,)),
    (1, 2, {"kernel_size": 4, "stride": 3, "padding": 1, "output_padding": 2}, (4,)),
    (1, 1, {"kernel_size": 2, "stride": 3, "bias": False}, (1,)),  # fewer outputs than the stride
    (1, 1, {"kernel_size": 3, "stride": 2, "padding": 4}, (6,)),  # pixels are cut off
    (2, 1, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}, (3, 2)),
    (2, 2, {"kernel_size": (2, 3), "stride": (1, 3), "dilation": (2, 1), "bias": False}, (3, 2)),
    (2, 1, {"kernel_size": 3, "stride": (4, 2), "dilation": 2, "padding": (0, 1)}, (2, 3)),
    (2, 2, {"kernel_size": 4, "stride": 2, "padding": 1}, (3, 3)),
    (3, 1, {"kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1)}, (2, 3, 2)),
    (3, 2, {"kernel_size": 2, "stride": 2, "output_padding": (1, 0, 1)}, (2, 1, 2)),
]
every_layer = pytest.mark.parametrize(("dims", "groups", "settings", "size"), CASES)


class Ordinary(nn.Module):
    """A transposed convolution with one group, as zeros, padding and an ordinary convolution."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        dims = len(layer.kernel_size)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        shape = layer.in_channels, layer.out_channels, layer.kernel_size
        bias = layer.bias is not None
        self.conv = kind(*shape, dilation=layer.dilation, bias=bias).double()  # type: ignore[arg-type]
        self.layer = [layer]
        with torch.no_grad():
            mirrored = layer.weight.transpose(0, 1).flip(list(range(2, 2 + dims)))
            self.conv.weight.copy_(mirrored)
            if bias:
                self.conv.bias.copy_(layer.bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        for axis in range(x.dim() - 2):
            stride, padding = layer.stride[axis], layer.padding[axis]
            reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) - padding
            rows = [x.select(2 + axis, i) for i in range(x.shape[2 + axis])]
            zeros = [torch.zeros_like(rows[0])] * (stride - 1)
            spread = [part for row in rows for part in (row, *zeros)]
            spread = spread[: len(spread) - len(zeros)]
            if reach < 0:
                spread = spread[-reach:]
            after = reach + layer.output_padding[axis]
            spread = [torch.zeros_like(rows[0])] * max(reach, 0) + spread
            spread += [torch.zeros_like(rows[0])] * max(after, 0)
            spread = spread[: len(spread) + min(after, 0)]
            x = torch.stack(spread, 2 + axis)
        output: Tensor = self.conv(x)
        return output


class Separate(nn.Module):
    """A grouped transposed convolution as ordinary ones of a split input."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleList()
        for k in range(whole.groups):
            part = type(whole)(
                whole.in_channels // whole.groups,
                whole.out_channels // whole.groups,
                whole.kernel_size,
                whole.stride,
                whole.padding,
                whole.output_padding,
                bias=whole.bias is not None,
                dilation=whole.dilation,
            ).double()
            with torch.no_grad():
                part.weight.copy_(whole.weight.chunk(whole.groups)[k])
                if part.bias is not None:
                    part.bias.copy_(whole.bias.chunk(whole.groups)[k])
            self.parts.append(Ordinary(part))

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.chunk(len(self.parts), 1)
        return torch.cat([p(c) for p, c in zip(self.parts, chunks, strict=True)], 1)


def both(
    dims: int, groups: int, settings: dict[str, Any], size: tuple[int, ...]
) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """A net with the layer, the same net of ordinary convolutions, and inputs."""
    layer = LAYERS[dims](4, 6, groups=groups, **settings).double()
    inputs = randn(3, 4, *size, seed=5)
    width = layer(inputs)[0].numel()
    whole = build(layer, nn.Tanh(), nn.Flatten(1), nn.Linear(width, 3))
    split = nn.Sequential(Separate(whole[0]), *list(whole)[1:])
    torch.testing.assert_close(split(inputs), whole(inputs), rtol=1e-12, atol=1e-12)
    return whole, split, inputs


@every_sharing
@every_layer
def test_factors_are_those_of_ordinary_convolutions(
    dims: int, groups: int, settings: dict[str, Any], size: tuple[int, ...], sharing: Sharing
) -> None:
    whole, split, inputs = both(dims, groups, settings, size)
    one = observed(whole, inputs, CategoricalLoss(), conv_sharing=sharing)
    many = observed(split, inputs, CategoricalLoss(), conv_sharing=sharing)
    found = pairs(one.layer("0"))
    assert len(found) == groups
    for group, (a, g) in enumerate(found):
        ((wanted_a, wanted_g),) = pairs(many.layer(f"0.parts.{group}.conv"))
        close(a, wanted_a, rtol=1e-12)
        close(g, wanted_g, rtol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "cholesky"])
@pytest.mark.parametrize("case", [4, 7, 8])
def test_steps_are_those_of_ordinary_convolutions(case: int, structure: Structure) -> None:
    """Where A has no equal eigenvalues, as it has when every output sees one tap alone."""
    whole, split, inputs = both(*CASES[case])
    steps: list[dict[str, Tensor]] = []
    for model in (whole, split):
        seen = observed(model, inputs, CategoricalLoss(), structure=structure)
        seen.curvature.refresh()
        seen.again()
        model.zero_grad()
        model(inputs).square().sum().backward()
        steps.append(seen.curvature.direction(seen.curvature.gradients()))
    parts = range(CASES[case][1])
    weight = torch.cat([steps[1][f"0.parts.{k}.conv.weight"].transpose(0, 1) for k in parts])
    close(steps[0]["0.weight"], weight.flip(list(range(2, weight.dim()))))
    close(steps[0]["0.bias"], torch.cat([steps[1][f"0.parts.{k}.conv.bias"] for k in parts]))


# --- against the exact block ----------------------------------------------------------------------


@every_sharing
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_output_and_one_datum_are_exact_in_every_group(
    dims: int, groups: int, sharing: Sharing
) -> None:
    """Padding cuts all but one output off, which sees every pixel."""
    layer = LAYERS[dims](4, 6, 3, padding=2, groups=groups)
    model = build(layer, nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    seen = observed(model, randn(1, 4, *[3] * dims), CategoricalLoss(), conv_sharing=sharing)
    truth = seen.truth("0")
    close(stored(seen.block("0")), within_groups(truth, groups))
    if groups > 1:
        assert gap(within_groups(truth, groups), truth) > 0.05


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_many_data_are_exact_in_a_linear_net(groups: int, bias: bool) -> None:
    """Reduce before a spatial sum, and expand where every position is a term of its own."""
    settings: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1, "bias": bias}
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups, **settings)
    pooled = build(layer, Apply(lambda y: y.sum((2, 3))), nn.Linear(6, 3), seed=1)
    terms = build(layer, Apply(lambda y: y.flatten(2).mT), nn.Linear(6, 3))
    inputs = randn(5, 4, 2, 3)
    for model, sharing in ((pooled, "reduce"), (terms, "expand")):
        seen = observed(model, inputs, GaussianLoss(std=0.6), conv_sharing=sharing)
        close(stored(seen.block("0")), within_groups(seen.truth("0"), groups))


class Sized(nn.Module):
    """The output's size is given in the call."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(2, 3, 3, stride=3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.up(x, output_size=[11])
        return output.flatten(2).mT


def test_an_output_size_of_the_call_is_respected() -> None:
    seen = observed(filled(Sized()), randn(5, 2, 3), GaussianLoss(std=0.6))
    close(stored(seen.block("up")), seen.truth("up"))


def test_a_lone_bias_of_a_transposed_convolution_is_exact() -> None:
    model = build(nn.ConvTranspose2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    model[0].weight.requires_grad_(False)
    seen = observed(model, randn(4, 2, 2, 2), CategoricalLoss())
    close(stored(seen.vector("0.bias")), seen.truth("0.bias"))


def test_large_batches_come_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _, inputs = both(*CASES[4])
    wanted = observed(whole, inputs, CategoricalLoss()).layer("0").a.mean()
    monkeypatch.setattr(factors, "_CHUNK_ELEMENTS", 1)
    close(observed(whole, inputs, CategoricalLoss()).layer("0").a.mean(), wanted, rtol=1e-12)


def test_a_layer_without_the_batch_is_refused() -> None:
    curvature = Preconditioner(build(nn.ConvTranspose1d(2, 3, 2)), plain_config())
    with curvature.capture() as captured:
        output = curvature.module(randn(2, 4))
    with pytest.raises(ValueError, match=r"must be called with a batch"):
        curvature.observe(captured, output, GaussianLoss())
