"""One environment in the middle of an episode, as arrays and JSON values, and back.

An environment is a stack of wrappers around a base; the snapshot has an entry for each layer:

    =============================================  ==============================================
    layer                                          what is kept of it
    =============================================  ==============================================
    any with ``state_dict`` and                    what ``state_dict()`` returns: dicts, lists,
    ``load_state_dict``                            tuples, numbers, text, None and arrays
    Gymnasium's classic control, toy text, MuJoCo  its variables, and MuJoCo's integration state
    Gymnasium's wrappers                           counters, stacks and running statistics
    a wrapper without attributes of its own        nothing
    =============================================  ==============================================

and of every base the generator ``np_random``. Any other layer makes the environment one that cannot
be saved. Restored into a new environment of the same making, the following steps are the same bit
for bit. MuJoCo's integration state alone does not suffice: rewards of Ant and Humanoid read arrays
that lag one sub-step behind it, so that these are kept too.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from typing import Any

import gymnasium
import numpy as np

from acktr.envs.errors import UnsavedError, named, one_line
from acktr.envs.values import Tree, decoded, encoded, require_like
from acktr.envs.vector import AnyEnv, Array

_BASES = {
    "gymnasium.envs.classic_control.": ("state", "steps_beyond_terminated", "last_u"),
    "gymnasium.envs.toy_text.": (
        *("s", "lastaction", "player", "dealer", "fickle_step", "taxi_orientation"),
        *("dealer_top_card_suit", "dealer_top_card_value_str"),
    ),
    "gymnasium.envs.mujoco.": ("goal", "cylinder_pos", "goal_pos"),
}
"""Variables of the base environments of a package, of which each has some."""

_MOMENTS = ("mean", "var", "count")
_WRAPPERS: dict[str, tuple[str, ...]] = {
    "acktr.envs.manners.ManneredEnv": ("_steps",),
    "acktr.envs.single.SafeEnv": ("_steps",),
    "gymnasium.wrappers.common.OrderEnforcing": ("_has_reset",),
    "gymnasium.wrappers.common.PassiveEnvChecker": (),
    "gymnasium.wrappers.common.RecordEpisodeStatistics": (
        *("episode_count", "episode_returns", "episode_lengths"),
    ),
    "gymnasium.wrappers.common.TimeLimit": ("_elapsed_steps",),
    "gymnasium.wrappers.stateful_action.RepeatAction": (),
    "gymnasium.wrappers.stateful_action.StickyAction": (
        *("last_action", "is_sticky_actions", "num_repeats", "repeats_taken"),
    ),
    "gymnasium.wrappers.stateful_observation.DelayObservation": ("observation_queue",),
    "gymnasium.wrappers.stateful_observation.FrameStackObservation": ("obs_queue",),
    "gymnasium.wrappers.stateful_observation.MaxAndSkipObservation": ("_obs_buffer",),
    "gymnasium.wrappers.stateful_observation.NormalizeObservation": (
        *(f"obs_rms.{name}" for name in _MOMENTS),
        "_update_running_mean",
    ),
    "gymnasium.wrappers.stateful_observation.TimeAwareObservation": ("timesteps",),
    "gymnasium.wrappers.stateful_reward.NormalizeReward": (
        *(f"return_rms.{name}" for name in _MOMENTS),
        *("discounted_reward", "_update_running_mean"),
    ),
}
"""Variables of wrappers, all of which are there."""
_PURE = "gymnasium.wrappers.transform_"
"""Beginning of the modules whose wrappers have no variables."""

_DERIVED = (
    *("xpos", "xipos", "cfrc_ext", "cinert", "cvel", "qfrc_actuator", "subtree_com", "site_xpos"),
    "geom_xpos",
)
"""Arrays of MuJoCo's that environments read before a step computes them anew."""


def save(env: AnyEnv) -> Tree:
    """The snapshot of an environment that was reset.

    Raises:
        UnsavedError: A layer of it cannot be saved; one line that names the layer.
    """
    return {"layers": [_saved(layer) for layer in _layers(env)]}


def check(env: AnyEnv, state: object) -> None:
    """Refuse a snapshot that does not fit an environment; nothing is changed.

    Args:
        env: The environment; variables that it has only after a reset are compared if it was.
        state: From a file; not trusted.

    Raises:
        ValueError: It does not fit; one line.
    """
    entries = state.get("layers") if isinstance(state, dict) else None
    layers = _layers(env)
    if not isinstance(entries, list) or len(entries) != len(layers):
        raise ValueError(f"its state is not one of {len(layers)} layers")
    for layer, entry in zip(layers, entries, strict=True):
        own = _saved(layer, ask=False)
        if not isinstance(entry, dict) or entry.keys() != own.keys():
            raise ValueError(f"the state of {own['kind']} has other entries")
        if entry["kind"] != own["kind"]:
            raise ValueError(f"it is made of {own['kind']}, the state of {entry['kind']!s:.80}")
        try:
            given = {key: decoded(entry[key]) for key in entry}
            template = {key: decoded(own[key]) for key in own}
            for name in given["variables"].keys() - template["variables"].keys():
                if name not in _late_variables(own["kind"]):
                    raise ValueError(f"there is no variable {name!r:.40}")
                template["variables"][name] = None
            require_like(given, template, "it")
            if "own" in given and callable(getattr(layer, "check_state_dict", None)):
                layer.check_state_dict(given["own"])
        except UnsavedError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"the state of {own['kind']}: {one_line(error)}") from error


