"""The Levenberg-Marquardt rule for the damping, on cases computed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from acktr.kfac import KFAC, LMConfig
from acktr.kfac.quadratic import reduction_ratio
from tests.tools.kfac import mlp, plain_config

OMEGA = 0.7737809375  # 0.95 ** 5


@pytest.mark.parametrize(
    ("rho", "expected"),
    [
        (0.76, 2 * OMEGA),
        (1.0, 2 * OMEGA),
        (math.inf, 2 * OMEGA),
        (0.75, 2.0),
        (0.5, 2.0),
        (0.25, 2.0),
        (0.24, 2 / OMEGA),
        (-3.0, 2 / OMEGA),
        (-math.inf, 2 / OMEGA),
        (math.nan, 2 / OMEGA),
    ],
)
def test_the_rule(rho: float, expected: float) -> None:
    assert LMConfig().adapted(2.0, rho) == pytest.approx(expected, rel=1e-14)


def test_a_loss_of_nan_raises_the_damping() -> None:
    rho = reduction_ratio(1.0, math.nan, -0.5)
    assert LMConfig().adapted(1.0, rho) == pytest.approx(1 / OMEGA)


def course(rule: LMConfig, damping: float, *ratios: float) -> list[float]:
    """The damping after each of some ratios."""
    return list(itertools.accumulate(ratios, rule.adapted, initial=damping))[1:]


def test_rises_and_falls_cancel() -> None:
    rule = LMConfig(interval=3, factor=0.5)
    assert course(rule, 4.0, 1.0, 1.0, 0.0, 0.0) == [0.5, 0.0625, 0.5, 4.0]


def test_every_fifth_step_is_followed_by_an_update() -> None:
    assert [step for step in range(16) if LMConfig().due(step)] == [4, 9, 14]
    assert all(LMConfig(interval=1).due(step) for step in range(5))


def test_the_limits_hold() -> None:
    rule = LMConfig(minimum=0.5, maximum=2.0)
    assert course(rule, 1.0, *[1.0] * 4)[2:] == [0.5, 0.5]
    assert course(rule, 0.5, *[-1.0] * 8)[6:] == [2.0, 2.0]
    assert course(LMConfig(minimum=1.0, maximum=1.0), 1.0, 1.0, -1.0) == [1.0, 1.0]


@pytest.mark.parametrize("damping", [1e-9, 1e5])
def test_a_first_damping_outside_of_the_limits_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match=r"damping must be a number in \[1e-08, 10000\]"):
        KFAC(mlp(), plain_config(damping=damping), adaptive=LMConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interval", 0),
        ("interval", 2.0),
        ("interval", True),
        ("factor", 0.0),
        ("factor", 1.0),
        ("factor", 1.5),
        ("factor", math.nan),
        ("factor", 1e-200),
        ("minimum", 0.0),
        ("minimum", -1.0),
        ("minimum", 1e5),
        ("maximum", math.inf),
        ("maximum", "1"),
        ("maximum", True),
    ],
)
def test_bad_settings_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be"):
        LMConfig(**{field: value})
