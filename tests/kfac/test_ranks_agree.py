"""Ranks that have become different, or were never the same, say so; the ranks are threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from acktr.kfac import KFAC, CategoricalLoss, Empirical, Ranks, bits_of
from tests.tools.kfac import build, parameters, plain_config, randn
from tests.tools.rank_trainings import TRAININGS, Training, made_optimizer, observed
from tests.tools.ranks import on_threads


def said(ranks: Ranks, act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


def head(ranks: Ranks, quadratic: str) -> str:
    """The frozen body of a classifier, and its head, whose gradients nobody averages."""
    model = build(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].requires_grad_(False)
    optimizer = KFAC(model, plain_config(quadratic=quadratic), ranks=ranks)
    before = parameters(model)
    inputs, labels = Training().batch(0, 12)
    (cut,) = Training().cuts(ranks.size, ranks.rank)
    with optimizer.capture() as captured:
        output = model(inputs[cut])
    optimizer.observe(captured, output, CategoricalLoss(), source=Empirical(labels[cut]))
    CategoricalLoss()(output, labels[cut]).backward()
    for parameter in model[2].parameters():
        assert abs(float(parameter.grad.sum())) < 1e-15  # which a sum does not tell from others
    message = said(ranks, optimizer.step)
    assert all(torch.equal(before[name], p) for name, p in parameters(model).items())
    return message


@pytest.mark.parametrize("quadratic", ["kronecker", "corrected"])
def test_gradients_of_a_softmax_head_add_up_to_zero_and_are_seen_to_differ(quadratic: str) -> None:
    for message in on_threads(lambda ranks: head(ranks, quadratic), 2):
        assert message.startswith("rank 1 has other gradients than rank 0"), message


def shifted(ranks: Ranks) -> str:
    """One rank moves two weights by what adds up to nothing."""
    optimizer, model = made_optimizer(ranks, refresh_interval=2)
    for step in range(3):
        observed(optimizer, model, ranks)
        if step == 2:
            break
        optimizer.step()
        if ranks.rank == 1:
            with torch.no_grad():
                model[0].weight[0, 0] += 0.01
                model[0].weight[0, 1] -= 0.01
    return said(ranks, optimizer.step)


def test_parameters_of_the_same_sum_are_seen_to_differ() -> None:
    for message in on_threads(shifted, 2):
        assert message.startswith("rank 1 has other parameters than rank 0"), message


def between(ranks: Ranks) -> str:
    """After the first steps, which refresh, the measured ones tell as well."""
    model = build(nn.Linear(4, 3))
    optimizer = KFAC(model, plain_config(quadratic="corrected", refresh_interval=1000), ranks=ranks)
    observed(optimizer, model, ranks)
    optimizer.step()
    assert not optimizer.needs_refresh
    while not optimizer.curvature.measuring:
        observed(optimizer, model, ranks)
        optimizer.step()
    observed(optimizer, model, ranks)
    model[0].weight.grad[0, ranks.rank] += 1.0
    return said(ranks, optimizer.step)


def test_gradients_are_compared_before_a_form_is_measured() -> None:
    for message in on_threads(between, 2):
        assert message.startswith("rank 1 has other gradients than rank 0"), message


def ahead(ranks: Ranks) -> str:
    """One rank has taken two steps more, as after an error that another one caught."""
    optimizer, model = made_optimizer(ranks, refresh_interval=2)
    for _ in range(2):
        observed(optimizer, model, ranks)
        optimizer.step()
    observed(optimizer, model, ranks)
    optimizer.curvature.turn += 2 * ranks.rank
    return said(ranks, optimizer.step)


def test_ranks_at_different_steps_are_told_of() -> None:
    for message in on_threads(ahead, 2):
        assert message.startswith("rank 1 is at step 4 and rank 0 at step 2: every rank"), message


def nothing(ranks: Ranks, quadratic: str) -> None:
    """A batch in which no rank has a row leaves the parameters as they are."""
    model = build(nn.Linear(4, 3))
    optimizer = KFAC(model, plain_config(quadratic=quadratic, momentum=0.0), ranks=ranks)
    observed(optimizer, model, ranks)
    optimizer.step()
    before = parameters(model)
    with optimizer.capture() as captured:
        output = model(randn(0, 4))
    optimizer.observe(captured, output, CategoricalLoss())
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ranks.average(model, 0)
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in parameters(model).items())


@pytest.mark.parametrize("quadratic", ["kronecker", "corrected"])
def test_a_batch_without_any_row(quadratic: str) -> None:
    on_threads(lambda ranks: nothing(ranks, quadratic), 2)


def test_a_share_without_rows_is_one_of_several_ranks_only() -> None:
    model = build(nn.Linear(4, 3))
    optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output = model(randn(0, 4))
    with pytest.raises(ValueError, match="without empty dimensions"):
        optimizer.observe(captured, output, CategoricalLoss())


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "another width": lambda: build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "another type": lambda: build(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).float(),
    "another name": lambda: nn.Sequential(
        nn.Linear(4, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_module_is_refused_before_anything_is_sent(name: str) -> None:
    def start(ranks: Ranks) -> list[str]:
        model = OTHERS[name]() if ranks.rank else build(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        before = parameters(model)
        found = [
            said(ranks, lambda: ranks.start(model)),
            said(ranks, lambda: KFAC(model, ranks=ranks)),
        ]
        assert all(torch.equal(before[key], p) for key, p in parameters(model).items())
        return found

    for of_start, of_kfac in on_threads(start, 2):
        assert of_start.startswith("rank 1 has other names, shapes or types of parameters")
        assert of_kfac.startswith("rank 1 has other modules, settings or seeds than rank 0")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_averages_over_many_rows(kind: torch.dtype) -> None:
    def averaged(ranks: Ranks) -> Tensor:
        model = nn.Linear(2, 1, bias=False, dtype=kind)
        model.weight.grad = torch.full_like(model.weight, 1.0 + ranks.rank)
        ranks.average(model, 40_000)
        grad = model.weight.grad
        assert grad is not None and grad.dtype == kind
        return grad

    for grad in on_threads(averaged, 2):
        assert grad.tolist() == [[1.5, 1.5]]


def test_without_ranks_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def used(*_: Any, **__: Any) -> None:
        raise AssertionError

    sending = [name for name in dir(distributed) if name.startswith(("all_", "broadcast", "new_"))]
    for name in (*sending, "barrier", "get_rank", "get_world_size", "init_process_group"):
        monkeypatch.setattr(distributed, name, used)
    dataclasses.replace(TRAININGS["corrected, estimated"], steps=2).run(None)


def test_numbers_of_bits() -> None:
    tensors = [randn(3, 2, seed=0), torch.zeros((), dtype=torch.bfloat16), torch.zeros(0)]
    assert bits_of(tensors) == bits_of([tensor.clone() for tensor in tensors])
    assert bits_of(tensors[:1]) == bits_of([tensors[0].T.contiguous().T])
    assert bits_of([torch.zeros(1)]) != bits_of([None]) != bits_of([])
    flipped = tensors[0].clone()
    flipped.view(torch.int64)[0, 0] ^= 1
    assert bits_of([flipped, *tensors[1:]]) != bits_of(tensors)
