"""What environments show: kept as they show it, recorded, and given as the network takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from acktr import tree
from acktr.compute import to_tensor
from acktr.envs import Arrays, final_rows, flat, parts
from acktr.policies import FrameStore, Normalizer, compute_type, stored_pictures
from acktr.tree import Tree

Array = NDArray[Any]


class Observations:
    """The present observations of all environments, and memory for those of a rollout, by part.

    Pictures of integers are converted once into memory on the network's device, which every rollout
    uses again, if the network takes them so. Everything else is recorded on the CPU, where numpy
    fills memory in a twentieth of torch's time for small arrays.

    Args:
        space: The space of one environment.
        num_envs: Number of environments.
        network: What takes the observations.
        device: Where it is.
        autocast: Context factory for its forward passes, in whose type pictures are.
        normalizer: Applied to every observation if given.
    """

    def __init__(
        self,
        space: gymnasium.Space[Any],
        num_envs: int,
        network: nn.Module,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        normalizer: Normalizer | None,
    ) -> None:
        self.normalizer = normalizer
        self._space = space
        self._num_envs = num_envs
        self._device = device
        self._autocast = autocast
        self._frames = {n: FrameStore(p, device) for n, p in stored_pictures(network).items()}
        # What the environments show at present, copied, as they may use their buffer again.
        now = {
            name: np.zeros((num_envs, *(part.shape or ())), part.dtype)
            for name, part in parts(space).items()
        }
        self.now: Arrays = now.get("", now)

    @property
    def reused(self) -> frozenset[str]:
        """Parts whose memory the next rollout overwrites."""
        return frozenset(self._frames)

    def keep(self, rows: slice, shown: Any) -> None:
        """Take over what the environments of these rows show, in the structure of their space."""
        if isinstance(self.now, dict):
            shown = flat(self._space, shown)
        fill(self.now, rows, shown)

    def room(self, num_steps: int) -> Tree:
        """Memory for the observations of a rollout (T, N, ...), as the network takes them."""
        one = self._normalized(_rows(self.now, slice(0, 1)))
        if isinstance(one, dict):
            return {name: self._room(name, num_steps, array) for name, array in one.items()}
        return self._room("", num_steps, one)

    def _room(self, name: str, num_steps: int, one: Array) -> Tensor:
        shape = (num_steps, self._num_envs)
        if name in self._frames:
            with self._autocast():
                return self._frames[name].room(*shape, compute_type(self._device))
        return torch.empty((*shape, *one.shape[1:]), dtype=torch.from_numpy(one).dtype)

    def show(self, memory: Any, step: int, rows: slice, alive: Array | None) -> Tree:
        """Record the present observations of some environments, and give them to the network.

        Args:
            memory: Of the rollout, from :meth:`room`.
            step: Number of the step.
            rows: The environments.
            alive: Which of them are in an episode, None for all; the normaliser's statistics are of
                these.
        """
        shown = _rows(self.now, rows)
        if self.normalizer is not None:
            self.normalizer.update(shown if alive is None else _rows(shown, alive))
            shown = self._normalized(shown)
        if isinstance(shown, dict):
            return {
                name: self._record(name, array, memory[name], step, rows)
                for name, array in shown.items()
            }
        return self._record("", shown, memory, step, rows)

    def _record(self, name: str, shown: Array, memory: Tensor, step: int, rows: slice) -> Tensor:
        if name in self._frames:
            return self._frames[name].put(shown, memory[step, rows])
        memory.numpy()[step, rows] = shown
        return to_tensor(shown, self._device)

    def finals(self, shown: Any, envs: Array) -> list[Arrays]:
        """Observations that a same-step reset has replaced, normalised, one for each environment.

        Args:
            shown: ``infos["final_obs"]``.
            envs: Numbers of the environments there.
        """
        found = self._normalized(final_rows(self._space, shown, envs))
        return [_rows(found, slice(row, row + 1)) for row in range(len(envs))]

    def ends(self, finals: Sequence[Arrays]) -> Tree:
        """The present observations, and after them the final ones, on the network's device."""
        ends: Any = [self._normalized(self.now), *finals]
        if isinstance(ends[0], dict):
            return {name: self._joined([each[name] for each in ends]) for name in ends[0]}
        return self._joined(ends)

    def _joined(self, arrays: Sequence[Array]) -> Tensor:
        return to_tensor(np.concatenate(arrays), self._device)

    def pieces(self, steps: Tree, ends: Tree) -> list[Tree]:
        """The observations of all steps, and the ends: as one, unless pictures were converted."""
        steps = tree.to_device(steps, self._device)
        return [steps, ends] if self._frames else [tree.concatenate([steps, ends])]

    def _normalized(self, shown: Any) -> Any:
        return shown if self.normalizer is None else self.normalizer(shown)


def fill(places: Arrays, index: Any, values: Any) -> None:
    """Write rows of arrays, part by part."""
    if isinstance(places, dict):
        for name, place in places.items():
            place[index] = values[name]
    else:
        places[index] = values


def _rows(shown: Arrays, index: Any) -> Any:
    if isinstance(shown, dict):
        return {name: array[index] for name, array in shown.items()}
    return shown[index]
