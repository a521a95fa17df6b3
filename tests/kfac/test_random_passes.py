"""Forward passes that draw from generators of all kinds, tried out again by the trust region."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, CategoricalLoss, KFACConfig
from acktr.kfac.statistics.generators import RandomState
from tests.tools.kfac import randn
from tests.tools.product_cases import filled

CLIP, STEPS = 0.01, 40


class Dropped(nn.Module):
    """A network that leaves a layer out in half of its passes (LayerDrop, Fan et al. 2019)."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self._draw = draw

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).tanh()
        if self.training and self._draw() < 0.5:
            hidden = hidden + 3 * self.second(hidden).tanh()
        output: Tensor = self.head(hidden)
        return output


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "random": random.random,
    "numpy": lambda: float(numpy.random.rand()),  # noqa: NPY002 (what users draw from)
}


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002


def drawn() -> dict[str, float]:
    return {kind: draw() for kind, draw in DRAWS.items()}


def trained(draw: Callable[[int], float]) -> list[float]:
    """The KLs, in those of the radius, that the steps of a training are predicted to cost."""
    step = 0
    seeded(step)
    model = filled(Dropped(lambda: draw(step)))
    optimizer = KFAC(model, KFACConfig(kl_clip=CLIP))
    inputs, targets = randn(40, 6), torch.arange(40) % 3
    found = []
    for step in range(STEPS):
        seeded(step)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, CategoricalLoss())
        optimizer.zero_grad()
        functional.cross_entropy(output, targets).backward()
        optimizer.step()
        assert optimizer.last_step is not None
        found.append(float(optimizer.last_step.predicted_kl) / (CLIP / 2))
    return found


@pytest.mark.parametrize("kind", DRAWS)
def test_passes_that_draw_from_a_global_generator_are_tried_as_they_were(kind: str) -> None:
    """Steps are those of a network that is told at every step which layers it has."""
    known = []
    for step in range(STEPS):
        seeded(step)
        known.append(drawn()[kind])
    assert 10 < sum(value < 0.5 for value in known) < 30
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a step cannot be tried out")
        found = trained(lambda _: drawn()[kind])
    wanted = trained(lambda step: known[step] if drawn() else 0.0)
    assert found == wanted


@pytest.mark.parametrize("seed", range(4))
def test_passes_that_draw_from_a_generator_of_their_own_are_not_tried(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = trained(lambda _: float(torch.rand((), generator=generator)))
    assert min(found[-5:]) > 0.1
    told = [str(w.message) for w in caught if "cannot be tried out" in str(w.message)]
    assert len(told) == 1


def test_a_state_sets_all_global_generators_and_sets_them_back() -> None:
    state = RandomState.now([])
    first = drawn()
    with state.again():
        assert drawn() == first
    after = RandomState.now([])
    second = drawn()
    with pytest.raises(RuntimeError), state.again():
        raise RuntimeError
    with after.again():
        assert drawn() == second
