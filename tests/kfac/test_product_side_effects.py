"""Fisher products leave the module, its gradients and the random generators alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acktr.kfac.fisher.products import (
    dense_fisher,
    fisher_gram,
    fisher_vector_product,
    inner_products,
    output_tangents,
)
from acktr.kfac.losses.likelihoods import CategoricalLoss
from tests.tools.kfac import build, mlp, randn, same
from tests.tools.product_cases import Case, close, convolutional, directions, joined, written_out


@pytest.mark.parametrize("training", [False, True])
def test_the_module_is_left_as_it_was(training: bool) -> None:
    model = convolutional().train(training)
    args, loss = (randn(3, 2, 4, 4),), CategoricalLoss()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, vectors = directions(model, 2)
    output_tangents(model, args, vectors)
    fisher_gram(model, args, loss, vectors)
    fisher_vector_product(model, args, loss, vectors[0])
    dense_fisher(model, args, loss)
    assert same(before, dict(model.state_dict()))
    assert all(p.grad is not None and (p.grad == 1).all() for p in model.parameters())
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(args[0])
    assert same(before, dict(model.state_dict())) is not training


def test_batch_normalisation_in_training_mode() -> None:
    """Samples depend on each other there; F is still J^T H J of the whole batch."""
    model = convolutional().train()
    case = Case(model, randn(3, 2, 4, 4, seed=4), CategoricalLoss())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = written_out(case)
    model.load_state_dict(state)
    args = (case.inputs,)
    matrix, vectors = directions(model, 2)
    close(dense_fisher(model, args, case.loss), fisher)
    gram = fisher_gram(model, args, case.loss, vectors)
    close(gram, matrix @ fisher @ matrix.mT)


def test_every_pass_sees_the_same_dropout_mask() -> None:
    model = build(nn.Linear(4, 40), nn.Dropout(0.5), nn.Linear(40, 3))
    args, loss = (randn(5, 4),), CategoricalLoss()
    _, (vector,) = directions(model, 1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    gram = fisher_gram(model, args, loss, [vector, vector])
    product = fisher_vector_product(model, args, loss, vector)
    dense = dense_fisher(model, args, loss)
    assert torch.equal(torch.get_rng_state(), state)
    flat = joined(vector)
    assert torch.equal(gram, gram[0, 0].expand(2, 2))
    close(flat @ joined(product), gram[0, 0])
    close(flat @ dense @ flat, gram[0, 0])
    torch.manual_seed(6)
    other = fisher_gram(model, args, loss, [vector])
    assert not torch.isclose(other[0, 0], gram[0, 0], rtol=1e-6)


def test_products_work_without_gradients_and_inside_of_inference_code() -> None:
    model, args, loss = mlp(), (randn(5, 4),), CategoricalLoss()
    _, vectors = directions(model, 2)
    expected = fisher_gram(model, args, loss, vectors)
    product = fisher_vector_product(model, args, loss, vectors[0])
    dense = dense_fisher(model, args, loss)
    with torch.no_grad():
        assert torch.equal(fisher_gram(model, args, loss, vectors), expected)
        assert same(fisher_vector_product(model, args, loss, vectors[0]), product)
        assert torch.equal(dense_fisher(model, args, loss), dense)
    assert not expected.requires_grad
    assert not dense.requires_grad


def test_half_precision_outputs_are_summed_in_float32() -> None:
    model = mlp().float()
    inputs = randn(64, 4).float()
    matrix, vectors = directions(model, 2)
    singles = [{n: v.float() for n, v in vector.items()} for vector in vectors]
    expected = matrix @ dense_fisher(mlp(), (inputs.double(),), CategoricalLoss()) @ matrix.mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gram = fisher_gram(model, (inputs,), CategoricalLoss(), singles)
        product = fisher_vector_product(model, (inputs,), CategoricalLoss(), singles[0])
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), expected, rtol=0.05, atol=0.05)
    assert all(value.dtype == torch.float32 for value in product.values())
    along = inner_products([product], singles)[0]
    torch.testing.assert_close(along.double(), expected[0], rtol=0.05, atol=0.05)
