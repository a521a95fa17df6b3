"""What targets of auxiliary losses get."""

from __future__ import annotations

import pytest
import torch

from acktr import Auxiliary
from acktr.algorithms.auxiliary import AuxiliaryObjective
from acktr.kfac import GaussianLoss
from acktr.rollout import Batch
from acktr.tree import Sequences, Tree


@pytest.mark.parametrize("parts", [False, True])
def test_observations_of_sequences_are_rows_in_the_order_of_samples(parts: bool) -> None:
    steps = torch.tensor([[[0.0], [3.0]], [[1.0], [4.0]], [[2.0], [9.0]]])  # (T, N, 1)
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    seen: Tree = {"x": steps} if parts else steps
    sequences = Sequences.of(seen, torch.zeros_like(valid), (), valid)
    rows = torch.zeros(5)
    batch = Batch(sequences, rows, rows, rows, rows)

    def target(given: Batch) -> torch.Tensor:
        observations = given.observations
        if isinstance(observations, dict):
            observations = observations["x"]
        assert isinstance(observations, torch.Tensor) and given.returns is rows
        return observations[:, :1]

    objective = AuxiliaryObjective("speed", Auxiliary(GaussianLoss(), target=target), batch)
    assert objective.targets(slice(None)).flatten().tolist() == [0, 1, 2, 3, 4]
