"""Kronecker factors against dense Fisher blocks and explicit sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac.statistics import factors as factors_module
from acktr.kfac.statistics.factors import conv_patches
from tests.tools.kfac import (
    EXACT,
    block,
    build,
    dense_fisher,
    factors,
    kfac,
    kronecker,
    observe,
    observe_softmax,
    randn,
    seeded,
    softmax_fisher,
)


def conv_input_factor(inputs: Any, conv: nn.Conv2d, bias: bool, sharing: Any) -> Tensor:
    total, divisor = factors_module.conv_input_factor(inputs, conv, bias, sharing)
    return total / divisor


def linear_input_factor(inputs: Any, bias: bool, sharing: Any) -> Tensor:
    total, divisor = factors_module.linear_input_factor(inputs, bias, sharing)
    return total / divisor


def output_factor(gradients: Any, channel_dim: int, sharing: Any) -> Tensor:
    total = factors_module.output_factor(gradients, channel_dim, sharing)
    return total / len(gradients[0])


CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3},
    {"kernel_size": (2, 3), "bias": False},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1)},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    {"kernel_size": (3, 1), "dilation": (2, 1), "stride": 3},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (2, 3), "padding": "same", "dilation": (3, 1)},
    {"kernel_size": 3, "padding": "valid", "stride": 2},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": (3, 2), "padding": 2, "padding_mode": "circular", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "dilation": 2},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "reflect", "bias": False},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 8, "stride": 4, "padding": 4},
]
BIG = (9, 8)


def convolution(**settings: Any) -> nn.Conv2d:
    layer = nn.Conv2d(3, 2, **settings).double()
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index))
    return layer


def unfolded(inputs: Tensor, conv: nn.Conv2d) -> Tensor:
    """Patches (N, T, C kh kw) in the weight's own order, from torch's im2col."""
    sides: list[int] = []
    for dim in (1, 0):
        if conv.padding == "valid":
            sides += [0, 0]
        elif conv.padding == "same":
            total = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [int(conv.padding[dim])] * 2
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = functional.pad(inputs, sides, mode=mode)
    columns = functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    return columns.mT


# --- exactness of A (x) G -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_one_sample_of_a_linear_layer_is_exact(bias: bool) -> None:
    model = build(nn.Linear(4, 3, bias=bias))
    optimizer = kfac(model)
    inputs, noise = randn(1, 4), randn(1, 3, seed=1)
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.update_curvature(captured, (noise * output).sum())

    a = torch.cat([inputs[0], torch.ones(1).double()]) if bias else inputs[0]
    gradient = torch.outer(noise[0], a).flatten()
    torch.testing.assert_close(kronecker(optimizer, "0"), torch.outer(gradient, gradient), **EXACT)


def test_softmax_policy_of_one_linear_layer_is_the_dense_fisher_for_one_input_only() -> None:
    model = build(nn.Linear(4, 3))
    single, several = randn(1, 4), randn(5, 4, seed=3)
    for inputs, equal in ((single, True), (several, False)):
        optimizer = kfac(model)
        observe_softmax(optimizer, model, inputs)
        exact = dense_fisher(model, block(optimizer, "0"), inputs, softmax_fisher(model(inputs)))
        gap = (kronecker(optimizer, "0") - exact).abs().max() / exact.abs().max()
        assert (gap < 1e-12) if equal else (gap > 1e-2)


# --- batch scaling --------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_duplicating_the_batch_changes_no_factor(sharing: str) -> None:
    model = build(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(60, 4))
    inputs, noise = randn(6, 2, 5, 4), randn(6, 4, seed=1)
    found = []
    for repeats in (1, 2):
        optimizer = kfac(model, conv_sharing=sharing)
        with optimizer.capture() as captured:
            output = model(inputs.repeat(repeats, 1, 1, 1))
        optimizer.update_curvature(captured, (noise.repeat(repeats, 1) * output).sum())
        found.append([*factors(optimizer, "0"), *factors(optimizer, "3")])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(once, twice, **EXACT)
        assert once.abs().max() > 1e-3


# --- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_pointwise_convolution_on_one_position_equals_a_linear_layer(sharing: str) -> None:
    linear, conv = build(nn.Linear(4, 3)), build(nn.Conv2d(4, 3, 1))
    inputs, noise = randn(8, 4), randn(8, 3, seed=1)
    found = []
    for model, shape in ((linear, (8, 4)), (conv, (8, 4, 1, 1))):
        optimizer = kfac(model, conv_sharing=sharing)
        with optimizer.capture() as captured:
            output = model(inputs.reshape(shape))
        optimizer.update_curvature(captured, (noise * output.flatten(1)).sum())
        found.append(factors(optimizer, "0"))
    torch.testing.assert_close(found[0], found[1], **EXACT)


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_patches_reproduce_the_output_of_the_layer(settings: dict[str, Any]) -> None:
    conv = convolution(**settings)
    inputs = randn(2, 3, *BIG, seed=5)
    patches = conv_patches(inputs, conv)
    output = torch.einsum("nhwijc,ocij->nohw", patches, conv.weight)
    if conv.bias is not None:
        output = output + conv.bias[:, None, None]
    torch.testing.assert_close(output, conv(inputs), **EXACT)


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_convolution_factors_equal_the_unfolded_sums(settings: dict[str, Any]) -> None:
    conv = convolution(**settings)
    bias = conv.bias is not None
    inputs = randn(4, 3, *BIG, seed=5)
    gradient = randn(*conv(inputs).shape, seed=6)
    patches = unfolded(inputs, conv)
    if bias:
        patches = torch.cat([patches, torch.ones_like(patches[..., :1])], -1)
    signals = gradient.flatten(2).mT
    num, positions = patches.shape[:2]
    omega = torch.einsum("nti,ntj->ij", patches, patches) / num
    gamma = torch.einsum("nti,ntj->ij", signals, signals) / (num * positions)
    mean, total = patches.mean(1), signals.sum(1)

    a = conv_input_factor([inputs], conv, bias, "expand")
    g = output_factor([gradient], 1, "expand")
    torch.testing.assert_close(a, omega / positions, **EXACT)
    torch.testing.assert_close(torch.kron(g, a), torch.kron(gamma, omega), **EXACT)
    a = conv_input_factor([inputs], conv, bias, "reduce")
    g = output_factor([gradient], 1, "reduce")
    torch.testing.assert_close(a, mean.mT @ mean / num, **EXACT)
    torch.testing.assert_close(g, total.mT @ total / num, **EXACT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("elements", [1, 500, 1000])
def test_chunks_do_not_change_the_factor(
    monkeypatch: pytest.MonkeyPatch, sharing: Any, elements: int
) -> None:
    conv = convolution(kernel_size=3)
    inputs = randn(5, 3, 5, 4)
    whole = conv_input_factor([inputs], conv, True, sharing)
    monkeypatch.setattr(factors_module, "_CHUNK_ELEMENTS", elements)
    torch.testing.assert_close(conv_input_factor([inputs], conv, True, sharing), whole, **EXACT)


# --- explicit sums of the pure functions ----------------------------------------------------------


def test_linear_factors_over_positions() -> None:
    inputs, gradient = randn(4, 5, 3), randn(4, 5, 2, seed=1)
    full = torch.cat([inputs, torch.ones(4, 5, 1).double()], -1)
    a = sum(torch.outer(full[n, t], full[n, t]) for n in range(4) for t in range(5)) / 20
    g = sum(torch.outer(gradient[n, t], gradient[n, t]) for n in range(4) for t in range(5)) / 4
    torch.testing.assert_close(linear_input_factor([inputs], True, "expand"), a, **EXACT)
    torch.testing.assert_close(output_factor([gradient], -1, "expand"), g, **EXACT)

    mean, total = full.mean(1), gradient.sum(1)
    reduced = linear_input_factor([inputs], True, "reduce")
    torch.testing.assert_close(reduced, mean.mT @ mean / 4, **EXACT)
    torch.testing.assert_close(
        output_factor([gradient], -1, "reduce"), total.mT @ total / 4, **EXACT
    )


def test_several_uses_count_as_positions() -> None:
    first, second = randn(4, 3), randn(4, 3, seed=1)
    stacked = torch.stack([first, second], dim=1)
    for bias in (True, False):
        torch.testing.assert_close(
            linear_input_factor([first, second], bias, "expand"),
            linear_input_factor([stacked], bias, "expand"),
            **EXACT,
        )
    torch.testing.assert_close(
        output_factor([first, second], -1, "expand"),
        output_factor([stacked], -1, "expand"),
        **EXACT,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_inputs_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    inputs = randn(4096, 3).to(dtype)
    wide = inputs.double()
    found = linear_input_factor([inputs], True, "expand")
    assert found.dtype == torch.float32
    expected = linear_input_factor([wide], True, "expand")
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_sums_over_positions_do_not_overflow_in_float16() -> None:
    """Each position is far below the largest number 65,504, their sum is not."""
    rows = torch.full((2, 4096, 1), 20.0).half()
    close_to = {"rtol": 1e-3, "atol": 0.0}
    torch.testing.assert_close(
        linear_input_factor([rows], False, "reduce"), torch.tensor([[400.0]]), **close_to
    )
    pixels = torch.full((2, 1, 64, 64), 20.0).half()
    layer = nn.Conv2d(1, 1, 1, bias=False).half()
    found = conv_input_factor([pixels], layer, False, "reduce")
    torch.testing.assert_close(found, torch.tensor([[400.0]]), **close_to)
    found = output_factor([pixels], 1, "reduce")
    torch.testing.assert_close(found, torch.tensor([[(20.0 * 4096) ** 2]]), **close_to)


# --- Monte-Carlo estimates ------------------------------------------------------------------------


def within_standard_errors(found: Tensor, samples: Tensor, exact: Tensor) -> None:
    """|found - exact| <= 4 standard errors, entry by entry; samples (N, ...) of the estimate."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((found - exact).abs() <= 4 * error + 1e-12).all()
    assert (error < 0.1 * exact.abs().max()).all()


