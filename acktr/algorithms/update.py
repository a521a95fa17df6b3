"""The update alone, over plain tensors: for a loop, storage or simulator of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium
import torch
from torch import Tensor, nn

from acktr import tree
from acktr.algorithms.a2c import A2CLearner
from acktr.algorithms.acktr import ACKTRLearner
from acktr.algorithms.auxiliary import Auxiliary, checked_auxiliary
from acktr.algorithms.learner import part_of
from acktr.algorithms.trpo import TRPOLearner
from acktr.compute import autocast_context
from acktr.config import Algo, Config, ConfigError, preset
from acktr.policies import action_head, check_network, own_network
from acktr.rollout import Batch
from acktr.tree import Tree

Module = nn.Module | tuple[nn.Module, nn.Module]


class Update:
    """One update of a network at each call, and what lives between them.

    Args:
        network: A module that keeps the contract of :mod:`acktr.policies.contract`, or an actor and
            a critic, already on their device.
        action_space: Space of the actions.
        config: Settings, of which those of networks, environments and rollouts do not count; by
            default the algorithm's for any environment.
        auxiliary: Losses of the network's further outputs, by name.

    Attributes:
        network: The network with checked outputs: observations to (parameters (B, P), values (B,),
            auxiliary outputs). Its parameters are those of the module that was given.

    Raises:
        ConfigError: Something does not fit.
    """

    algo: ClassVar[Algo]
    _kind: ClassVar[type[ACKTRLearner | A2CLearner | TRPOLearner]]

    def __init__(
        self,
        network: Module,
        action_space: gymnasium.Space[Any],
        config: Config | None = None,
        *,
        auxiliary: Mapping[str, Auxiliary] | None = None,
    ) -> None:
        self.config = config or preset("own", self.algo)[0]
        if self.config.algo != self.algo:
            raise ConfigError(
                f"algo is {self.config.algo!r} in the configuration: use"
                f" {self.config.algo.upper()}Update"
            )
        self._space, self._head = action_space, action_head(action_space)
        losses = checked_auxiliary(auxiliary, self.config.micro_batch)
        self.network = own_network(network, None, action_space, self._head, tuple(losses))
        if self.network.recurrent:
            raise ConfigError(
                "a network with a memory learns from whole rollouts: give it to"
                f" {self.algo.upper()} by network="
            )
        self.network.eval()
        first = next(self.network.parameters())
        self._device, self._dtype = first.device, first.dtype
        convolutional = any(isinstance(layer, nn.Conv2d) for layer in self.network.modules())
        _, autocast = autocast_context(self._device, self.config.precision, convolutional)
        generator = torch.Generator(self._device).manual_seed(2 * self.config.seed + 2)
        self._learner = self._kind(
            self.network, self._head, self.config, generator, autocast, losses
        )
        self._looked = False

    def __call__(
        self,
        observations: Any,
        actions: Tensor,
        advantages: Tensor,
        returns: Tensor,
        *,
        masks: Tensor | tuple[Tensor, ...] | None = None,
        weights: Tensor | None = None,
        values: Tensor | None = None,
        progress: float = 0.0,
    ) -> dict[str, float]:
        """Learn from one batch.

        Args:
            observations: (B, ...) as the network takes them, or a dict of such tensors.
            actions: (B, ...) as :meth:`acktr.kfac.Distribution.sample` gives them: class numbers
                from zero, or numbers that are not clipped to the bounds.
            advantages: (B,), see :func:`acktr.gae`.
            returns: (B,), targets of the values: advantages + values.
            masks: (B, P), 1 where an action is allowed: of Discrete, or the components' of
                MultiDiscrete side by side or as a tuple.
            weights: (B,), at least 0: what a sample counts in every mean and in the curvature; 0
                is as if it were left out, for padding and absent agents. A mask does too.
            values: (B,), predictions during the rollout, for the explained variance alone.
            progress: Fraction of training done, in [0, 1], for the schedules.

        Returns:
            Metrics by tag, as in progress.csv.

        Raises:
            ConfigError: Something does not fit.
            FactorError: K-FAC cannot go on.
        """
        if not 0 <= progress <= 1:
            raise ConfigError(f"progress must be in [0, 1], got {progress!r}")
        rows = len(torch.as_tensor(advantages))
        batch = Batch(
            observations=self._seen(observations, rows),
            actions=self._actions(actions, rows),
            advantages=self._numbers("advantages", advantages, rows),
            returns=self._numbers("returns", returns, rows),
            values=None if values is None else self._numbers("values", values, rows),
            weights=None if weights is None else self._numbers("weights", weights, rows),
            masks=None if masks is None else self._masks(masks, rows),
        )
        batch = _counted(batch)
        if len(batch) < 2:
            raise ConfigError(f"an update needs 2 samples or more, got {len(batch)}")
        _require_finite(batch)
        if not self._looked:
            check_network(self.network, tree.rows(batch.observations, slice(3)))
            self._looked = True
        return self._learner.update(batch, progress)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers and generators; the network's own state_dict has the weights."""
        return self._learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises ValueError when it is another network's."""
        self._learner.load_state_dict(state)

    def _seen(self, given: Any, rows: int) -> Tree:
        """Observations on the network's device."""
        seen: Tree
        try:
            if isinstance(given, Mapping):
                seen = {n: torch.as_tensor(part, device=self._device) for n, part in given.items()}
            else:
                seen = torch.as_tensor(given, device=self._device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                "observations must be a tensor (B, ...) or a dict of such tensors, got"
                f" {type(given).__name__}"
            ) from error
        leaves = seen.values() if isinstance(seen, dict) else [seen]
        lengths = sorted({len(leaf) if leaf.dim() else 0 for leaf in leaves})
        if lengths != [rows]:
            raise ConfigError(
                f"observations must have a row for each of {rows} advantages, got {lengths} rows"
            )
        return seen

    def _numbers(self, name: str, given: Any, rows: int) -> Tensor:
        """Finite numbers (B,) in the type of the network."""
        numbers = torch.as_tensor(given, device=self._device).detach().to(self._dtype)
        if numbers.shape != (rows,):
            raise ConfigError(f"{name} must have the shape ({rows},), got {tuple(numbers.shape)}")
        if not bool(numbers.isfinite().all()):
            raise ConfigError(f"{name} must be finite, got NaN or Inf")
        return numbers

    def _masks(self, given: Any, rows: int) -> Tensor:
        """Action masks (B, P) as booleans; what they forbid is looked at with the actions."""
        parts = given if isinstance(given, tuple) else (given,)
        masks = torch.cat([torch.as_tensor(part, device=self._device) for part in parts], dim=-1)
        shape = (rows, self._head.outputs)
        if masks.shape != shape:
            raise ConfigError(f"masks must have the shape {shape}, got {tuple(masks.shape)}")
        allowed = masks == 1
        if not bool((allowed | (masks == 0)).all()):
            raise ConfigError("masks must be 0 or 1, got other numbers")
        return allowed

    def _actions(self, given: Any, rows: int) -> Tensor:
        """Actions as the distribution takes them."""
        space, actions = self._space, torch.as_tensor(given, device=self._device)
        shape, flat = (rows, *(space.shape or ())), (rows, self._head.outputs)
        if actions.shape != shape and not (self._head.gaussian and actions.shape == flat):
            raise ConfigError(
                f"actions of {space} must have the shape {shape}, got {tuple(actions.shape)}"
            )
        if self._head.gaussian:
            return actions.reshape(rows, -1).to(self._dtype)
        if isinstance(space, gymnasium.spaces.MultiBinary):
            if not bool(((actions == 0) | (actions == 1)).all()):
                raise ConfigError(
                    f"actions of {space} must be 0 or 1, got {actions.dtype} from"
                    f" {actions.min().item()} to {actions.max().item()}"
                )
            return actions.reshape(rows, -1).to(self._dtype)
        most = torch.as_tensor(getattr(space, "nvec", getattr(space, "n", 0)), device=self._device)
        if actions.is_floating_point() or bool(((actions < 0) | (actions >= most)).any()):
            raise ConfigError(
                f"actions of {space} must be class numbers from 0, got {actions.dtype} from"
                f" {actions.min().item()} to {actions.max().item()}"
            )
        return actions.long()


