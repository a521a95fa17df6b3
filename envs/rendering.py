"""Rendering of MuJoCo environments: without a display, with the robot in the picture."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import suppress

from acktr.envs.errors import EnvError
from acktr.envs.vector import AnyEnv

_BACKENDS = ("egl", "osmesa")
_PROBE = """
import os
import mujoco
context = mujoco.GLContext(16, 16)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), mujoco.mjtFontScale.mjFONTSCALE_100)
from OpenGL import GL
found = (GL.glGetString(name).decode() for name in (GL.GL_RENDERER, GL.GL_VERSION))
print(os.environ["MUJOCO_GL"], *found, sep=", ", flush=True)
os._exit(0)
"""
_CAMERA_SETTINGS = {"camera_id", "camera_name", "default_camera_config"}


def prepare_rendering(env: AnyEnv) -> None:
    """Make a MuJoCo environment render here, and follow its robot; others stay as they are.

    Raises:
        EnvError: MuJoCo cannot draw on this machine.
    """
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is None:
        return
    choose_backend()
    # Gymnasium 1.4 no longer takes the model's camera "track", which moves with the robot, and
    # its own camera stands still: after two seconds HalfCheetah has left the picture.
    if env.spec is None or not _CAMERA_SETTINGS & env.spec.kwargs.keys():
        with suppress(KeyError):  # models of robots that stay in their place have no such camera
            renderer.camera_id = renderer.model.camera("track").id


def choose_backend() -> str:
    """Set MUJOCO_GL to the first backend that can draw without a display, unless it is set.

    Raises:
        EnvError: None of them works.
    """
    # Mesa's renderer on the processor has threads otherwise: the cores are busy with other
    # environments, and threads do not go on in a fork.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    given = os.environ.get("MUJOCO_GL")
    for backend in (given,) if given else _BACKENDS:
        if _works(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    if given:
        raise EnvError(f"MuJoCo cannot draw with MUJOCO_GL={given}; unset it or try egl")
    raise EnvError(
        "MuJoCo can draw neither with EGL nor with OSMesa here: "
        "install one, for example apt install libegl1 libopengl0 or libosmesa6"
    )


def drawn_by() -> str:
    """Backend, renderer and version of OpenGL with which MuJoCo draws here.

    Raises:
        EnvError: As `choose_backend`.
    """
    return _tried(choose_backend()) or ""


def _works(backend: str) -> bool:
    return _tried(backend) is not None


@functools.cache
def _tried(backend: str) -> str | None:
    """What draws with a backend; None if that fails.

    It is tried in another process, because a failed attempt spoils this one for the next.
    """
    environment = {**os.environ, "MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return said[-1] if done.returncode == 0 and said else None
