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

Other numbers and words of Gymnasium's bases, such as CartPole's ``gravity``, but for those of
drawing, and numbers of MuJoCo's model must be as in the new environment: where somebody changed
them, for example at random in ``reset``, the snapshot cannot be restored.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np

from acktr.envs.errors import UnsavedError, named, one_line
from acktr.envs.values import Tree, decoded, encoded, escaped, require_like, to_bytes
from acktr.envs.vector import AnyEnv, Array, is_mujoco

_BASES = {
    "gymnasium.envs.classic_control.": ("state", "steps_beyond_terminated", "last_u"),
    "gymnasium.envs.toy_text.": (
        *("s", "lastaction", "player", "dealer", "fickle_step", "taxi_orientation"),
        *("dealer_top_card_suit", "dealer_top_card_value_str"),
    ),
    "gymnasium.envs.mujoco.": ("goal", "cylinder_pos", "goal_pos"),
}
"""Variables of the base environments of a package, of which each has some."""

_PLAIN = (
    *("_np_random", "render_mode", "init_qpos", "fullpath", "metadata", "width", "height"),
    *("_ez", "screen", "surf", "clock", "isopen", "window", "camera", "cell_size"),
)
"""Beginnings of attributes that may differ: steps do not depend on them.

They are for drawing, or repeat the arguments; resets of Pusher write ``init_qpos``.
"""
_MODEL = (
    *("body_mass", "body_inertia", "dof_damping", "dof_armature", "jnt_stiffness", "geom_friction"),
    *("actuator_gear", "actuator_gainprm", "actuator_biasprm"),
)
_OPTIONS = ("gravity", "wind", "timestep", "density", "viscosity")
"""Numbers of a model of MuJoCo's that are varied for robust agents; drawing changes others."""

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
_LONG = 1000
"""Entries of a value that is too long to be compared."""
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


def check(env: AnyEnv, state: object, varied: bool = True) -> None:
    """Refuse a snapshot that does not fit an environment; nothing is changed.

    Args:
        env: The environment; variables that it has only after a reset are compared if it was.
        state: From a file; not trusted.
        varied: Whether to compare what no step changes by itself, such as gravity.

    Raises:
        ValueError: It does not fit; one line.
        UnsavedError: It was saved where such an attribute had been changed, or was changed here.
    """
    entries = state.get("layers") if isinstance(state, dict) else None
    layers = _layers(env)
    if not isinstance(entries, list) or len(entries) != len(layers):
        raise ValueError(f"its state is not one of {len(layers)} layers")
    for layer, entry in zip(layers, entries, strict=True):
        _check_layer(layer, entry, varied)


def _check_layer(layer: Any, entry: Any, varied: bool) -> None:
    own = _saved(layer, ask=False)
    # Earlier versions did not write the others.
    if not isinstance(entry, dict) or entry.keys() | {"others"} != own.keys() | {"others"}:
        raise ValueError(f"the state of {own['kind']} has other entries")
    if entry["kind"] != own["kind"]:
        raise ValueError(f"it is made of {own['kind']}, the state of {entry['kind']!s:.80}")
    try:
        given = {key: decoded(entry[key]) for key in entry}
        template = {key: decoded(own[key]) for key in own}
        others, here = given.pop("others", {}), template.pop("others", {})
        for name in given["variables"].keys() - template["variables"].keys():
            if name not in _late_variables(own["kind"]):
                raise ValueError(f"there is no variable {name!r:.40}")
            template["variables"][name] = None
        require_like(given, template, "it")
        if "own" in given and callable(getattr(layer, "check_state_dict", None)):
            layer.check_state_dict(given["own"])
        if varied:
            _require_same(others, here, own["kind"])
    except UnsavedError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the state of {own['kind']}: {one_line(error)}") from error


