"""Noisy K-FAC over ranks that share out every batch is that of one process on the whole batch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Empirical, GaussianLoss, NoisyConfig, NoisyKFAC, Ranks
from tests.tools.kfac import build, parameters, randn
from tests.tools.noisy import STRUCTURES
from tests.tools.rank_trainings import distance
from tests.tools.ranks import on_threads

CONTEXTS = ({1: (12,), 2: (5, 7), 3: (3, 0, 9)}, {1: (6,), 2: (6, 0), 3: (1, 2, 3)})
"""Rows of the ranks in both contexts of a step."""


def trained(
    ranks: Ranks | None, structure: str, form: str, noise_seed: int = 0
) -> dict[str, Tensor]:
    """Parameters, a draw from the posterior and the generator of noise after some steps.

    ``noise_seed``, times the rank, is what other noise on each rank begins with.
    """
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
    # Factors of full rank: eigenvectors of equal eigenvalues would be those of rounding.
    model = build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    settings = {"structure": structure, "damping_form": form, "lr": 0.1}
    config = NoisyConfig(refresh_interval=2, **settings)  # type: ignore[arg-type]
    optimizer, loss = NoisyKFAC(model, config, data_size=500, ranks=ranks), GaussianLoss()
    if noise_seed * rank:
        optimizer.curvature.noise.manual_seed(noise_seed * rank)
    for step in range(6):
        for number, shares in enumerate(CONTEXTS):
            rows, first = shares[size][rank], sum(shares[size][:rank])
            (every,) = shares[1]
            inputs = randn(every, 4, seed=2 * step + number)[first : first + rows]
            targets = randn(every, 3, seed=100 + step)[first : first + rows]
            with optimizer.sampled_params(train=True) as captured:
                output = model(inputs)
                optimizer.observe(captured, output, loss, source=Empirical(targets))
                if rows:
                    loss(output, targets).backward()
                if ranks is not None:
                    ranks.average(model, rows)
        optimizer.step()
    with optimizer.sampled_params():
        drawn = parameters(model)
    noise = optimizer.curvature.noise.get_state().double()
    return {**parameters(model), **{f"drawn {n}": p for n, p in drawn.items()}, "noise": noise}


@pytest.mark.parametrize(("structure", "form"), STRUCTURES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_posterior_is_that_of_one_process(structure: str, form: str, size: int) -> None:
    wanted = trained(None, structure, form)
    first, *others = on_threads(lambda ranks: trained(ranks, structure, form), size)
    assert all(torch.equal(mine[name], first[name]) for mine in others for name in wanted)
    assert distance(first, wanted) < 1e-10


@pytest.mark.parametrize(("structure", "form"), STRUCTURES)
def test_means_of_means_are_seen(structure: str, form: str) -> None:
    """What the test above would not see is worth nothing."""
    wanted, right = trained(None, structure, form), Ranks.average

    def means(ranks: Ranks, module: nn.Module, rows: float) -> None:
        right(ranks, module, float(rows > 0))

    with mock.patch.object(Ranks, "average", means):
        found = on_threads(lambda ranks: trained(ranks, structure, form), 3)[0]
    assert distance(found, wanted) > 1e-3


@pytest.mark.parametrize(("structure", "form"), STRUCTURES)
def test_noise_of_each_rank_alone_is_refused(structure: str, form: str) -> None:
    def refused(ranks: Ranks) -> str:
        with pytest.raises(ValueError) as caught:
            trained(ranks, structure, form, noise_seed=1)
        return str(caught.value)

    for said in on_threads(refused, 3):
        assert said.startswith("rank 1 has other parameters than rank 0")


def test_another_size_of_the_data_is_refused() -> None:
    def made(ranks: Ranks) -> str:
        with pytest.raises(ValueError) as caught:
            NoisyKFAC(build(nn.Linear(4, 3)), data_size=10 + ranks.rank, ranks=ranks)
        return str(caught.value)

    for said in on_threads(made, 2):
        assert said == "rank 1 has other settings or data_size than rank 0: give all the same"
