"""What environments are made from: an id, a class, a function, a list of those, or one."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from acktr.envs.errors import EnvError, named
from acktr.envs.manners import Manners
from acktr.envs.registry import PIXELS, is_gymnasiums, lookup, mujoco_py_replacements, pictured
from acktr.envs.vector import AnyEnv
from acktr.envs.watch import TIMEOUT, Late, limited

EnvMaker = Callable[..., AnyEnv]
EnvLike = str | EnvSpec | AnyEnv | EnvMaker | Sequence[EnvMaker]
"""An id, a Gymnasium specification, one environment, or a class or function (or a list of them)
that makes one."""
Wrapper = str | Callable[[AnyEnv], AnyEnv]
"""A class or function that wraps an environment, or its name as module:Name."""

_FORMS = (
    "an id, a gymnasium.Env, a class or function that makes one, a list of such functions, or a"
    " Gymnasium VectorEnv"
)
_NOT_DRAWN = (
    "{} cannot be drawn, as it takes no render_mode: write def __init__(self, render_mode=None),"
    " keep it as self.render_mode, name 'rgb_array' in metadata['render_modes'], and return a"
    " picture (height, width, 3) from render()"
)
_POLICIES = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")


class EnvSource:
    """What environments are made from, with the arguments and wrappers of each.

    One environment is made at once of what is not an id, as its class tells the name.

    Args:
        env: What they are made from.
        kwargs: Arguments: of ``gymnasium.make`` for an id, of the class or function otherwise.
        wrappers: Wrappers around each environment, the innermost first.
        timeout: Seconds that making the first one may take.

    Attributes:
        name: Gymnasium's id of the environment, or the name of its class.
        spec: Gymnasium's specification, if there is one.
        registered: Whether they are made by ``gymnasium.make`` from that specification.
        count: The number of environments that there are; None: as many as are asked for.
        json_kwargs: Those of the arguments that are JSON values.
        wrapped: Whether there are wrappers.
        wrapper_names: Names of those wrappers that can be found in a module again.
        origin: What no file can bring back, in words; None if an id and JSON values say it all.

    Raises:
        EnvError: Nothing can be made from it; one line.
    """

    def __init__(
        self,
        env: EnvLike,
        kwargs: Mapping[str, Any] | None = None,
        wrappers: Sequence[Wrapper] = (),
        timeout: float = TIMEOUT,
    ) -> None:
        self.kwargs = dict(kwargs or {})
        if callable(wrappers) or isinstance(wrappers, str):
            raise EnvError(f"wrappers must be a list, such as [TimeLimit], got {wrappers!r:.80}")
        self._wrappers = [_resolved(wrapper) for wrapper in wrappers]
        self.wrapped = bool(self._wrappers)
        names = [wrapper_name(wrapper) for wrapper in wrappers]
        self.wrapper_names = tuple(name for name in names if name is not None)
        self.count: int | None = None
        self._first: AnyEnv | None = None
        self._makers: list[EnvMaker] = []
        self.registered = isinstance(env, str | EnvSpec)
        self.spec: EnvSpec | None = None
        self.origin: str | None = None
        if isinstance(env, str | EnvSpec):
            self.spec = _specification(env)
            self.name = self.spec.id
            if isinstance(env, EnvSpec) and gymnasium.registry.get(env.id) != env:
                self.origin = f"a specification of {env.id} that is not the registered one"
        else:
            self._makers, self.origin = _makers(env)
            self.count = len(self._makers) if not callable(env) else None
            if isinstance(env, gymnasium.Env) and self.kwargs:
                raise EnvError(
                    "env_kwargs cannot be given to an environment that is made already: give its"
                    " id, or a class or function that makes it"
                )
            self.name = _called(self._makers[0])  # until the first one says it better
            self._first = self.make(0, None, timeout)
            self.spec = self._first.spec
            self.name = env_name(self._first)
        self.json_kwargs = {key: value for key, value in self.kwargs.items() if is_json(value)}
        unsaved = sorted(self.kwargs.keys() - self.json_kwargs.keys())
        if self.origin is None and unsaved:
            self.origin = f"made with env_kwargs that are no JSON values ({', '.join(unsaved)})"
        if self.origin is None and None in names:
            nameless = _called(wrappers[names.index(None)])
            self.origin = f"wrapped by {nameless}, which is not found in a module by its name"

    def make(self, index: int, render_mode: str | None, timeout: float = TIMEOUT) -> AnyEnv:
        """Environment number `index` with its wrappers.

        Raises:
            EnvError: It cannot be made, or not within so many seconds.
        """
        if self._first is not None and index == 0 and render_mode is None:
            first, self._first = self._first, None
            return first
        mode = {} if render_mode is None else {"render_mode": render_mode}
        try:
            which = f"environment {index} of {self.name}"
            with limited(f"{which} was not made", timeout), self._minded(which):
                return self._wrapped(self._made(index, self._arguments(mode)))
        except EnvError:
            raise
        except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
            text = " ".join(str(error).split())
            raise EnvError(f"{self.name} needs a package that is missing: {text}") from error
        except Late as late:
            raise EnvError(str(late)) from late
        except (Exception, SystemExit) as error:
            if mode and self._lacks_render_mode(error):
                raise EnvError(_NOT_DRAWN.format(self.name)) from error
            raise EnvError(f"{self.name} could not be made: {named(error)}") from error

    def _lacks_render_mode(self, error: BaseException) -> bool:
        """Whether an environment was not made because it takes no render_mode."""
        alone = "takes no arguments" in str(error) and not self.kwargs
        return isinstance(error, TypeError) and (alone or "argument 'render_mode'" in str(error))

    @property
    def foreign(self) -> bool:
        """Whether somebody else than Gymnasium wrote the environment or what is around it."""
        return self.wrapped or not self.registered or not is_gymnasiums(self.spec)

    def _minded(self, which: str) -> AbstractContextManager[None]:
        return Manners(which).around("its making") if self.foreign else nullcontext()

    def _wrapped(self, env: AnyEnv) -> AnyEnv:
        """An environment with its wrappers."""
        _require_env(env, self.name)
        for wrapper in self._wrappers:
            try:
                env = wrapper(env)
            except (Exception, SystemExit) as error:
                raise EnvError(f"{self.name}: {_called(wrapper)} failed: {named(error)}") from error
            _require_env(env, _called(wrapper))
        return env

    def _made(self, index: int, kwargs: dict[str, Any]) -> AnyEnv:
        if not self.registered:
            maker = self._makers[index if len(self._makers) > 1 else 0]
            return maker(**kwargs)
        assert self.spec is not None
        # The specification instead of the id avoids warnings of newer versions.
        env: AnyEnv = gymnasium.make(self.spec, **kwargs)
        return env

    def _arguments(self, mode: dict[str, str]) -> dict[str, Any]:
        """All arguments; those of an environment behind pictures in one, as they are not theirs."""
        if self.spec is not None and self.registered and self.spec.namespace == PIXELS:
            return {"env_kwargs": self.kwargs, **mode}
        return {**self.kwargs, **mode}


def env_name(env: AnyEnv | VectorEnv[Any, Any, Any]) -> str:
    """Gymnasium's id of an environment, or the name of its class."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def is_json(value: object) -> bool:
    """Whether a value comes back from a JSON file as it was."""
    if isinstance(value, dict):
        return all(type(key) is str and is_json(item) for key, item in value.items())
    if type(value) is list:
        return all(is_json(item) for item in value)
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or type(value) in (bool, str)


