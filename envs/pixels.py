"""`Pixels/Id-v0`: any environment of Gymnasium, seen by its pictures instead of its numbers.

Actions, rewards and ends are those of the environment `Id-v0`; the observation is a stack of its
last pictures, of bytes. Those of MuJoCo are drawn by `acktr.envs.view`; others are what the
environment renders, its pixels averaged over the areas of a square of the asked size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from acktr.envs import view
from acktr.envs.errors import EnvError, EnvFault, UnsavedError, one_line
from acktr.envs.masks import MASK
from acktr.envs.registry import PIXELS, lookup, pictured
from acktr.envs.rendering import drawn_by
from acktr.envs.settings import PixelSettings
from acktr.envs.vector import AnyEnv, Array, is_mujoco

_CLIP = 480
"""Sides of the pictures of MuJoCo that videos are made of."""
_ANSWER = 60.0
"""Seconds that the first picture may take."""
_RENDERING = {
    *("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config"),
    *("max_geom", "visual_options"),
}
"""Arguments of `MujocoEnv` that are about its own renderer."""


class PixelEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose observations are its last pictures (size, size, 3 * frame_stack).

    The newest picture comes last. Nothing is drawn before the first reset, so that what draws is
    made in the process that steps: an OpenGL context does not go on in a fork.

    Args:
        env: The environment, with the render mode rgb_array unless MuJoCo simulates it.
        settings: What is seen, and how often.
    """

    def __init__(self, env: AnyEnv, settings: PixelSettings) -> None:
        super().__init__(env)
        self.settings = settings
        size, depth = settings.size, 3 * settings.frame_stack
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, depth), np.uint8)
        fps = env.metadata.get("render_fps")
        rate = {} if fps is None else {"render_fps": fps / settings.frame_skip}
        self.metadata = {**env.metadata, "render_modes": ["rgb_array"], **rate}
        self._frames = np.zeros((size, size, depth), np.uint8)
        self._mujoco = is_mujoco(env.unwrapped)
        space = env.observation_space
        self._masked = isinstance(space, gymnasium.spaces.Dict) and MASK in space.spaces
        self._closed = False
        self._views: dict[int, view.View] = {}

    @property
    def render_mode(self) -> str:  # type: ignore[override]
        """Pictures, in any case."""
        return "rgb_array"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Reset; the first picture stands for those before it, or zeros do."""
        seen, info = self.env.reset(seed=seed, options=options)
        info = self._with_mask(seen, info)
        if self.settings.blank_start:
            self._frames[...] = 0
            self._see()
        else:
            self._frames[...] = np.tile(self._picture(), self.settings.frame_stack)
        return self._frames.copy(), info

    def step(self, action: Any) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        """Take an action `frame_skip` times, or until the episode ends; rewards are summed."""
        seen, reward, terminated, truncated, info = self.env.step(action)
        for _ in range(self.settings.frame_skip - 1):
            if terminated or truncated:
                break
            seen, more, terminated, truncated, info = self.env.step(action)
            reward = float(reward) + float(more)
        self._see()
        return self._frames.copy(), reward, terminated, truncated, self._with_mask(seen, info)

    def render(self) -> Array:
        """A picture for people; of MuJoCo by the same camera."""
        return self._drawn(_CLIP).copy() if self._mujoco else self._rendered()

    def close(self) -> None:
        """Close the environment and what draws it."""
        for each in self._views.values():
            each.close()
        self._views, self._closed = {}, True
        super().close()

    def state_dict(self) -> dict[str, Any]:
        """The pictures, and what draws them."""
        return {"frames": self._frames.copy(), "drawn_by": self._drawer()}

    def check_state_dict(self, state: Any) -> None:
        """Refuse pictures that another renderer has drawn, as the next ones would differ.

        Raises:
            UnsavedError: Another one did.
            ValueError: The state is not one of :meth:`state_dict`.
        """
        if not isinstance(state, Mapping) or state.keys() != {"frames", "drawn_by"}:
            raise ValueError("the state of pictures has other entries")
        frames, by = state["frames"], state["drawn_by"]
        same = isinstance(frames, np.ndarray) and frames.shape == self._frames.shape
        if not same or frames.dtype != np.uint8 or not isinstance(by, str):
            raise ValueError("the pictures have another shape or type")
        if by != self._drawer():
            raise UnsavedError(f"pictures were drawn by {by:.200}, here {self._drawer()} draws")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with pictures; MuJoCo is restored apart from them."""
        self.check_state_dict(state)
        self._frames[...] = state["frames"]

    def told(self) -> dict[str, Any]:
        """What is seen, after a reset, in every number, as JSON values."""
        first = hashlib.sha256(self._frames[..., -3:].tobytes()).hexdigest()
        facts: dict[str, Any] = {"drawn_by": self._drawer(), "first_picture_sha256": first}
        if self._mujoco:
            inner = self.env.unwrapped
            seen = view.described(inner, view.find_camera(inner, self.settings.camera))
            facts |= {"reflections": False, "floor_grid": view.FLOOR_GRID, "view": seen}
            facts["multisample"] = self._views[self.settings.size].samples
        else:
            facts["rendered"] = list(self._rendered().shape)
        return facts

    def _with_mask(self, seen: Any, info: dict[str, Any]) -> dict[str, Any]:
        """The infos, with the action mask of an observation that is not seen itself."""
        return info if not self._masked or MASK in info else {**info, MASK: seen[MASK]}

    def _see(self) -> None:
        """Put the present picture behind the others, of which the oldest is forgotten."""
        self._frames[..., :-3] = self._frames[..., 3:].copy()
        self._frames[..., -3:] = self._picture()

    def _picture(self) -> Array:
        size = self.settings.size
        return self._drawn(size) if self._mujoco else shrunk(self._rendered(), size)

    def _drawn(self, size: int) -> Array:
        """MuJoCo's picture, in memory that the next one overwrites."""
        if self._closed:
            raise EnvError("the environment is closed: no picture can be drawn")
        if size not in self._views:
            chosen, inner = self.settings, self.env.unwrapped
            samples = chosen.multisample
            self._views[size] = view.View(inner, size, chosen.camera, chosen.shadows, samples)
        return self._views[size].draw()

    def _rendered(self) -> Array:
        picture: Any = self.env.render()
        shape = tuple(getattr(picture, "shape", ()))
        if len(shape) != 3 or shape[-1] != 3 or picture.dtype != np.uint8:
            raise EnvError("it renders no pictures of bytes with the shape (height, width, 3)")
        return picture  # type: ignore[no-any-return]

    def _drawer(self) -> str:
        return drawn_by() if self._mujoco else "the environment"


