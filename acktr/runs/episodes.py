"""The episodes of all processes of a run, which its checkpoints hold side by side."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from acktr.runs.trees import decode, decode_tensors, encode, encode_tensors
from acktr.train import Trainer
from acktr.world import PARTS, World, own_episodes

_HEAD = 8
"""Bytes that say how long the tree is; the tensors follow it."""


class SharedEpisodes:
    """The episodes of all processes at the last moment at which a checkpoint could be made.

    Every process has one, made when its episodes have begun, and tells it of every update: all of
    them know at which ones to exchange episodes.

    Args:
        trainer: Of this process.
        world: The processes.
        goal: Steps at which the session ends.
    """

    def __init__(self, trainer: Trainer, world: World, goal: float) -> None:
        self._trainer, self._world, self._goal = trainer, world, goal
        self._seen = trainer.timesteps
        again = [why for why in self._exchange() if why is not None]
        if again and trainer.restarted is None:  # those of another process could not go on
            trainer.restarted = again[0]
            trainer.restarts += 1

    def after_update(self) -> None:
        """Exchange episodes if a checkpoint or the end may follow."""
        trainer, config = self._trainer, self._trainer.config
        marks = (config.checkpoint_freq, config.eval_freq)
        now, before = trainer.timesteps, self._seen
        self._seen = now
        passed = any(freq and now // freq != before // freq for freq in marks)
        if passed or trainer.stop is not None or now >= min(self._goal, config.total_timesteps):
            self._exchange()

    def put_into(self, state: MutableMapping[str, Any]) -> None:
        """Add them to a trainer's state, if they are of the same moment."""
        if state["timesteps"] == self._timesteps:
            state["collector"] = {**state["collector"], PARTS: self._parts}

    def _exchange(self) -> list[str | None]:
        """Tell all processes; why each began new episodes, if it did."""
        trainer = self._trainer
        mine = {**own_episodes(trainer.collector.state_dict()), "restarted": trainer.restarted}
        try:
            data = _packed(mine)
        except TypeError as error:  # no file can hold them
            data = _packed({**mine, "envs": None, "observation": None, "unsaved": str(error)})
        self._parts = [_unpacked(each) for each in self._world.every(data)]
        self._timesteps = trainer.timesteps
        return [part.pop("restarted") for part in self._parts]


def _packed(tree: dict[str, Any]) -> bytes:
    words, tensors = encode(tree, "part")
    return len(words).to_bytes(_HEAD, "little") + words + encode_tensors(tensors)


def _unpacked(data: bytes) -> dict[str, Any]:
    end = _HEAD + int.from_bytes(data[:_HEAD], "little")
    return decode(data[_HEAD:end], decode_tensors(data[end:]))
