"""Keeps MuJoCo's deprecation lines about Gymnasium's model files away from the user."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from gymnasium.envs.registration import EnvSpec


@contextmanager
def quiet_mujoco(spec: EnvSpec) -> Iterator[None]:
    """While environments are built, drop MuJoCo's messages that something "is deprecated".

    MuJoCo 4 reports deprecated attributes of the model files in Gymnasium from C, on stderr and
    in a file MUJOCO_LOG.TXT in the working directory. Its other messages become Python warnings.
    """
    uses_mujoco = isinstance(spec.entry_point, str) and "mujoco" in spec.entry_point
    if not uses_mujoco and "mujoco" not in sys.modules:
        yield
        return
    try:
        mujoco = importlib.import_module("mujoco")
    except ImportError:
        yield  # Gymnasium explains what is missing
        return
    if not (hasattr(mujoco, "get_mju_user_warning") and hasattr(mujoco, "set_mju_user_warning")):
        yield
        return
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(_forward)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)


def _forward(message: str) -> None:
    if "is deprecated" not in message:
        warnings.warn(f"MuJoCo: {message}", RuntimeWarning, stacklevel=2)
