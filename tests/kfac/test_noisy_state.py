"""Contexts, micro-batches, resuming, own generators, and what is refused without a change."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    BayesByBackprop,
    CategoricalLoss,
    GaussianLoss,
    NoisyConfig,
    NoisyKFAC,
    Sampled,
)
from tests.tools.kfac import build, mlp, parameters, randn, same
from tests.tools.noisy import context, gaussian, noisy

SIZE = 40
LOSS = gaussian()


def data(seed: int = 0, count: int = 20) -> tuple[Tensor, Tensor]:
    return randn(count, 4, seed=seed), randn(count, 3, seed=seed + 50)


def stepped(steps: int = 3, **settings: Any) -> NoisyKFAC:
    optimizer = noisy(mlp(), SIZE, lr=0.1, momentum=0.9, initial_curvature=0.1, **settings)
    for seed in range(steps):
        context(optimizer, *data(seed), LOSS, Sampled())
        optimizer.step()
    return optimizer


def equal(first: NoisyKFAC, second: NoisyKFAC) -> bool:
    return same(parameters(first.module), parameters(second.module)) and same(
        first.state_by_name(), second.state_by_name()
    )


# --- contexts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_the_mean_is_outside_of_the_context_bit_for_bit(train: bool) -> None:
    optimizer = stepped()
    before = parameters(optimizer.module)
    with optimizer.sampled_params(train=train) as captured:
        assert (captured is not None) == train
        inside = parameters(optimizer.module)
    assert not any(torch.equal(inside[name], p) for name, p in before.items())
    assert same(parameters(optimizer.module), before)


@pytest.mark.parametrize("train", [True, False])
def test_an_exception_restores_the_mean_and_forgets_the_step(train: bool) -> None:
    optimizer, reference = stepped(), stepped()
    before = parameters(optimizer.module)
    with pytest.raises(KeyError), optimizer.sampled_params(train=train) as captured:
        if train:
            output = optimizer.module(data()[0])
            optimizer.observe(captured, output, LOSS)
            LOSS(output, data()[1]).backward()  # type: ignore[no-untyped-call]
        raise KeyError
    assert same(parameters(optimizer.module), before)
    for one in (optimizer, reference):
        one.curvature.noise.manual_seed(5)
        one.curvature.generator.manual_seed(6)
        context(one, *data(7), LOSS)
        one.step()
    assert same(parameters(optimizer.module), parameters(reference.module))


def test_the_global_generator_is_not_touched() -> None:
    optimizer = stepped()
    state = torch.get_rng_state()
    context(optimizer, *data(4), LOSS, Sampled())
    optimizer.step()
    optimizer.predict(data()[0], 2)
    optimizer.sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluations_do_not_change_the_training() -> None:
    first, second = stepped(2), stepped(2)
    first.predict(data()[0], 3)
    with first.sampled_params():
        pass
    for one in (first, second):
        context(one, *data(9), LOSS)
        one.step()
    assert same(parameters(first.module), parameters(second.module))


# --- several contexts -----------------------------------------------------------------------------


def test_two_micro_batches_of_one_sample_are_one_batch() -> None:
    found = []
    for parts in (1, 2):
        optimizer = stepped()
        inputs, targets = data(4)
        for i in range(parts):
            optimizer.curvature.noise.manual_seed(3)
            context(optimizer, inputs[i::parts], targets[i::parts], LOSS)
        optimizer.step()
        found.append(optimizer)
    first, second = (parameters(one.module) for one in found)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-12, atol=1e-14)


def test_gradients_and_statistics_of_samples_are_averaged_in_any_order() -> None:
    found = []
    for order in ((1, 2, 3), (3, 1, 2)):
        optimizer = stepped()
        for seed in order:
            optimizer.curvature.noise.manual_seed(seed)
            context(optimizer, *data(seed), LOSS)
            optimizer.zero_grad()  # what users of other optimizers do; it takes nothing away
        optimizer.curvature.noise.manual_seed(8)
        context(optimizer, *data(8), LOSS)
        optimizer.step()
        found.append(parameters(optimizer.module))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-11, atol=1e-13)


def test_several_samples_of_the_same_noise_are_one() -> None:
    found = []
    for count in (1, 3):
        optimizer = stepped()
        for _ in range(count):
            optimizer.curvature.noise.manual_seed(3)
            context(optimizer, *data(4), LOSS)
        optimizer.step()
        found.append(parameters(optimizer.module))
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-12, atol=1e-14)


def test_a_missing_zero_grad_does_not_add_up() -> None:
    optimizer, reference = stepped(), stepped()
    optimizer.module.get_parameter("0.weight").grad = torch.ones(5, 4).double()
    for one in (optimizer, reference):
        context(one, *data(4), LOSS)
        one.step()
    assert equal(optimizer, reference)


def test_clipping_the_gradient_before_the_step_counts() -> None:
    optimizer, reference = stepped(), stepped()
    for one in (optimizer, reference):
        context(one, *data(4), LOSS)
    nn.utils.clip_grad_norm_(optimizer.module.parameters(), 1e-3)
    optimizer.step()
    reference.step()
    assert not equal(optimizer, reference)


def test_a_gradient_that_is_not_finite_is_no_step() -> None:
    optimizer = stepped()
    before = parameters(optimizer.module)
    context(optimizer, *data(4), LOSS)
    optimizer.module.get_parameter("0.bias").grad = torch.full((5,), torch.nan).double()
    optimizer.step()
    assert same(parameters(optimizer.module), before)
    context(optimizer, *data(5), LOSS)
    optimizer.step()
    assert not same(parameters(optimizer.module), before)
    assert all(bool(p.isfinite().all()) for p in optimizer.module.parameters())


def test_kl_clip_bounds_the_step() -> None:
    lengths = []
    for clip in (None, 1e-6):
        optimizer = stepped(2, kl_clip=clip)
        before = parameters(optimizer.module)
        context(optimizer, *data(4), LOSS)
        optimizer.step()
        moved = [before[n] - p for n, p in parameters(optimizer.module).items()]
        lengths.append(float(torch.stack([m.norm() for m in moved]).norm()))
    assert 0 < lengths[1] < 0.1 * lengths[0]


def test_the_weight_of_the_divergence_warms_up() -> None:
    optimizer = noisy(mlp(), SIZE, kl_weight=0.5, kl_warmup=4, initial_curvature=0.1)
    weights, widths = [], []
    for seed in range(6):
        weights.append(optimizer.kl_weight)
        widths.append(float(optimizer.posterior_std()["0.weight"].mean()))
        context(optimizer, *data(seed), LOSS)
        optimizer.step()
    shares = [0.01, 0.2575, 0.505, 0.7525, 1.0, 1.0]
    assert weights == pytest.approx([0.5 * share for share in shares])
    assert widths[0] < 0.3 * widths[-1]


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "structure, form",
    [
        ("mvg", "exact"),
        ("mvg", "factored"),
        ("emvg", "exact"),
        ("ffg", "exact"),
        ("tridiagonal", "factored"),
    ],
)
def test_training_goes_on_from_a_state_bit_for_bit(structure: str, form: str) -> None:
    settings = {"structure": structure, "damping_form": form}
    optimizer = stepped(3, **settings, kl_warmup=5, refresh_interval=2)
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(optimizer.module.state_dict())
    other = stepped(1, **settings, kl_warmup=5, refresh_interval=2, seed=9)
    other.module.load_state_dict(weights)
    other.load_state_dict(state)
    for one in (optimizer, other):
        for seed in (20, 21, 22):
            context(one, *data(seed), LOSS, Sampled())
            one.step()
    assert equal(optimizer, other)
    assert torch.equal(optimizer.predict(data()[0], 2), other.predict(data()[0], 2))


def test_a_state_of_a_gpu_is_loaded_with_ones_own_generators() -> None:
    """Those of CUDA have 16 bytes."""
    state = stepped().state_by_name()
    ((kind, generators),) = state["curvature"]["noisy"].items()
    foreign = [torch.zeros(16, dtype=torch.uint8) for _ in generators]
    state["curvature"]["noisy"] = {kind: foreign}
    fresh = stepped(0)
    own = fresh.curvature.noise.get_state()
    fresh.load_state_dict(state)
    assert torch.equal(fresh.curvature.noise.get_state(), own)


def test_a_state_of_another_kind_is_refused_without_a_change() -> None:
    optimizer = stepped()
    before = copy.deepcopy(optimizer.state_by_name())
    plain, former = KFAC(mlp()), stepped().state_dict()
    del former["state"][1]["momentum_weight"]
    for state, message in [
        (stepped(structure="ffg").state_dict(), "lacks mvg with exact damping and has ffg with"),
        (stepped(damping_form="factored").state_dict(), "has mvg with factored damping instead"),
        (plain.state_dict(), "lacks noisy"),
        (former, "0.bias must have the entry momentum and the entry momentum_weight"),
        ({"state": {}}, "entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        assert same(optimizer.state_by_name(), before)


# --- refusals -------------------------------------------------------------------------------------


def test_the_size_of_the_data_must_be_given() -> None:
    with pytest.raises(TypeError, match="data_size"):
        NoisyKFAC(mlp())  # type: ignore[call-arg]
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"data_size \(the loss terms of the whole training"):
            NoisyKFAC(mlp(), data_size=wrong)  # type: ignore[arg-type]
    optimizer = noisy(mlp(), 10)
    with pytest.raises(ValueError, match="data_size=10 is less than the 20 loss terms"):
        context(optimizer, *data(), LOSS)


def test_a_loss_that_is_a_sum_is_refused() -> None:
    optimizer = stepped()
    before = parameters(optimizer.module)
    with pytest.raises(ValueError, match='needs a loss with reduction="mean"'):
        context(optimizer, *data(), GaussianLoss(reduction="sum"))
    assert same(parameters(optimizer.module), before)


def test_a_closed_context_is_refused() -> None:
    optimizer = stepped()
    with optimizer.sampled_params(train=True) as captured:
        output = optimizer.module(data()[0])
    for record in (captured, None):
        with pytest.raises(ValueError, match="a context that is closed, or of none"):
            optimizer.observe(record, output, LOSS)
    with pytest.raises(ValueError, match="a backward pass before it"):
        optimizer.step()
    with optimizer.sampled_params():
        for act in (optimizer.step, optimizer.draw, optimizer.kl):
            with pytest.raises(ValueError, match=r"inside of sampled_params\(\)"):
                act()
        with pytest.raises(ValueError, match="inside of"), optimizer.sampled_params():
            pass


def test_a_late_backward_pass_is_an_error() -> None:
    optimizer = stepped()
    with optimizer.sampled_params(train=True):
        loss = LOSS(optimizer.module(data()[0]), data()[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prior_variance": 0.0}, "prior_variance must be a finite number > 0"),
        ({"prior_variance": {"0": 0.0, "": 1.0}}, "prior_variance of '0' must be"),
        ({"structure": "full"}, "structure must be mvg or ffg or emvg or tridiagonal"),
        ({"structure": "ffg", "damping_form": "factored"}, 'give damping_form="exact"'),
        ({"structure": "tridiagonal"}, 'give damping_form="factored"'),
        ({"kl_weight": -1.0}, "kl_weight must be a finite number >= 0"),
        ({"kl_weight": 0.0}, "give external_damping > 0"),
        ({"external_damping": -0.1}, "external_damping must be"),
        ({"kl_warmup": 1.5}, "kl_warmup must be an integer"),
        ({"stat_decay": 1.0}, "stat_decay must be"),
        ({"deterministic": "0"}, "deterministic must be a list of names"),
        ({"deterministic": (1,)}, "deterministic must be a list of names"),
        ({"sample_norms": "no"}, "sample_norms must be True or False"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyConfig(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prior_variance": {"head": 1.0, "": 1.0}}, "names 'head', which is no trainable"),
        ({"prior_variance": {"0": 1.0}}, "2.weight has no prior_variance"),
        ({"prior_variance": {"0.weight": 1.0, "": 2.0}}, "0.weight and 0.bias share a curvature"),
        ({"deterministic": ("0.bias",)}, "give them one place in deterministic"),
    ],
)
def test_settings_that_do_not_fit_the_module_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NoisyKFAC(mlp(), NoisyConfig(**settings), data_size=9)


def test_a_module_without_trainable_parameters_is_refused() -> None:
    frozen = mlp().requires_grad_(False)
    for make in (NoisyKFAC, BayesByBackprop):
        for module, found in (
            (frozen, "all 4 have requires_grad=False"),
            (nn.Tanh(), "it has none"),
        ):
            with pytest.raises(ValueError, match=f"with trainable parameters: {found}"):
                make(module, data_size=9)


@pytest.mark.parametrize("wrong", [nn.CrossEntropyLoss(), len, None, GaussianLoss])
def test_what_is_no_loss_is_refused(wrong: Any) -> None:
    optimizer = stepped()
    with (
        pytest.raises(ValueError, match="loss must be an OutputLoss such as"),
        optimizer.sampled_params(train=True) as captured,
    ):
        optimizer.observe(captured, optimizer.module(data()[0]), wrong)


@pytest.mark.parametrize("deterministic", [["0"], {"0"}, iter(("0.weight", "0.bias"))])
def test_deterministic_names_come_in_any_collection(deterministic: Any) -> None:
    optimizer = NoisyKFAC(mlp(), NoisyConfig(deterministic=deterministic), data_size=9)
    assert optimizer.posterior.prior.names == ["2.weight", "2.bias"]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"is copied with state_dict\(\) and load_state_dict\(\)"):
        copied(stepped(1))


def test_a_weight_decay_beside_the_prior_is_refused() -> None:
    optimizer = stepped()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    context(optimizer, *data(), LOSS)
    with pytest.raises(ValueError, match="is its prior"):
        optimizer.step()


def test_a_classifier_trains_and_predicts_probabilities() -> None:
    model = build(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = NoisyKFAC(model, NoisyConfig(lr=0.05, stat_decay=0.9), data_size=60)
    inputs, loss = randn(60, 4), CategoricalLoss()
    labels = inputs[:, :3].argmax(-1)
    for _ in range(60):
        context(optimizer, inputs, labels, loss, Sampled())
        optimizer.step()
    found = optimizer.predict(inputs, 20).softmax(-1).mean(0)
    assert float((found.argmax(-1) == labels).double().mean()) > 0.85
