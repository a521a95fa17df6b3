"""Weights of the parts of a sum: every layer has the rows of the part that it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, Exact, GaussianLoss, Preconditioner, SumLoss
from tests.kfac.test_weights import folded, tokens
from tests.tools.exact import close, stored
from tests.tools.kfac import plain_config, randn, seeded
from tests.tools.product_cases import filled


class TwoHeads(nn.Module):
    """A head of three terms for every sample, and one of one term."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.policy = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        self.value = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden[:, 0])


GRADED = torch.rand(6, 3, generator=seeded(6)).double(), torch.linspace(0, 2, 6).double()
PARTS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "masks": (GRADED[0] > 0.5, GRADED[1] > 0.9),
    "graded": GRADED,
    "the first alone": (GRADED[0], None),
    "the second alone": (None, GRADED[1]),
}


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_every_head_has_the_rows_of_its_own_part(name: str, classes: bool, structure: Any) -> None:
    model, inputs = filled(TwoHeads()), randn(6, 3, 3)
    scale = torch.tensor([0.5, 2.0]).double() if classes else None
    targets = (tokens(6, 3, size=2), randn(6, 1)) if classes else (None, None)
    losses = CategoricalLoss(class_weights=scale), GaussianLoss()
    settings, loss = {"structure": structure}, SumLoss(losses, weights=(1.0, 0.5))
    given = {"weights": PARTS[name], "target": targets if classes else None}
    both = folded(model, inputs, loss, **given, **settings)
    hidden = model.trunk(inputs).tanh().detach()
    heads = model.policy, model.value
    for k, (head, rows) in enumerate(zip(heads, (hidden, hidden[:, 0]), strict=True)):
        mine = {"weights": PARTS[name][k], "target": targets[k] if k == 0 else None}
        alone = folded(head, rows, losses[k], **mine, **settings)
        for path, block in alone.stats.items():
            found = both.stats[".".join(filter(None, (("policy", "value")[k], path)))]
            close(found.a.mean(), block.a.mean())  # type: ignore[union-attr]
            close(found.g.mean(), (1.0, 0.5)[k] * block.g.mean())  # type: ignore[union-attr]


class OneLayer(nn.Module):
    """One layer, called for each of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.layer(x[0]), self.layer(x[1])


def test_every_use_of_a_layer_has_the_rows_of_its_own_part() -> None:
    model, weights = filled(OneLayer()), (torch.tensor([2, 0, 1, 1]), torch.tensor([1, 1, 0, 2]))
    inputs, loss = (randn(4, 3), randn(4, 3, seed=1)), SumLoss(GaussianLoss(), GaussianLoss())
    found = []
    repeated = tuple(x.repeat_interleave(w, 0) for x, w in zip(inputs, weights, strict=True))
    for given, mine in ((inputs, weights), (repeated, None)):
        curvature = Preconditioner(model, plain_config())
        with curvature.capture() as captured:
            output = model(given)
        curvature.observe(captured, output, loss, source=Exact(), weights=mine)
        found.append(stored(curvature.stats["layer"]))  # type: ignore[arg-type]
    close(found[0], found[1])
