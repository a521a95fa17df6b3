"""The block-tridiagonal structure through the optimizer."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    Sampled,
)
from acktr.kfac.blocks.tridiagonal import chain_matrix
from acktr.kfac.linalg import trace_ratio
from tests.tools.kfac import (
    build,
    chain,
    flat,
    kfac,
    layers,
    mlp,
    observe,
    parameters,
    plain_config,
    randn,
    same,
    set_gradients,
    snapshot,
)

CHAIN: dict[str, Any] = {"structure": "tridiagonal"}


def deep(seed: int = 0) -> nn.Sequential:
    layers = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False), nn.Tanh(), nn.Linear(2, 3))
    return build(*layers, seed=seed)


def moments(model: nn.Sequential, inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and exact output gradients of each linear layer, (N, d) and (C, N, d).

    For unit-variance Gaussian outputs: one gradient per output entry, of the entry itself.
    """
    seen, outputs = [], []
    hidden = inputs
    for layer in model:
        if isinstance(layer, nn.Linear):
            one = torch.ones_like(hidden[:, :1])
            seen.append(
                hidden.detach() if layer.bias is None else torch.cat([hidden, one], 1).detach()
            )
            hidden = layer(hidden)
            outputs.append(hidden)
        else:
            hidden = layer(hidden)
    columns = [torch.autograd.grad(c.sum(), outputs, retain_graph=True) for c in hidden.unbind(1)]
    return seen, [torch.stack([column[i] for column in columns]) for i in range(len(outputs))]


def dense(
    model: nn.Sequential, inputs: Tensor, damping: list[float], weights: float = 1.0
) -> Tensor:
    """F-hat of the damped moments, worked out without the library's statistics."""
    a_rows, g_rows = moments(model, inputs)
    count = len(inputs)
    a_cross = [here.mT @ there / count for here, there in itertools.pairwise(a_rows)]
    g_cross = [
        torch.einsum("cni,cnj->ij", g_rows[i], g_rows[i + 1]) / count * weights
        for i in range(len(g_rows) - 1)
    ]
    own_a, own_g = [], []
    for a, g, amount in zip(a_rows, g_rows, damping, strict=True):
        first = a.mT @ a / count
        second = torch.einsum("cni,cnj->ij", g, g) / count * weights
        pi = trace_ratio(first.diagonal(), second.diagonal())
        own_a.append(first + pi * amount**0.5 * torch.eye(len(first)).double())
        own_g.append(second + amount**0.5 / pi * torch.eye(len(second)).double())
    return chain_matrix(own_a, own_g, a_cross, g_cross)


def watch(optimizer: KFAC, model: nn.Module, inputs: Tensor, std: float = 1.0) -> Tensor:
    with optimizer.capture() as captured:
        output: Tensor = model(inputs)
    optimizer.observe(captured, output, GaussianLoss(std=std), source=Exact())
    return output


@pytest.mark.parametrize("make", [mlp, deep])
@pytest.mark.parametrize("std", [1.0, 0.4])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_direction_is_the_dense_inverse(make: Any, std: float, decay: float) -> None:
    model = make()
    inputs = randn(30, 4)
    optimizer = kfac(model, damping=0.05, weight_decay=decay, **CHAIN)
    watch(optimizer, model, inputs, std)
    gradients = set_gradients(model)
    optimizer.refresh()
    step = optimizer.direction()
    found_layers = layers(optimizer)
    matrix = dense(model, inputs, [0.05 + decay] * len(found_layers), 1 / std**2)
    here = parameters(model)
    full = {n: g + decay * here[n] if n.endswith("weight") else g for n, g in gradients.items()}
    vector = torch.cat([flat(full, layer) for layer in found_layers])
    expected = torch.linalg.solve(matrix, vector)
    found = torch.cat([flat(step, layer) for layer in found_layers])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_step_fits_the_trust_region_of_the_whole_chain() -> None:
    model, inputs = deep(), randn(30, 4)
    optimizer = kfac(model, damping=0.05, kl_clip=1e-5, momentum=0.0, **CHAIN)
    watch(optimizer, model, inputs)
    set_gradients(model)
    matrix = dense(model, inputs, [0.05] * 3)
    before = parameters(model)
    optimizer.step()
    found_layers = layers(optimizer)
    after = parameters(model)
    change = torch.cat([flat({n: before[n] - after[n] for n in before}, x) for x in found_layers])
    assert float(change @ matrix @ change) == pytest.approx(1e-5, rel=1e-7)