def make_pixels(
    base: str,
    settings: Mapping[str, Any],
    render_mode: str | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
) -> PixelEnv:
    """The entry point of `Pixels/` ids.

    `env_kwargs` are the arguments of `gymnasium.make` for `base`, whose time limit stays inside:
    it counts the steps of `base`.

    Raises:
        EnvError: `base` renders no pictures, has no camera of that name, or is given arguments
            about its own pictures, which nobody would see.
    """
    chosen, spec, env_kwargs = PixelSettings(**settings), lookup(base), dict(env_kwargs or {})
    # Its pictures are drawn by Gymnasium's own renderer if it is asked to render, which is slow.
    env: AnyEnv = gymnasium.make(spec, **env_kwargs)
    if is_mujoco(env.unwrapped):
        _require_unseen(env_kwargs, chosen)
        view.find_camera(env.unwrapped, chosen.camera)  # a wrong name is told at once
        return PixelEnv(env, chosen)
    env.close()
    modes = env.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise EnvError(f"{spec.id} renders no pictures: it offers {list(modes)}, not rgb_array")
    if chosen.camera != "auto":
        raise EnvError(f"pixels.camera is for MuJoCo: it must be auto for {spec.id}")
    if "render_mode" in env_kwargs:
        raise EnvError(
            f"env_kwargs: {spec.id} is seen by its pictures, so that it has no other"
            " render_mode than rgb_array"
        )
    return PixelEnv(gymnasium.make(spec, render_mode="rgb_array", **env_kwargs), chosen)


