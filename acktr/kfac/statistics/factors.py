"""Kronecker factors of linear, convolutional and embedding layers, as pure functions.

For a layer with weight W (out x in) the Fisher block is approximated by A (x) G, where A is built
from layer inputs a (with a 1 appended for the bias) and G from the gradients g of one sample's
log-likelihood with respect to the layer's output (Martens & Grosse 2015, section 3; Grosse &
Martens 2016 for convolutions). N is the number of samples, T the number of positions at which the
weights are used for one sample (1 for a plain linear layer that is used once):

    expand   A = 1/(N T) sum_{n,t} a a^T        G = 1/N sum_{n,t} g g^T
    reduce   A = 1/N sum_n abar abar^T          G = 1/N sum_n gsum gsum^T

with abar the mean of a and gsum the sum of g over positions (Eschenhagen et al. 2023). In the
"expand" form A (x) G is the product Omega (x) Gamma of KFC; only a scalar T moves between the two.
Gradients must belong to the *sum* of the samples' log-likelihoods, so that no 1/N is in them.

A convolution with k groups has k pairs of factors, stacked along a leading dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac.config import Sharing
from acktr.kfac.linalg import LARGE_FACTOR, narrow_products
from acktr.kfac.statistics import strips
from acktr.kfac.tensors import accumulation_type, positions

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""A convolution that K-FAC handles."""

_CHUNK_ELEMENTS = 2**22
_STRIPES = 3
"""A symmetric product in so many stripes takes two thirds of the time."""


def append_one(rows: Tensor) -> Tensor:
    """Rows (..., d) with the homogeneous coordinate 1 appended."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def second_moment(rows: Tensor, bias: bool, diagonal: bool = False) -> Tensor:
    """Sum of r r^T over rows (..., m, d), with a 1 appended to each r if bias; or its diagonal."""
    if diagonal:
        norms = torch.linalg.vector_norm(rows, dim=-2, dtype=accumulation_type(rows))
        one = norms.new_full((*norms.shape[:-1], int(bias)), rows.shape[-2])
        return torch.cat([norms.square(), one], dim=-1)
    wide = rows.to(accumulation_type(rows))
    with narrow_products(rows.dtype, rows.device):
        gram = _gram(wide)
    return _bordered(gram, wide.sum(-2), rows.shape[-2], bias) if bias else gram


def _gram(rows: Tensor) -> Tensor:
    """Sum of r r^T over rows (..., m, d); of a large one each pair of entries is computed once."""
    width = rows.shape[-1]
    if rows.dim() > 2 or width < 2 * LARGE_FACTOR:
        return rows.mT @ rows
    gram, step = rows.new_empty(width, width), -(-width // _STRIPES)
    for start in range(0, width, step):
        end = min(start + step, width)
        torch.mm(rows[:, start:end].mT, rows[:, start:], out=gram[start:end, start:])
        gram[end:, start:end] = gram[start:end, end:].mT
    return gram


def _bordered(gram: Tensor, sums: Tensor, count: int, bias: bool) -> Tensor:
    """Second moments (..., d, d) with those of an appended 1: the rows' sums and their number."""
    if not bias:
        return gram
    corner = sums.new_full((*sums.shape[:-1], 1), count)
    top = torch.cat([gram, sums[..., :, None]], dim=-1)
    return torch.cat([top, torch.cat([sums, corner], dim=-1)[..., None, :]], dim=-2)


