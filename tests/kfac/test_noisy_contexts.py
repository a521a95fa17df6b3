"""What counts in a step of noisy K-FAC: contexts, their sizes, and what was forgotten."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import (
    CategoricalLoss,
    Exact,
    GaussianLoss,
    NoisyKFAC,
    NoStatisticsWarning,
    dense_kfac,
)
from tests.kfac.test_noisy_state import LOSS, SIZE, data, equal, stepped
from tests.tools.kfac import build, mlp, parameters, randn, same
from tests.tools.noisy import context, noisy, refreshed


@contextmanager
def told() -> Iterator[list[str]]:
    """The messages of all NoStatisticsWarnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield messages
    for warning in said:
        if warning.category is NoStatisticsWarning:
            assert warning.filename == __file__
            messages.append(str(warning.message))


def unobserved(optimizer: NoisyKFAC, steps: int = 3) -> None:
    """Steps as those of IVON, which observes nothing."""
    inputs, targets = data()
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            LOSS(optimizer.module(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


class Bypassed(nn.Module):
    """A layer that is reached by F.linear alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bare = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(self.first(inputs).tanh(), self.bare.weight, self.bare.bias)


# --- what was not observed ------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["mvg", "emvg", "ffg"])
def test_steps_that_nobody_observes_are_told_once(structure: str) -> None:
    optimizer = noisy(mlp(), SIZE, structure=structure, initial_curvature=0.1)
    with told() as messages:
        unobserved(optimizer)
    [message] = messages
    names = "0.weight, 0.bias, 2.weight, 2.bias"
    assert message.startswith(f"no statistics of {names}: they keep the curvature of the start")


def test_a_layer_that_no_batch_reaches_is_told_once() -> None:
    optimizer = noisy(Bypassed().double(), SIZE, lr=0.1, initial_curvature=0.1)
    with told() as messages:
        for seed in range(3):
            context(optimizer, *data(seed), LOSS)
            optimizer.step()
    [message] = messages
    assert message.startswith("no statistics of bare.weight, bare.bias: they keep")


def test_an_observation_that_is_forgotten_later_is_told_once() -> None:
    optimizer = stepped(2)
    with told() as messages:
        unobserved(optimizer)
    [message] = messages
    assert message.startswith("no statistics of this step")


def test_steps_between_observations_are_not_told() -> None:
    optimizer = noisy(mlp(), SIZE, lr=0.1, stat_interval=3, initial_curvature=0.1)
    with told() as messages:
        for seed in range(12):
            context(optimizer, *data(seed), LOSS)
            optimizer.step()
        for turn in range(7):
            if turn % 3:
                unobserved(optimizer, 1)
            else:
                context(optimizer, *data(turn), LOSS)
                optimizer.step()
    assert not messages


# --- contexts that do not count -------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_context_without_a_backward_pass_is_no_sample(first: bool) -> None:
    """As after `continue` inside of it, before or after one that counts."""
    optimizer, reference = stepped(), stepped()
    for empty in (first, not first):
        if empty:
            state = optimizer.curvature.noise.get_state()
            with optimizer.sampled_params(train=True):
                optimizer.module(data(7)[0])
            optimizer.curvature.noise.set_state(state)
        else:
            context(optimizer, *data(4), LOSS)
    context(reference, *data(4), LOSS)
    for one in (optimizer, reference):
        one.step()
    assert equal(optimizer, reference)


def test_contexts_without_any_backward_pass_are_no_step() -> None:
    optimizer = stepped()
    with optimizer.sampled_params(train=True):
        optimizer.module(data(7)[0])
    with pytest.raises(ValueError, match="with a backward pass before it"):
        optimizer.step()


def test_contexts_that_are_forgotten_are_no_part_of_the_next_step() -> None:
    optimizer, reference = stepped(), stepped()
    context(optimizer, *data(4), LOSS)
    optimizer.forget()
    with pytest.raises(ValueError, match=r"needs sampled_params\(train=True\)"):
        optimizer.step()
    for one in (optimizer, reference):
        one.curvature.noise.manual_seed(5)
        context(one, *data(7), LOSS)
        one.step()
    assert equal(optimizer, reference)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_gradient_scaler_recovers_from_inf(unscaled: bool) -> None:
    """A skipped step forgets its contexts; the next one is that of an optimizer without them."""
    optimizer, reference = stepped(), stepped()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(factor: float, seed: int) -> None:
        with optimizer.sampled_params(train=True) as captured:
            output = optimizer.module(data(seed)[0])
            optimizer.observe(captured, output, LOSS)
            (factor * scaler.scale(LOSS(output, data(seed)[1]))).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    before = parameters(optimizer.module)
    states = [one.get_state() for one in (optimizer.curvature.noise, optimizer.curvature.generator)]
    scaled(float("inf"), 3)
    assert same(parameters(optimizer.module), before) and optimizer.steps == reference.steps
    optimizer.curvature.noise.set_state(states[0])
    optimizer.curvature.generator.set_state(states[1])
    for seed in (4, 5):
        scaled(1.0, seed)
        reference_step(reference, seed)
    assert optimizer.steps == reference.steps
    for name, weight in parameters(reference.module).items():
        torch.testing.assert_close(parameters(optimizer.module)[name], weight)


def reference_step(optimizer: NoisyKFAC, seed: int) -> None:
    with optimizer.sampled_params(train=True) as captured:
        output = optimizer.module(data(seed)[0])
        optimizer.observe(captured, output, LOSS)
        LOSS(output, data(seed)[1]).backward()
    optimizer.step()


# --- sums over contexts ---------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_unequal_micro_batches_count_by_their_terms(weighted: bool) -> None:
    """Parts of 15 and 5 rows, or of weights, are one batch of 20, in gradients as in statistics."""
    inputs, targets = data(4)
    weights = randn(20, seed=6).abs() if weighted else None
    found = []
    for parts in ([slice(0, 20)], [slice(0, 15), slice(15, 20)]):
        optimizer = stepped()
        for rows in parts:
            optimizer.curvature.noise.manual_seed(3)
            mine = None if weights is None else weights[rows]
            with optimizer.sampled_params(train=True) as captured:
                output = optimizer.module(inputs[rows])
                optimizer.curvature.generator.manual_seed(5)
                optimizer.observe(captured, output, LOSS, weights=mine)
                LOSS(output, targets[rows], mine).backward()
        found.append({n: p.grad for n, p in optimizer.module.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "settings", [{"ignore_index": -100}, {"class_weights": torch.tensor([0.5, 2.0, 1.5])}]
)
def test_targets_that_decide_on_weights_count_as_those_weights(settings: Any) -> None:
    inputs, labels = data(4)[0], data(4)[1].argmax(-1)
    weights = settings.get("class_weights", torch.ones(3)).double()[labels]
    if "ignore_index" in settings:
        labels[::3], weights[::3] = -100, 0
    by_target = CategoricalLoss(**settings), {"target": labels}
    found = []
    for loss, terms in (by_target, (CategoricalLoss(), {"weights": weights})):
        optimizer = stepped()
        for rows in (slice(0, 15), slice(15, 20)):
            mine = {name: tensor[rows] for name, tensor in terms.items()}
            with optimizer.sampled_params(train=True) as captured:
                output = optimizer.module(inputs[rows])
                optimizer.observe(captured, output, loss, source=Exact(), **mine)
                loss(output, labels[rows], mine.get("weights")).backward()
        refreshed(optimizer)
        found.append([dense_kfac(optimizer.curvature), *optimizer.curvature.gradients().values()])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_likelihoods_of_ones_own_count_by_their_samples() -> None:
    inputs, targets = data(4)
    found = []
    for parts in ([slice(0, 20)], [slice(0, 15), slice(15, 20)]):
        optimizer = stepped()
        for rows in parts:
            optimizer.curvature.noise.manual_seed(3)
            with optimizer.sampled_params(train=True) as captured:
                output = optimizer.module(inputs[rows])
                drawn = (output.detach() + randn(*output.shape) - output).square().sum() / 2
                optimizer.update_curvature(captured, drawn)
                LOSS(output, targets[rows]).backward()
        found.append({n: p.grad for n, p in optimizer.module.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_gradients_set_to_zero_in_place_between_contexts_are_kept() -> None:
    optimizer, reference = stepped(), stepped()
    for one in (optimizer, reference):
        for seed in (4, 5, 6):
            if one is optimizer:
                one.module.zero_grad(set_to_none=False)
            context(one, *data(seed), LOSS)
        one.step()
    assert equal(optimizer, reference)


def test_half_precision_sums_in_single() -> None:
    """3 gradients of 30,000 are beyond float16, whose largest number is 65,504; so is their sum."""
    model = build(nn.Linear(2, 2, bias=False)).half()
    optimizer = noisy(model, SIZE, lr=1e-4, initial_curvature=1.0)
    inputs = torch.ones(4, 2).half()
    before = parameters(model)
    for _ in range(3):
        with optimizer.sampled_params(train=True) as captured:
            output = model(inputs)
            optimizer.observe(captured, output, GaussianLoss())
            (30000 * output.float().mean(0).sum()).backward()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    assert torch.equal(gradient, torch.full((2, 2), 30000.0).half())
    optimizer.step()
    assert not same(parameters(model), before)


# --- warm-up of a chain ---------------------------------------------------------------------------


def test_a_chain_that_warms_up_is_never_wider_than_its_prior() -> None:
    """Its inverse holds the damping of the refresh: lambda must be of that time too."""
    settings: dict[str, Any] = {"structure": "tridiagonal", "damping_form": "factored"}
    settings |= {"kl_warmup": 30, "refresh_interval": 20, "initial_curvature": 1e-3}
    optimizer = noisy(build(nn.Linear(4, 5), nn.Linear(5, 3)), SIZE, kl_weight=50.0, **settings)
    weak = GaussianLoss(std=300.0)
    for seed in range(40):
        for deviation in optimizer.posterior_std().values():
            assert float(deviation.max()) <= 0.7**0.5 * (1 + 1e-12)
        context(optimizer, *data(seed), weak)
        optimizer.step()


def test_a_chain_goes_on_from_a_state_with_the_weight_of_its_inverse() -> None:
    settings: dict[str, Any] = {"structure": "tridiagonal", "damping_form": "factored"}
    settings |= {"kl_warmup": 9, "refresh_interval": 6}
    optimizer = stepped(8, **settings)
    other = stepped(1, **settings, seed=9)
    other.module.load_state_dict(optimizer.module.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert same(other.posterior_std(), optimizer.posterior_std())
    assert optimizer.posterior.chain_weight < optimizer.kl_weight
    for one in (optimizer, other):
        for seed in (20, 21, 22, 23, 24):
            context(one, *data(seed), LOSS)
            one.step()
    assert equal(optimizer, other)