def test_sampled_categorical_actions_give_the_softmax_fisher() -> None:
    model = build(nn.Linear(3, 4))
    optimizer = kfac(model)
    inputs = randn(1, 3).expand(40_000, 3)
    with optimizer.capture() as captured:
        logits = model(inputs)
    actions = torch.multinomial(logits.detach().softmax(-1), 1, generator=seeded(2))
    chosen = logits.log_softmax(-1).gather(1, actions)
    optimizer.update_curvature(captured, chosen.sum())

    scores = functional.one_hot(actions[:, 0], 4).double() - logits.detach().softmax(-1)
    _, g = factors(optimizer, "0")
    products = scores[:, :, None] * scores[:, None, :]
    within_standard_errors(g, products, softmax_fisher(logits[0]))


def test_sampled_gaussian_actions_give_the_inverse_variance() -> None:
    model = build(nn.Linear(3, 2))
    optimizer = kfac(model)
    std = torch.tensor([0.5, 2.0]).double()
    with optimizer.capture() as captured:
        mean = model(randn(1, 3).expand(40_000, 3))
    actions = mean.detach() + std * randn(40_000, 2, seed=4)
    optimizer.update_curvature(
        captured, torch.distributions.Normal(mean, std).log_prob(actions).sum()
    )

    scores = (actions - mean.detach()) / std**2
    _, g = factors(optimizer, "0")
    products = scores[:, :, None] * scores[:, None, :]
    within_standard_errors(g, products, torch.diag(std**-2))


def test_sampled_value_targets_give_one() -> None:
    model = build(nn.Linear(3, 1))
    optimizer = kfac(model)
    output = observe(optimizer, model, randn(40_000, 3), seed=9)
    _, g = factors(optimizer, "0")
    noise = torch.randn(output.shape, generator=seeded(9), dtype=torch.float64)
    within_standard_errors(g, noise[:, :, None].square(), torch.ones(1, 1).double())
