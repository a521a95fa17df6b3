"""One Gymnasium environment: made without noise, with supported spaces and named faults."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from acktr.envs.errors import EnvError, EnvFault, EnvWarning, named, one_line
from acktr.envs.manners import ManneredEnv
from acktr.envs.registry import uses_mujoco
from acktr.envs.rendering import prepare_rendering
from acktr.envs.source import EnvSource
from acktr.envs.spaces import check_spaces
from acktr.envs.vector import AnyEnv
from acktr.envs.watch import TIMEOUT, Late, Watch

_RESET = "reset must return (observation, info)"
_STEP = "step must return (observation, reward, terminated, truncated, info)"


def make_one(
    source: EnvSource, index: int, render_mode: str | None, timeout: float = TIMEOUT
) -> SafeEnv:
    """Environment number `index` of a vector, or the only one.

    Raises:
        EnvError: It cannot be made, cannot render so, or has unsupported spaces.
    """
    with quiet_mujoco(source.spec), warnings.catch_warnings():
        # A render mode that the environment does not have is an error below.
        warnings.filterwarnings("ignore", message=".*is being initialised with render_mode")
        env = source.make(index, render_mode, timeout)
    modes = env.metadata.get("render_modes") or []
    try:
        if render_mode is not None and render_mode not in modes:
            raise EnvError(f"{source.name} cannot render {render_mode!r}; it offers {list(modes)}")
        if render_mode not in (None, "human"):
            prepare_rendering(env)
        if source.foreign:
            env = ManneredEnv(env, f"environment {index} of {source.name}")
        safe = SafeEnv(env, source.name, index)
        check_spaces(safe.observation_space, safe.action_space)
    except EnvError:
        SafeEnv(env, source.name, index).close()
        raise
    return safe


class SafeEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment whose exceptions name it."""

    def __init__(self, env: AnyEnv, name: str, index: int) -> None:
        super().__init__(env)
        self._label = f"environment {index} of {name}"
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `gymnasium.Env.reset`."""
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        except (Exception, SystemExit) as error:
            raise self._fault(error, "reset", _RESET) from error
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; see `gymnasium.Env.step`."""
        self._steps += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except (Exception, SystemExit) as error:
            raise self._fault(error, f"step {self._steps}", _STEP) from error
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        """Render; a missing dependency or display becomes an EnvError."""
        try:
            return self.env.render()
        except (Exception, SystemExit) as error:
            raise EnvError(f"{self._label} cannot be rendered: {one_line(error)}") from error

    def close(self) -> None:
        """Close; what goes wrong is a warning, as nothing is asked of the environment any more."""
        try:
            self.env.close()
        except (Exception, SystemExit, Late) as error:
            said = str(error) if isinstance(error, Late) else f"{self._label} raised {named(error)}"
            warnings.warn(f"{said}, when it was closed", EnvWarning, stacklevel=2)

    def _fault(self, error: BaseException, when: str, wanted: str) -> EnvFault:
        said = f"{type(error).__name__} at {when}: {one_line(error)}"
        if "unpack" in said and _raised_in(error).startswith((__name__, "gymnasium.")):
            said += f"; {wanted}, which environments of gym before 0.26 do not"
        return EnvFault(f"{self._label} raised {said}")


class LimitedEnv(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment alone, none of whose calls may take longer than some seconds."""

    def __init__(self, env: AnyEnv, name: str, seconds: float) -> None:
        super().__init__(env)
        self._name, self._seconds = name, seconds
        self._doing: list[tuple[int, str] | None] = [None]  # what is under way, by its number
        self._count = 0
        self._end: weakref.finalize[..., LimitedEnv] | None = None
        self._process = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Reset; see `gymnasium.Env.reset`."""
        with self._limit("reset"):
            return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; see `gymnasium.Env.step`."""
        with self._limit("a step"):
            return self.env.step(action)

    def render(self) -> Any:
        """Render; see `gymnasium.Env.render`."""
        with self._limit("rendering"):
            return self.env.render()

    def close(self) -> None:
        """Close; see `gymnasium.Env.close`."""
        with self._limit("close"):
            self.env.close()
        if self._end is not None:
            self._end()

    @contextmanager
    def _limit(self, call: str) -> Iterator[None]:
        self._count += 1
        try:
            if threading.current_thread() is threading.main_thread():  # which a watch interrupts
                self._watch()
                self._doing[0] = self._count, call
            yield
        except Late as late:
            raise EnvFault(str(late)) from late
        finally:
            self._doing[0] = None

    def _watch(self) -> None:
        """Begin to watch at the first call: what has a thread when it is made is not forked."""
        watched = self._end is not None and self._end.alive  # a copy's is not
        if not watched or self._process != os.getpid():  # and a thread stays behind in a fork
            self._process = os.getpid()
            doing, said = self._doing, f"{self._name} did not return from "
            watch = Watch(lambda: doing[0], lambda call: said + call[1], self._seconds)
            self._end = weakref.finalize(self, watch.stop)


def _raised_in(error: BaseException) -> str:
    """The name of the module whose code raised an exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


@contextmanager
def quiet_mujoco(spec: EnvSpec | None) -> Iterator[None]:
    """While environments are built, drop MuJoCo's messages that something "is deprecated".

    MuJoCo 4 reports deprecated attributes of the model files in Gymnasium from C, on stderr and
    in a file MUJOCO_LOG.TXT in the working directory. Its other messages become Python warnings.

    Raises:
        EnvError: It is there, but cannot be imported.
    """
    mujoco: Any = sys.modules.get("mujoco")
    if spec is not None and uses_mujoco(spec):
        try:
            mujoco = importlib.import_module("mujoco")
        except ImportError:
            pass  # Gymnasium explains what is missing
        except Exception as error:  # of a MUJOCO_GL that it does not know, for example
            hint = "; unset it or try egl" if "MUJOCO_GL" in str(error) else ""
            raise EnvError(f"MuJoCo cannot be imported: {one_line(error)}{hint}") from error
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
