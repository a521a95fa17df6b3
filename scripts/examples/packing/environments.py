"""Online 3D bin packing as Gymnasium environments.

The bin has 10 x 10 x 10 cells. Items arrive one at a time, with three integer sides that are drawn
evenly from 1 to 5; only the next one is known, and it must be placed before another comes. It is
lowered from above, parallel to the axes, and rests on the highest thing beneath it. It must lie
inside the bin and, with ``stable=True``, on enough of its base: more than 95 % of it, or 80 % and
three corners, or 60 % and all four (:func:`scripts.examples.packing.geometry.landings`).

The reward of a step is the item's share of the bin's volume, so that the undiscounted return of an
episode is the bin's utilisation. An episode ends when the next item fits nowhere, or with reward 0
when an action that is not allowed is chosen. ``info["ratio"]`` is the utilisation so far and
``info["counter"]`` the number of items in the bin.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from scripts.examples.packing.geometry import Sides, corner_placements, landings, turned

Array = NDArray[Any]
Observation = TypeVar("Observation")


class Packing(gymnasium.Env[Observation, Any], Generic[Observation]):
    """What both variants share: the bin, the items and the rules of an episode.

    Args:
        size: Cells of the bin along x, y and z.
        sides: Least and greatest side of an item, both of which occur.
        orientations: How items may be turned: 1 not, 2 about the vertical, 6 in every way.
        stable: Whether items must be stable.

    Attributes:
        heights: Heights (L, W) of what lies in the bin.
        boxes: Placed items as (x, y, z, length, width, height), in the order of their arrival.
        item: Sides of the next item.
        allowed: Actions that are possible now.
    """

    def __init__(
        self, size: Sides, sides: tuple[int, int], orientations: int, stable: bool
    ) -> None:
        if orientations not in (1, 2, 6):
            raise ValueError(f"orientations must be 1, 2 or 6, got {orientations}")
        if not 1 <= sides[0] <= sides[1] <= min(size):
            raise ValueError(f"items with sides from {sides[0]} to {sides[1]} do not suit {size}")
        self.size = size
        self.sides = sides
        self.orientations = orientations
        self.stable = stable
        self.heights = np.zeros(size[:2], np.int16)
        self.boxes: list[tuple[int, ...]] = []
        self.item: Sides = (1, 1, 1)
        self.allowed = np.zeros(0, np.bool_)
        self._volume = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Empty the bin and show the first item."""
        super().reset(seed=seed)
        self.heights[:] = 0
        self.boxes.clear()
        self._volume = 0
        self._next_item()
        return self._observe(), self._info()

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Place the item and show the next."""
        if not self.allowed[action]:
            return self._observe(), 0.0, True, False, self._info()
        x, y, z, length, width, height = self.placement(int(action))
        self.heights[x : x + length, y : y + width] = z + height
        self.boxes.append((x, y, z, length, width, height))
        volume = length * width * height
        self._volume += volume
        self._next_item()
        ended = not self.allowed.any()
        return self._observe(), self._share(volume), ended, False, self._info()

    def action_masks(self) -> NDArray[np.bool_]:
        """The actions that are possible now."""
        return self.allowed.copy()

    def placement(self, action: int) -> tuple[int, ...]:
        """The box (x, y, z, length, width, height) that an action stands for."""
        raise NotImplementedError

    def _look(self) -> None:
        """Find the allowed actions for the next item."""
        raise NotImplementedError

    def _observe(self) -> Observation:
        raise NotImplementedError

    def _next_item(self) -> None:
        length, width, height = self.np_random.integers(*self.sides, 3, endpoint=True).tolist()
        self.item = (length, width, height)
        self._look()

    def _share(self, volume: int) -> float:
        length, width, height = self.size
        return volume / (length * width * height)

    def _info(self) -> dict[str, Any]:
        return {"ratio": self._share(self._volume), "counter": len(self.boxes)}


class HeightmapPacking(Packing[NDArray[np.float32]]):
    """The agent sees the heights and chooses a cell for the item's corner nearest to the origin.

    Observations are pictures (4, L, W) in [0, 1]: the heights, and three even planes with the
    item's length, width and height, as shares of the bin's. Action o L W + x W + y places the item
    at (x, y), turned by o quarter turns. A turn that changes nothing is not allowed.

    Args:
        size: Cells of the bin along x, y and z.
        sides: Least and greatest side of an item.
        orientations: 1, or 2 for items that may be turned about the vertical.
        stable: Whether items must be stable.
    """

    def __init__(
        self,
        size: Sides = (10, 10, 10),
        sides: tuple[int, int] = (1, 5),
        orientations: int = 1,
        stable: bool = True,
    ) -> None:
        if orientations == 6:
            raise ValueError("orientations must be 1 or 2 on a heightmap, got 6")
        super().__init__(size, sides, orientations, stable)
        self._landings = np.zeros((orientations, *size[:2]), np.int16)
        self.observation_space = spaces.Box(0, 1, (4, *size[:2]), np.float32)
        self.action_space = spaces.Discrete(self._landings.size)

    def placement(self, action: int) -> tuple[int, ...]:
        """The box (x, y, z, length, width, height) that an action stands for."""
        _, length, width = self._landings.shape
        way, cell = divmod(action, length * width)
        sides = turned(self.item, self.orientations)[way]
        return (*divmod(cell, width), int(self._landings.flat[action]), *sides)

    def _look(self) -> None:
        allowed = np.zeros(self._landings.shape, np.bool_)
        for way, (length, width, height) in enumerate(turned(self.item, self.orientations)):
            tops, stable = landings(self.heights, length, width)
            rows, columns = tops.shape
            self._landings[way, :rows, :columns] = tops
            fits = tops <= self.size[2] - height
            if self.stable:
                fits &= stable
            allowed[way, :rows, :columns] = fits
        self.allowed = allowed.reshape(-1)

    def _observe(self) -> NDArray[np.float32]:
        shown = np.empty((4, *self.size[:2]), np.float32)
        shown[0] = self.heights
        shown[0] /= self.size[2]
        for plane, (side, most) in enumerate(zip(self.item, self.size, strict=True), 1):
            shown[plane] = side / most
        return shown


class LeafPacking(Packing[dict[str, Array]]):
    """The agent sees the boxes in the bin and candidates for the next, and chooses one of these.

    Candidates are the corners of the maximal empty spaces, in every way that the item may be
    turned; with more than ``candidates`` of them, the lowest. An episode ends when there is none.

    Observations are a dictionary: ``boxes`` (boxes, 6) and ``candidates`` (candidates, 6) have a
    row x, y, z, length, width, height for each that exists, and rows of zeros behind them; ``item``
    has the next item's sides. All are shares of the bin's sides. ``action_mask`` says which
    candidates exist. Of more than ``boxes`` boxes the last ones are shown.

    Args:
        size: Cells of the bin along x, y and z.
        sides: Least and greatest side of an item.
        orientations: 1, 2 or 6.
        stable: Whether items must be stable.
        boxes: Most boxes shown.
        candidates: Most candidates, the number of actions.
    """

    def __init__(
        self,
        size: Sides = (10, 10, 10),
        sides: tuple[int, int] = (1, 5),
        orientations: int = 6,
        stable: bool = False,
        boxes: int = 60,
        candidates: int = 50,
    ) -> None:
        super().__init__(size, sides, orientations, stable)
        self.candidates = np.zeros((0, 6), np.int64)
        self.action_space = spaces.Discrete(candidates)
        self._most_candidates = candidates
        self._most_boxes = boxes
        self._scale = np.array([*size, *size], np.float32)
        self.observation_space: Any = spaces.Dict(
            boxes=spaces.Box(0, 1, (boxes, 6), np.float32),
            candidates=spaces.Box(0, 1, (candidates, 6), np.float32),
            item=spaces.Box(0, 1, (3,), np.float32),
            action_mask=spaces.Box(0, 1, (candidates,), np.int8),
        )

    def placement(self, action: int) -> tuple[int, ...]:
        """The box (x, y, z, length, width, height) that an action stands for."""
        return tuple(self.candidates[action].tolist())

    def _look(self) -> None:
        count = self._most_candidates
        ways = turned(self.item, self.orientations)
        places = corner_placements(self.heights, self.size[2], ways, self.stable)
        self.candidates = places[:count]
        self.allowed = np.arange(count) < len(places)

    def _observe(self) -> dict[str, Array]:
        boxes = np.zeros((self._most_boxes, 6), np.float32)
        shown = self.boxes[-self._most_boxes :]
        if shown:
            boxes[: len(shown)] = shown / self._scale
        candidates = np.zeros((len(self.allowed), 6), np.float32)
        candidates[: len(self.candidates)] = self.candidates / self._scale
        return {
            "boxes": boxes,
            "candidates": candidates,
            "item": (self.item / self._scale[:3]).astype(np.float32),
            "action_mask": self.allowed.astype(np.int8),
        }
