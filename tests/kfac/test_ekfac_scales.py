"""EKFAC keeps its scales in every new basis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KroneckerBlock,
    Sampled,
)
from acktr.kfac.config import Structure
from tests.kfac.test_ekfac import NETS, dense, ekfac, every_net, vectors
from tests.tools import exact as exact_helpers
from tests.tools.exact import Seen, close, gap, observed, stored, within_four_standard_errors
from tests.tools.kfac import basis, build, plain_config, randn, scales, seeded


def batch_scales(seen: Seen, block: KroneckerBlock) -> Tensor:
    """The diagonal of the batch's exact block in the present basis."""
    q = torch.kron(*reversed(vectors(block)))
    return (q.mT @ seen.truth(block.name) @ q).diagonal().reshape(scales(block).shape)


def test_scales_start_at_the_products_of_eigenvalues_and_average_from_there() -> None:
    model, inputs, _ = NETS["multi-sample MLP"]
    seen = observed(model, inputs, CategoricalLoss(), structure="ekfac", stat_decay=0.7)
    block = seen.layer("0")
    seen.curvature.refresh()
    a_values, _, g_values, _ = basis(block)
    start = g_values[:, None] * a_values
    close(scales(block), start)
    close(dense(block), stored(block))  # K-FAC itself
    total, weight = 0.3 * start, 0.3  # the start weighs as much as one batch
    for count in range(3):
        seen.inputs = randn(7, 4, seed=count)
        seen.again()
        total, weight = 0.7 * total + 0.3 * batch_scales(seen, block), 0.7 * weight + 0.3
        close(scales(block), total / weight)


def groups_of(matrix: Tensor) -> list[Tensor]:
    return [matrix] if matrix.dim() == 2 else list(matrix)


MOVING: dict[str, tuple[nn.Module, Callable[[int], Tensor]]] = {
    "positions": (
        build(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3), seed=3),
        lambda seed: randn(5, 3, 4, seed=seed),
    ),
    "groups": (
        build(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3), seed=2),
        lambda seed: randn(5, 4, 4, seed=seed),
    ),
    "tokens": (
        build(nn.Embedding(6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3), seed=4),
        lambda seed: torch.randint(6, (8, 3), generator=seeded(seed)),
    ),
}


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("kind", MOVING)
def test_the_average_goes_on_in_every_new_basis(kind: str, interval: int) -> None:
    """Against dense matrices in the bases of eigh, with the diagonal of Q' Q diag(s) Q^T Q'^T."""
    model, batch = MOVING[kind]
    seen = observed(model, batch(0), CategoricalLoss(), structure="ekfac", stat_decay=0.8)
    block = seen.layer("0")
    groups = len(groups_of(block.g.value))
    bases: list[Tensor] = []
    sums: list[Tensor] = []
    weight = 0.2
    for turn in range(7):
        if turn:
            seen.inputs = batch(turn)
            seen.again()
            truth = exact_helpers.within_groups(seen.truth("0"), groups).chunk(groups)
            for k, q in enumerate(bases):
                part = truth[k].chunk(groups, dim=1)[k]
                sums[k] = 0.8 * sums[k] + 0.2 * (q.mT @ part @ q).diagonal()
            weight = 0.8 * weight + 0.2
        if turn % interval == 0:
            seen.curvature.refresh()
            a, g = block.a.mean(), block.g.mean()
            new = []
            for left, right in zip(
                groups_of(g), groups_of(a.diag_embed() if a.dim() == 1 else a), strict=True
            ):
                q_a = torch.eye(len(right)).double()
                if a.dim() > 1:
                    q_a = torch.linalg.eigh(right)[1].contiguous()
                new.append(torch.kron(torch.linalg.eigh(left)[1].contiguous(), q_a))
            if turn == 0:
                factors = zip(groups_of(g), groups_of(a.diag() if a.dim() == 1 else a), strict=True)
                dense_sums = [0.2 * torch.kron(*pair) for pair in factors]
            else:
                dense_sums = [q @ s.diag() @ q.mT for q, s in zip(bases, sums, strict=True)]
            bases = new
            sums = [(q.mT @ s @ q).diagonal() for q, s in zip(bases, dense_sums, strict=True)]
        close(scales(block).flatten(), torch.cat(sums) / weight)


@every_net
def test_a_refresh_alone_keeps_traces_and_in_the_same_basis_everything(net: str) -> None:
    model, inputs, name = NETS[net]
    seen = observed(model, inputs, CategoricalLoss(), structure="ekfac", stat_decay=0.5)
    block = seen.layer(name)
    seen.curvature.refresh()
    seen.again()
    before = scales(block)
    seen.curvature.refresh()
    close(scales(block), before)
    turned = torch.linalg.qr(randn(len(block.g.value), len(block.g.value), seed=6))[0]
    block.g.load(turned @ block.g.value @ turned.mT, block.g.weight)
    seen.curvature.refresh()
    assert gap(scales(block), before) > 0.01
    close(scales(block).sum(), before.sum())


