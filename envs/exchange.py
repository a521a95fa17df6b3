"""Snapshots of environments that live in several processes: one part for each worker."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from acktr.envs import snapshot
from acktr.envs.errors import EnvFault, UnsavedError
from acktr.envs.values import Tree, from_bytes, to_bytes
from acktr.envs.vector import AnyEnv

SAVE, LOAD = b"v", b"l"
"""Commands to a worker's process: take snapshots, and restore those that are given."""


class SharedTree:
    """A tree in memory that this process shares with those that are forked from it later."""

    def __init__(self) -> None:
        self._file = os.memfd_create("acktr")
        weakref.finalize(self, os.close, self._file)

    def put(self, tree: Any) -> None:
        """Put a tree of :func:`acktr.envs.values.to_bytes` in place of the last one."""
        data, place = memoryview(to_bytes(tree)), 0
        os.ftruncate(self._file, len(data))
        while place < len(data):
            place += os.pwrite(self._file, data[place:], place)

    def get(self) -> Any:
        """The last tree, whichever process put it there."""
        return from_bytes(os.pread(self._file, os.fstat(self._file).st_size, 0))


class Part:
    """The environments of a worker, and the place where their snapshots go in and out.

    Args:
        envs: The environments.
        first: Index of the first of them in the vector.
        name: Name for messages.
        elsewhere: Whether they are in a process to be forked, with which memory is shared then.
    """

    def __init__(self, envs: Sequence[AnyEnv], first: int, name: str, elsewhere: bool) -> None:
        self._envs, self._first, self._name = envs, first, name
        self._held: list[Any] = []
        self._shared = SharedTree() if elsewhere else None

    def save(self) -> None:
        """Take snapshots; in place of one that cannot be taken stands in words why."""
        states: list[Any] = []
        for env in self._envs:
            try:
                states.append(snapshot.save(env))
            except UnsavedError as error:
                states.append(str(error))
        self.states = states

    def load(self) -> None:
        """Restore snapshots in environments that were reset just now."""
        for row, (env, state) in enumerate(zip(self._envs, self.states, strict=True), self._first):
            try:
                snapshot.load(env, state)
            except ValueError as error:
                raise EnvFault(f"environment {row} of {self._name}: {error}") from error

    @property
    def states(self) -> list[Any]:
        """The snapshots, seen by both processes."""
        states: list[Any] = self._held if self._shared is None else self._shared.get()
        return states

    @states.setter
    def states(self, states: list[Any]) -> None:
        if self._shared is None:
            self._held = states
        else:
            self._shared.put(states)


class Snapshots:
    """The snapshots of all environments of a vector.

    Args:
        envs: The environments. Those that live elsewhere are compared as they were when made.
        name: Name for messages.
        bounds: Indices where the parts begin, and the number of environments; the first part, which
            may be empty, is in this process.
    """

    def __init__(self, envs: Sequence[AnyEnv], name: str, bounds: Sequence[int]) -> None:
        self._envs, self._name, self._bounds = envs, name, bounds
        self.parts = [
            Part(envs[first:last], first, name, elsewhere=number > 0)
            for number, (first, last) in enumerate(pairwise(bounds))
        ]

    def taken(self) -> Tree:
        """The snapshots that all parts have taken.

        Raises:
            UnsavedError: One environment cannot be saved; one line.
        """
        states = [state for part in self.parts for state in part.states]
        for row, state in enumerate(states):
            if isinstance(state, str):
                raise UnsavedError(f"environment {row} of {self._name}: {state}")
        return {"envs": states}

    def check(self, state: Any) -> None:
        """Raise ValueError, with one line, unless a state fits; it is not trusted."""
        states = state.get("envs") if isinstance(state, dict) else None
        if not isinstance(states, list) or len(states) != len(self._envs):
            raise ValueError(f"it has no states of {len(self._envs)} environments")
        for row, (env, part) in enumerate(zip(self._envs, states, strict=True)):
            try:
                snapshot.check(env, part)
            except UnsavedError as error:
                raise UnsavedError(f"environment {row} of {self._name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"environment {row} of {self._name}: {error}") from error

    def give(self, state: Tree) -> None:
        """Give each part the snapshots that it is to restore."""
        for part, (first, last) in zip(self.parts, pairwise(self._bounds), strict=True):
            part.states = state["envs"][first:last]