def load(env: AnyEnv, state: Tree) -> None:
    """Restore a snapshot in an environment that was reset just now.

    Raises:
        ValueError: It does not fit; one line.
    """
    check(env, state)
    for layer, entry in zip(_layers(env), state["layers"], strict=True):
        try:
            if entry.get("generator") is not None:
                layer.np_random.bit_generator.state = decoded(entry["generator"])
            if "mujoco" in entry:
                _load_mujoco(layer, entry["mujoco"])
            for name, value in decoded(entry["variables"]).items():
                _set(layer, name, value)
            if "own" in entry:
                layer.load_state_dict(decoded(entry["own"]))
        except Exception as error:
            raise ValueError(f"the state of {entry['kind']}: {named(error)}") from error


def _layers(env: AnyEnv) -> list[Any]:
    """The wrappers of an environment, the outermost first, and the base."""
    layers: list[Any] = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _saved(layer: Any, ask: bool = True) -> Tree:
    """The entry of a layer; whose own ``state_dict`` is called if ``ask``, else None is in it."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    entry: Tree = {"kind": kind, "variables": encoded({})}
    base = not isinstance(layer, gymnasium.Wrapper)
    if base:
        generator = vars(layer).get("_np_random")
        entry["generator"] = None if generator is None else _generator(generator, kind)
        if _is_mujoco(layer):
            entry["mujoco"] = _saved_mujoco(layer)
    try:
        if all(callable(getattr(layer, name, None)) for name in ("state_dict", "load_state_dict")):
            return {**entry, "own": encoded(layer.state_dict()) if ask else None}
        names = _base_variables(layer, kind) if base else _wrapper_variables(layer, kind)
        if names is None:
            raise UnsavedError(f"{kind} has no state_dict and load_state_dict")
        values = {name: operator.attrgetter(name)(layer) for name in names}
        return {**entry, "variables": encoded(values)}
    except UnsavedError:
        raise
    except Exception as error:
        raise UnsavedError(f"{kind} cannot be saved: {named(error)}") from error


def _base_variables(layer: Any, kind: str) -> list[str] | None:
    if not kind.startswith(tuple(_BASES)):
        return None
    return [name for name in _late_variables(kind) if name in vars(layer)]


def _late_variables(kind: str) -> tuple[str, ...]:
    """The variables that a layer may have, some of them only after a reset."""
    packages = (names for package, names in _BASES.items() if kind.startswith(package))
    return next(packages, ())


def _wrapper_variables(layer: Any, kind: str) -> tuple[str, ...] | None:
    plain = vars(gymnasium.Wrapper(layer.env)).keys() | {"_saved_kwargs"}
    if kind.startswith(_PURE) or vars(layer).keys() <= plain:
        return ()
    return _WRAPPERS.get(kind)


def _set(layer: Any, name: str, value: Any) -> None:
    path, _, last = name.rpartition(".")
    owner = operator.attrgetter(path)(layer) if path else layer
    if isinstance(value, deque):
        value = deque(value, getattr(owner, last).maxlen)
    setattr(owner, last, value)


def _generator(generator: np.random.Generator, kind: str) -> Any:
    state = generator.bit_generator.state
    if state.get("bit_generator") != "PCG64":
        raise UnsavedError(f"{kind} draws from another generator than Gymnasium's")
    return encoded(state)


def _is_mujoco(layer: Any) -> bool:
    module: Any = sys.modules.get("gymnasium.envs.mujoco.mujoco_env")
    return module is not None and isinstance(layer, module.MujocoEnv)


def _saved_mujoco(layer: Any) -> Array:
    mujoco: Any = sys.modules["mujoco"]
    what = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(layer.model, what))
    mujoco.mj_getState(layer.model, layer.data, integration, what)
    return np.concatenate([integration, *(getattr(layer.data, n).ravel() for n in _DERIVED)])


def _load_mujoco(layer: Any, state: Array) -> None:
    mujoco: Any = sys.modules["mujoco"]
    what = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(layer.model, what)
    mujoco.mj_setState(layer.model, layer.data, state[:size], what)
    for name in _DERIVED:
        array = getattr(layer.data, name)
        array[...] = state[size : size + array.size].reshape(array.shape)
        size += array.size
