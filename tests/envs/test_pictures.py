"""Which Boxes are pictures, where their channels are, and how they are scaled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from acktr.envs import picture, pictures


def box(shape: tuple[int, ...], low: float = 0, high: float = 255, kind: Any = np.uint8) -> Any:
    return spaces.Box(low, high, shape, kind)


@pytest.mark.parametrize(
    ("shape", "ordered", "sure"),
    [
        ((84, 84, 3), (3, 84, 84), True),
        ((4, 84, 84), (4, 84, 84), True),
        ((210, 160, 3), (3, 210, 160), True),
        ((3, 210, 160), (3, 210, 160), True),
        ((128, 64, 4), (4, 128, 64), True),
        ((8, 8, 12), (12, 8, 8), True),
        ((12, 8, 8), (12, 8, 8), True),
        ((8, 8, 8), (8, 8, 8), False),
        ((10, 11, 12), (10, 11, 12), False),
        ((20, 24, 18), (18, 20, 24), False),
        ((64, 12, 48), (64, 12, 48), False),
        ((7, 7, 3), (3, 7, 7), True),
    ],
)
def test_where_the_channels_are(
    shape: tuple[int, ...], ordered: tuple[int, ...], sure: bool
) -> None:
    found = picture(box(shape))
    assert found is not None
    assert (found.shape, found.sure) == (ordered, sure)
    last = (shape[2], *shape[:2])
    for setting, wanted in (("first", shape), ("last", last)):
        told = picture(box(shape), setting)  # type: ignore[arg-type]
        assert told is not None and told.shape == wanted and told.sure
    assert picture(box(shape), "none") is None


def test_numbers_within_bounds_are_pictures_of_a_certain_size() -> None:
    for space, scaling in (
        (box((128, 64, 4), 0, 1, np.float32), (0, 1, True)),
        (box((8, 8, 3), -1, 1, np.float64), (0, 1, True)),
        (box((8, 8, 3), -2, 6, np.float32), (-2, 1 / 8, True)),
        (box((8, 8, 3), 0, 4, np.int64), (0, 1 / 4, False)),
        (box((8, 8, 12), 0, 1, np.uint8), (0, 1, False)),
        (box((8, 8, 3), 0, 255, np.uint8), (0, 1 / 255, False)),
    ):
        found = picture(space)
        assert found is not None
        assert (found.low, found.scale, found.floats) == scaling
    small, unbounded = box((7, 7, 3), 0, 1, np.float32), box((9, 9, 3), -np.inf, np.inf, np.float32)
    assert picture(small) is None and picture(unbounded) is None
    told = picture(unbounded, "last")
    assert told is not None and (told.low, told.scale) == (0, 1)


def test_grey_pictures_need_no_axis_of_channels() -> None:
    found = picture(box((84, 80)))
    assert found is not None and found.shape == (1, 84, 80) and found.axis == "absent"
    for space in (box((8, 8)), box((84,)), box((84, 84), 0, 1, np.float32)):
        assert picture(space) is None


def test_pictures_among_parts_are_found() -> None:
    space = spaces.Dict({"x": box((9, 9, 3)), "y": spaces.Tuple((box((20, 20)), box((4,))))})
    assert {name: each.shape for name, each in pictures(space).items()} == {
        "x": (3, 9, 9),
        "y/0": (1, 20, 20),
    }
    assert list(pictures(box((9, 9, 3)))) == [""]
    assert pictures(spaces.Discrete(4)) == {}
