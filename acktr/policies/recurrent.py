"""Recurrent networks: step by step when acting, over whole sequences when learning.

A network is recurrent if it has a method ``initial_state(n)``, which gives its state at the
beginning of n episodes: a tensor (n, ...) or a tuple of such tensors. Its forward pass is

    outputs, state = network(observations, state, starts)

with time-major observations (T, N, ...), starts (T, N) that are true at the first steps of
episodes, where the network must forget the state before, and outputs as those of any network
(:mod:`acktr.policies.contract`), but (T, N, ...).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map as pytree_map

from acktr.config import ConfigError, NetworkConfig
from acktr.policies.contract import (
    ActorCritic,
    Adapter,
    Outputs,
    SeparateActorCritic,
    State,
    described,
)
from acktr.policies.distributions import ActionHead
from acktr.policies.memory import memory_of
from acktr.policies.networks import PolicyHead, full_precision, orthogonal, trunk_of
from acktr.tree import Sequences, Tree, tree_map


class MemoryNetwork(nn.Module):
    """Hidden layers, a memory, and a head for the policy, the value or both.

    Args:
        space: Observation space of one environment.
        head: Action distribution.
        config: Settings.
        outputs: "policy", "value", or both.
    """

    def __init__(
        self,
        space: gymnasium.Space[Any],
        head: ActionHead,
        config: NetworkConfig,
        outputs: Sequence[str],
    ) -> None:
        super().__init__()
        acts = "policy" in outputs
        self.trunk, inputs = trunk_of(space, config, critic=not acts)
        self.memory = memory_of(config, inputs)
        width = config.memory_width
        self.policy: PolicyHead | None = None
        self.value: nn.Linear | None = None
        if acts:
            self.policy = PolicyHead(width, head, config.policy_gain, config.log_std_init)
        if "value" in outputs:
            self.value = nn.Linear(width, 1)
            orthogonal(self.value, 1.0)

    def initial_state(self, n: int) -> State:
        """The memory's."""
        return self.memory.initial_state(n)

    def forward(
        self, observations: Any, state: State, starts: Tensor
    ) -> tuple[dict[str, Tensor], State]:
        """Outputs (T, N, ...) and the last state."""
        flat = tree_map(lambda part: part.flatten(0, 1), observations)
        hidden = self.trunk(flat).unflatten(0, starts.shape)
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = next(self.memory.parameters()).dtype
            hidden, state = self.memory(hidden.to(dtype), state, starts)
        outputs: dict[str, Tensor] = {}
        if self.policy is not None:
            outputs["policy"] = self.policy(hidden)
        if self.value is not None:
            outputs["value"] = full_precision(self.value, hidden)[..., 0]
        return outputs, state


