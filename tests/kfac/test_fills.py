"""Outputs that a network masks itself: what a mask fills in says nothing of the other numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, KFACConfig, fill_bound
from acktr.kfac.fisher.followed import near, same

FILLS = [-torch.inf, -1e9, -1e4, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("fill", FILLS)
def test_what_is_filled_is_told_from_the_rest(fill: float) -> None:
    logits = torch.tensor([[0.0, -3.0, 2.0], [fill, 1.0, fill]])
    assert (logits < fill_bound(logits)).tolist() == [[False] * 3, [True, False, True]]
    assert not (torch.full((2, 2), -1e6) < fill_bound(torch.full((2, 2), -1e6))).any()
    assert not (torch.zeros(3) < fill_bound(torch.zeros(3))).any()


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("added", [False, True])
def test_outputs_are_compared_by_what_is_not_filled(fill: float, added: bool) -> None:
    """Both where a mask replaces and where it is added, which rounds the logits away."""
    torch.manual_seed(0)
    logits, ok = torch.randn(64, 5), torch.rand(64, 5) > 0.4

    def masked(values: Tensor) -> Tensor:
        return values + torch.where(ok, 0.0, fill) if added else values.masked_fill(~ok, fill)

    rounded, other = logits * (1 + 1e-6), logits + 0.01 * torch.randn(64, 5)
    for alike in (near, same):
        assert alike(masked(logits), masked(rounded), 0.0)
        assert not alike(masked(logits), masked(other), 0.0)
    assert near(masked(logits), masked(logits * (1 + 1e-5)), 0.0)
    assert not near(masked(logits), logits.masked_fill(ok, fill), 0.0)
    assert not near(masked(logits), torch.full_like(logits, torch.nan), 0.0)


def test_a_column_of_large_negative_numbers_is_compared_too() -> None:
    first = torch.tensor([[-1e6, 0.5], [-2e6, 1.0]])
    assert near(first, first * (1 + 1e-6), 0.0)
    for place in range(2):
        second = first.clone()
        second[:, place] *= 1.01
        assert not near(first, second, 0.0)


class Masked(nn.Module):
    """Gives no fourth class, by a number in place of its logit."""

    def __init__(self, fill: float | None, between: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), between, nn.Tanh(), nn.Linear(16, 4))
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        if self.fill is None:
            return logits
        return logits.masked_fill(torch.tensor([False, False, False, True]), self.fill)


def trained(fill: float | None, between: nn.Module) -> tuple[bool, Tensor]:
    """Whether steps are measured on whole batches, and the real KL of the last one."""
    torch.manual_seed(0)
    module = Masked(fill, between)
    optimizer, loss = KFAC(module, KFACConfig(kl_clip=1.0)), CategoricalLoss()
    x = torch.randn(512, 8)
    classes = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for _ in range(8):
        with optimizer.capture() as captured:
            output = module(x)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, classes).backward()
        optimizer.step(outputs=lambda: module(x))
    region = optimizer.curvature.region.corrected
    assert region is not None and optimizer.last_step is not None
    spent = optimizer.last_step.spent_kl
    assert spent is not None
    return region.whole, spent


@pytest.mark.parametrize("fill", [None, *FILLS])
def test_a_part_of_a_batch_stands_for_it_unless_it_gives_something_else(
    fill: float | None,
) -> None:
    whole, spent = trained(fill, nn.Identity())
    assert not whole and torch.isfinite(spent)
    assert trained(fill, nn.Dropout(0.5))[0]
    assert trained(fill, nn.BatchNorm1d(16))[0]


def test_steps_do_not_depend_on_how_it_is_filled() -> None:
    (_, first), *others = (trained(fill, nn.Identity()) for fill in FILLS)
    for _, spent in others:
        assert torch.allclose(spent, first, rtol=1e-4)
