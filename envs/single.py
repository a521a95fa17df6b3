"""One Gymnasium environment: made without noise, with supported spaces and named faults."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from acktr.envs.errors import EnvError, EnvFault, named, one_line
from acktr.envs.registry import mujoco_py_replacements, uses_mujoco
from acktr.envs.rendering import prepare_rendering
from acktr.envs.spaces import check_spaces
from acktr.envs.vector import AnyEnv


def make_one(spec: EnvSpec, index: int, render_mode: str | None) -> SafeEnv:
    """Environment number `index` of a vector, or the only one.

    Raises:
        EnvError: It cannot be made, cannot render so, or has unsupported spaces.
    """
    replacements = mujoco_py_replacements(spec)
    if replacements:
        choice = " or ".join(sorted(replacements, reverse=True))
        raise EnvError(f"{spec.id} needs the retired mujoco-py package; use {choice}")
    try:
        with quiet_mujoco(spec), warnings.catch_warnings():
            # A render mode that the environment does not have is an error below.
            warnings.filterwarnings("ignore", message=".*is being initialised with render_mode")
            # The specification instead of the id avoids warnings of newer versions.
            env: AnyEnv = gymnasium.make(spec, render_mode=render_mode)
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise EnvError(f"{spec.id} needs a package that is missing: {one_line(error)}") from error
    except Exception as error:
        raise EnvError(f"{spec.id} could not be made: {named(error)}") from error
    modes = env.metadata.get("render_modes") or []
    try:
        if render_mode is not None and render_mode not in modes:
            raise EnvError(f"{spec.id} cannot render {render_mode!r}; it offers {list(modes)}")
        if render_mode not in (None, "human"):
            prepare_rendering(env)
        safe = SafeEnv(env, spec.id, index)
        check_spaces(safe.observation_space, safe.action_space)
    except EnvError:
        env.close()
        raise
    return safe


class SafeEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment: exceptions name it, and integer spaces start at zero.

    Discrete and MultiDiscrete spaces with another start are shifted to zero.
    """

    def __init__(self, env: AnyEnv, name: str, index: int) -> None:
        super().__init__(env)
        self._label = f"environment {index} of {name}"
        self._steps = 0
        self._action_start, self.action_space = _from_zero(env.action_space)
        self._obs_start, self.observation_space = _from_zero(env.observation_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `gymnasium.Env.reset`."""
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._fault(error, "reset") from error
        return self._shift(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; see `gymnasium.Env.step`."""
        self._steps += 1
        if self._action_start is not None:
            action = action + self._action_start
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._fault(error, f"step {self._steps}") from error
        return self._shift(obs), reward, terminated, truncated, info

    def render(self) -> Any:
        """Render; a missing dependency or display becomes an EnvError."""
        try:
            return self.env.render()
        except Exception as error:
            raise EnvError(f"{self._label} cannot be rendered: {one_line(error)}") from error

    def _shift(self, obs: Any) -> Any:
        return obs if self._obs_start is None else obs - self._obs_start

    def _fault(self, error: Exception, when: str) -> EnvFault:
        return EnvFault(f"{self._label} raised {type(error).__name__} at {when}: {one_line(error)}")


def _from_zero(space: spaces.Space[Any]) -> tuple[Any, spaces.Space[Any]]:
    """The start of an integer space if it is not zero, else None; the space with start zero."""
    if isinstance(space, spaces.Discrete) and space.start != 0:
        return space.start, spaces.Discrete(int(space.n))
    if isinstance(space, spaces.MultiDiscrete) and np.any(space.start != 0):
        return space.start, spaces.MultiDiscrete(space.nvec)
    return None, space


@contextmanager
def quiet_mujoco(spec: EnvSpec) -> Iterator[None]:
    """While environments are built, drop MuJoCo's messages that something "is deprecated".

    MuJoCo 4 reports deprecated attributes of the model files in Gymnasium from C, on stderr and
    in a file MUJOCO_LOG.TXT in the working directory. Its other messages become Python warnings.
    """
    mujoco: Any = sys.modules.get("mujoco")
    if uses_mujoco(spec):
        with suppress(ImportError):  # Gymnasium explains what is missing
            mujoco = importlib.import_module("mujoco")
    if not hasattr(mujoco, "set_mju_user_warning"):
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
