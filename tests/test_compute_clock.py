"""Seconds by part."""

from __future__ import annotations

import time

import pytest

from acktr.compute import Clock, joined


def test_parts_add_up_and_survive_errors() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.part("a"):
            time.sleep(0.01)
    with pytest.raises(KeyError), clock.part("b"):
        raise KeyError
    assert clock.seconds["a"] >= 0.02
    assert 0 <= clock.seconds["b"] < clock.seconds["a"]


def test_joined_sums_by_name() -> None:
    assert joined({"a": 1.0}, {"a": 2.0, "b": 3.0}) == {"a": 3.0, "b": 3.0}
    assert joined() == {}
