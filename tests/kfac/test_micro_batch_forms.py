"""Exact forms of batches in parts are those of whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    SumLoss,
)
from acktr.kfac.losses.likelihoods import Reduction
from tests.kfac.test_micro_batches import PARTS, REDUCTIONS
from tests.tools.kfac import (
    build,
    mlp,
    plain_config,
    randn,
)
from tests.tools.product_cases import filled


class Heads(nn.Module):
    """Two outputs of a shared trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.policy, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.policy(hidden), self.value(hidden)


def forms_in(parts: tuple[int, ...], reduction: Reduction, weights: Tensor | None) -> Tensor:
    """Forms of two directions in the Fisher of each of two parts of a loss."""
    model = filled(Heads())
    curvature = Preconditioner(model, plain_config(quadratic="exact"))
    loss = SumLoss(CategoricalLoss(reduction=reduction), GaussianLoss(reduction=reduction))
    inputs = randn(7, 2, 4)
    observe_parts(curvature, model, inputs, parts, loss, weights)
    named = dict(model.named_parameters())
    steps = [{n: randn(*p.shape, seed=i) for n, p in named.items()} for i in range(2)]
    return curvature.region.grams(steps)


def observe_parts(
    curvature: Preconditioner,
    model: nn.Module,
    inputs: Tensor,
    parts: tuple[int, ...],
    loss: OutputLoss[Any],
    weights: Tensor | None = None,
) -> None:
    done = 0
    for size in parts:
        cut = slice(done, done + size)
        done += size
        with curvature.capture() as captured:
            output = model(inputs[cut])
        mine = None if weights is None else weights[cut]
        curvature.observe(captured, output, loss, weights=mine, last=done == len(inputs))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exact_forms_are_those_of_all_micro_batches(reduction: Reduction, weighted: bool) -> None:
    weights = randn(7, 2, seed=4).square() if weighted else None
    whole = forms_in((7,), reduction, weights)
    assert whole.shape == (2, 2, 2)
    torch.testing.assert_close(forms_in(PARTS, reduction, weights), whole, rtol=1e-10, atol=1e-12)


def test_a_batch_in_micro_batches_is_measured_whole() -> None:
    """Where some samples of one large batch would do."""
    model, inputs = filled(mlp()), randn(130, 4)
    step = {n: randn(*p.shape, seed=1) for n, p in model.named_parameters()}
    forms = []
    for parts in ((130,), (60, 70)):
        curvature = Preconditioner(model)
        assert curvature.region.corrected is not None
        curvature.region.corrected.load_state_dict(
            {**curvature.region.corrected.state_dict(), "due": 1, "whole": False}
        )
        curvature.load_state_dict({**curvature.state_dict(), "turn": 1})
        assert curvature.measuring and not curvature.following
        observe_parts(curvature, model, inputs, parts, BernoulliLoss())
        found = curvature.region.estimated([step], 1, 8)
        assert found is not None
        forms.append((found.grams, curvature.region.quadratic(step)))
    (some, whole), (all_of_it, again) = forms
    assert abs(float(some) / float(whole) - 1) > 1e-3
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(all_of_it.sum(), whole, **close)
    torch.testing.assert_close(again, whole, **close)


def test_exact_forms_of_micro_batches_have_their_dropout() -> None:
    """One sample in each: the form of the whole is the mean of those of the parts."""
    torch.manual_seed(3)
    model = build(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))
    curvature = Preconditioner(model, plain_config(quadratic="exact"))
    inputs, loss, forms = randn(4, 4), GaussianLoss(), []
    step = {n: randn(*p.shape, seed=1) for n, p in model.named_parameters()}
    for sample in inputs.split(1):
        torch.manual_seed(len(forms))
        observe_parts(curvature, model, sample, (1,), loss)
        forms.append(curvature.region.quadratic(step))
    assert len({float(form) for form in forms}) == 4
    for index, sample in enumerate(inputs.split(1)):
        torch.manual_seed(index)
        with curvature.capture() as captured:
            output = model(sample)
        curvature.observe(captured, output, loss, last=index == 3)
    torch.testing.assert_close(curvature.region.quadratic(step), torch.stack(forms).mean())


def test_a_micro_batch_that_cannot_run_again_is_told() -> None:
    model = mlp()
    curvature = Preconditioner(model, plain_config(quadratic="exact"))
    step = {n: randn(*p.shape, seed=1) for n, p in model.named_parameters()}
    forms = []
    for first in ([], [randn(3, 4)], [randn(3, 4, seed=5)]):
        for inputs in (*first, randn(2, 4, seed=2)):
            with curvature.capture() as captured:
                output = model(inputs)
            curvature.observe(captured, output, GaussianLoss(), last=len(inputs) == 2)
        if len(forms) == 1:
            first[0].zero_()  # a buffer that the next micro-batch is read into
            with pytest.warns(UserWarning, match="last micro-batch alone: the input of the module"):
                forms.append(curvature.region.quadratic(step))
        else:
            forms.append(curvature.region.quadratic(step))
    assert torch.equal(forms[0], forms[1]) and not torch.equal(forms[0], forms[2])