def wrapper_name(wrapper: Wrapper) -> str | None:
    """The name by which a wrapper is found in its module; None if it is not."""
    if isinstance(wrapper, str):
        return wrapper
    module, name = getattr(wrapper, "__module__", ""), getattr(wrapper, "__qualname__", "")
    found: Any = sys.modules.get(module) if module != "__main__" else None
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is wrapper else None


def _specification(env: str | EnvSpec) -> EnvSpec:
    if env in _POLICIES:
        raise EnvError(
            f"{env!r} is no environment: write ACKTR(env) without a policy; the network follows the"
            " spaces, and network= takes one of your own"
        )
    spec = lookup(env) if isinstance(env, str) else env
    replacements = mujoco_py_replacements(pictured(spec))
    if replacements:
        choice = " or ".join(sorted(replacements, reverse=True))
        raise EnvError(f"{spec.id} needs the retired mujoco-py package; use {choice}")
    if spec.entry_point is None:
        raise EnvError(
            f"{spec.id} is registered as a vector environment only: give"
            f" gymnasium.make_vec({spec.id!r}, num_envs=8)"
        )
    return spec


def _makers(env: object) -> tuple[list[EnvMaker], str]:
    """What makes the environments, one by one or all of them, and what that is in words."""
    if isinstance(env, gymnasium.Env):
        return [lambda: env], f"one {env_name(env)} that was made already"
    if isinstance(env, type) and issubclass(env, VectorEnv):
        raise EnvError(f"{env.__name__} is a class of vector environments: give one of them")
    if callable(env):
        kind = "class" if isinstance(env, type) else "function"
        return [env], f"made by the {kind} {_called(env)}"
    if isinstance(env, list | tuple) and env and all(callable(maker) for maker in env):
        return list(env), f"made by a list of {len(env)} functions"
    raise EnvError(f"the environment must be {_FORMS}; got {_shown(env)}")


def _require_env(env: object, maker: str) -> None:
    if not isinstance(env, gymnasium.Env):
        hint = "; give the VectorEnv itself" if isinstance(env, VectorEnv) else ""
        raise EnvError(f"{maker} gave no gymnasium.Env but {_shown(env)}{hint}")


def _resolved(wrapper: Wrapper) -> Callable[[AnyEnv], AnyEnv]:
    """The wrapper of a name, which imports its module."""
    if not isinstance(wrapper, str):
        if not callable(wrapper):
            raise EnvError(f"a wrapper must be a class, a function or module:Name; got {wrapper!r}")
        return wrapper
    module, _, name = wrapper.partition(":")
    if not module or not name or ":" in name:
        raise EnvError(f"the wrapper {wrapper!r} must be written as module:Name")
    try:
        found: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as error:
        raise EnvError(f"the wrapper {wrapper!r} cannot be imported: {named(error)}") from error
    if not callable(found):
        raise EnvError(f"the wrapper {wrapper!r} is no class or function")
    return found  # type: ignore[no-any-return]


def _called(thing: object) -> str:
    return str(getattr(thing, "__name__", type(thing).__name__))


def _shown(thing: object) -> str:
    """A thing that is no environment, and what to do if it is another library's."""
    text = f"{type(thing).__name__} {' '.join(repr(thing).split()):.60}"
    libraries = {base.__module__.split(".")[0] for base in type(thing).__mro__}
    if "stable_baselines3" in libraries:
        text += "; give the list of functions that it is made of"
    if "gym" in libraries:
        text += (
            ", which is of the old gym: derive its class from gymnasium.Env, or convert it by"
            " shimmy.GymV26CompatibilityV0(env=...) or shimmy.GymV21CompatibilityV0(env=...)"
        )
    return text