def test_it_differs_from_the_block_diagonal_only_by_the_cross_moments() -> None:
    model, inputs = mlp(), randn(30, 4)
    optimizer = kfac(model, damping=0.05, **CHAIN)
    plain = kfac(mlp(), damping=0.05, structure="kfac_factored")
    watch(optimizer, model, inputs)
    watch(plain, plain.curvature.module, inputs)
    set_gradients(model)
    set_gradients(plain.curvature.module)
    optimizer.refresh()
    plain.refresh()
    with_cross = optimizer.direction()
    for average in (*chain(optimizer).a_cross, *chain(optimizer).g_cross):
        average.value = torch.zeros_like(average.value)
    optimizer.refresh()
    for name, step in plain.direction().items():
        torch.testing.assert_close(optimizer.direction()[name], step, rtol=1e-8, atol=1e-10)
        assert not torch.allclose(with_cross[name], step, rtol=1e-2)


def test_the_moments_are_averaged_like_the_factors() -> None:
    model = mlp()
    optimizer = kfac(model, stat_decay=0.7, **CHAIN)
    expected: list[Tensor] = []
    for index in range(3):
        inputs = randn(9, 4, seed=index)
        watch(optimizer, model, inputs)
        a, g = moments(model, inputs)
        new = [a[0].mT @ a[1] / 9, torch.einsum("cni,cnj->ij", g[0], g[1]) / 9]
        weight = 0.3 / (1 - 0.7 ** (index + 1))
        expected = [e + weight * (n - e) for e, n in zip(expected or new, new, strict=True)]
    found = chain(optimizer).a_cross[0].mean(), chain(optimizer).g_cross[0].mean()
    torch.testing.assert_close(found, tuple(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 24.0)])
def test_sums_and_means(reduction: Any, scale: float) -> None:
    model, inputs = mlp(), randn(12, 4)
    optimizer = kfac(model, damping=0.05, **CHAIN)
    with optimizer.capture() as captured:
        output = model(inputs.repeat_interleave(2, 0))
    optimizer.observe(captured, output, GaussianLoss(reduction=reduction), source=Exact())
    gradients = set_gradients(model)
    optimizer.refresh()
    found_layers = layers(optimizer)
    vector = torch.cat([flat(gradients, layer) for layer in found_layers])
    expected = torch.linalg.solve(dense(model, inputs, [0.05] * 2, scale), vector)
    step = optimizer.direction()
    found = torch.cat([flat(step, layer) for layer in found_layers])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_two_samples_are_the_mean_of_two_draws() -> None:
    crosses = []
    for source, draws in ((Sampled(2), 1), (Sampled(1), 2)):
        model, inputs = mlp(), randn(9, 4)
        optimizer = kfac(model, **CHAIN)
        for draw in range(draws):
            with optimizer.capture() as captured:
                output = model(inputs)
            last = draw == draws - 1
            optimizer.observe(captured, output, GaussianLoss(), source=source, last=last)
        crosses.append(chain(optimizer).g_cross[0].mean())
    torch.testing.assert_close(crosses[0], crosses[1], rtol=1e-12, atol=1e-14)


def test_a_good_refresh_ends_the_count_of_failures() -> None:
    model = mlp()
    optimizer = kfac(model, max_failures=2, **CHAIN)
    watch(optimizer, model, randn(9, 4))
    average = layers(optimizer)[0].a
    good = average.value
    for _ in range(3):
        average.value = good * math.nan
        optimizer.refresh()
        average.value = good
        optimizer.refresh()
    assert optimizer.failures == 3


