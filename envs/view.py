"""Pictures of a MuJoCo simulation by MuJoCo's own renderer, as fast as a processor draws them.

Most of what Gymnasium's pictures cost goes into a shadow map, reflections, four samples a pixel,
and a floor whose grid is drawn as 100,000 squares. Without these, one core draws 40 to 50 times as
many pictures of Hopper. Physics knows nothing of any of them.
"""

from __future__ import annotations

import atexit
import importlib
import os
import weakref
from typing import Any

import numpy as np

from acktr.envs.errors import EnvError
from acktr.envs.vector import Array

FLOOR_GRID = 20.0
"""Spacing of the squares that a floor is drawn of, in place of the model's 0.1 to 1."""
_MOST_GEOMS = 10_000
_NEAR: dict[str, dict[str, Any]] = {
    "Reacher": {"lookat": (0.0, 0.0, 0.0), "distance": 0.55, "elevation": -90.0},
    "InvertedPendulum": {"lookat": (0.0, 0.0, 0.3), "distance": 2.8, "elevation": -10.0},
    "InvertedDoublePendulum": {"lookat": (0.0, 0.0, 0.5), "distance": 2.8, "elevation": -10.0},
}
"""Free cameras by the name of the environment. Gymnasium's are too far away for small pictures
(Reacher's target has a radius of 9 mm, 1.5 pixels; the double pendulum is 9 pixels), or lose the
cart at the ends of its rail, which are 1 m from the middle."""

_open: weakref.WeakSet[View] = weakref.WeakSet()
_hooked = False


class View:
    """A camera's pictures of a simulation, in an OpenGL context of its own.

    It belongs to the process that makes it: a context does not go on in a fork.

    Args:
        env: A `MujocoEnv` of Gymnasium.
        size: Sides of the square pictures in pixels.
        camera: Name of a camera of the model, `free`, or `auto`: see `find_camera`.
        shadows: Whether shadows are drawn.
        multisample: Samples a pixel.

    Raises:
        EnvError: There is no such camera, or no picture can be drawn.
    """

    def __init__(self, env: Any, size: int, camera: str, shadows: bool, multisample: int) -> None:
        mujoco: Any = importlib.import_module("mujoco")
        self._mujoco, self._data, self._size = mujoco, env.data, size
        model = self._model = env.model
        self._camera = find_camera(env, camera)
        simplify(model, size, multisample)
        backend = (os.environ.get("MUJOCO_GL") or "egl").lower()
        try:
            self._context: Any = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
            self._context.make_current()
            self._drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:
            raise EnvError(f"MuJoCo cannot draw with MUJOCO_GL={backend}: {error}") from error
        self.samples = int(self._drawing.offSamples)
        """Samples a pixel that are drawn; the driver need not have those that were asked for."""
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._drawing)
        self._scene = mujoco.MjvScene(model, maxgeom=_MOST_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        self._options = mujoco.MjvOption()
        self._rectangle = mujoco.MjrRect(0, 0, size, size)
        self._buffer = np.empty((size, size, 3), np.uint8)
        _open.add(self)
        _close_at_exit()

    def draw(self) -> Array:
        """The picture of this moment (size, size, 3), in memory that the next one overwrites."""
        mujoco = self._mujoco
        if self._context is None:
            raise EnvError("the environment is closed: no picture can be drawn")
        self._context.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model, self._data, self._options, None, self._camera, everything, self._scene
        )
        mujoco.mjr_render(self._rectangle, self._scene, self._drawing)
        mujoco.mjr_readPixels(self._buffer, None, self._rectangle, self._drawing)
        return self._buffer[::-1]  # OpenGL's first row is the lowest

    def close(self) -> None:
        """Free the context; it may be closed twice."""
        if self._context is not None:
            self._context.make_current()
            self._drawing.free()
            self._context.free()
            self._context = None


def simplify(model: Any, size: int, multisample: int) -> None:
    """Make a model cheap to draw, before a context is made for it; physics stays the same."""
    model.vis.quality.offsamples = multisample
    model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
    model.vis.global_.offheight = max(model.vis.global_.offheight, size)
    plane = importlib.import_module("mujoco").mjtGeom.mjGEOM_PLANE
    floors = model.geom_type == plane
    model.geom_size[floors, 2] = np.maximum(model.geom_size[floors, 2], FLOOR_GRID)


def find_camera(env: Any, name: str) -> Any:
    """The camera of a name as MuJoCo's `MjvCamera`.

    `auto` is the camera `track` of the model, which moves with the robot, or a free one: near, from
    above for Reacher and from the side for pendulums, and elsewhere Gymnasium's. `free` is the
    latter everywhere.

    Raises:
        EnvError: The model has no such camera.
    """
    mujoco: Any = importlib.import_module("mujoco")
    model, camera = env.model, mujoco.MjvCamera()
    names = [model.camera(number).name for number in range(model.ncam)]
    if name == "auto" and "track" in names:
        name = "track"
    if name in names:
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = names.index(name)
        return camera
    if name not in ("auto", "free"):
        offered = ", ".join(["auto", "free", *names])
        raise EnvError(f"pixels.camera: the model has no camera {name!r}; it offers {offered}")
    mujoco.mjv_defaultFreeCamera(model, camera)
    usual = getattr(env.mujoco_renderer, "default_cam_config", None) or {}
    base = "" if env.spec is None else env.spec.name
    for key, value in (_NEAR.get(base, usual) if name == "auto" else usual).items():
        if key in ("distance", "azimuth", "elevation"):
            setattr(camera, key, value)
        elif key == "lookat":
            camera.lookat[:] = value
    return camera


def described(env: Any, camera: Any) -> dict[str, Any]:
    """Every number of a camera's view, as JSON values; lengths are in metres, angles in degrees."""
    model, fixed = env.model, camera.fixedcamid
    visual = model.vis.global_
    facts: dict[str, Any] = {"fovy": float(visual.fovy)}
    if fixed >= 0:
        seen = model.camera(fixed)
        facts = {
            "camera": seen.name,
            "mode": int(seen.mode[0]),
            "body": model.body(int(seen.bodyid[0])).name,
            "position": seen.pos.tolist(),
            "quaternion": seen.quat.tolist(),
            "fovy": float(seen.fovy[0]),
        }
    else:
        facts |= {"camera": "free", "lookat": camera.lookat.tolist()}
        facts |= {key: float(getattr(camera, key)) for key in ("distance", "azimuth", "elevation")}
    extent = float(model.stat.extent)
    return facts | {
        "near": float(model.vis.map.znear) * extent,
        "far": float(model.vis.map.zfar) * extent,
        "extent": extent,
    }


def drawn_here() -> bool:
    """Whether this process has made a context, so that forks of it cannot draw."""
    return _hooked


def _close_at_exit() -> None:
    """Close what is open before the display is: contexts that outlive it fail loudly.

    The hook of the display is registered when the first context is made, and hooks are called in
    the opposite order.
    """
    global _hooked
    if not _hooked:
        _hooked = True
        atexit.register(_close_all)


def _close_all() -> None:
    for view in list(_open):
        view.close()