def conv_patches(inputs: Tensor, conv: Conv, start: int = 0) -> Tensor:
    """Input patches seen by a convolution, (N, *output, *kernel, C), as a strided view.

    Args:
        inputs: Layer input (N, C, *spatial).
        conv: The layer (any stride, padding, dilation and padding mode; C counts all groups).
        start: First axis that is cut into patches; those before it stay padded pixels.
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padding = list(conv._reversed_padding_repeated_twice)
    patches = functional.pad(inputs, padding, mode=mode) if any(padding) else inputs
    sizes = list(zip(conv.kernel_size, conv.dilation, conv.stride, strict=True))
    for axis, (kernel, dilation, stride) in list(enumerate(sizes))[start:]:
        patches = patches.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return patches.movedim(1, -1)


def _group_rows(patches: Tensor, conv: Conv) -> Tensor:
    """Patches to (N, T, width) rows, or (k, N, T, width) with k groups; order (*kernel, C)."""
    num = len(patches)
    spots = patches.shape[1 : 1 + len(conv.kernel_size)].numel()
    if conv.groups == 1:
        return patches.reshape(num, spots, -1)
    rows = patches.reshape(num, spots, -1, conv.groups, conv.in_channels // conv.groups)
    return rows.permute(3, 0, 1, 2, 4).reshape(conv.groups, num, spots, -1)


def _channel_order(conv: Conv, bias: bool, device: torch.device) -> Tensor:
    """Index that takes (*kernel, C) to the weight's own order (C, *kernel)."""
    channels = conv.in_channels // conv.groups
    order = torch.arange(conv.weight[0].numel(), device=device)
    order = order.view(-1, channels).mT.reshape(-1)
    return torch.cat([order, order.new_full((1,), len(order))]) if bias else order


def conv_rows(inputs: Tensor, conv: Conv, bias: bool) -> Tensor:
    """Patches as rows in the weight's order, ([k,] N, T, width [+ 1])."""
    rows = _group_rows(conv_patches(inputs, conv), conv)
    order = _channel_order(conv, False, inputs.device)
    rows = rows[..., order].to(accumulation_type(rows))
    return append_one(rows) if bias else rows


def conv_input_factor(
    inputs: Sequence[Tensor], conv: Conv, bias: bool, sharing: Sharing, diagonal: bool = False
) -> tuple[Tensor, int]:
    """Factor A of a convolution as (sum, divisor); one entry of inputs per use.

    The sum is (C kh kw [+ 1]) square, or the diagonal of that, with a leading dimension of groups
    if there are several.
    """
    if sharing == "reduce":
        total, divisor = _reduced_factor(inputs, conv, bias, diagonal)
    else:
        pairs = [_expanded_factor(used, conv, bias, diagonal) for used in inputs]
        total = reduce(torch.add, (part for part, _ in pairs))
        divisor = sum(count for _, count in pairs)
    order = _channel_order(conv, bias, total.device)
    return total[..., order] if diagonal else total[..., order, :][..., order], divisor