def _require_unseen(env_kwargs: Mapping[str, Any], settings: PixelSettings) -> None:
    """Refuse arguments of Gymnasium's own renderer of MuJoCo, which draws nothing here."""
    without = _RENDERING - ({"default_camera_config"} if settings.camera == "free" else set())
    if unused := sorted(without & env_kwargs.keys()):
        raise EnvError(
            f"env_kwargs {', '.join(unused)}: another renderer draws what is seen; its settings are"
            " pixels.camera, pixels.size, pixels.shadows and pixels.multisample"
        )


def configured(spec: EnvSpec, settings: PixelSettings | None) -> EnvSpec:
    """The specification of a `Pixels/` id with settings; another one as it is."""
    if spec.namespace != PIXELS:
        return spec
    kwargs = {**spec.kwargs, "settings": dataclasses.asdict(settings or PixelSettings())}
    return dataclasses.replace(spec, kwargs=kwargs)


def protocol(spec: EnvSpec, settings: PixelSettings, make: Callable[[], AnyEnv]) -> dict[str, Any]:
    """What of `describe` is about pictures, with the first one of seed 0.

    It is drawn in a fork, where there can be one, as this process has to fork workers later.

    Raises:
        EnvError: It cannot be drawn.
    """
    facts: dict[str, Any] = {"kind": "pixels", "base": pictured(spec).id}
    facts |= dataclasses.asdict(settings)

    def tell() -> dict[str, Any]:
        env: Any = make()
        try:
            env.reset(seed=0)
            while not isinstance(env, PixelEnv):
                env = env.env
            told: dict[str, Any] = env.told()
            return told
        finally:
            env.close()

    if sys.platform != "linux" or view.drawn_here():
        try:
            return facts | tell()
        except EnvFault as fault:
            raise EnvError(f"{spec.id} cannot be drawn: {fault}") from fault
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    child = fork.Process(target=_answer, args=(theirs, tell), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(_ANSWER):
            raise EnvError(f"{spec.id} has drawn nothing within {_ANSWER:.0f} seconds")
        answer: dict[str, Any] = json.loads(ours.recv_bytes())
    except EOFError:
        raise EnvError(f"{spec.id} cannot be drawn: the process that tried died") from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if "error" in answer:
        raise EnvError(f"{spec.id} cannot be drawn: {answer['error']}")
    return facts | answer


def _answer(pipe: Connection, tell: Callable[[], dict[str, Any]]) -> None:
    """Send what is told, or why it cannot be."""
    try:
        answer = tell()
    except Exception as error:
        answer = {"error": one_line(error)}
    pipe.send_bytes(json.dumps(answer).encode())


def shrunk(picture: Array, size: int) -> Array:
    """A picture (H, W, 3) of bytes as a square (size, size, 3), by the mean over areas.

    Each new pixel covers H/size by W/size old ones, those on its border in part.
    """
    height, width, _ = picture.shape
    numbers = picture.astype(np.float32)
    rows = np.einsum("ih,hwc->iwc", _areas(height, size), numbers, optimize=True)
    mean: Array = np.einsum("jw,iwc->ijc", _areas(width, size), rows, optimize=True)
    return np.rint(mean).astype(np.uint8)


def _areas(old: int, new: int) -> Array:
    """Share (new, old) that each old place has in each new one; rows sum to 1."""
    edges = np.arange(new + 1) * (old / new)
    places = np.arange(old)
    low = np.maximum(edges[:-1, None], places)
    high = np.minimum(edges[1:, None], places + 1)
    shares: Array = np.maximum(high - low, 0) * (new / old)
    return shares.astype(np.float32)