def test_a_batch_whose_parts_are_on_both_sides_of_a_refresh_is_whole() -> None:
    seen, block = ekfac("conv")
    whole = scales(block)
    for part, last in ((seen.inputs[:2], False), (seen.inputs[2:], True)):
        with seen.curvature.capture() as captured:
            output = seen.model(part)
        seen.curvature.observe(captured, output, seen.loss, source=Exact(), last=last)
        seen.curvature.refresh()  # of the same factors
    close(scales(block), whole)


def trained(structure: Structure, interval: int) -> list[Tensor]:
    """The parameters after each of four steps."""
    model = build(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), seed=5)
    optimizer = KFAC(model, plain_config(structure=structure, refresh_interval=interval, lr=0.1))
    found = []
    for turn in range(4):
        inputs = randn(20, 2, 4, seed=turn)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, CategoricalLoss())
        optimizer.zero_grad()
        CategoricalLoss()(output, inputs[:, 0, :3].argmax(1)).backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return found


@pytest.mark.parametrize("interval", [1, 3])
def test_no_step_but_the_first_is_that_of_kfac(interval: int) -> None:
    plain, corrected = trained("kfac", interval), trained("ekfac", interval)
    errors = [gap(one, other) for one, other in zip(plain, corrected, strict=True)]
    assert errors[0] < 1e-12
    assert min(errors[1:]) > 1e-4


@pytest.mark.parametrize("delay", [None, 2])
def test_scales_remember_more_batches_than_an_interval(delay: int | None) -> None:
    """Those of a fixed network come near the exact ones, and stay there after a refresh."""
    model = build(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), seed=1)
    config = plain_config(
        structure="ekfac", refresh_interval=4, refresh_delay=delay, lr=1e-12, kl_clip=None
    )
    optimizer = KFAC(model, config)
    data = randn(256, 6, seed=0) * torch.logspace(0.5, -1, 6).double()
    seen = Seen(model, data, CategoricalLoss(), optimizer.curvature)
    block = seen.layer("0")
    errors = []
    for turn in range(44):
        inputs = data[turn % 16 :: 16]
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, CategoricalLoss())
        optimizer.zero_grad()
        CategoricalLoss()(output, torch.zeros(len(inputs), dtype=torch.long)).backward()
        optimizer.step()
        if turn in (39, 40, 43):
            errors.append(gap(scales(block), batch_scales(seen, block)))
    a_values, _, g_values, _ = basis(block)
    plain = gap(torch.outer(g_values, a_values), batch_scales(seen, block))
    optimizer.close()
    assert max(errors) < 0.4 * plain, (errors, plain)


def test_with_the_usual_decay_the_start_fades_within_an_interval() -> None:
    model, inputs, _ = NETS["multi-sample MLP"]
    seen = observed(model, inputs, CategoricalLoss(), structure="ekfac", stat_decay=0.99)
    block = seen.layer("0")
    seen.curvature.refresh()
    start = scales(block)
    for _ in range(9):
        seen.again()
    exact = batch_scales(seen, block)
    left = (scales(block) - exact).norm() / (start - exact).norm()
    assert left < 0.11


def test_where_kfac_is_exact_ekfac_is_the_same() -> None:
    model = build(nn.Linear(4, 5), nn.Linear(5, 3, bias=False))
    seen = observed(model, randn(8, 4), GaussianLoss(), structure="ekfac", stat_decay=0.0)
    seen.curvature.refresh()
    seen.again()
    for name in ("0", "1"):
        close(dense(seen.layer(name)), seen.truth(name))


def test_parts_of_a_batch_give_the_scales_of_the_whole() -> None:
    seen, block = ekfac("conv")
    whole = scales(block)
    for part, last in (
        (seen.inputs[:1], False),
        (seen.inputs[1:4], False),
        (seen.inputs[4:], True),
    ):
        with seen.curvature.capture() as captured:
            output = seen.model(part)
        seen.curvature.observe(captured, output, seen.loss, source=Exact(), last=last)
    close(scales(block), whole)


def test_sampled_scales_are_within_four_standard_errors_of_the_exact() -> None:
    seen, block = ekfac("shared linear")
    exact = scales(block)
    draws = []
    for _ in range(400):
        seen.again(Sampled())
        draws.append(scales(block))
    within_four_standard_errors(torch.stack(draws), exact)
