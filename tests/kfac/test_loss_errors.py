"""Bad input to the losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
)
from acktr.kfac.losses.sums import SumLoss
from tests.tools.kfac import seeded

Z = torch.zeros(3, 2)
LABELS = torch.zeros(3, dtype=torch.int64)
PAIR = SumLoss(parts=(CategoricalLoss(), GaussianLoss()))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            lambda: GaussianLoss(reduction="none"),  # type: ignore[arg-type]
            "GaussianLoss: reduction must be mean or batchmean or sum, got 'none'",
        ),
        (
            lambda: GaussianLoss(std=0.0),
            "GaussianLoss: std must be a finite number > 0, got 0.0",
        ),
        (
            lambda: BernoulliLoss()(torch.zeros(3, 2, dtype=torch.int64), Z),
            "BernoulliLoss: output must be a floating-point tensor, got int64 of shape (3, 2)",
        ),
        (
            lambda: GaussianLoss()(torch.zeros(3), torch.zeros(3)),
            "GaussianLoss: output must be (N, ..., D) without empty dimensions, got (3,)",
        ),
        (
            lambda: CategoricalLoss().sampled(torch.zeros(0, 3), None),
            "CategoricalLoss: output must be (N, ..., D) without empty dimensions, got (0, 3)",
        ),
        (
            lambda: GaussianLoss().normalizer((Z, Z)),  # type: ignore[arg-type]
            "GaussianLoss: output must be a floating-point tensor, got tuple",
        ),
        (
            lambda: LearntGaussianLoss().roots(torch.zeros(4, 3)),
            "LearntGaussianLoss: output must be (N, ..., 2 D), means and log-stds, got (4, 3)",
        ),
        (
            lambda: CategoricalLoss()(Z, LABELS[:, None]),
            "CategoricalLoss: target must be an int64 tensor of shape (3,), "
            "got int64 of shape (3, 1)",
        ),
        (
            lambda: CategoricalLoss()(Z, LABELS.int()),
            "CategoricalLoss: target must be an int64 tensor of shape (3,), "
            "got int32 of shape (3,)",
        ),
        (
            lambda: CategoricalLoss()(Z, LABELS - 100),  # torch's ignore_index
            "CategoricalLoss: targets must lie in [0, 1], got values from -100 to -100",
        ),
        (
            lambda: BernoulliLoss()(Z, Z + 1.5),
            "BernoulliLoss: targets must lie in [0, 1], got values from 1.5 to 1.5",
        ),
        (
            lambda: BernoulliLoss()(Z, Z * math.nan),
            "BernoulliLoss: targets must lie in [0, 1], got values from nan to nan",
        ),
        (
            lambda: GaussianLoss()(Z, Z[:, :1]),
            "GaussianLoss: target must be a floating-point tensor of shape (3, 2), "
            "got float32 of shape (3, 1)",
        ),
        (
            lambda: LearntGaussianLoss()(Z, Z),
            "LearntGaussianLoss: target must be a floating-point tensor of shape (3, 1), "
            "got float32 of shape (3, 2)",
        ),
        (
            lambda: GaussianLoss()(Z, Z.to("meta")),
            "GaussianLoss: target is on meta, but the output on cpu",
        ),
        (
            lambda: CategoricalLoss().hessian_product(Z, Z[0]),
            "CategoricalLoss: tangent must be a floating-point tensor of shape (3, 2), "
            "got float32 of shape (2,)",
        ),
        (
            lambda: GaussianLoss().sampled(Z.to("meta"), seeded(0)),
            "GaussianLoss: the generator is for cpu, the output on meta",
        ),
        (
            lambda: SumLoss(parts=()),
            "SumLoss: parts must be a tuple of losses, got ()",
        ),
        (
            lambda: SumLoss(parts=(CategoricalLoss(), GaussianLoss(reduction="sum"))),
            "SumLoss: parts must share one reduction, got ['mean', 'sum']",
        ),
        (
            lambda: SumLoss(parts=(CategoricalLoss(),), weights=(1.0, 2.0)),
            "SumLoss: weights must be a tuple of 1 numbers, got 2",
        ),
        (
            lambda: SumLoss(parts=(CategoricalLoss(),), weights=(0.0,)),
            "SumLoss: weights[0] must be a finite number > 0, got 0.0",
        ),
        (
            lambda: PAIR(Z, (LABELS, Z)),  # type: ignore[arg-type]
            "SumLoss: output must be a tuple of 2 tensors, got float32 of shape (3, 2)",
        ),
        (
            lambda: PAIR((Z, Z), (LABELS,)),
            "SumLoss: target must be a tuple of 2 tensors, got 1",
        ),
        (
            lambda: PAIR.hessian_product((Z, Z), (Z,)),
            "SumLoss: tangent must be a tuple of 2 tensors, got 1",
        ),
    ],
)
def test_bad_input_gets_one_clear_line(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        action()
    assert str(caught.value) == message
