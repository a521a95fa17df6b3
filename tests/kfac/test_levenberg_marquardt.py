"""The Levenberg-Marquardt rule for the damping, on cases computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from acktr.kfac.quadratic import LevenbergMarquardt, LMConfig, reduction_ratio

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
    rule = LevenbergMarquardt(LMConfig(), 2.0)
    assert rule.update(rho) == pytest.approx(expected, rel=1e-14)
    assert rule.damping == pytest.approx(expected, rel=1e-14)


def test_a_loss_of_nan_raises_the_damping() -> None:
    rule = LevenbergMarquardt(LMConfig(), 1.0)
    rule.update(reduction_ratio(1.0, math.nan, -0.5))
    assert rule.damping == pytest.approx(1 / OMEGA)


def test_rises_and_falls_cancel() -> None:
    rule = LevenbergMarquardt(LMConfig(interval=3, factor=0.5), 4.0)
    assert [rule.update(rho) for rho in (1.0, 1.0, 0.0, 0.0)] == [0.5, 0.0625, 0.5, 4.0]


def test_every_fifth_step_is_followed_by_an_update() -> None:
    rule = LevenbergMarquardt(LMConfig(), 1.0)
    assert [step for step in range(16) if rule.due(step)] == [4, 9, 14]
    every = LevenbergMarquardt(LMConfig(interval=1), 1.0)
    assert all(every.due(step) for step in range(5))


def test_the_limits_hold() -> None:
    rule = LevenbergMarquardt(LMConfig(minimum=0.5, maximum=2.0), 1.0)
    assert [rule.update(1.0) for _ in range(4)][2:] == [0.5, 0.5]
    assert [rule.update(-1.0) for _ in range(8)][6:] == [2.0, 2.0]
    fixed = LevenbergMarquardt(LMConfig(minimum=1.0, maximum=1.0), 1.0)
    assert [fixed.update(rho) for rho in (1.0, -1.0)] == [1.0, 1.0]


def test_a_state_comes_back_exactly() -> None:
    rule = LevenbergMarquardt(LMConfig(), 0.1)
    for rho in (1.0, 0.0, math.nan, 1.0, 1.0):
        rule.update(rho)
    other = LevenbergMarquardt(LMConfig(), 3.0)
    other.load_state_dict(rule.state_dict())
    assert other.damping == rule.damping
    assert other.update(1.0) == rule.update(1.0)


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        [("damping", 1.0)],
        {"damping": 1.0, "more": 1},
        {"damping": math.nan},
        {"damping": math.inf},
        {"damping": 0.0},
        {"damping": -1.0},
        {"damping": 1e5},
        {"damping": True},
        {"damping": "1.0"},
        {"damping": torch.tensor(1.0)},
    ],
)
def test_a_bad_state_is_refused(state: Any) -> None:
    rule = LevenbergMarquardt(LMConfig(), 3.0)
    with pytest.raises(ValueError, match="damping"):
        rule.load_state_dict(state)
    assert rule.damping == 3.0


@pytest.mark.parametrize("damping", [0.0, -1.0, 1e-9, 1e5, math.nan, math.inf, True, "1"])
def test_a_bad_first_damping_is_refused(damping: Any) -> None:
    with pytest.raises(ValueError, match=r"damping must be a number in \[1e-08, 10000.0\]"):
        LevenbergMarquardt(LMConfig(), damping)


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
