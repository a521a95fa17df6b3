"""Where this package and curvlinops 3.0.1 differ on purpose, and which of them is exact there.

The judge is curvlinops' own exact Gauss-Newton matrix, in a case in which a Kronecker product can
be exact: one datum, or a deep linear network with squared errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Empirical
from acktr.kfac.blocks.vectors import VectorBlock
from tests.tools.kfac import build, randn

pytest.importorskip("curvlinops")

from tests.tools.curvlinops_reference import (
    NETS,
    Problem,
    block_deviations,
    curvlinops,
    dense,
    deviation,
    layers,
    masked,
    whole,
)

EXACT = 1e-12
FAR = 0.05
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


class Pair(nn.Module):
    """Two uses of one weight, on the two halves of the inputs (N, 2, 3)."""

    def __init__(self, *, tied: bool, join: str, conv: bool = False) -> None:
        super().__init__()
        self.first, second = (
            nn.Conv2d(3, 2, 1, bias=False) if conv else nn.Linear(3, 2, bias=False)
            for _ in range(2)
        )
        if tied:
            self.second = second
            self.second.weight = self.first.weight
        self.tied, self.join, self.conv = tied, join, conv

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs[..., None, None] if self.conv else inputs
        again = self.second if self.tied else self.first
        outputs = torch.stack([self.first(inputs[:, 0]), again(inputs[:, 1])], 1)
        outputs = outputs.flatten(2)
        return outputs if self.join == "stack" else outputs.sum(1)


class AcrossPositions(nn.Module):
    """A linear map of the position dimension of (N, T, d), to another number of positions."""

    def __init__(self, old: int, new: int) -> None:
        super().__init__()
        self.weights = nn.Linear(old, new, bias=False)
        self.weights.weight.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        mixed: Tensor = self.weights(inputs.movedim(1, -1))
        return mixed.movedim(-1, 1)


def check_ours_is_exact(case: Problem) -> tuple[Tensor, Tensor]:
    """Our and their matrix; ours is the Gauss-Newton matrix in its blocks, theirs is not in one."""
    ours, theirs = case.ours(), dense(case.theirs())
    matrix, exact = whole(ours), masked(case.gauss_newton(), ours)
    assert (block_deviations(matrix, exact, ours) < EXACT).all()
    assert block_deviations(masked(theirs, ours), exact, ours).max() > FAR
    return matrix, theirs


@both_sharings
@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int, sharing: Any) -> None:
    """We keep one pair of factors for each group, and none of the products between groups.

    They average the input channels of all groups into one A and keep one G of all outputs.
    """
    conv = nn.Conv2d(4, 4, 2, groups=groups)
    net = build(conv, nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    case = Problem(net, randn(1, 4, 2, 2, seed=1), sharing=sharing)
    check_ours_is_exact(case)
    block, operator = layers(case.ours())[0], case.theirs()
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    width = 4 * 4 // groups + 1
    assert block.a.mean().shape == (groups, width, width)
    assert block.g.mean().shape == (groups, 4 // groups, 4 // groups)
    assert state["input_covariances"]["0"].shape == (width, width)
    assert state["gradient_covariances"]["0"].shape == (4, 4)


@both_sharings
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: Any, sharing: Any) -> None:
    """They pad with zeros whatever the layer's padding_mode is; we pad as the layer does."""
    conv = nn.Conv2d(2, 3, 4, padding=1, padding_mode=mode)
    net = build(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3, 3))
    check_ours_is_exact(Problem(net, randn(1, 2, 2, 2, seed=2), sharing=sharing))


@pytest.mark.parametrize("name", ["mlp", "strided", "pooled series"])
def test_separate_bias(name: str) -> None:
    """By default they treat a bias apart from its weight; for us it is always a column of it.

    Theirs is then our matrix without the products between weight and bias, which are curvature.
    """
    case = Problem(*NETS[name]())
    ours, theirs = case.ours(), case.theirs(separate_weight_and_bias=True)
    apart = torch.zeros_like(whole(ours))
    start = 0
    for parameter in ours.named.values():
        part = slice(start, start + parameter.numel())
        apart[part, part] = whole(ours)[part, part]
        start += parameter.numel()
    assert deviation(apart, dense(theirs)) < EXACT
    assert deviation(apart, whole(ours)) > FAR


@pytest.mark.parametrize("conv", [False, True])
def test_layer_used_twice_expanded(conv: bool) -> None:
    """Uses are like positions for us: A is their mean. They add them up, for twice the curvature.

    Judged where each use has a loss of its own, in a linear network with squared errors.
    """
    net = build(Pair(tied=False, join="stack", conv=conv))
    case = Problem(net, randn(5, 2, 3, seed=3), "squared error")
    matrix, theirs = check_ours_is_exact(case)
    assert deviation(theirs, 2 * matrix) < EXACT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_uses_reduced(tied: bool, conv: bool) -> None:
    """Inputs are averaged and gradients added over uses for us; they have no terms between uses.

    Judged where the uses are added up, so that both have the same gradient.
    """
    net = build(Pair(tied=tied, join="sum", conv=conv), nn.Tanh(), nn.Linear(2, 3))
    check_ours_is_exact(Problem(net, randn(1, 2, 3, seed=4), sharing="reduce"))