def load(env: AnyEnv, state: Tree) -> None:
    """Restore a snapshot in an environment that was reset just now.

    Raises:
        ValueError: It does not fit; one line.
    """
    check(env, state, varied=False)  # which a reset may have changed since it was compared
    for layer, entry in zip(_layers(env), state["layers"], strict=True):
        try:
            if entry.get("generator") is not None:
                layer.np_random.bit_generator.state = decoded(entry["generator"])
            if "mujoco" in entry:
                _load_mujoco(layer, entry["mujoco"])
            for name, value in decoded(entry["variables"]).items():
                _set(layer, name, value)
            _load_others(layer, entry)
            if "own" in entry:
                layer.load_state_dict(decoded(entry["own"]))
        except Exception as error:
            raise ValueError(f"the state of {entry['kind']}: {named(error)}") from error


def _load_others(layer: Any, entry: Tree) -> None:
    """Set what the reset may have changed; windows and logs stay as they are here."""
    given = decoded(entry.get("others", {"dict": {}}))
    here = _others(layer, decoded(entry["variables"])) if given else {}
    for name in given.keys() & here:
        if name == "model":
            _load_model(layer.model, given[name])
        else:
            setattr(layer, name, given[name])


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
        if is_mujoco(layer):
            entry["mujoco"] = _saved_mujoco(layer)
    try:
        if all(callable(getattr(layer, name, None)) for name in ("state_dict", "load_state_dict")):
            return {**entry, "own": encoded(layer.state_dict()) if ask else None}
        names = _base_variables(layer, kind) if base else _wrapper_variables(layer, kind)
        if names is None:
            raise UnsavedError(f"{kind} has no state_dict and load_state_dict")
        values = {name: operator.attrgetter(name)(layer) for name in names}
        if base:
            entry["others"] = {"dict": _others(layer, names)}
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


def _others(layer: Any, names: Iterable[str]) -> Tree:
    """What no step changes by itself, but somebody may: numbers, words and short rows of them."""
    found: Tree = {}
    for name, value in list(getattr(layer, "__dict__", {}).items()):
        if name not in names and not name.startswith(_PLAIN) and _is_setting(value):
            with suppress(TypeError):
                found[escaped(name)] = encoded(value)
    return found | ({"model": _model(layer.model)} if is_mujoco(layer) else {})


def _is_setting(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.size <= _LONG
    if isinstance(value, tuple):  # lists are rather records
        return len(value) <= _LONG and all(isinstance(each, int | float) for each in value)
    return isinstance(value, int | float | str | np.generic)


def _require_same(others: Tree, here: Tree, kind: str) -> None:
    for name in others.keys() & here:  # another version of Gymnasium may have others
        if to_bytes(encoded(others[name])) != to_bytes(encoded(here[name])):
            raise UnsavedError(
                f"the attribute {name!r:.40} of {kind}, which no step changes, differs from that of"
                " the environment where it was saved"
            )


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


def _saved_mujoco(layer: Any) -> Array:
    mujoco: Any = sys.modules["mujoco"]
    what = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = np.empty(mujoco.mj_stateSize(layer.model, what))
    mujoco.mj_getState(layer.model, layer.data, integration, what)
    return np.concatenate([integration, *(getattr(layer.data, n).ravel() for n in _DERIVED)])


def _model(model: Any) -> Array:
    options = [np.ravel(getattr(model.opt, name)) for name in _OPTIONS]
    return np.concatenate([*options, *(getattr(model, name).ravel() for name in _MODEL)])


def _load_model(model: Any, numbers: Array) -> None:
    place = 0
    for owner, names in ((model.opt, _OPTIONS), (model, _MODEL)):
        for name in names:
            shape, size = np.shape(getattr(owner, name)), np.size(getattr(owner, name))
            value = numbers[place : place + size].reshape(shape)
            setattr(owner, name, value if shape else float(value))
            place += size


def _load_mujoco(layer: Any, state: Array) -> None:
    mujoco: Any = sys.modules["mujoco"]
    what = mujoco.mjtState.mjSTATE_INTEGRATION
    size = mujoco.mj_stateSize(layer.model, what)
    mujoco.mj_setState(layer.model, layer.data, state[:size], what)
    for name in _DERIVED:
        array = getattr(layer.data, name)
        array[...] = state[size : size + array.size].reshape(array.shape)
        size += array.size
