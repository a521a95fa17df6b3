"""Second moments from strips of cells against those of explicit patches, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac.statistics import strips
from acktr.kfac.statistics.factors import conv_input_factor, conv_rows
from tests.tools.kfac import randn

LAYERS: list[tuple[type[Any], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv2d, {"kernel_size": 8, "stride": 4}, (36, 36)),
    (nn.Conv2d, {"kernel_size": 4, "stride": 2}, (10, 10)),
    (nn.Conv2d, {"kernel_size": 3}, (7, 5)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "bias": False}, (6, 6)),
    (nn.Conv2d, {"kernel_size": 5, "stride": 2, "padding": 2}, (11, 8)),
    (nn.Conv2d, {"kernel_size": (5, 2), "stride": (3, 1), "dilation": (1, 2)}, (13, 6)),
    (nn.Conv2d, {"kernel_size": (4, 1)}, (7, 3)),
    (nn.Conv1d, {"kernel_size": 7, "stride": 2, "padding": 3}, (20,)),
    (nn.Conv3d, {"kernel_size": (3, 2, 2), "stride": (2, 1, 1)}, (8, 3, 4)),
]


def explicit(inputs: Tensor, conv: Any, bias: bool) -> Tensor:
    rows = conv_rows(inputs, conv, bias).flatten(0, 1)
    return rows.mT @ rows


@pytest.mark.parametrize(("kind", "settings", "size"), LAYERS)
def test_the_factor_equals_that_of_whole_patches(
    kind: type[Any],
    settings: dict[str, Any],
    size: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    moments = strips.patch_moments

    def watched(*args: Any) -> Any:
        calls.append(args)
        return moments(*args)

    monkeypatch.setattr(strips, "patch_moments", watched)
    conv = kind(3, 2, **settings).double()
    bias = conv.bias is not None
    inputs = [randn(4, 3, *size, seed=1), randn(4, 3, *size, seed=2)]
    total, divisor = conv_input_factor(inputs, conv, bias, "expand")
    assert len(calls) == 2
    truth = explicit(inputs[0], conv, bias) + explicit(inputs[1], conv, bias)
    torch.testing.assert_close(total, truth, rtol=1e-12, atol=1e-10)
    assert divisor == 2 * len(conv_rows(inputs[0], conv, bias).flatten(0, 1))


def test_inputs_of_low_precision_are_summed_in_float32() -> None:
    conv = nn.Conv2d(2, 3, 4, 2)
    inputs = randn(8, 2, 12, 12, seed=3).bfloat16()
    total, _ = conv_input_factor([inputs], conv, True, "expand")
    assert total.dtype == torch.float32
    truth = explicit(inputs.double(), conv, True)
    torch.testing.assert_close(total.double(), truth, rtol=1e-5, atol=1e-3)


def test_channels_last_inputs_give_the_same() -> None:
    conv = nn.Conv2d(2, 3, 4, 2).double()
    inputs = randn(3, 2, 12, 12, seed=4)
    last = inputs.to(memory_format=torch.channels_last)
    found = [conv_input_factor([x], conv, True, "expand")[0] for x in (inputs, last)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "outputs", "expected"),
    [
        (8, 4, 1, 20, True),
        (3, 1, 1, 3, True),
        (3, 1, 1, 2, False),
        (3, 3, 1, 9, False),
        (1, 1, 1, 9, False),
        (3, 1, 2, 9, False),
    ],
)
def test_where_it_is_used(
    kernel: int, stride: int, dilation: int, outputs: int, expected: bool
) -> None:
    assert strips.saves(kernel, stride, dilation, outputs) is expected