def _counted(batch: Batch) -> Batch:
    """The samples of positive weight, with weights of mean 1; None where all are alike."""
    weights = batch.weights
    if weights is None:
        return batch
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ConfigError(
            f"weights must be at least 0 and not all 0, got {weights.min().item():g} to"
            f" {weights.max().item():g}"
        )
    rows = weights.nonzero()[:, 0]
    kept = weights[rows]
    alike = bool((kept == kept[0]).all())
    return Batch(
        observations=tree.rows(batch.observations, rows),
        actions=batch.actions[rows],
        advantages=batch.advantages[rows],
        returns=batch.returns[rows],
        values=part_of(batch.values, rows),
        masks=part_of(batch.masks, rows),
        weights=None if alike else kept / kept.mean(),
    )


def _require_finite(batch: Batch) -> None:
    """Refuse observations or actions from which the network would become NaN.

    Samples that are left out may have any.

    Raises:
        ConfigError: One line.
    """
    seen = batch.observations
    named: dict[str, Any] = {"observations": seen, "actions": batch.actions}
    if isinstance(seen, dict):
        named = {f"observations[{name!r}]": part for name, part in seen.items()}
        named["actions"] = batch.actions
    for name, part in named.items():
        if part.is_floating_point() and not bool(part.isfinite().all()):
            raise ConfigError(
                f"{name} must be finite, got NaN or Inf (weight 0 leaves a sample out)"
            )


class ACKTRUpdate(Update):
    """ACKTR over plain tensors: ``metrics = update(observations, actions, advantages, returns)``.

    The arguments are ``(network, action_space, config=None, *, auxiliary=None)``.
    """

    algo = "acktr"
    _kind = ACKTRLearner


class A2CUpdate(Update):
    """A2C over plain tensors; arguments as :class:`ACKTRUpdate`."""

    algo = "a2c"
    _kind = A2CLearner


class TRPOUpdate(Update):
    """TRPO over plain tensors, for an actor and a critic; arguments as :class:`ACKTRUpdate`."""

    algo = "trpo"
    _kind = TRPOLearner