def test_tied_layers() -> None:
    """Layers that share a weight share a block for us; theirs is that of the last layer alone."""
    net = build(Pair(tied=True, join="stack"))
    case = Problem(net, randn(5, 2, 3, seed=5), "squared error")
    matrix, theirs = check_ours_is_exact(case)
    a = case.inputs[:, 1].mT @ case.inputs[:, 1] / 5
    assert deviation(theirs, torch.kron(torch.eye(2).double() / 2, a)) < EXACT
    assert [block.names for block in layers(case.ours())] == [("0.first.weight",)]
    assert deviation(theirs, matrix) > FAR


@pytest.mark.parametrize("kind", ["cross-entropy", "squared error", "binary"])
def test_terms_of_several_positions_reduced(kind: Any) -> None:
    """A loss for each of T positions: we send a root of each term back by itself.

    They send those of all positions back together, and "reduce" then adds products between
    different terms, which the Gauss-Newton matrix does not have; judged with equal positions, where
    theirs is T times as large.
    """
    net = build(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    inputs = randn(1, 1, 3, seed=6).expand(1, 5, 3).contiguous()
    matrix, theirs = check_ours_is_exact(Problem(net, inputs, kind, sharing="reduce"))
    assert deviation(theirs, 5 * matrix) < EXACT


@both_sharings
@pytest.mark.parametrize("kind", ["cross-entropy", "squared error", "binary"])
def test_terms_that_share_positions(kind: Any, sharing: Any) -> None:
    """The same, for a layer each of whose positions enters several terms: here one enters all."""
    net = build(nn.Linear(3, 3), AcrossPositions(1, 4), nn.Tanh())
    check_ours_is_exact(Problem(net, randn(1, 1, 3, seed=7), kind, sharing=sharing))


def test_empirical_fisher_of_means() -> None:
    """torch's mean is over the D outputs too, so that the loss of a datum is 1/D of a sum.

    We square the gradients of the loss as it is. They scale them by sqrt(D), with which the
    *sampled* Fisher of a fixed noise variance is right: D times our empirical Fisher.
    """
    case = Problem(*NETS["mlp"](), "squared error")
    ours, theirs = case.ours(Empirical(case.targets)), case.theirs(fisher_type="empirical")
    assert deviation(dense(theirs), 3 * whole(ours)) < EXACT


def test_dead_layer_with_factored_damping() -> None:
    """A layer without gradients has G = 0, for which the trace ratio pi is not defined.

    The limit of the factored inverse is the gradient over lambda, which is what we return. They
    fall back to lambda in both factors: (A + lambda)^-1 lambda^-1.
    """
    net = build(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-100)
    case = Problem(net, randn(5, 3, seed=8))
    gradients = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    ours = case.ours(structure="kfac_factored", damping=0.1)
    a = layers(ours)[0].a.mean()
    found = ours.direction(gradients)
    assert deviation(found["0.weight"], 10 * gradients["0.weight"]) < 1e-6
    inverse = curvlinops.KFACInverseLinearOperator(
        case.theirs(), damping=0.1, use_heuristic_damping=True
    )
    theirs = (inverse @ list(gradients.values()))[0]
    ones = torch.ones(4, 4, dtype=torch.float64)
    wanted = 10 * ones @ torch.linalg.inv(a + 0.1 * torch.eye(4).double())
    assert deviation(theirs, wanted[:, :3]) < EXACT
    assert deviation(theirs, found["0.weight"]) > FAR


def test_bias_alone_at_several_positions() -> None:
    """A bias whose weight is frozen has one gradient a datum for us, the sum over its positions.

    That is its exact second moment. They add the positions' squares with "expand".
    """
    net = build(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    net.get_parameter("0.weight").requires_grad_(False)
    case = Problem(net, randn(5, 2, 3, seed=9))
    block = case.ours().stats["0.bias"]
    assert isinstance(block, VectorBlock)
    exact = case.gauss_newton()[:4, :4]
    assert deviation(block.moment.mean(), exact) < EXACT
    assert deviation(dense(case.theirs())[:4, :4], exact) > FAR


ONE_POSITION: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "conv1d": lambda: (nn.Conv1d(2, 4, 3), randn(1, 2, 3)),
    "conv3d": lambda: (nn.Conv3d(2, 4, (1, 2, 3)), randn(1, 2, 1, 2, 3)),
    "embedding": lambda: (nn.Embedding(5, 4), torch.tensor([[2]])),
    "uneven padding": lambda: (nn.Conv2d(2, 4, 2, padding="same"), randn(1, 2, 1, 1)),
}


@pytest.mark.parametrize("name", ONE_POSITION)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_layers_that_only_we_have(name: str) -> None:
    """They know linear layers and two-dimensional convolutions with even padding."""
    cases = []
    for _ in range(2):  # an error leaves their hooks in the network
        layer, inputs = ONE_POSITION[name]()
        cases.append(Problem(build(layer, nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)), inputs))
    with pytest.raises(NotImplementedError):
        dense(cases[0].theirs())
    ours, exact = cases[1].ours(), cases[1].gauss_newton()
    assert len(layers(ours)) == 2
    assert (block_deviations(whole(ours), exact, ours) < EXACT).all()


@pytest.mark.parametrize("name", ["series", "pixels"])
def test_corrected_eigenvalues_with_several_terms(name: str) -> None:
    """They have no corrected eigenvalues for outputs with positions; for us each root is squared.

    The correction leaves the trace of the exact matrix, whatever the basis.
    """
    with pytest.raises(ValueError, match="Only 2d output"):
        dense(Problem(*NETS[name]()).theirs("EKFACLinearOperator"))  # leaves its hooks behind
    case = Problem(*NETS[name]())
    ours = case.ours(structure="ekfac")
    assert deviation(whole(ours).trace(), case.gauss_newton().trace()) < EXACT
