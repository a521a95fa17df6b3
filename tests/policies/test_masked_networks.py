"""Networks of one's own that mask their logits themselves are checked as others are."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acktr import ACKTRUpdate, Auxiliary, Config, ConfigError
from acktr.kfac import BernoulliLoss, CategoricalLoss

SPACE = gymnasium.spaces.Discrete(5)


class Actor(nn.Module):
    def __init__(self, fill: float | None, dropout: float = 0.0, leak: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)
        self.dropout, self.fill, self.leak = nn.Dropout(dropout), fill, leak

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(torch.tanh(self.first(x)))
        hidden = hidden + hidden.mean(0) if self.leak else hidden
        logits: Tensor = self.last(hidden)
        allowed = torch.tensor([True, False, True, True, False])
        return logits if self.fill is None else logits.masked_fill(~allowed, self.fill)


def checked(actor: Actor) -> bool:
    """Whether training and evaluation differ, as a learner finds out at the first batch."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    update = ACKTRUpdate((actor, critic), SPACE)
    rows = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)
    actions = np.tile([0, 2, 3, 0], 8)
    update(rows, actions, rows[:, 0], rows[:, 1])
    return update.network.modal


@pytest.mark.parametrize("fill", [None, -1e9, -1e4, torch.finfo(torch.float32).min])
def test_dropout_and_leaks_are_found(fill: float | None) -> None:
    assert not checked(Actor(fill))
    assert checked(Actor(fill, dropout=0.5))
    with pytest.raises(ConfigError, match="depends on the other observations"):
        checked(Actor(fill, leak=True))


def test_targets_that_weigh_terms_are_not_learned_in_parts() -> None:
    """A part has other weights than the whole, so that its mean would be another loss."""
    network = nn.Linear(6, 8)
    config = Config(env="own", algo="acktr", micro_batch=8)
    for loss in (CategoricalLoss(ignore_index=-1), CategoricalLoss(class_weights=torch.ones(2))):
        extra = {"extra": Auxiliary(loss, target=lambda batch: batch.actions)}
        with pytest.raises(ConfigError, match=r"auxiliary\['extra'\]: .* micro_batch must be null"):
            ACKTRUpdate(network, SPACE, config, auxiliary=extra)
    fit = {"extra": Auxiliary(BernoulliLoss(), target=lambda batch: batch.actions)}
    ACKTRUpdate(network, SPACE, config, auxiliary=fit)
