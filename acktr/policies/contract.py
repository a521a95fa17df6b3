"""The contract of networks: any module goes in, by what it returns.

A network of one's own is a ``torch.nn.Module``, or a class or function that makes one of the
observation space and the action space. For B observations it returns

    {"policy": parameters, "value": values, **auxiliary outputs}     or     (parameters, values)

with the parameters (B, P) of the action distribution, which for a Gaussian may also be a pair (mean
(B, A), log std (A,) or (B, A)), and values (B,) or (B, 1). Of a tuple (actor, critic) the actor
returns the parameters, or a dict with auxiliary outputs, and the critic the values; they share
nothing. A network knows nothing of action masks, and gets

    pictures (B, C, H, W), other Boxes (B, *shape) in the type of its parameters, and everything
    else as the environment gives it; of a Dict or Tuple space a dict or tuple of these.

Its resting state is evaluation mode, which acting and all comparisons of policies use, and in which
its outputs are a function of the observations; learners take the gradients of their losses in
training mode. It leaves observations as they are where it gets the tensors that rollouts record:
Boxes of float32 and what is no Box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from acktr.config import Config, ConfigError
from acktr.envs import Channels
from acktr.policies.distributions import ActionHead
from acktr.policies.inputs import Given
from acktr.tree import Sequences

Source = nn.Module | Callable[[gymnasium.Space[Any], gymnasium.Space[Any]], nn.Module]
"""A module, or what makes one of the observation space and the action space."""
NetworkSource = Source | tuple[Source, Source]
"""One network for policy and values, or an actor and a critic."""
Outputs = tuple[Tensor, ...]
"""What a network returns, always as a tuple."""
State = tuple[Tensor, ...]
"""What a recurrent network remembers, (N, ...) each."""


class ActorCritic(nn.Module):
    """Policy and values, as acting and learning take them.

    Its forward pass gives the parameters of the action distribution (B, P), values (B,), and the
    auxiliary outputs in the order of their names.
    """

    shared: bool
    """Whether policy and values come from one network; otherwise from ``actor`` and ``critic``."""
    own = False
    """Whether it is a network of one's own."""
    modal = False
    """Whether training mode differs from evaluation mode (dropout, batch normalisation): policies
    are compared in a pass of its own then. It is found out by a look, which may overlook some."""
    auxiliary: tuple[str, ...] = ()
    """Names of the auxiliary outputs."""
    actor: nn.Module
    """Of separate networks: observations to parameters, or to a tuple with auxiliary outputs."""
    critic: nn.Module
    """Of separate networks: observations to values."""
    recurrent = False
    """Whether it has a state from step to step, and learns from whole sequences."""

    def initial_state(self, n: int) -> State:
        """Of a recurrent network: its state at the beginning of n episodes."""
        raise NotImplementedError

    def unroll(self, sequences: Sequences) -> tuple[Outputs, State]:
        """Of a recurrent network: outputs (B, ...) of sequences, and their last states."""
        raise NotImplementedError

    def step(self, observations: Any, state: State, starts: Tensor) -> tuple[Outputs, State]:
        """Of a recurrent network: outputs (N, ...) and states after one step of N episodes."""
        raise NotImplementedError


def as_outputs(returned: Tensor | Outputs) -> Outputs:
    """What a network returned as a tuple."""
    return returned if isinstance(returned, tuple) else (returned,)


class SeparateActorCritic(ActorCritic):
    """An actor and a critic that share nothing."""

    shared = False

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor = actor
        self.critic = critic

    def forward(self, observations: Any) -> Outputs:
        """Distribution parameters (B, P), values (B,), and the actor's auxiliary outputs."""
        policy, *more = as_outputs(self.actor(observations))
        return (policy, self.critic(observations), *more)


@contextmanager
def mode(network: ActorCritic, training: bool) -> Iterator[None]:
    """Context in training or in evaluation mode, for a network to which it may make a difference.

    That is every network of one's own: a look at a few observations cannot tell for certain that it
    makes none.
    """
    before = network.training
    if before == training or not (network.own or network.modal):
        yield
        return
    network.train(training)
    try:
        yield
    finally:
        network.train(before)


