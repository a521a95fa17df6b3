"""Noisy K-FAC over ranks that share out every batch is that of one process on the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import Empirical, GaussianLoss, NoisyConfig, NoisyKFAC, Ranks
from tests.tools.kfac import build, parameters, randn
from tests.tools.rank_trainings import distance
from tests.tools.ranks import on_threads

CONTEXTS = ({1: (12,), 2: (5, 7), 3: (3, 0, 9)}, {1: (6,), 2: (6, 0), 3: (1, 2, 3)})
"""Rows of the ranks in both contexts of a step."""


def trained(ranks: Ranks | None, structure: str = "mvg") -> dict[str, Tensor]:
    """Parameters, a draw from the posterior and the generator of noise after some steps."""
    size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
    # Factors of full rank: eigenvectors of equal eigenvalues would be those of rounding.
    model = build(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    settings = {"structure": structure, "damping_form": "factored", "lr": 0.1}
    config = NoisyConfig(refresh_interval=2, **settings)  # type: ignore[arg-type]
    optimizer, loss = NoisyKFAC(model, config, data_size=500, ranks=ranks), GaussianLoss()
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


@pytest.mark.parametrize("structure", ["mvg", "tridiagonal"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_posterior_is_that_of_one_process(structure: str, size: int) -> None:
    wanted = trained(None, structure)
    first, *others = on_threads(lambda ranks: trained(ranks, structure), size)
    assert all(torch.equal(mine[name], first[name]) for mine in others for name in wanted)
    assert distance(first, wanted) < 1e-10


def test_another_size_of_the_data_is_refused() -> None:
    def made(ranks: Ranks) -> str:
        with pytest.raises(ValueError) as caught:
            NoisyKFAC(build(nn.Linear(4, 3)), data_size=10 + ranks.rank, ranks=ranks)
        return str(caught.value)

    for said in on_threads(made, 2):
        assert said == "rank 1 has other settings or data_size than rank 0: give all the same"
