"""The update alone refuses numbers from which a network would become NaN, or learn nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr import ConfigError
from tests.algorithms.test_update import UPDATES, general, parameters


class Free(nn.Module):
    """A Gaussian policy or the logits of three switches, of observations with two parts."""

    def __init__(self, gaussian: bool) -> None:
        super().__init__()
        self.layer, self.gaussian = nn.Linear(3, 3), gaussian
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, observations: dict[str, Tensor]) -> Any:
        found = self.layer(observations["near"] + observations["far"])
        return (found, self.log_std) if self.gaussian else found


class Worth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.layer(observations["near"] + observations["far"])
        return found


@pytest.mark.parametrize("algo", UPDATES)
@pytest.mark.parametrize("gaussian", [True, False])
def test_numbers_that_would_destroy_the_network_are_refused(algo: str, gaussian: bool) -> None:
    """In any call, and not where weights leave the sample out."""
    space: Any = spaces.Box(-1, 1, (3,)) if gaussian else spaces.MultiBinary(3)
    update = UPDATES[algo]((Free(gaussian), Worth()), space, general(algo))
    draw = torch.Generator().manual_seed(0)
    shown = {name: torch.randn(16, 3, generator=draw) for name in ("near", "far")}
    acted = torch.randn(16, 3, generator=draw)
    acted = acted if gaussian else (acted > 0).long()
    advantages, returns = torch.randn(2, 16, generator=draw)
    update(shown, acted, advantages, returns)
    before = parameters(update)
    for bad in (torch.nan, torch.inf):
        spoilt = shown["far"].clone()
        spoilt[9, 1] = bad
        with pytest.raises(ConfigError, match=r"observations\['far'\] must be finite, got"):
            update(shown | {"far": spoilt}, acted, advantages, returns)
    if gaussian:
        wrong, message = acted.clone(), "actions must be finite, got NaN or Inf"
        wrong[9, 1] = torch.nan
    else:
        wrong, message = 7 * acted, r"of MultiBinary\(3\) must be 0 or 1, got .* from 0 to 7"
    with pytest.raises(ConfigError, match=message):
        update(shown, wrong, advantages, returns)
    assert torch.equal(parameters(update), before)
    weights = torch.ones(16)
    weights[9] = 0
    update(shown | {"far": spoilt}, acted, advantages, returns, weights=weights)
    assert parameters(update).isfinite().all()