class Adapter(ActorCritic):
    """A network of one's own, whose outputs are checked and brought into one form.

    Args:
        network: The module.
        outputs: Names of what it returns: policy, value, or both, and auxiliary outputs.
        head: Action distribution.
        action_space: Of one environment; messages name it.
        space: Observation space of one environment; None for observations that stay as they are.
        channels: Where pictures have their channels.
    """

    shared = True
    own = True
    _form = '{"policy": ..., "value": ...} or (policy, value)'

    def __init__(
        self,
        network: nn.Module,
        outputs: Sequence[str],
        head: ActionHead,
        action_space: gymnasium.Space[Any] | None,
        space: gymnasium.Space[Any] | None,
        channels: Channels = "auto",
    ) -> None:
        super().__init__()
        self.network = network
        self.auxiliary = tuple(name for name in outputs if name not in ("policy", "value"))
        self._outputs, self._head = tuple(outputs), head
        self._action_space = action_space
        self._given = None if space is None else Given(space, channels)
        self.pictures = {} if self._given is None else self._given.pictures

    def forward(self, observations: Any) -> Tensor | Outputs:
        """The outputs in the order of their names; one alone is no tuple.

        Raises:
            ConfigError: One is missing or has another shape.
        """
        rows = tree_leaves(observations)[0].shape[0]  # len() would bind a trace to it
        if self._given is not None:
            observations = self._given(observations, self._dtype)
        outputs = self.checked(self.network(observations), rows)
        return outputs if len(outputs) > 1 else outputs[0]

    def checked(self, outputs: Any, rows: int) -> Outputs:
        """What the module returned for so many observations, in the order of the names.

        Raises:
            ConfigError: One is missing or has another shape.
        """
        returned = self._named(outputs)
        found = []
        for name in self._outputs:
            if name not in returned:
                raise ConfigError(
                    f"the network returns {', '.join(map(repr, returned)) or 'nothing'}, without"
                    f" {name!r}: it must return a dict with {', '.join(map(repr, self._outputs))}"
                )
            kind = {"policy": self._policy, "value": self._value}.get(name)
            output = returned[name]
            found.append(kind(output, rows) if kind else _auxiliary(name, output, rows))
        return tuple(found)

    @property
    def _dtype(self) -> torch.dtype:
        kinds = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        return next(kinds, torch.get_default_dtype())

    def _named(self, returned: Any) -> Mapping[str, Any]:
        """What the module returned, by name."""
        if isinstance(returned, Mapping):
            return returned
        both = {"policy", "value"} <= set(self._outputs)
        if both and isinstance(returned, tuple | list) and len(returned) == 2:
            return dict(zip(("policy", "value"), returned, strict=True))
        if both:
            raise ConfigError(f"the network must return {self._form}, got {described(returned)}")
        return {self._outputs[0]: returned}

    def _policy(self, output: Any, rows: int) -> Tensor:
        """Distribution parameters (B, P)."""
        gaussian, width = self._head.gaussian, self._head.outputs
        found = output
        if gaussian and isinstance(output, tuple | list) and len(output) == 2:
            found = self._joined(*output)
        if isinstance(found, Tensor) and found.dim() > 2:
            found = found.flatten(1)
        shape = (rows, 2 * width if gaussian else width)
        if isinstance(found, Tensor) and _fits(found, shape):
            return found.to(self._dtype)
        what = (
            "means and log-stds side by side, or a pair (mean, log_std)" if gaussian else "logits"
        )
        raise ConfigError(
            f"the network's policy for {rows} observations must have the shape {shape}, {what} of"
            f" {self._action_space}, got {described(output)}"
        )

    def _joined(self, mean: Any, log_std: Any) -> Any:
        """A pair (mean, log std) side by side; None if it is none."""
        if not isinstance(mean, Tensor) or not isinstance(log_std, Tensor) or mean.dim() < 2:
            return None
        mean = mean.flatten(1)
        shape = tuple(getattr(self._action_space, "shape", None) or ())
        if log_std.shape in (shape, (1, *shape)):  # a parameter that does not see the observations
            log_std = log_std.reshape(-1)
        elif log_std.dim() > 2:
            log_std = log_std.flatten(1)
        try:
            return torch.cat([mean, log_std.expand_as(mean)], dim=-1)
        except RuntimeError:
            return None

    def _value(self, output: Any, rows: int) -> Tensor:
        """Values (B,)."""
        if _fits(output, (rows,)) or _fits(output, (rows, 1)):
            values: Tensor = output.reshape(rows).to(self._dtype)
            return values
        raise ConfigError(
            f"the network's value for {rows} observations must have the shape {(rows,)} or"
            f" {(rows, 1)}, got {described(output)}"
        )


def _auxiliary(name: str, output: Any, rows: int) -> Tensor:
    """An auxiliary output (B, ..., D), whose further shape is its loss's to check."""
    fits = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1
    if isinstance(output, Tensor) and fits and output.shape[0] == rows:
        return output
    raise ConfigError(
        f"the network's {name!r} for {rows} observations must have the shape ({rows}, ..., D), got"
        f" {described(output)}"
    )


def _fits(found: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(found, Tensor) and found.shape == shape and found.is_floating_point()


def described(value: Any) -> str:
    """Shapes and types of what a network gets or returns, for messages."""
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
        return f"{tuple(value.shape)}{kind}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(map(described, value)) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"dict of {', '.join(f'{k}: {described(v)}' for k, v in value.items())}"
    return type(value).__name__


def each_source(source: NetworkSource) -> tuple[Source, ...]:
    """The network, or the actor and the critic.

    Raises:
        ConfigError: It is neither.
    """
    each = source if isinstance(source, tuple) else (source,)
    if len(each) > 2 or not each or any(not callable(one) for one in each):
        raise ConfigError(
            "network must be a torch.nn.Module, a class or function (observation_space,"
            f" action_space) that gives one, or (actor, critic), got {source!r:.100}"
        )
    return each


def network_name(source: NetworkSource) -> str:
    """The name of a network of one's own for files: module:Class, of two with a comma."""
    if isinstance(source, tuple):
        return ",".join(network_name(each) for each in source)
    kind = type(source) if isinstance(source, nn.Module) else source
    return f"{kind.__module__}:{getattr(kind, '__qualname__', type(kind).__name__)}"


def with_network(config: Config, source: NetworkSource | None) -> Config:
    """The configuration of a run with a network of one's own, whose name it holds.

    Raises:
        ConfigError: It is no network, or the algorithm needs an actor and a critic.
    """
    if source is None:
        return config
    one = len(each_source(source)) == 1
    shared = source.shared if isinstance(source, ActorCritic) else one
    if shared and config.algo == "trpo":
        raise ConfigError("trpo needs a critic of its own: network=(Actor, Critic)")
    own = replace(config.network, custom=network_name(source), shared=shared)
    return replace(config, network=own)
