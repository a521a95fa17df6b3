"""Without damping the K-FAC step does not depend on how layers' inputs and outputs are expressed.

Martens & Grosse 2015, theorem 1: a network with s_i = W_i abar_{i-1}, a_i = phi(s_i) is computed
with other coordinates as well, abar_i' = Omega_i abar_i for the inputs of layers and
s_i = Phi_i s_i' + d_i for their outputs, by W_i' = Phi_i^-1 (W_i - [0 d_i]) Omega_{i-1}^-1. A step
W_i + U_i is then transported to the step Phi_i^-1 U_i Omega_{i-1}^-1, and K-FAC, block-diagonal or
block-tridiagonal, takes that step by itself. Gradient descent does not.

Omega_i abar = (M_i a + c_i, 1) keeps the homogeneous coordinate. Factors are exact and of full
rank; the damping, which has to be positive, is 1e-60.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    BernoulliLoss,
    Exact,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
)
from tests.tools.coordinates import Coordinates, assign, expressed, joined, layers, tensors, widths
from tests.tools.kfac import build, plain_config, randn

RTOL = 1e-6
BARE = {"damping": 1e-60, "stat_decay": 0.5, "refresh_interval": 1, "lr": 0.5, "momentum": 0.5}
FACTORED = {**BARE, "structure": "kfac_factored"}
DIAGONAL: dict[str, dict[str, Any]] = {
    "eigen": BARE,
    "factored": FACTORED,
    "cholesky": {**BARE, "structure": "cholesky"},
}
SETTINGS = {**DIAGONAL, "tridiagonal": {**FACTORED, "structure": "tridiagonal"}}
LOSSES: dict[str, tuple[OutputLoss[Any], int]] = {
    "gaussian": (GaussianLoss(std=0.7), 3),
    "bernoulli": (BernoulliLoss(), 3),
    "learnt gaussian": (LearntGaussianLoss(), 4),
}


@dataclass
class Learner:
    """A network, its optimizer and what they learn from."""

    model: nn.Sequential
    inputs: Tensor
    target: Tensor
    loss: OutputLoss[Any]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.optimizer = KFAC(self.model, plain_config(**self.settings))

    def step(self) -> None:
        with self.optimizer.capture() as captured:
            output = self.model(self.inputs)
        self.optimizer.observe(captured, output, self.loss, source=Exact())
        self.optimizer.zero_grad()
        self.loss(output, self.target).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [joined(layer) for layer in layers(self.model)]

    def gradients(self) -> list[Tensor]:
        """Gradients as (out, in + 1) matrices, which are the steps of SGD."""
        found = []
        self.model.zero_grad()
        self.loss(self.model(self.inputs), self.target).backward()  # type: ignore[no-untyped-call]
        for layer in layers(self.model):
            weight, bias = (tensor.grad for tensor in tensors(layer))
            assert weight is not None and bias is not None
            found.append(torch.cat([weight.flatten(1), bias[:, None]], 1))
        return found

    @torch.no_grad()
    def output(self) -> Tensor:
        found: Tensor = self.model(self.inputs)
        return found


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """||found - expected|| / ||expected|| over all layers."""
    wrong = torch.cat([(f - e).flatten() for f, e in zip(found, expected, strict=True)])
    return float(wrong.norm() / torch.cat([e.flatten() for e in expected]).norm())


def direction_distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The same for the directions alone: the best multiple of ``expected`` is compared with."""
    dot = sum(float((f * e).sum()) for f, e in zip(found, expected, strict=True))
    size = sum(float(e.square().sum()) for e in expected)
    return distance([dot / size * e for e in expected], found)


def transported(coordinates: list[Coordinates], steps: list[Tensor]) -> list[Tensor]:
    return [mine.step(step) for mine, step in zip(coordinates, steps, strict=True)]


