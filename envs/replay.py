"""Atari games that are saved as what was done in them, and played again.

ale-py's vector environment gives no state away. But a game that was seeded is determined by its
actions, sticky ones too: the seed loads the ROM anew and begins all of its generators. So each game
keeps its seed and the actions since, also over several episodes; restored, the games are played
again up to the same picture. Seeding costs as much as some 240 steps, so that it is done at the end
of an episode only when the log has grown long. The published protocol is what it was until then,
and after it the games are as random: the new seed is drawn from the old one.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from numpy.typing import NDArray

from acktr.envs.errors import UnsavedError
from acktr.envs.values import Tree, require_like
from acktr.envs.vector import Array, env_seeds

_UNKNOWN = -1


class GameLog:
    """What was done in games that are stepped together, since each was seeded last.

    Args:
        num_envs: Number of games.
        longest: Agent steps after which a game that ends is seeded anew; None: never.
        most_steps: Most agent steps of one game.

    Attributes:
        seeds: Seeds (num_envs,), `_UNKNOWN` where a reset had none.
    """

    def __init__(self, num_envs: int, longest: int | None, most_steps: int) -> None:
        self.seeds = np.full(num_envs, _UNKNOWN, np.int64)
        self._longest = longest
        self._most = most_steps + (longest or 0) + 1
        # In one piece: an array for every step, kept, would tear the heap to pieces between the
        # large tensors that come and go, and memory would grow by kilobytes for each step.
        self._actions = bytearray()
        # Places in it where the games began.
        self._begins = np.zeros(num_envs, np.int64)

    def begin(self, which: NDArray[np.bool_], seeds: Array | None) -> None:
        """Forget what was done in games that are reset, with seeds or without."""
        self.seeds[which] = _UNKNOWN if seeds is None else seeds
        self._begins[which] = self._steps
        first = int(self._begins.min())
        del self._actions[: first * len(self.seeds)]
        self._begins -= first

    @property
    def _steps(self) -> int:
        return len(self._actions) // len(self.seeds)

    def add(self, actions: Array) -> None:
        """Add the actions of a step as executed."""
        self._actions += actions.astype(np.uint8).tobytes()

    def due(self, ended: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The games, of those that ended, which are to be seeded anew."""
        if self._longest is None:
            return np.zeros_like(ended)
        return ended & (self._steps - self._begins >= self._longest)

    def next_seeds(self, which: NDArray[np.bool_]) -> NDArray[np.int64]:
        """New seeds of games, each drawn from its old one."""
        # Zero would leave a game without a seed.
        return np.array([max(1, env_seeds(int(s), 1)[0]) for s in self.seeds[which]], np.int64)

    def state_dict(self) -> Tree:
        """Seeds, actions (T, num_envs), and the steps in them at which the games began.

        Raises:
            UnsavedError: A game was reset without a seed.
        """
        if (self.seeds == _UNKNOWN).any():
            raise UnsavedError("Atari games that were reset without a seed cannot be saved")
        actions = np.array(self._actions, np.uint8).reshape(self._steps, len(self.seeds))
        return {"seeds": self.seeds.copy(), "begins": self._begins.copy(), "actions": actions}

    def check_state_dict(self, state: Any, choices: int) -> None:
        """Raise ValueError unless a state, which is not trusted, fits games with such actions."""
        template = {"seeds": self.seeds, "begins": self._begins, "actions": None}
        require_like(state, template, "the log")
        actions, begins, seeds = (state[name] for name in ("actions", "begins", "seeds"))
        shape: tuple[int, ...] = getattr(actions, "shape", ())
        if shape[1:] != self.seeds.shape or actions.dtype != np.uint8 or shape[0] > self._most:
            raise ValueError(
                f"the log of actions has the shape {shape}, not at most {self._most} steps of"
                f" {len(self.seeds)} games"
            )
        if (actions >= choices).any():
            raise ValueError(f"the log has actions above {choices - 1}")
        if ((begins < 0) | (begins > len(actions)) | (seeds < 0) | (seeds >= 2**31)).any():
            raise ValueError("the log has begins or seeds out of range")

    def load_state_dict(self, state: Tree) -> None:
        """Go on with a log that was checked."""
        self.seeds[:], self._begins[:] = state["seeds"], state["begins"]
        self._actions = bytearray(state["actions"].tobytes())


def replay(log: Tree, games: AtariVectorEnv) -> tuple[Array, dict[str, Any]]:
    """Play games again.

    They are stepped together: a game that began later plays anything until then.

    Args:
        log: The state of a `GameLog`, checked.
        games: New games of the same making.

    Returns:
        Observations and infos at the end.
    """
    actions, begins, seeds = log["actions"], log["begins"], log["seeds"]
    first = begins == 0
    obs, infos = games.reset(seed=np.where(first, seeds, _UNKNOWN))
    for step in range(len(actions) + 1):
        now = (begins == step) & ~first
        if now.any():
            obs, infos = games.reset(seed=seeds[now], options={"reset_mask": now})
        if step < len(actions):
            obs, *_, infos = games.step(actions[step].astype(np.int64))
    return obs, infos


def checksum(observations: Array) -> int:
    """A number by which replayed pictures are compared with those of before."""
    return zlib.crc32(np.ascontiguousarray(observations).tobytes())
