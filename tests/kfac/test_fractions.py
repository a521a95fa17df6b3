"""A fraction of the batch is the same one whether or not the batch comes in parts."""

from __future__ import annotations

import pytest
import torch

from acktr.kfac import KFAC, GaussianLoss, KFACConfig
from tests.kfac.test_micro_batches import STRUCTURES, inputs_of, nearly, observe_in, statistics
from tests.tools.kfac import factors, mlp, randn

SPLITS = ((1, 4, 2), (3, 3, 1), (2, 5), (1,) * 7)


@pytest.mark.parametrize("parts", SPLITS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_kth_sample_is_the_same_one_in_micro_batches(
    structure: str, parts: tuple[int, ...]
) -> None:
    """Every third sample of the whole batch, also where a part has none of them."""
    results = []
    for sizes in ((7,), parts):
        model = mlp()
        config = KFACConfig(stat_decay=0.8, stat_fraction=1 / 3, **STRUCTURES[structure])
        optimizer = KFAC(model, config)
        observe_in(optimizer, model, inputs_of("mlp"), (7,), GaussianLoss())
        optimizer.refresh()
        for turn in range(4):
            observe_in(optimizer, model, inputs_of("mlp", turn), sizes, GaussianLoss())
        results.append(statistics(optimizer))
    nearly(*results)


def test_a_fraction_of_a_sum_in_parts_of_whole_strides() -> None:
    results = []
    for sizes in ((6,), (3, 3)):
        model = mlp()
        optimizer = KFAC(model, KFACConfig(stat_fraction=1 / 3))
        for turn in range(4):
            observe_in(
                optimizer, model, randn(6, 4, seed=turn), sizes, GaussianLoss(reduction="sum")
            )
        results.append(statistics(optimizer))
    nearly(*results)


def test_a_fraction_of_a_sum_in_any_parts_is_right_on_average() -> None:
    """Over one round of turns every sample counts once, stride times as much."""
    model = mlp()
    inputs = randn(7, 4)
    whole = KFAC(model)
    observe_in(whole, model, inputs, (7,), GaussianLoss(reduction="sum"))
    total = torch.zeros(3, 3).double()
    for turn in range(3):
        optimizer = KFAC(model, KFACConfig(stat_fraction=1 / 3, stat_decay=0.0))
        for _ in range(turn + 1):
            observe_in(optimizer, model, inputs, (1, 4, 2), GaussianLoss(reduction="sum"))
        total += factors(optimizer, "2")[1] / 3
    torch.testing.assert_close(total, factors(whole, "2")[1], rtol=1e-10, atol=1e-12)