def largest_error(
    first: Learner, second: Learner, coordinates: list[Coordinates], steps: int = 3
) -> float:
    """Largest relative difference, over some steps, of steps and of outputs."""
    worst = distance([second.output()], [first.output()])
    assert worst < 1e-12, "the networks are not the same function"
    for _ in range(steps):
        before = first.weights(), second.weights()
        output = first.output()
        for learner in (first, second):
            learner.step()
        moved = [
            [new - old for new, old in zip(learner.weights(), past, strict=True)]
            for learner, past in zip((first, second), before, strict=True)
        ]
        change = [first.output() - output]
        assert float(change[0].norm() / output.norm()) > 1e-3, "there was hardly a step"
        worst = max(worst, distance([second.output() - output], change))
        worst = max(worst, distance(moved[1], transported(coordinates, moved[0])))
    return worst


def check(first: Learner, second: Learner, coordinates: list[Coordinates]) -> None:
    """K-FAC steps agree; those of SGD do not, at any learning rate."""
    sgd = second.gradients(), transported(coordinates, first.gradients())
    assert direction_distance(*sgd) > 0.3
    assert largest_error(first, second, coordinates) < RTOL


def pair(
    model: nn.Sequential,
    coordinates: list[Coordinates],
    inputs: Tensor,
    loss: OutputLoss[Any],
    settings: dict[str, Any],
) -> tuple[Learner, Learner]:
    """A learner, and one of the same function in other coordinates."""
    other = expressed(model, coordinates)
    shape = list(model(inputs).shape)
    if isinstance(loss, LearntGaussianLoss):
        shape[-1] //= 2
    target = randn(*shape, seed=77)
    if isinstance(loss, BernoulliLoss):
        target = target.sigmoid()
    return (
        Learner(model, inputs, target, loss, settings),
        Learner(other, inputs, target, loss, settings),
    )


def drawn(model: nn.Sequential, seed: int) -> list[Coordinates]:
    found = layers(model)
    return [Coordinates.drawn(*widths(layer), seed + 10 * i) for i, layer in enumerate(found)]


