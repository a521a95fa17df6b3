"""Kronecker factors of linear and convolutional layers, as pure functions.

For a layer with weight W (out x in) the Fisher block is approximated by A (x) G, where A is built
from layer inputs a (with a 1 appended for the bias) and G from the gradients g of one sample's
log-likelihood with respect to the layer's output (Martens & Grosse 2015, section 3; Grosse &
Martens 2016 for convolutions). N is the number of samples, T the number of positions at which the
weights are used for one sample (1 for a plain linear layer):

    expand   A = 1/(N T) sum_{n,t} a a^T        G = 1/N sum_{n,t} g g^T
    reduce   A = 1/N sum_n abar abar^T          G = 1/N sum_n gsum gsum^T

with abar the mean of a and gsum the sum of g over positions (Eschenhagen et al. 2023). In the
"expand" form A (x) G is the product Omega (x) Gamma of KFC; only a scalar T moves between the two.
Gradients must belong to the *sum* of the samples' log-likelihoods, so that no 1/N is in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac.config import Sharing

_CHUNK_ELEMENTS = 2**24


def _gram(rows: Tensor, bias: bool) -> Tensor:
    """Sum of r r^T over rows (m, d), with a 1 appended to each r if bias."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    gram = rows.mT @ rows
    if not bias:
        return gram
    edge = rows.sum(0)
    count = edge.new_full((1,), rows.shape[0])
    return torch.cat(
        [torch.cat([gram, edge[:, None]], dim=1), torch.cat([edge, count])[None]], dim=0
    )


def _positions(inputs: Tensor) -> Tensor:
    """Reshape (N, ..., d) to (N, T, d)."""
    return inputs.reshape(inputs.shape[0], -1, inputs.shape[-1])


def conv_patches(inputs: Tensor, conv: nn.Conv2d) -> Tensor:
    """Input patches seen by a convolution, (N, Oh, Ow, kh, kw, C), as a strided view.

    Args:
        inputs: Layer input (N, C, H, W).
        conv: The layer (one group; any stride, padding, dilation and padding mode).
    """
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padding = list(conv._reversed_padding_repeated_twice)
    padded = functional.pad(inputs, padding, mode=mode) if any(padding) else inputs
    kh, kw = conv.kernel_size
    dh, dw = conv.dilation
    windows = padded.unfold(2, dh * (kh - 1) + 1, conv.stride[0])
    windows = windows.unfold(3, dw * (kw - 1) + 1, conv.stride[1])
    return windows[..., ::dh, ::dw].permute(0, 2, 3, 4, 5, 1)


def _channel_major(matrix: Tensor, conv: nn.Conv2d, bias: bool) -> Tensor:
    """Reorder a factor from (kh, kw, C) to the weight's own order (C, kh, kw)."""
    kh, kw = conv.kernel_size
    order = torch.arange(kh * kw * conv.in_channels, device=matrix.device)
    order = order.view(kh, kw, conv.in_channels).permute(2, 0, 1).reshape(-1)
    if bias:
        order = torch.cat([order, order.new_full((1,), len(order))])
    return matrix[order][:, order]


def conv_input_factor(
    inputs: Sequence[Tensor], conv: nn.Conv2d, bias: bool, sharing: Sharing
) -> Tensor:
    """Factor A of a convolution, (C kh kw [+ 1]) square; one entry of inputs per use."""
    total: Tensor | None = None
    rows = 0
    for used in inputs:
        patches = conv_patches(used, conv)
        num, oh, ow = patches.shape[:3]
        width = conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1]
        chunk = max(1, _CHUNK_ELEMENTS // (oh * ow * width))
        for part in torch.split(patches, chunk):
            flat = part.reshape(len(part), oh * ow, width)
            flat = flat.reshape(-1, width) if sharing == "expand" else flat.mean(1)
            gram = _gram(flat, bias)
            total = gram if total is None else total.add_(gram)
        rows += num * (oh * ow if sharing == "expand" else 1)
    if total is None:
        raise ValueError("a factor needs at least one input")
    return _channel_major(total / rows, conv, bias)


def linear_input_factor(inputs: Sequence[Tensor], bias: bool, sharing: Sharing) -> Tensor:
    """Factor A of a linear layer, (in [+ 1]) square; inputs (N, ..., in), one entry per use."""
    total: Tensor | None = None
    rows = 0
    for used in inputs:
        spread = _positions(used)
        flat = spread.reshape(-1, spread.shape[-1]) if sharing == "expand" else spread.mean(1)
        gram = _gram(flat, bias)
        total = gram if total is None else total + gram
        rows += len(flat)
    if total is None:
        raise ValueError("a factor needs at least one input")
    return total / rows


def output_factor(gradients: Sequence[Tensor], channel_dim: int, sharing: Sharing) -> Tensor:
    """Factor G, (out) square.

    Args:
        gradients: Gradients of the summed log-likelihood with respect to the layer's output, one
            entry per use; (N, ..., out) or, for convolutions, (N, out, Oh, Ow).
        channel_dim: Index of the output dimension: -1 for linear layers, 1 for convolutions.
        sharing: "expand" or "reduce".
    """
    total: Tensor | None = None
    for gradient in gradients:
        spread = _positions(gradient.movedim(channel_dim, -1))
        flat = spread.reshape(-1, spread.shape[-1]) if sharing == "expand" else spread.sum(1)
        gram = _gram(flat, bias=False)
        total = gram if total is None else total + gram
    if total is None:
        raise ValueError("a factor needs at least one gradient")
    return total / gradients[0].shape[0]
