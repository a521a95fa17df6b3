"""A torch optimizer with a curvature, by names of parameters: groups, momentum, and states."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.blocks.registry import caller_level
from acktr.kfac.curvature import Curvature
from acktr.kfac.parameter_groups import FULL, check_groups, group_state
from acktr.kfac.state import packed, plain_name, require_like, unpacked


class NamedOptimizer(torch.optim.Optimizer):
    """An optimizer with momentum, whose groups are fixed at construction.

    Args:
        groups: Complete parameter groups, with ``param_names``.
        defaults: Options of a group.
    """

    curvature: Curvature
    """What preconditions, and has the parameters; it is there before the construction."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        defaults: dict[str, float],
    ) -> None:
        self._named = self.curvature.named
        super().__init__(groups, defaults)
        self._warned = False
        self._grouped = {
            name: index
            for index, group in enumerate(self.param_groups)
            for name in group["param_names"]
        }
        self._count(0)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self._steps

    def _count(self, steps: int) -> None:
        """Set the number of steps taken, and what depends on it."""
        self._steps = steps

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are fixed at construction; raises ValueError afterwards."""
        if hasattr(self, "_grouped"):
            raise ValueError(
                "K-FAC takes its groups at construction: pass param_groups, to a new one or, for"
                " the new parameters alone, to a second one beside this"
            )
        # Unwrapped, because the wrapper, for a loop that torch compiles, imports its compiler:
        # a second of every start.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's own, without the time that its hooks take for profilers and compilers."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for name in self._grouped:
            self._named[name].grad = None

    @property
    def lr(self) -> float:
        """Step size of the next step, of the first group (a scheduler may change it there).

        To set it here sets the full one, of a step of the whole radius; a scheduler, and
        ``param_groups[0]["lr"]``, takes a part of that.
        """
        return float(self.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.param_groups[0].update({"lr": value, FULL: value})

    def _full_lr(self) -> float:
        """The largest full step size of the groups: those of the construction, or set since."""
        return max(self._each(FULL).values())

    def _warn_schedule(self, why: str, scale: Tensor | None = None) -> None:
        """Say once that a scheduler's lr has no effect, unless nu = 1 shows that it has one."""
        if self._warned or self._each("lr") == self._each(FULL):
            return
        if scale is None or float(scale) < 1:
            self._warned = True
            warnings.warn(f"the schedule of lr has no effect: {why}", stacklevel=caller_level())

    def _each(self, option: str) -> dict[str, float]:
        """An option of the groups, by parameter name."""
        values = [float(group[option]) for group in self.param_groups]
        if len(values) == 1:
            return dict.fromkeys(self._grouped, values[0])
        return {name: values[group] for name, group in self._grouped.items()}

    # --- momentum ---------------------------------------------------------------------------------

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """What is kept of a parameter, as it is at first."""
        return {"momentum": torch.zeros_like(parameter)}

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(self._fresh(torch.zeros(())))

    def _momentum(self, name: str) -> Tensor:
        """V of a parameter, zero at first."""
        parameter = self._named[name]
        state = self.state[parameter]
        if "momentum" not in state:
            state.update(self._fresh(parameter))
        velocity: Tensor = state["momentum"]
        return velocity

    def _velocities(self, names: Iterable[str]) -> dict[str, Tensor]:
        """V of the parameters that have moved."""
        moved = {name: self.state.get(self._named[name]) for name in names}
        return {name: state["momentum"] for name, state in moved.items() if state}

    def _clear_momentum(self) -> None:
        for state in self.state.values():
            state["momentum"].zero_()

    # --- state ------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Refuse copies: they would share the module but not its gradients."""
        raise TypeError("a K-FAC optimizer is copied with state_dict() and load_state_dict()")

    def state_by_name(self) -> dict[str, Any]:
        """What :meth:`state_dict` holds by the names of parameters, for files with text keys."""
        return {
            "groups": group_state(self.param_groups),
            "steps": self._steps,
            **{kind: self._moving(kind) for kind in self._kinds},
            "curvature": self.curvature.state_dict(),
        }

    def load_by_name(self, state: Any) -> None:
        """Restore :meth:`state_by_name`; ValueError and no change if it does not fit."""
        own = self.state_by_name()
        if not isinstance(state, dict) or set(state) != set(own):
            raise ValueError(f"K-FAC state must have the entries {', '.join(own)}")
        curvature = self.curvature.checked(state["curvature"])
        require_like(state["steps"], self._steps, "K-FAC steps")
        self._check_own({**state, "curvature": curvature})
        self.curvature.load_state_dict(curvature)
        self._load_own(state)
        self._count(state["steps"])

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs, in torch's form: ``state`` and ``param_groups``.

        Counters and the curvature are entries of the first group.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = packed(self.state_by_name(), self.param_groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore either form of the state; ValueError and no change if it does not fit.

        Numbers with a fraction are cast to the type of the module's.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.load_by_name(unpacked(state_dict, self.param_groups, self._kinds))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _moving(self, kind: str) -> dict[str, Tensor]:
        """V, or what else is kept, by name, of the parameters that have moved."""
        return {
            plain_name(name): self.state[p][kind].clone()
            for name, p in self._named.items()
            if p in self.state
        }

    def _check_own(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless options and momentum fit; the curvature does."""
        fresh = {plain_name(name): self._fresh(p) for name, p in self._named.items()}
        moving = _plain(state["momentum"])
        for kind in self._kinds:
            template = {name: new[kind] for name, new in fresh.items() if name in moving}
            require_like(_plain(state[kind]), template, f"K-FAC {kind}")
        check_groups(state["groups"], self.param_groups)

    def _load_own(self, state: Mapping[str, Any]) -> None:
        """Restore options and momentum that fit."""
        self.state.clear()
        for kind in self._kinds:
            moving = _plain(state[kind])
            for name, p in self._named.items():
                if plain_name(name) in moving:
                    value = moving[plain_name(name)]
                    self.state[p][kind] = value.to(self._fresh(p)[kind], copy=True)
        for group, stored in zip(self.param_groups, state["groups"], strict=True):
            group.update(stored)


def _plain(moving: Any) -> dict[str, Any]:
    if not isinstance(moving, dict):
        raise ValueError("K-FAC momentum must be a dict")
    return {plain_name(str(name)): value for name, value in moving.items()}
