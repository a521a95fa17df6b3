"""What all vector environments share: types, seeds and the masks of partial resets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from acktr.envs.errors import EnvError, UnsavedError, check_integer

Array = NDArray[Any]
StepResult = tuple[Any, Array, Array, Array, dict[str, Any]]
"""Observations, rewards, terminated, truncated and infos of one step of all environments.

Observations are an array, or a dict or tuple of arrays as their space has it.
"""
AnyEnv = gymnasium.Env[Any, Any]
AnyVectorEnv = VectorEnv[Any, Any, Any]
if TYPE_CHECKING:
    AnyVectorWrapper = VectorWrapper[Any, Any, Any, Any, Any]
else:  # Gymnasium 1.2 has no generic VectorWrapper at run time
    AnyVectorWrapper = VectorWrapper

MAX_SEED = 2**32 - 1


class OpenVectorEnv(AnyVectorWrapper):
    """A wrapper through which attributes and methods of the environments inside are reached.

    As in Gymnasium's vectors; others may lack them, and a vector over processes refuses in one
    line. What is called here counts as played by somebody else.
    """

    _count = 0

    @property
    def turns(self) -> int:
        """Resets and steps so far, and states that were loaded."""
        return self._count

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or get an attribute."""
        self._count += name in ("reset", "step")
        results: tuple[Any, ...] = self._inside("call")(name, *args, **kwargs)
        return results

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of every environment."""
        values: tuple[Any, ...] = self._inside("get_attr")(name)
        return values

    def set_attr(self, name: str, values: Any) -> None:
        """Set an attribute of every environment: one value, or a list of one for each."""
        self._inside("set_attr")(name, values)

    def _inside(self, name: str) -> Callable[..., Any]:
        """A method of the vector environment that is wrapped."""
        method = getattr(self.env.unwrapped, name, None)
        if method is None:
            kind = type(self.env.unwrapped).__name__
            raise AttributeError(f"{kind} has no {name}: its environments are not reached so")
        found: Callable[..., Any] = method
        return found


def check_seed(seed: object) -> int:
    """Return `seed` as an int.

    Raises:
        EnvError: not an integer from 0 to 2^32 - 1.
    """
    return check_integer("the seed", seed, 0, MAX_SEED)


def env_seeds(seed: int, num_envs: int) -> list[int]:
    """Seeds of the environments of a vector, each from 0 to 2^31 - 1.

    They are drawn from a `numpy.random.SeedSequence`, so that runs with neighbouring seeds share
    no environment, and the first k do not depend on `num_envs`.
    """
    words = np.random.SeedSequence(check_seed(seed)).generate_state(num_envs)
    return [int(word) >> 1 for word in words]


def check_mask(mask: Any, num_envs: int) -> NDArray[np.bool_]:
    """The environments that a `reset_mask` selects; None selects all.

    Raises:
        EnvError: It is no mask, or selects none.
    """
    array = np.ones(num_envs, np.bool_) if mask is None else np.asarray(mask)
    if array.shape != (num_envs,) or array.dtype != np.bool_ or not array.any():
        raise EnvError(
            f"reset_mask must be {num_envs} booleans, not all of them false; got {mask!r}"
        )
    return array


_TWICE = (
    "{name}: environments {first} and {second} are one and the same: the function must make a new"
    " one each time"
)


def require_new(env: AnyEnv, others: Sequence[AnyEnv], name: str) -> None:
    """Refuse an environment that is one of the others already: both would step it.

    Raises:
        EnvError: It is; one line.
    """
    for index, other in enumerate(others):
        if env.unwrapped is other.unwrapped:
            raise EnvError(_TWICE.format(name=name, first=index, second=len(others)))


def require_distinct(envs: AnyVectorEnv, name: str) -> None:
    """Refuse Gymnasium's vector of environments where it has one of them twice.

    In vectors of others the environments may be views of one simulation that all step together.

    Raises:
        EnvError: It has; one line.
    """
    if type(envs.unwrapped) is not SyncVectorEnv:
        return
    places: dict[int, int] = {}
    for index, env in enumerate(inner_envs(envs)):
        first = places.setdefault(id(env.unwrapped), index)
        if first != index:
            raise EnvError(_TWICE.format(name=name, first=first, second=index))


def inner_envs(envs: AnyEnv | AnyVectorEnv) -> list[AnyEnv]:
    """The environments of a vector that has them in this process, as Gymnasium's own do."""
    inside: Any = getattr(envs.unwrapped, "envs", ()) if isinstance(envs, VectorEnv) else ()
    listed = inside if isinstance(inside, list | tuple) else ()
    return [env for env in listed if isinstance(env, gymnasium.Env)]


def layers(envs: AnyVectorEnv) -> Iterator[Any]:
    """A vector environment and what it wraps, the outermost first."""
    layer: Any = envs
    while layer is not None:
        yield layer
        layer = getattr(layer, "env", None)


def is_mujoco(env: Any) -> bool:
    """Whether it is one of Gymnasium's base environments that MuJoCo simulates."""
    module: Any = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    return module is not None and isinstance(env, module.MujocoEnv)


def state_method(envs: AnyVectorEnv, name: str) -> Callable[..., Any]:
    """``state_dict`` or a method like it, of a vector environment or of what it wraps.

    Raises:
        UnsavedError: There is none, or a wrapper around it has variables and no such method.
    """
    layer: Any = envs
    while True:
        method = getattr(layer, name, None)
        if callable(method):
            found: Callable[..., Any] = method
            return found
        wraps = isinstance(layer, VectorWrapper)
        if not wraps or vars(layer).keys() - vars(VectorWrapper(layer.env)).keys():
            raise UnsavedError(f"{type(layer).__name__} has no {name}")
        layer = layer.env


def check_state(envs: AnyVectorEnv, state: Any) -> None:
    """Let a vector environment check a state, where it has ``check_state_dict``.

    Raises:
        ValueError: The state does not fit; one line.
    """
    state_method(envs, "load_state_dict")
    try:
        check = state_method(envs, "check_state_dict")
    except UnsavedError:
        return
    check(state)


def autoreset_mode(envs: AnyVectorEnv) -> AutoresetMode:
    """How a vector environment resets those whose episodes have ended.

    Raises:
        EnvError: It does not say so, or not by itself; one line.
    """
    mode: Any = envs.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        raise EnvError(
            f"the vector environment declares autoreset mode {mode!r}; NEXT_STEP or SAME_STEP"
            ' is needed in metadata["autoreset_mode"], of gymnasium.vector.AutoresetMode'
        )
    return AutoresetMode(mode)
