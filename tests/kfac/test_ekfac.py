"""EKFAC: its scales, and its distance to the exact block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from acktr.kfac import (
    CategoricalLoss,
    Empirical,
    KroneckerBlock,
)
from acktr.kfac.config import Sharing
from acktr.kfac.losses.likelihoods import Reduction
from tests.tools import exact as exact_helpers
from tests.tools.exact import Seen, close, gap, observed, stored
from tests.tools.kfac import basis, build, randn, scales, seeded, set_basis
from tests.tools.losses import REDUCTIONS
from tests.tools.product_cases import Tied, filled

NETS: dict[str, tuple[nn.Module, Tensor, str]] = {
    "multi-sample MLP": (
        build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        randn(7, 4),
        "0",
    ),
    "shared linear": (
        build(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
        randn(6, 3, 4),
        "0",
    ),
    "conv": (
        build(nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)),
        randn(6, 2, 3, 3),
        "0",
    ),
    "embedding": (
        build(nn.Embedding(5, 3, padding_idx=2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)),
        torch.randint(5, (8, 3), generator=seeded(1)),
        "0",
    ),
    "several uses": (filled(Tied()), randn(6, 3), "twice"),
    "tied": (filled(Tied()), randn(6, 3), "first"),
}
every_net = pytest.mark.parametrize("net", NETS)


def ekfac(
    net: str, sharing: Sharing = "expand", reduction: Reduction = "mean", **settings: Any
) -> tuple[Seen, KroneckerBlock]:
    """The basis of one batch and, with no memory of the start, the scales of the same batch."""
    model, inputs, name = NETS[net]
    seen = observed(
        model,
        inputs,
        CategoricalLoss(reduction=reduction),
        structure="ekfac",
        stat_decay=0.0,
        linear_sharing=sharing,
        conv_sharing=sharing,
        **settings,
    )
    seen.curvature.refresh()
    seen.again()
    return seen, seen.layer(name)


def vectors(block: KroneckerBlock) -> tuple[Tensor, Tensor]:
    values, a_vectors, _, g_vectors = basis(block)
    full = torch.eye(len(values)).double() if a_vectors is None else a_vectors
    return full, g_vectors


def dense(block: KroneckerBlock) -> Tensor:
    """Q diag(s) Q^T."""
    a_vectors, g_vectors = vectors(block)
    q = torch.kron(g_vectors, a_vectors)
    return q @ scales(block).flatten().diag() @ q.mT


def sample_matrices(seen: Seen, block: KroneckerBlock, scalars: Any) -> list[list[Tensor]]:
    """Gradient of every scalar for every sample as the block's matrix, one backward pass each."""
    everything = {n: p.detach() for n, p in seen.model.named_parameters()}
    found = []
    for n in range(len(seen.inputs)):
        chosen = {name: everything[name].clone().requires_grad_() for name in block.names}
        output = functional_call(seen.model, {**everything, **chosen}, (seen.inputs[n : n + 1],))
        rows = []
        for scalar in scalars(output, n):
            grads = torch.autograd.grad(scalar, list(chosen.values()), retain_graph=True)
            rows.append(block.layer.matrix(dict(zip(chosen, grads, strict=True))))
        found.append(rows)
    return found


@every_net
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scales_are_squared_rotated_gradients_summed_over_positions_first(
    net: str, sharing: Sharing, reduction: Reduction
) -> None:
    seen, block = ekfac(net, sharing, reduction)
    a_vectors, g_vectors = vectors(block)

    def roots(output: Tensor, _: int) -> Any:
        return CategoricalLoss().roots(output)

    wanted = torch.zeros_like(scales(block))
    for rows in sample_matrices(seen, block, roots):
        for matrix in rows:
            wanted += (g_vectors.mT @ matrix @ a_vectors).square()
    if reduction != "sum":
        wanted /= len(seen.inputs)
    close(scales(block), wanted)


@every_net
def test_scales_of_the_empirical_fisher(net: str) -> None:
    seen, block = ekfac(net)
    target = torch.randint(3, (len(seen.inputs),), generator=seeded(4))
    seen.again(Empirical(target))
    a_vectors, g_vectors = vectors(block)

    def losses(output: Tensor, n: int) -> Any:
        return [CategoricalLoss()(output, target[n : n + 1])]

    rows = sample_matrices(seen, block, losses)
    squares = [(g_vectors.mT @ found[0] @ a_vectors).square() for found in rows]
    close(scales(block), torch.stack(squares).mean(0))


@every_net
def test_scales_are_the_diagonal_of_the_exact_block_in_the_basis(net: str) -> None:
    seen, block = ekfac(net)
    a_vectors, g_vectors = vectors(block)
    q = torch.kron(g_vectors, a_vectors)
    truth = seen.truth(block.name)
    close(scales(block).flatten(), (q.mT @ truth @ q).diagonal())


@every_net
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_is_strictly_closer_to_the_exact_block_than_kfac(net: str, sharing: Sharing) -> None:
    seen, block = ekfac(net, sharing)
    truth = seen.truth(block.name)
    kronecker, corrected = gap(stored(block), truth), gap(dense(block), truth)
    assert 0 < corrected < kronecker - 1e-3


def test_a_grouped_convolution_has_scales_in_every_group() -> None:
    model = build(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), seed=2)
    seen = observed(model, randn(5, 4, 4), CategoricalLoss(), structure="ekfac", stat_decay=0.0)
    seen.curvature.refresh()
    seen.again()
    block = seen.layer("0")
    _, a_vectors, _, g_vectors = basis(block)
    assert a_vectors is not None
    size = len(seen.truth("0")) // 2
    truth = exact_helpers.within_groups(seen.truth("0"), 2)
    found = []
    for k in range(2):
        q = torch.kron(g_vectors[k], a_vectors[k])
        part = truth[k * size : (k + 1) * size, k * size : (k + 1) * size]
        mine = scales(block)[k].flatten()
        close(mine, (q.mT @ part @ q).diagonal())
        found.append(q @ mine.diag() @ q.mT)
    assert gap(torch.block_diag(*found), truth) < gap(stored(block), truth) - 1e-3


@every_net
def test_scales_and_step_do_not_depend_on_the_signs_of_the_eigenvectors(net: str) -> None:
    seen, block = ekfac(net)
    before, matrix = scales(block), dense(block)
    gradients = {n: randn(*p.shape, seed=3) for n, p in seen.curvature.named.items()}
    step = seen.curvature.direction(gradients)
    a_values, a_vectors, g_values, g_vectors = basis(block)
    g_signs = torch.tensor([(-1.0) ** i for i in range(len(g_values))]).double()
    a_signs = torch.tensor([(-1.0) ** (i // 2) for i in range(len(a_values))]).double()
    flipped = None if a_vectors is None else a_vectors * a_signs
    set_basis(block, a_values, flipped, g_values, -g_vectors * g_signs)
    seen.again()
    close(scales(block), before)
    close(dense(block), matrix)
    for name in block.names:
        close(seen.curvature.direction(gradients)[name], step[name])


@every_net
def test_scales_follow_the_order_of_the_eigenvectors(net: str) -> None:
    seen, block = ekfac(net)
    before, matrix = scales(block), dense(block)
    a_values, a_vectors, g_values, g_vectors = basis(block)
    set_basis(block, a_values, a_vectors, g_values.flip(0), g_vectors.flip(1))
    seen.again()
    close(scales(block), before.flip(0))
    close(dense(block), matrix)


# --- how scales are kept --------------------------------------------------------------------------