def _split(patches: Tensor) -> tuple[Tensor, ...]:
    """Parts of the batch of which a copy takes little memory."""
    return torch.split(patches, max(1, _CHUNK_ELEMENTS // max(1, patches[0].numel())))


def _reduced_factor(
    inputs: Sequence[Tensor], conv: Conv, bias: bool, diagonal: bool
) -> tuple[Tensor, int]:
    """Sum over samples of the moments of mean patches, order (*kernel, C), and their number."""
    sums: list[Tensor] = []
    spots = 0
    for used in inputs:
        patches = conv_patches(used, conv)
        spots += patches.shape[1 : 1 + len(conv.kernel_size)].numel()
        kind = accumulation_type(patches)
        parts = [_group_rows(part, conv).sum(-2, dtype=kind) for part in _split(patches)]
        sums.append(torch.cat(parts, dim=-2))
    mean = torch.stack(sums).sum(0) / spots
    return second_moment(mean, bias, diagonal), mean.shape[-2]


def _expanded_factor(used: Tensor, conv: Conv, bias: bool, diagonal: bool) -> tuple[Tensor, int]:
    """Sum over samples and positions of the patches' moments, order (*kernel, C), their number."""
    patches = conv_patches(used, conv)
    outputs = patches.shape[1 : 1 + len(conv.kernel_size)]
    kernel, stride, dilation = (
        value[0] for value in (conv.kernel_size, conv.stride, conv.dilation)
    )
    total: Tensor | None = None
    whole = conv.groups == 1 and not diagonal
    if whole and strips.saves(kernel, stride, dilation, outputs[0]):
        cells, width = -(-kernel // stride), patches[0][(0,) * len(outputs)].numel()
        for part in _split(conv_patches(used, conv, start=1)):
            rows = strips.cut(part, kernel, stride, outputs[0])
            with narrow_products(used.dtype, used.device):
                moments, sums = strips.patch_moments(rows, cells, outputs[0])
            count = len(part) * outputs.numel()
            part_total = _bordered(moments[:width, :width], sums[:width], count, bias)
            total = part_total if total is None else total.add_(part_total)
    else:
        for part in _split(patches):
            gram = second_moment(_group_rows(part, conv).flatten(-3, -2), bias, diagonal)
            total = gram if total is None else total.add_(gram)
    assert total is not None
    return total, len(used) * outputs.numel()


def linear_input_factor(
    inputs: Sequence[Tensor], bias: bool, sharing: Sharing, diagonal: bool = False
) -> tuple[Tensor, int]:
    """Factor A of a linear layer, or its diagonal, as (sum, divisor).

    Inputs are (N, ..., in), one entry per use.
    """
    spread = [positions(used) for used in inputs]
    if sharing == "reduce":
        count = sum(used.shape[1] for used in spread)
        sums = [used.sum(1, dtype=accumulation_type(used)) for used in spread]
        rows = torch.stack(sums).sum(0) / count
    else:
        rows = _joined([used.flatten(0, 1) for used in spread])
    return second_moment(rows, bias, diagonal), len(rows)


def output_factor(
    gradients: Sequence[Tensor],
    channel_dim: int,
    sharing: Sharing,
    groups: int = 1,
    diagonal: bool = False,
) -> Tensor:
    """Factor G before its division by the number of samples, (out) square, or its diagonal.

    Args:
        gradients: Gradients of the summed log-likelihood with respect to the layer's output, one
            entry per use; (N, ..., out) or, for convolutions, (N, out, *spatial).
        channel_dim: Index of the output dimension: -1 for linear layers, 1 for convolutions.
        sharing: "expand" or "reduce".
        groups: Groups k of a convolution; more than one gives (k, out / k, out / k).
        diagonal: Whether only the diagonal is wanted.
    """
    spread = [output_rows(gradient, channel_dim, groups) for gradient in gradients]
    if sharing == "reduce":
        sums = [rows.sum(-2, dtype=accumulation_type(rows)) for rows in spread]
        return second_moment(torch.stack(sums).sum(0), False, diagonal)
    return second_moment(_joined([rows.flatten(-3, -2) for rows in spread]), False, diagonal)


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows ([k,] M, d) of several uses, as in a recurrence, for one product; no copy of one."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows), dim=-2)


def output_rows(gradient: Tensor, channel_dim: int, groups: int = 1) -> Tensor:
    """Output gradients as rows, (N, T, out), or (k, N, T, out / k) with k groups."""
    rows = positions(gradient.movedim(channel_dim, -1))
    if groups == 1:
        return rows
    return rows.reshape(*rows.shape[:2], groups, -1).movedim(2, 0)


def squared_gradients(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Sum over samples of the elementwise square of sum_t g a^T, ([k,] out, in).

    Args:
        inputs: Rows a, ([k,] N, T, in).
        gradients: Rows g, ([k,] N, T, out).
    """
    if inputs.shape[-2] == 1:
        return gradients[..., 0, :].square().mT @ inputs[..., 0, :].square()
    chunk = max(1, _CHUNK_ELEMENTS // (inputs.shape[-1] * gradients.shape[-1]))
    pieces = zip(torch.split(inputs, chunk, -3), torch.split(gradients, chunk, -3), strict=True)
    return reduce(torch.add, ((g.mT @ a).square().sum(-3) for a, g in pieces))


def squared_token_gradients(
    tokens: Tensor, gradients: Tensor, num: int, padding: int | None
) -> Tensor:
    """:func:`squared_gradients` of one-hot inputs, without the one-hot vectors.

    A token that a sample has m times is m rows with the same sum of gradients s, each of which adds
    s^2 / m.

    Args:
        tokens: (N, T).
        gradients: Rows g, (N, T, out).
        num: Number of tokens V.
        padding: The token whose input counts as zero.

    Returns:
        (out, V).
    """
    total = gradients.new_zeros(num, gradients.shape[-1])
    chunk = max(1, _CHUNK_ELEMENTS // (tokens.shape[1] * max(*gradients.shape[1:])))
    for t, g in zip(torch.split(tokens, chunk), torch.split(gradients, chunk), strict=True):
        equal = (t[:, :, None] == t[:, None, :]).to(g.dtype)
        rows = (equal @ g).square() / equal.sum(-1, keepdim=True)
        total.index_add_(0, t.flatten(), rows.flatten(0, 1))
    if padding is not None:
        total[padding] = 0
    return total.mT