def mlp(out: int = 3, unit: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return build(nn.Linear(4, 5), unit(), nn.Linear(5, 4), unit(), nn.Linear(4, out))


def conv_net(padding: int = 0) -> nn.Sequential:
    """Images of 3 x 5 x 5: two convolutions, then a linear layer on 2 x 3 x 3 numbers."""
    return build(
        nn.Conv2d(3, 4, 2, padding=padding),
        nn.Tanh(),
        nn.Conv2d(4, 2, 2, stride=1 + padding),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


# --- any coordinates ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [100, 200])
@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_mlp_steps_are_transported(kind: str, loss: str, seed: int) -> None:
    output_loss, out = LOSSES[loss]
    model = mlp(out)
    coordinates = drawn(model, seed)
    check(*pair(model, coordinates, randn(40, 4), output_loss, SETTINGS[kind]), coordinates)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", sorted(DIAGONAL))
def test_conv_steps_are_transported(kind: str, sharing: str) -> None:
    model = conv_net()
    coordinates = drawn(model, 100)
    settings = {**DIAGONAL[kind], "conv_sharing": sharing}
    check(*pair(model, coordinates, randn(60, 3, 5, 5), GaussianLoss(), settings), coordinates)


def test_conv_steps_with_zero_padding_are_transported_for_linear_changes() -> None:
    """Padding is zero in both coordinates only without a shift of the padded input."""
    model = conv_net(padding=1)
    coordinates = drawn(model, 100)
    inputs = randn(60, 3, 5, 5)
    shifted = expressed(model, coordinates)
    with torch.no_grad():
        assert distance([shifted(inputs)], [model(inputs)]) > 0.01
    coordinates[0] = replace(coordinates[0], c=torch.zeros(3, dtype=torch.float64))
    check(*pair(model, coordinates, inputs, GaussianLoss(), DIAGONAL["eigen"]), coordinates)


@pytest.mark.parametrize("extra", [{"quadratic": "exact"}, {"kl_clip": None}], ids=str)
@pytest.mark.parametrize("kind", ["eigen", "tridiagonal"])
def test_length_of_the_step_is_transported(kind: str, extra: dict[str, Any]) -> None:
    model = mlp()
    coordinates = drawn(model, 300)
    settings = {**SETTINGS[kind], "lr": 0.1, **extra}
    check(*pair(model, coordinates, randn(40, 4), GaussianLoss(), settings), coordinates)


@pytest.mark.parametrize("kind", ["eigen", "tridiagonal"])
def test_quadratic_model_steps_are_transported(kind: str) -> None:
    model = mlp()
    coordinates = drawn(model, 300)
    learners = pair(model, coordinates, randn(40, 4), GaussianLoss(), SETTINGS[kind])
    for learner in learners:
        config = plain_config(**learner.settings)
        learner.optimizer = KFAC(learner.model, config, step_rule="quadratic_model")
    check(*learners, coordinates)


@pytest.mark.parametrize(
    "settings",
    [
        {"damping": 0.1},
        {"damping": 0.1, "structure": "kfac_factored"},
        {"structure": "ekfac", "refresh_interval": 2},
    ],
    ids=str,
)
def test_damping_and_corrected_eigenvalues_break_the_invariance(settings: dict[str, Any]) -> None:
    model = mlp()
    coordinates = drawn(model, 100)
    learners = pair(model, coordinates, randn(40, 4), GaussianLoss(), {**BARE, **settings})
    assert largest_error(*learners, coordinates) > 0.01


# --- what the theorem is about in practice --------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_tanh_and_logistic_units_learn_alike(kind: str) -> None:
    """Two ordinary networks: tanh(s) = 2 sigma(2 s) - 1."""
    first, second = mlp(unit=nn.Tanh), mlp(unit=nn.Sigmoid)
    coordinates = [Coordinates.identity(*widths(layer)) for layer in layers(first)]
    for i in range(len(coordinates) - 1):
        here, after = coordinates[i], coordinates[i + 1]
        coordinates[i] = replace(here, phi=here.phi / 2)
        coordinates[i + 1] = replace(after, m=after.m / 2, c=after.c + 0.5)
    for mine, old, new in zip(coordinates, layers(first), layers(second), strict=True):
        assign(new, mine.weights(old))
    inputs, target, loss = randn(40, 4), randn(40, 3, seed=77), GaussianLoss()
    check(
        Learner(first, inputs, target, loss, SETTINGS[kind]),
        Learner(second, inputs, target, loss, SETTINGS[kind]),
        coordinates,
    )


def standardised(inputs: Tensor) -> tuple[Tensor, Coordinates]:
    """Inputs with mean 0 and variance 1 in each channel, and the coordinates they are."""
    channels = inputs.transpose(0, 1).flatten(1)
    mean, std = channels.mean(1), channels.std(1)
    shape = (-1, *[1] * (inputs.dim() - 2))
    identity = Coordinates.identity(len(mean), 1)
    found = replace(identity, m=(1 / std).diag(), c=-mean / std)
    return (inputs - mean.reshape(shape)) / std.reshape(shape), found


@pytest.mark.parametrize("kind", [*sorted(SETTINGS), "conv"])
def test_raw_and_standardised_inputs_learn_alike(kind: str) -> None:
    """Two ordinary networks, on inputs far from 0 and on the same inputs centred and scaled."""
    first, shape = (conv_net(), (60, 3, 5, 5)) if kind == "conv" else (mlp(), (40, 4))
    second = copy.deepcopy(first)
    scales = torch.linspace(0.5, 3, shape[1], dtype=torch.float64)
    raw = ((2 + randn(*shape).transpose(1, -1)) * scales).transpose(1, -1)
    centred, seen = standardised(raw)
    coordinates = [Coordinates.identity(*widths(layer)) for layer in layers(first)]
    coordinates[0] = replace(coordinates[0], m=seen.m, c=seen.c)
    for mine, layer in zip(coordinates, layers(second), strict=True):
        assign(layer, mine.weights(layer))
    target, loss, settings = randn(shape[0], 3, seed=77), GaussianLoss(), SETTINGS.get(kind, BARE)
    check(
        Learner(first, raw, target, loss, settings),
        Learner(second, centred, target, loss, settings),
        coordinates,
    )
