"""Answers of a policy about observations, for people and for other programs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gymnasium
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from acktr.config import Config, lacking_attribute, require_attribute
from acktr.envs import (
    MASK,
    AnyVectorEnv,
    Masks,
    as_masks,
    batched,
    choices,
    flat,
    found_masks,
    integers,
    parts,
)
from acktr.export import export_policy
from acktr.policies import (
    Policy,
    action_probability,
    copied_parameters,
    log_probability,
    replace_parameters,
)
from acktr.train import Trainer


class Predictor:
    """A policy, asked in the words of Stable-Baselines; :class:`acktr.agent.Agent` trains it."""

    trainer: Trainer
    """What trains it."""
    _envs: AnyVectorEnv
    _policy: Policy

    @property
    def envs(self) -> AnyVectorEnv:
        """Where it learns."""
        return self._envs

    @property
    def policy(self) -> Policy:
        """What acts; a critic that learns in another process has ended its steps."""
        self.trainer.settle()
        return self._policy

    @property
    def config(self) -> Config:
        """How it was trained."""
        return self.trainer.config

    @property
    def observation_space(self) -> gymnasium.Space[Any]:
        """Observations of one environment."""
        return self._policy.observation_space

    @property
    def action_space(self) -> gymnasium.Space[Any]:
        """Actions of one environment."""
        return self._policy.action_space

    @property
    def num_envs(self) -> int:
        """Parallel environments."""
        return self.envs.num_envs

    def __repr__(self) -> str:
        """What it is, where it learns, how far it is."""
        count = sum(parameter.numel() for parameter in self._policy.network.parameters())
        return (
            f"<{type(self).__name__} in {self.num_envs} x {self.config.env}, step"
            f" {self.trainer.timesteps:,}, {count:,} parameters, device {self.trainer.device}>"
        )

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse settings, which would be ignored."""
        require_attribute(type(self).__name__, name)
        object.__setattr__(self, name, value)

    if not TYPE_CHECKING:  # which would find every attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Say what an attribute of Stable-Baselines3 is called here."""
            raise AttributeError(lacking_attribute(type(self).__name__, name), name=name, obj=self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or serialised."""
        raise TypeError("an agent has environments: save() and load() it, or copy agent.policy")

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | bool | None = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Action of one observation, or actions of a batch of them.

        Args:
            observation: Raw observation (*shape) or batch (N, *shape), as the environment gives it,
                with a dict or tuple of arrays for Dict and Tuple spaces.
            state: What predict gave at the step before; None at the first. Of a network with a
                memory arrays (N, ...), with N = 1 for one observation; others pass it through.
            episode_start: Observations that are the first of an episode, (N,) or one bool: there a
                network with a memory begins anew. None: none of them is.
            deterministic: The most likely action instead of a sample.
            action_masks: Mask (P,) of the observation, or (N, P) of the batch, in the forms of
                :mod:`acktr.envs.masks`; all actions are allowed if None.

        Returns:
            Action or actions as the environment takes them, and the state.

        Raises:
            ValueError: The observation has another shape or other parts than the environment's, or
                the mask is unfit.
        """
        batch, alone = self._batched(observation)
        masks = self._allowed(batch, alone, action_masks, "predict")
        starts = None if episode_start is None else np.asarray(episode_start, np.bool_).reshape(-1)
        actions, state = self._policy.advance(batch, state, starts, deterministic, masks)
        return (actions[0] if alone else actions), state

    def value(self, observation: Any) -> NDArray[np.float32]:
        """V of one observation () or a batch (N,), of the rewards that the agent learns from.

        With ``normalize_reward`` those are divided by the running deviation of the return. Networks
        with a memory begin anew, here and in :meth:`action_probability`.

        Raises:
            ValueError: The observation has another shape or other parts than the environment's.
        """
        batch, alone = self._batched(observation)
        values: NDArray[np.float32] = self._policy.outputs(batch)[1].float().cpu().numpy()
        return values[0] if alone else values

    def action_probability(
        self,
        observation: Any,
        actions: NDArray[Any] | int | None = None,
        action_masks: Any = None,
        logp: bool = False,
    ) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """The distribution of actions, or how probable given ones are, as in Stable-Baselines 2.

        Args:
            observation: One (*shape) or a batch (N, *shape), as in :meth:`predict`.
            actions: An action, or one per observation, as the environment takes them.
            action_masks: As in :meth:`predict`; a forbidden action has probability 0.
            logp: The logarithm, of given actions.

        Returns:
            Without actions: probabilities (n,) of a Discrete space, a tuple of such arrays for
            MultiDiscrete, probabilities of 1 for MultiBinary, mean and standard deviation for Box.
            With actions: probability or density () of each, before Boxes are clipped to the bounds.
            For a batch all have a first axis N.

        Raises:
            ValueError: Shapes do not fit, an action is not in its space, a mask is unfit, or logp
                comes without actions.
        """
        batch, alone = self._batched(observation)
        masks = self._allowed(batch, alone, action_masks, "action_probability")
        if actions is not None:
            given = np.asarray(actions)
            logs = log_probability(self._policy, batch, given[None] if alone else given, masks)
            found = logs if logp else np.exp(logs)
            return found[0] if alone else found
        if logp:
            raise ValueError("logp=True needs actions")
        arrays = action_probability(self._policy, batch, masks)
        if not alone:
            return arrays
        return tuple(array[0] for array in arrays) if isinstance(arrays, tuple) else arrays[0]

    def _batched(self, observation: Any) -> tuple[Any, bool]:
        """A batch of observations, and whether one alone was given.

        Raises:
            ValueError: Its shape or parts are not the environment's, or a number is NaN or Inf.
        """
        space = self._policy.observation_space
        if (
            isinstance(observation, tuple)
            and any(isinstance(part, dict) for part in observation)
            and not isinstance(space, gymnasium.spaces.Tuple)
        ):
            raise ValueError(
                "the observation is a tuple: of reset's (observation, info), and of what step"
                " gives, it is the first"
            )
        batch, alone = batched(space, observation)
        arrays, kinds = flat(space, batch), parts(space)
        for name, array in arrays.items() if isinstance(arrays, dict) else [("", arrays)]:
            _require_known(
                array, kinds[name], f"observation's part {name!r}" if name else "observation"
            )
        return batch, alone

    def _allowed(self, batch: Any, alone: bool, action_masks: Any, name: str) -> Masks | None:
        """Masks (N, P) of a batch of observations as booleans."""
        sizes = choices(self._policy.action_space)
        inside = self.config.masks in ("auto", "observation") and sizes is not None
        if action_masks is None and inside and isinstance(batch, dict):
            action_masks, alone = batch.get(MASK), False
        if action_masks is None:
            if found_masks(self.envs).source is not None or (sizes and self._masks_method()):
                warnings.warn(
                    f"{name} was called without action_masks in an environment that has some: the"
                    " action may be a forbidden one",
                    UserWarning,
                    stacklevel=3,
                )
            return None
        if sizes is None:
            kind = type(self._policy.action_space).__name__
            raise ValueError(f"action_masks are for Discrete and MultiDiscrete actions, not {kind}")
        arrays = flat(self._policy.observation_space, batch)
        rows = len(next(iter(arrays.values())) if isinstance(arrays, dict) else arrays)
        try:
            masks = as_masks(action_masks, sizes, () if alone else (rows,))
        except ValueError as error:
            raise ValueError(f"action_masks cannot be used: {error}") from error
        return masks[None] if alone else masks

    def _masks_method(self) -> bool:
        """Whether the first environment has the method of masks that is used, reset or not."""
        first = next(iter(getattr(self.envs.unwrapped, "envs", ())), None)
        asked = self.config.masks in ("auto", "action_masks")
        return asked and isinstance(first, gymnasium.Env) and first.has_wrapper_attr("action_masks")

    def get_parameters(self) -> dict[str, Tensor]:
        """Copies of the network's parameters and buffers, by name; :meth:`save` has the rest."""
        return copied_parameters(self.policy.network)

    def set_parameters(
        self, parameters: Mapping[str, Tensor | NDArray[Any]], exact_match: bool = True
    ) -> None:
        """Give the network these parameters; optimizer and statistics stay.

        Args:
            parameters: Tensors or arrays by name, as :meth:`get_parameters` gives them.
            exact_match: Whether all of them must be there; else the others stay.

        Raises:
            ValueError: A name, a shape or a number cannot be used; nothing is changed then.
        """
        replace_parameters(self.policy.network, parameters, exact_match)

    def export(self, path: str | Path) -> None:
        """Write the policy, with the normalisation of observations inside, for other programs.

        Args:
            path: File that ends in .onnx, or in .pt2 for ``torch.export.load``; what it gives is
                said in :mod:`acktr.export`.

        Raises:
            ExportError: A package is missing, or the network cannot be exported.
        """
        masks = self.trainer.begin().source  # which the first reset of environments finds
        export_policy(self.policy, Path(path), masks)


def _require_known(array: NDArray[Any], space: gymnasium.Space[Any], what: str) -> None:
    """Refuse numbers that the space has not, or that would be others in its type.

    Boxes may be left by a little, as by environments in training.

    Raises:
        ValueError: NaN or Inf, fractions in place of integers, or numbers out of range.
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"the {what} has NaN or Inf, of which no action follows")
    kind, ranges = np.dtype(space.dtype or np.float32), integers(space)
    if array.dtype == kind and ranges is None:
        return
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            large = ~np.isfinite(array.astype(kind, copy=False))
        if large.any():
            raise ValueError(f"the {what} has {array[large][0]}, which is too large for {kind}")
        return
    low, above = ranges or _limits(kind)
    whole = array.dtype.kind != "f" or (array == np.rint(array)).all()
    outside = (array < low) | (array >= above)
    if ranges is not None and whole and outside.any():
        raise ValueError(f"the {what} has {array[outside][0]}, which is not in range for {space}")
    if outside.any() or not whole:
        raise ValueError(
            f"the {what} is of {array.dtype} and does not fit {kind}, as the environment gives"
            " it: numbers would be cut off (pictures are scaled by the policy itself)"
        )


def _limits(kind: np.dtype[Any]) -> tuple[int, int]:
    """The least integer of a type, and the one above the largest."""
    return (0, 2) if kind.kind == "b" else (np.iinfo(kind).min, int(np.iinfo(kind).max) + 1)
