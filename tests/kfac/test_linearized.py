"""Gradients and tangents from one graph, against backward passes and forward-mode derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Categorical, CategoricalLoss, fisher_gram, fisher_vector_product
from acktr.kfac.fisher.linearized import Linearized
from acktr.kfac.fisher.products import output_tangents
from tests.tools.kfac import randn
from tests.tools.product_cases import LogStd, cases, close, directions, filled

CASES = cases("mean")


def parts(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("name", list(CASES))
def test_both_products_equal_the_usual_passes(name: str) -> None:
    model, inputs = CASES[name].model, CASES[name].inputs
    named = dict(model.named_parameters())
    outputs = parts(model(inputs))
    cotangents = [randn(*z.shape, seed=place) for place, z in enumerate(outputs)]
    expected = torch.autograd.grad(
        outputs, list(named.values()), cotangents, retain_graph=True, allow_unused=True
    )
    linear = Linearized(outputs, named, cotangents)
    for (parameter, gradient), right in zip(linear.gradients.items(), expected, strict=True):
        assert not gradient.requires_grad
        assert torch.equal(gradient, right), parameter
    _, vectors = directions(model, 2)
    _, found = output_tangents(model, (inputs,), vectors)
    with torch.no_grad():  # as in an optimizer's step; a second product needs the graph once more
        for vector, tangent in zip(vectors, found, strict=True):
            for mine, right in zip(linear.tangents(vector), parts(tangent), strict=True):
                assert not mine.requires_grad
                close(mine, right)


def test_gradients_are_those_of_backward_in_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    inputs, target = torch.randn(100, 17), torch.randn(100, 64)
    (model(inputs) - target).square().mean().backward()  # type: ignore[no-untyped-call]
    output = model(inputs)
    (cotangent,) = torch.autograd.grad((output - target).square().mean(), output)
    linear = Linearized([output], dict(model.named_parameters()), [cotangent])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(linear.gradients[name], parameter.grad), name


def test_what_is_missing_counts_as_zero() -> None:
    model = filled(LogStd())
    policy, value = model(randn(5, 4, seed=1))
    named = dict(model.named_parameters())
    only = Linearized([value], named, [torch.ones_like(value)])
    assert set(only.gradients) == {"value.weight", "value.bias"}
    assert not only.tangents({"log_std": torch.ones_like(named["log_std"])})[0].any()
    both = Linearized([policy, value], named, [torch.ones_like(policy), torch.ones_like(value)])
    spread, none = both.tangents({"log_std": torch.ones_like(named["log_std"])})
    assert spread.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 5
    assert none.tolist() == [0.0] * 5


def test_the_fisher_is_that_of_a_loss() -> None:
    """Forms and products with a distribution's metric equal those with its loss."""
    model, inputs = filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))), randn(6, 3)
    output = model(inputs)
    linear = Linearized([output], dict(model.named_parameters()), [torch.ones_like(output)])
    metric = Categorical(output.detach()).fisher_quadratic
    _, (vector, _) = directions(model, 2)
    gram = fisher_gram(model, (inputs,), CategoricalLoss(), [vector])
    close(linear.quadratic(metric, vector), gram[0, 0])
    product = fisher_vector_product(model, (inputs,), CategoricalLoss(), vector)
    for name, mine in linear.product(metric, vector).items():
        close(mine, product[name])
