"""The categorical loss is torch's cross-entropy."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from acktr.kfac import (
    CategoricalLoss,
)
from tests.kfac.test_weights import tokens
from tests.tools.exact import close
from tests.tools.kfac import randn, seeded


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3), (3, 5, 2, 4)])
@pytest.mark.parametrize("class_dim", [1, -1])
def test_the_objective_is_torchs_cross_entropy(shape: tuple[int, ...], class_dim: int) -> None:
    logits, target = randn(*shape), tokens(shape[0], *shape[2:], size=5)
    given = logits if class_dim == 1 else logits.movedim(1, -1)
    weights = torch.rand(5, generator=seeded(3), dtype=torch.float64) + 0.1
    for ignored, classes, reduction in itertools.product(
        (None, -100, 2), (None, weights), ("mean", "sum")
    ):
        labels = target.clone()
        if ignored == -100:
            labels.view(-1)[::3] = -100
        kept = -100 if ignored is None else ignored
        loss = CategoricalLoss(
            reduction=reduction,  # type: ignore[arg-type]
            class_dim=class_dim,
            ignore_index=ignored,
            class_weights=classes,
        )
        right = functional.cross_entropy(
            logits, labels, weight=classes, ignore_index=kept, reduction=reduction
        )
        assert float(loss(given, labels)) == pytest.approx(float(right), rel=1e-13)
    soft = randn(*shape, seed=4).softmax(1)
    found = CategoricalLoss(class_dim=class_dim)(
        given, soft if class_dim == 1 else given * 0 + soft.movedim(1, -1)
    )
    assert float(found) == pytest.approx(float(functional.cross_entropy(logits, soft)), rel=1e-13)


def test_probabilities_of_zero_are_compatible_with_masked_classes() -> None:
    logits = torch.tensor([[0.3, -torch.inf, 1.0]], requires_grad=True)
    loss = CategoricalLoss()(logits, torch.tensor([[0.25, 0.0, 0.75]]))
    loss.backward()
    assert bool(loss.isfinite()) and bool(logits.grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        (CategoricalLoss(), torch.zeros(4, 3, dtype=torch.int64), r"class_dim=1"),
        (CategoricalLoss(), torch.full((4, 5, 3), 0.5), "must have the sum 1"),
        (CategoricalLoss(class_dim=3), torch.zeros(4, 5, dtype=torch.int64), r"\(N, D, ...\)"),
        (CategoricalLoss(class_weights=torch.ones(4)), torch.zeros(4, 5).long(), "4 class_weights"),
        (CategoricalLoss(ignore_index=0), torch.zeros(4, 5).long(), "not all zero"),
        (
            CategoricalLoss(class_weights=torch.ones(3)),
            torch.full((4, 5, 3), 1 / 3),
            "need classes as targets",
        ),
    ],
)
def test_targets_that_do_not_fit(loss: CategoricalLoss, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(4, 5, 3), target)


def test_classes_in_the_second_dimension_have_the_same_curvature() -> None:
    logits = randn(3, 4, 2)
    second, last = CategoricalLoss(class_dim=1), CategoricalLoss()
    tangent = randn(3, 4, 2, seed=5)
    found = second.hessian_product(logits, tangent)
    close(found, last.hessian_product(logits.mT, tangent.mT).mT)
    assert torch.equal(
        second.sampled(logits, seeded(2)), last.sampled(logits.mT.contiguous(), seeded(2))
    )
    roots = [list(loss.roots(z)) for loss, z in ((second, logits), (last, logits.mT))]
    assert [float(r) for r in roots[0]] == [float(r) for r in roots[1]]