class RecurrentAdapter(Adapter):
    """A recurrent network, whose samples are the steps of whole sequences."""

    recurrent = True
    _form = f"(outputs, state), with outputs {Adapter._form}"
    place = slice(None)
    """Where its own tensors are in the states that it is given."""

    def initial_state(self, n: int) -> State:
        """The module's, as a tuple.

        Raises:
            ConfigError: It has another shape.
        """
        initial: Any = self.network.initial_state
        given = initial(n)
        state = (given,) if isinstance(given, Tensor) else tuple(given)
        if not all(isinstance(part, Tensor) and len(part) == n for part in state):
            raise ConfigError(
                f"the network's initial_state({n}) must give a tensor ({n}, ...) or a tuple of such"
                f" tensors, got {described(given)}"
            )
        return state

    def unroll(self, sequences: Sequences) -> tuple[Outputs, State]:
        """Outputs (B, ...) of all samples, and the last state of every sequence."""
        outputs, last = self._run(sequences.observations, sequences.state, sequences.starts)
        return self.checked(_samples(outputs, sequences), len(sequences)), last

    def step(self, observations: Tree, state: State, starts: Tensor) -> tuple[Outputs, State]:
        """The same for one step (N, ...) of each sequence, in a form that can be traced."""
        shown = tree_map(lambda part: part[None], observations)
        outputs, last = self._run(shown, state, starts[None])
        shape = (1, starts.shape[0])

        def row(part: Any) -> Any:
            return part[0] if isinstance(part, Tensor) and part.shape[:2] == shape else part

        return self.checked(pytree_map(row, outputs), starts.shape[0]), last

    def _run(self, observations: Tree, state: State, starts: Tensor) -> tuple[Any, State]:
        """What the module returns for sequences (T, N, ...), and the last state."""
        steps, num = starts.shape
        flat = tree_map(lambda part: part.flatten(0, 1), observations)
        shown: Any = flat if self._given is None else self._given(flat, self._dtype)
        shown = pytree_map(lambda part: part.unflatten(0, (steps, num)), shown)
        initial: Any = self.network.initial_state
        given: Any = state[self.place]
        if self.own:  # it may forget in place, and rollouts record the state before
            given = tuple(part.clone() for part in given)
        if isinstance(initial(1), Tensor):
            (given,) = given
        returned: Any = self.network(shown, given, starts)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ConfigError(
                "a recurrent network must return (outputs, state), got " + described(returned)
            )
        outputs, last = returned
        return outputs, (last,) if isinstance(last, Tensor) else tuple(last)

    def forward(self, observations: Sequences) -> Tensor | Outputs:
        """The outputs (B, ...) in the order of their names; one alone is no tuple."""
        outputs = self.unroll(observations)[0]
        return outputs if len(outputs) > 1 else outputs[0]


def _samples(output: Any, sequences: Sequences) -> Any:
    """An output (T, N, ...) as rows (B, ...); parameters that every step shares stay."""
    if isinstance(output, Mapping):
        return {name: _samples(part, sequences) for name, part in output.items()}
    if isinstance(output, tuple | list):
        return tuple(_samples(part, sequences) for part in output)
    if isinstance(output, Tensor) and output.shape[:2] == sequences.starts.shape:
        return sequences.samples(output)
    return output


class RecurrentSeparate(SeparateActorCritic):
    """A recurrent actor and a recurrent critic, whose states are side by side."""

    recurrent = True
    actor: RecurrentAdapter
    critic: RecurrentAdapter

    def __init__(self, actor: RecurrentAdapter, critic: RecurrentAdapter) -> None:
        super().__init__(actor, critic)
        tensors = len(actor.initial_state(1))
        actor.place, critic.place = slice(0, tensors), slice(tensors, None)

    def initial_state(self, n: int) -> State:
        """The actor's, and behind it the critic's."""
        return self.actor.initial_state(n) + self.critic.initial_state(n)

    def unroll(self, sequences: Sequences) -> tuple[Outputs, State]:
        """Parameters (B, P), values (B,), auxiliary outputs, and the last states."""
        (policy, *more), first = self.actor.unroll(sequences)
        (value,), second = self.critic.unroll(sequences)
        return (policy, value, *more), first + second

    def step(self, observations: Tree, state: State, starts: Tensor) -> tuple[Outputs, State]:
        """The same for one step (N, ...) of each sequence, in a form that can be traced."""
        (policy, *more), first = self.actor.step(observations, state, starts)
        (value,), second = self.critic.step(observations, state, starts)
        return (policy, value, *more), first + second


def memory_network(
    space: gymnasium.Space[Any], head: ActionHead, config: NetworkConfig
) -> ActorCritic:
    """The built-in networks with the memory that the configuration asks for."""

    def part(*outputs: str) -> RecurrentAdapter:
        network = MemoryNetwork(space, head, config, outputs)
        adapter = RecurrentAdapter(network, outputs, head, None, None)
        adapter.own = False
        return adapter

    if config.shared:
        return part("policy", "value")
    return RecurrentSeparate(part("policy"), part("value"))
