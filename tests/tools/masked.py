"""Small environments with action masks, which raise or end at a forbidden action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

Bools = NDArray[np.bool_]

SOURCES = ("action_masks", "info", "observation")
KINDS: dict[str, tuple[int, ...]] = {"Discrete": (5,), "MultiDiscrete": (3, 1, 4)}
MODES = (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)


class MaskedEnv(gymnasium.Env[Any, Any]):
    """Shows random masks and values of the choices; the reward is the mean value of those taken.

    Each episode has `horizon` steps. In its last observation nothing is allowed, as nothing will be
    done there. A Box observation (2 P,) holds the mask and then the values, so that whoever has it
    can check the mask that came with it; a Dict has them apart.

    Args:
        source: Convention of the masks; several may be joined by "+", "none" is none of them.
        nvec: Choices of each component; one component makes a Discrete space.
        horizon: Steps of an episode.
        start: First action of the space.
        tuples: Whether masks are tuples with an array for each component.
        kind: numpy type of the masks.
        spoil: What is wrong at step `at` (0: reset): "length", "values", "nothing", "missing",
            "raises", or nothing ("").
        at: When; counted over all episodes.
        lenient: Whether a forbidden action ends the episode with reward 0 instead of raising.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        source: str = "action_masks",
        nvec: tuple[int, ...] = (5,),
        horizon: int = 3,
        start: int = 0,
        tuples: bool = False,
        kind: str = "bool",
        spoil: str = "",
        at: int = 0,
        lenient: bool = False,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._sources = source.split("+")
        self._nvec, self._horizon, self._start = nvec, horizon, start
        self._tuples, self._kind, self._lenient = tuples, np.dtype(kind), lenient
        self._spoil, self._at = spoil, at
        self._steps = self._all_steps = 0
        total = sum(nvec)
        self.action_space: spaces.Space[Any] = spaces.Discrete(nvec[0], start=start)
        if len(nvec) > 1:
            self.action_space = spaces.MultiDiscrete(nvec, start=[start] * len(nvec))
        self.observation_space: spaces.Space[Any] = spaces.Box(0, 1, (2 * total,), np.float32)
        if "observation" in self._sources:
            mask: spaces.Space[Any] = spaces.Box(0, 1, (total,), np.int8)
            if tuples:
                mask = spaces.Tuple([spaces.Box(0, 1, (size,), np.int8) for size in nvec])
            values = spaces.Box(0, 1, (total,), np.float32)
            self.observation_space = spaces.Dict({"action_mask": mask, "values": values})
        if "action_masks" in self._sources:
            self.action_masks = self._given  # as a method; others must not have it
        self._mask: Bools = np.ones(total, np.bool_)
        self._values: NDArray[np.float32] = np.zeros(total, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        self._draw()
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.asarray(action).reshape(-1) - self._start
        places = chosen + np.cumsum((0, *self._nvec[:-1]))
        allowed = bool(self._mask[places].all())
        if not allowed and not self._lenient:
            raise RuntimeError(f"the action {action} is forbidden by {self._mask.astype(int)}")
        reward = float(self._values[places].mean()) if allowed else 0.0
        self._steps += 1
        self._all_steps += 1
        self._draw()
        ends = self._steps >= self._horizon or not allowed
        if ends:
            self._mask[:] = False
        truncates = ends and allowed and self._all_steps % 2 == 0
        return self._observation(), reward, ends and not truncates, truncates, self._info()

    def render(self) -> Any:
        return np.full((16, 16, 3), 20 * self._steps, np.uint8)

    def _draw(self) -> None:
        self._mask = self.np_random.random(sum(self._nvec)) < 0.4
        first = np.cumsum((0, *self._nvec[:-1]))
        self._mask[first + self.np_random.integers(self._nvec)] = True
        self._values = self.np_random.random(sum(self._nvec)).astype(np.float32)

    def _spoiled(self, what: str) -> bool:
        return self._spoil == what and self._all_steps == self._at

    def _given(self) -> Any:
        """The mask as it is given, which is not always right."""
        if self._spoiled("raises"):
            raise ZeroDivisionError("the mask\nbroke")
        mask = self._mask.astype(self._kind)
        if self._spoiled("length"):
            return mask[:-1]
        if self._spoiled("values"):
            return mask.astype(np.int8) + 2
        if self._spoiled("nothing"):
            mask[: self._nvec[0]] = 0
        if self._tuples:
            return tuple(np.split(mask, np.cumsum(self._nvec[:-1])))
        return mask

    def _info(self) -> dict[str, Any]:
        if "info" not in self._sources or self._spoiled("missing"):
            return {}
        return {"action_mask": self._given()}

    def _observation(self) -> Any:
        if "observation" in self._sources:
            given = self._given()
            mask: Any = given.astype(np.int8) if not self._tuples else None
            if mask is None:
                mask = tuple(part.astype(np.int8) for part in given)
            return {"action_mask": mask, "values": self._values}
        return np.concatenate([self._mask, self._values], dtype=np.float32)


for _source in ("action_masks", "info"):
    gymnasium.register(
        f"toys/Masked{_source.title()}-v0",
        entry_point="tests.tools.masked:MaskedEnv",
        kwargs={"source": _source, "nvec": (3, 1, 4)},
    )


def sync(mode: AutoresetMode, num_envs: int, **settings: Any) -> SyncVectorEnv:
    """Gymnasium's own vector of such environments."""
    makers: list[Callable[[], gymnasium.Env[Any, Any]]] = [lambda: MaskedEnv(**settings)] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=mode)


def shown_masks(observations: Any) -> Bools:
    """The masks (..., P) that observations hold."""
    if isinstance(observations, dict):
        masks = observations["action_mask"]
        return np.asarray(np.concatenate(masks, -1) if isinstance(masks, tuple) else masks) == 1
    return np.asarray(observations[..., : observations.shape[-1] // 2]) == 1


def random_actions(
    masks: Bools, nvec: tuple[int, ...], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Allowed actions (N,) or (N, M), uniformly."""
    scores = np.where(masks, rng.random(masks.shape), -1.0)
    parts = np.split(scores, np.cumsum(nvec[:-1]), axis=-1)
    columns = np.stack([part.argmax(-1) for part in parts], axis=-1)
    return columns[:, 0] if len(nvec) == 1 else columns
