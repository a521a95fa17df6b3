"""Settings."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest

from acktr.kfac import KFAC, KFACConfig, Preconditioner
from tests.tools.kfac import mlp


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lr", 0.0, "lr must be a finite number > 0, got 0.0"),
        ("lr", math.nan, "lr must be a finite number > 0, got nan"),
        ("kl_clip", -1.0, "kl_clip must be a finite number > 0, got -1.0"),
        ("kl_clip", math.inf, "kl_clip must be a finite number > 0, got inf"),
        ("damping", 0.0, "damping must be a finite number > 0, got 0.0"),
        ("cold_lr", -0.1, "cold_lr must be a finite number > 0, got -0.1"),
        ("cold_max_grad_norm", 0.0, "cold_max_grad_norm must be a finite number > 0, got 0.0"),
        ("stat_decay", 1.0, "stat_decay must be a number in [0, 1), got 1.0"),
        ("stat_decay", math.nan, "stat_decay must be a number in [0, 1), got nan"),
        ("momentum", -0.1, "momentum must be a number in [0, 1), got -0.1"),
        ("weight_decay", -1e-9, "weight_decay must be a finite number >= 0, got -1e-09"),
        ("weight_decay", math.inf, "weight_decay must be a finite number >= 0, got inf"),
        ("stat_interval", 0, "stat_interval must be an integer >= 1, got 0"),
        ("refresh_interval", 0, "refresh_interval must be an integer >= 1, got 0"),
        ("refresh_interval", 2.5, "refresh_interval must be an integer >= 1, got 2.5"),
        ("refresh_interval", True, "refresh_interval must be an integer >= 1, got True"),
        ("float64", "no", "float64 must be True or False, got 'no'"),
        ("eager_start", 1, "eager_start must be True or False, got 1"),
        ("fast_products", None, "fast_products must be True or False, got None"),
        ("max_failures", 0, "max_failures must be an integer >= 1, got 0"),
        ("cold_steps", -1, "cold_steps must be an integer >= 0, got -1"),
        ("conv_sharing", "both", "conv_sharing must be expand or reduce, got 'both'"),
        ("quadratic", "dense", "quadratic must be corrected or kronecker or exact, got 'dense'"),
    ],
)
def test_settings_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        KFACConfig(**{name: value})
    assert str(caught.value) == message


def test_the_limits_of_the_settings_are_allowed() -> None:
    KFACConfig(stat_decay=0.0, momentum=0.0, weight_decay=0.0, refresh_interval=1, cold_steps=0)


def test_a_setting_that_is_given_changes_no_other() -> None:
    model, given = mlp(), KFACConfig(damping=0.1)
    assert KFAC(model).config == Preconditioner(model).config == KFACConfig.for_supervised()
    differing = {
        name for name, value in asdict(KFAC(model).config).items() if asdict(given)[name] != value
    }
    assert differing == {"damping"}


def test_the_defaults_are_those_of_supervised_learning() -> None:
    assert asdict(KFACConfig()) == asdict(KFACConfig.for_rl()) | {
        "lr": 1.0,
        "kl_clip": 0.3,
        "damping": 0.001,
        "structure": "cholesky",
        "stat_decay": 0.8,
        "stat_interval": 5,
        "momentum": 0.5,
        "eager_start": True,
        "small_parameters": "diagonal",
        "max_factor_size": 2048,
        "factor_rows": 4,
        "fast_products": True,
        "quadratic": "corrected",
    }