def test_other_parameters_keep_their_own_blocks() -> None:
    model = build(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = kfac(model, damping=0.1, **CHAIN)
    observe(optimizer, model, randn(8, 4))
    gradients = set_gradients(model)
    optimizer.refresh()
    step = optimizer.direction()
    assert set(step) == set(gradients)
    norm = optimizer.curvature.stats["1"]
    matrix = norm.moment.mean() + 0.1 * torch.eye(10).double()  # type: ignore[union-attr]
    vector = torch.cat([gradients["1.weight"], gradients["1.bias"]])
    expected = torch.linalg.solve(matrix, vector)
    found = torch.cat([step["1.weight"], step["1.bias"]])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_one_layer_is_a_chain() -> None:
    model = build(nn.Linear(4, 3))
    optimizer = kfac(model, damping=0.05, **CHAIN)
    inputs = randn(12, 4)
    watch(optimizer, model, inputs)
    gradients = set_gradients(model)
    optimizer.refresh()
    (layer,) = layers(optimizer)
    expected = torch.linalg.solve(dense(model, inputs, [0.05]), flat(gradients, layer))
    torch.testing.assert_close(flat(optimizer.direction(), layer), expected, rtol=1e-8, atol=1e-10)


# --- what does not fit ----------------------------------------------------------------------------


def shared() -> nn.Sequential:
    model = build(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    model[2].bias = model[0].bias
    return model


@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (lambda: build(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)), "not 0$"),
        (lambda: build(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 3)), "not 0$"),
        (shared, "not 0$"),
        (lambda: build(nn.LayerNorm(4)), "not a network without linear layers$"),
    ],
)
def test_networks_that_are_no_chain_are_refused(make: Any, culprit: str) -> None:
    with pytest.raises(ValueError, match="structure=tridiagonal needs a chain.*" + culprit) as e:
        kfac(make(), **CHAIN)
    assert "\n" not in str(e.value)


class Twice(nn.Module):
    """A layer that is used twice under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.outer(self.inner(self.inner(inputs).tanh()))
        return output


@pytest.mark.parametrize(
    ("make", "inputs", "culprit"),
    [
        (lambda: mlp(), randn(3, 2, 4), "'0'"),
        (lambda: Twice().double(), randn(3, 4), "'inner'"),
    ],
)
def test_several_uses_or_positions_are_refused(make: Any, inputs: Tensor, culprit: str) -> None:
    model = make()
    optimizer = kfac(model, **CHAIN)
    with pytest.raises(ValueError, match=f"used once for \\(N, d\\) inputs: {culprit}") as e:
        watch(optimizer, model, inputs)
    assert "\n" not in str(e.value)


def test_a_chain_of_which_only_a_part_is_used_is_refused() -> None:
    model = mlp()
    optimizer = kfac(model, **CHAIN)
    with optimizer.capture() as captured:
        output = model[0](randn(3, 4))
    with pytest.raises(ValueError, match=r"used once for .* inputs: '2' is not"):
        optimizer.update_curvature(captured, output.sum())


# --- training -------------------------------------------------------------------------------------


def train(structure: dict[str, Any], count: int) -> float:
    model = build(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs = randn(60, 4)
    targets = (inputs @ randn(4, 3, seed=5)).argmax(1)
    config = plain_config(
        lr=1.0, kl_clip=0.05, damping=0.01, momentum=0.0, refresh_interval=1, **structure
    )
    optimizer, loss = KFAC(model, config), CategoricalLoss()
    for _ in range(count):
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss, source=Exact())
        optimizer.zero_grad()
        loss(output, targets).backward()
        optimizer.step()
    return float(loss(model(inputs), targets))


def test_it_converges_on_a_toy() -> None:
    start, end = train(CHAIN, 0), train(CHAIN, 40)
    assert end < 0.05 * start


def test_the_state_comes_back_with_the_inverse() -> None:
    model, other = mlp(), mlp(seed=4)
    optimizer, resumed = kfac(model, **CHAIN), kfac(other, **CHAIN)
    watch(optimizer, model, randn(9, 4))
    optimizer.refresh()
    watch(optimizer, model, randn(9, 4, seed=1))  # moments newer than the inverse
    resumed.load_state_dict(snapshot(optimizer))
    assert same(snapshot(resumed), snapshot(optimizer))
    set_gradients(model)
    set_gradients(other)
    assert same(resumed.direction(), optimizer.direction())


@pytest.mark.parametrize("entry", ["moments", "inverse"])
def test_a_damaged_state_of_the_chain_is_refused_as_a_whole(entry: str) -> None:
    model = mlp()
    optimizer = kfac(model, **CHAIN)
    watch(optimizer, model, randn(9, 4))
    optimizer.refresh()
    state = snapshot(optimizer)
    del state["curvature"]["layers"]["chain"][entry][-1]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"chain: {entry} must be a list"):
        optimizer.load_state_dict(state)
    assert same(snapshot(optimizer), before)
