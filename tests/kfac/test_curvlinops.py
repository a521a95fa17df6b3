"""Factors, blocks and damped inverses agree with the independent library curvlinops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Empirical, Preconditioner, dense_fisher
from tests.tools.kfac import basis, randn

pytest.importorskip("curvlinops")

from tests.tools.curvlinops_reference import (
    KINDS,
    NETS,
    REDUCTIONS,
    SEVERAL_TERMS,
    Problem,
    block_deviations,
    curvlinops,
    dense,
    deviation,
    layers,
    masked,
    whole,
)

CLOSE = 1e-12
SOLVED = 1e-8
"""For what went through a decomposition and a division by the damping."""
SHARINGS = [(name, "expand") for name in NETS]
SHARINGS += [(name, "reduce") for name in NETS if name not in SEVERAL_TERMS]
DAMPINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {"use_exact_damping": True}),
    "factored": ({"structure": "kfac_factored"}, {"use_heuristic_damping": True}),
    "cholesky": (
        {"structure": "cholesky"},
        {"use_heuristic_damping": True},
    ),
}

every_net = pytest.mark.parametrize(("name", "sharing"), SHARINGS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def problem(
    name: str, sharing: Any = "expand", kind: Any = KINDS[0], reduction: Any = "mean"
) -> Any:
    return Problem(*NETS[name](), kind, reduction, sharing)


def their_step(operator: Any, gradients: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    inverse = curvlinops.KFACInverseLinearOperator(operator, **settings)
    return dict(zip(gradients, inverse @ list(gradients.values()), strict=True))


def check_blocks(found: Tensor, expected: Tensor, ours: Preconditioner) -> None:
    assert (block_deviations(found, expected, ours) < CLOSE).all()
    assert deviation(found, expected) < CLOSE  # also zero between the blocks


def check_steps(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, step in theirs.items():
        assert deviation(ours[name], step) < SOLVED, name


@every_net
@every_kind
@every_reduction
def test_factors_and_blocks(name: str, sharing: str, kind: str, reduction: str) -> None:
    """A and G themselves agree: both libraries give the positions to A's mean and G's sum."""
    case = problem(name, sharing, kind, reduction)
    ours, theirs = case.ours(), case.theirs()
    matrix = dense(theirs)
    state = theirs.state_dict()
    assert len(layers(ours)) == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in case.net)
    for block in layers(ours):
        assert deviation(block.a.mean(), state["input_covariances"][block.name]) < CLOSE
        assert deviation(block.g.mean(), state["gradient_covariances"][block.name]) < CLOSE
    check_blocks(whole(ours), matrix, ours)


@every_net
@every_kind
@pytest.mark.parametrize("damping", [0.3, 1e-3])
def test_damped_inverses(name: str, sharing: str, kind: str, damping: float) -> None:
    case = problem(name, sharing, kind)
    gradients, operator = case.gradients(), case.theirs()
    for mine, their in DAMPINGS.values():
        ours = case.ours(damping=damping, **mine).direction(gradients)
        check_steps(ours, their_step(operator, gradients, damping=damping, **their))


@pytest.mark.parametrize("name", ["mlp", "strided"])
@pytest.mark.parametrize("how", DAMPINGS)
def test_damped_inverses_of_sums(name: str, how: str) -> None:
    mine, their = DAMPINGS[how]
    for kind in KINDS:
        case = problem(name, "expand", kind, "sum")
        gradients = case.gradients()
        ours = case.ours(damping=0.1, **mine).direction(gradients)
        check_steps(ours, their_step(case.theirs(), gradients, damping=0.1, **their))


@pytest.mark.parametrize("name", NETS)
@every_kind
@every_reduction
def test_exact_fisher_and_objective(name: str, kind: str, reduction: str) -> None:
    """The exact matrix, all products between layers included, and the value of the loss."""
    case = problem(name, "expand", kind, reduction)
    ours = dense_fisher(case.our_net, (case.inputs,), case.loss)
    assert deviation(ours, case.gauss_newton()) < CLOSE
    targets = (case.targets,) if kind == "binary" else case.targets
    with torch.no_grad():
        value = case.loss(case.our_net(case.inputs), targets)
        assert deviation(value, case.torch_loss(case.their_net(case.inputs), case.targets)) < CLOSE


@every_reduction
def test_blocks_are_exact_for_a_deep_linear_network(reduction: str) -> None:
    """With squared errors, where K-FAC is a theorem, against their exact Gauss-Newton matrix."""
    case = problem("deep linear", "expand", "squared error", reduction)
    ours = case.ours()
    check_blocks(whole(ours), masked(case.gauss_newton(), ours), ours)


@pytest.mark.parametrize("name", ["mlp", "series", "pooled conv"])
@every_reduction
def test_batches_of_different_sizes(name: str, reduction: str) -> None:
    """Their loader of several batches is our accumulation of micro-batches."""
    for kind in KINDS:
        case = problem(name, "expand", kind, reduction)
        inputs = case.inputs
        case = replace(case, inputs=torch.cat([inputs, randn(1, *inputs.shape[1:], seed=3)]))
        theirs = case.theirs(batches=3)
        for ours in (case.ours(), case.ours(batches=3)):
            check_blocks(whole(ours), dense(theirs), ours)


@pytest.mark.parametrize("name", NETS)
@every_reduction
def test_empirical_fisher(name: str, reduction: str) -> None:
    for kind in KINDS:
        if reduction == "mean" and kind == "squared error":
            continue  # another noise variance: test_curvlinops_differences
        case = problem(name, "expand", kind, reduction)
        targets = (case.targets,) if kind == "binary" else case.targets
        ours, theirs = case.ours(Empirical(targets)), case.theirs(fisher_type="empirical")
        check_blocks(whole(ours), dense(theirs), ours)


# --- corrected eigenvalues ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETS if name not in SEVERAL_TERMS])
@every_kind
@every_reduction
def test_corrected_eigenvalues(name: str, kind: str, reduction: str) -> None:
    case = problem(name, "expand", kind, reduction)
    ours, theirs = case.ours(structure="ekfac", damping=0.01), case.theirs("EKFACLinearOperator")
    matrix = dense(theirs)
    check_blocks(whole(ours), matrix, ours)
    if name != "deep linear":
        assert deviation(whole(case.ours()), matrix) > 1e-3
    gradients = case.gradients()
    step = their_step(theirs, gradients, damping=0.01, use_exact_damping=True)
    check_steps(ours.direction(gradients), step)


def in_our_basis(case: Problem, ours: Preconditioner) -> Any:
    """Their corrected eigenvalues in our eigenvectors."""
    theirs = case.theirs("EKFACLinearOperator")
    state = theirs.state_dict()
    for place, key in ((1, "input"), (3, "gradient")):
        vectors = {block.name: basis(block)[place] for block in layers(ours)}
        state[f"{key}_covariances_eigenvectors"] = vectors
    with pytest.warns(UserWarning, match="overwrite the parameters"):
        theirs.load_state_dict(state)
    theirs.compute_eigenvalue_correction()
    return theirs


@pytest.mark.parametrize("name", [name for name in NETS if name not in SEVERAL_TERMS])
@every_kind
def test_corrected_eigenvalues_in_a_reduced_basis(name: str, kind: str) -> None:
    """Averaged inputs leave A singular: within its null space every basis is as good as another.

    The correction sees inputs of single positions, which reach into that space, and so depends on
    the basis there. With the same basis both agree; with each its own, the trace does.
    """
    case = problem(name, "reduce", kind)
    ours = case.ours(structure="ekfac")
    matrix = whole(ours)
    check_blocks(matrix, dense(in_our_basis(case, ours)), ours)
    own = dense(case.theirs("EKFACLinearOperator"))
    assert deviation(matrix.trace(), own.trace()) < CLOSE
