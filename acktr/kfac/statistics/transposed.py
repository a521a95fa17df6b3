"""Kronecker factors of transposed convolutions, by the ordinary ones that give the same outputs.

The output of a transposed convolution is that of an ordinary one with stride 1 and the mirrored
kernel over a spread input: stride - 1 zeros between its pixels, dilation (kernel - 1) - padding
zeros around them. Its factors are those of that convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac.statistics import factors
from acktr.kfac.statistics.factors import Conv
from acktr.kfac.tensors import accumulation_type

ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
"""A transposed convolution that K-FAC handles."""


class Axis(NamedTuple):
    """How a transposed convolution works along one axis."""

    kernel: int
    stride: int
    dilation: int
    before: int
    """Zeros before the first pixel of the spread input; negative if pixels are cut off."""

    @classmethod
    def of(cls, module: ConvTranspose) -> list[Axis]:
        """All axes of a module."""
        padding = [int(pixels) for pixels in module.padding]
        sizes = zip(module.kernel_size, module.stride, module.dilation, padding, strict=True)
        return [cls(k, s, d, d * (k - 1) - p) for k, s, d, p in sizes]

    @property
    def phases(self) -> list[tuple[slice, slice]]:
        """The outputs with one remainder modulo the stride, and the taps through which they see.

        Output o sees a pixel through tap j if o + dilation j - before is a multiple of the stride.
        """
        period = self.stride // math.gcd(self.stride, self.dilation)
        result = []
        for rest in range(self.stride):
            at = (rest + self.dilation * tap - self.before for tap in range(period))
            first = next((tap for tap, place in enumerate(at) if place % self.stride == 0), period)
            taps = slice(first, None, period) if first < period else slice(0)
            result.append((slice(rest, None, self.stride), taps))
        return result


def plain_conv(module: ConvTranspose) -> Conv:
    """The ordinary convolution over :func:`spread_input`, without numbers in its parameters."""
    kinds: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    conv: Conv = kinds[len(module.kernel_size)](
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        dilation=module.dilation,
        groups=module.groups,
        device="meta",
    )
    return conv


def spread_input(inputs: Tensor, module: ConvTranspose, outputs: Sequence[int]) -> Tensor:
    """Input of the ordinary convolution that gives outputs of these sizes, (N, C, *spatial).

    The sizes, and not the module, know of an ``output_size`` that was given in the call.
    """
    axes = Axis.of(module)
    wide = [(size - 1) * axis.stride + 1 for size, axis in zip(inputs.shape[2:], axes, strict=True)]
    spread = inputs.new_zeros(*inputs.shape[:2], *wide)
    pixels: Any = (..., *(slice(None, None, axis.stride) for axis in axes))
    spread[pixels] = inputs
    padding: list[int] = []
    for size, output, axis in reversed(list(zip(wide, outputs, axes, strict=True))):
        whole = output + axis.dilation * (axis.kernel - 1)
        padding += [axis.before, whole - size - axis.before]
    return functional.pad(spread, padding)


def spread_input_factor(
    inputs: Sequence[Tensor], module: ConvTranspose, conv: Conv, bias: bool
) -> tuple[Tensor, int]:
    """The "expand" factor of :func:`~acktr.kfac.statistics.factors.conv_input_factor`.

    It is made without products of the spread's zeros: outputs whose numbers are alike modulo the
    stride see pixels through the same taps of the kernel and zeros through all others.

    Args:
        inputs: What :func:`spread_input` gives, one entry per use.
        module: The transposed convolution.
        conv: Its ordinary convolution.
        bias: Whether a 1 is appended.
    """
    channels, width = conv.in_channels // conv.groups, conv.weight[0].numel()
    kind = accumulation_type(inputs[0])
    lead = () if conv.groups == 1 else (conv.groups,)
    total = inputs[0].new_zeros(*lead, width + bias, width + bias, dtype=kind)
    entries = torch.arange(width, device=total.device).view(*conv.kernel_size, channels)
    count = 0
    for used in inputs:
        patches = factors.conv_patches(used, conv)
        count += len(used) * patches.shape[1 : 1 + len(conv.kernel_size)].numel()
        for phase in product(*(axis.phases for axis in Axis.of(module))):
            outputs, taps = tuple(o for o, _ in phase), tuple(t for _, t in phase)
            seen = entries[taps].flatten()
            index = torch.cat([seen, seen.new_full((1,), width)]) if bias else seen
            cut: Any = (slice(None), *outputs, *taps)
            if 0 in patches[cut].shape[1 : 1 + len(outputs)]:  # fewer outputs than the stride
                continue
            for part in factors._split(patches[cut]):
                gram = factors.second_moment(factors._group_rows(part, conv).flatten(-3, -2), bias)
                total[..., index[:, None], index] += gram
    order = factors._channel_order(conv, bias, total.device)
    return total[..., order, :][..., order], count
