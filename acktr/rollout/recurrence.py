"""What a recurrent network remembers of every environment, from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from acktr import tree
from acktr.compute import to_tensor
from acktr.envs import require_like
from acktr.policies import ActorCritic
from acktr.tree import Sequences, Tree

Bools = NDArray[np.bool_]
State = tuple[Tensor, ...]


class Remembered:
    """The memory of a rollout: the state at its beginning, and where episodes begin.

    Args:
        state: The network's state (N, ...), which is copied.
        steps: Number of steps.

    Attributes:
        starts: Steps (T, N) that are the first of an episode.
        finals: States (1, ...) when truncated episodes ended, by (step, environment).
    """

    def __init__(self, state: State, steps: int) -> None:
        self.state = tuple(part.clone() for part in state)
        self.starts = np.zeros((steps, len(state[0])), np.bool_)
        self.finals: dict[tuple[int, int], State] = {}

    def sequences(self, observations: Tree, valid: Bools, device: torch.device) -> Sequences:
        """The rollout's sequences, whose samples are the valid steps."""
        shown = tree.to_device(observations, device)
        starts, counted = (to_tensor(each, device) for each in (self.starts, valid))
        return Sequences.of(shown, starts, self.state, counted)


class Recurrence:
    """The present state of a recurrent network in every environment.

    Args:
        network: The network.
        num_envs: Number of environments.
        device: Where the network is.
    """

    def __init__(self, network: ActorCritic, num_envs: int, device: torch.device) -> None:
        with torch.no_grad():
            initial = network.initial_state(num_envs)
        self.state = tuple(part.to(device, copy=True) for part in initial)
        # Whether what an environment shows is the first observation of an episode.
        self.starts = np.ones(num_envs, np.bool_)
        self._device = device

    def seen(self, observations: Tree, rows: slice) -> Sequences:
        """The present step of some environments."""
        starts = to_tensor(self.starts[rows].copy(), self._device)
        return Sequences.step(observations, starts, tuple(part[rows] for part in self.state))

    def advance(self, rows: slice, state: State) -> None:
        """Take over the state after a step."""
        for mine, new in zip(self.state, state, strict=True):
            mine[rows] = new

    def of(self, env: int) -> State:
        """A copy of the state of one environment."""
        return tuple(part[env : env + 1].clone() for part in self.state)

    def ends(self, observations: Tree, finals: list[State]) -> Sequences:
        """What all environments show, and behind it final observations, each with its state."""
        starts = np.concatenate([self.starts, np.zeros(len(finals), np.bool_)])
        state = tuple(map(torch.cat, zip(self.state, *finals, strict=True)))
        return Sequences.step(observations, to_tensor(starts, self._device), state)

    def state_dict(self) -> dict[str, Any]:
        """State and starts."""
        state = {str(place): part.clone() for place, part in enumerate(self.state)}
        return {"state": state, "starts": self.starts.copy()}

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a state fits."""
        parts = [state["state"].get(str(place)) for place in range(len(self.state))]
        fits = len(state["state"]) == len(parts) and all(
            isinstance(new, Tensor) and new.shape == mine.shape
            for new, mine in zip(parts, self.state, strict=True)
        )
        if not fits:
            raise ValueError("the memory has another shape than the network's")
        require_like(state["starts"], self.starts, "starts")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for place, part in enumerate(self.state):
            part.copy_(state["state"][str(place)])
        self.starts[:] = state["starts"]
