"""Atari games that are saved as what was done in them, and played again.

ale-py's vector environment gives no state away. But a game that was seeded is determined by its
actions, sticky ones too: the seed loads the ROM anew and begins all of its generators. So each game
keeps its seed and the actions since, also over several episodes; restored, the games are played
again up to the same picture. Seeding costs as much as some 240 steps, so that it is done at the end
of an episode only when the log has grown long. The published protocol is what it was until then,
and after it the games are as random: the new seed is drawn from the old one.

A reset leaves nothing of the episode before but the numbers that its generators have drawn. Without
sticky actions steps draw none, so that as many resets as there were, and the steps of the present
episode alone, come to the same; that is tried first where it holds.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from numpy.typing import NDArray

from acktr.envs.errors import UnsavedError
from acktr.envs.values import Tree, require_like
from acktr.envs.vector import Array, env_seeds

_UNKNOWN = -1
_LATER = ("starts", "resets")
"""What the logs of earlier versions lack."""


class GameLog:
    """What was done in games that are stepped together, since each was seeded last.

    Args:
        num_envs: Number of games.
        longest: Agent steps after which a game that ends is seeded anew; None: never.
        most_steps: Most agent steps of one game.
        sticky: Whether steps draw numbers, by which a game depends on its former episodes.

    Attributes:
        seeds: Seeds (num_envs,), `_UNKNOWN` where a reset had none.
    """

    def __init__(
        self, num_envs: int, longest: int | None, most_steps: int, *, sticky: bool = True
    ) -> None:
        self.seeds = np.full(num_envs, _UNKNOWN, np.int64)
        self.sticky = sticky
        self._longest = longest
        self._most = most_steps + (longest or 0) + 1
        # In one piece: an array for every step, kept, would tear the heap to pieces between the
        # large tensors that come and go, and memory would grow by kilobytes for each step.
        self._actions = bytearray()
        # Places in it where the games began, where their present episodes did, and how many
        # episodes ended in between.
        self._begins = np.zeros(num_envs, np.int64)
        self._starts = np.zeros(num_envs, np.int64)
        self._resets = np.zeros(num_envs, np.int64)

    def begin(self, which: NDArray[np.bool_], seeds: Array | None) -> None:
        """Forget what was done in games that are reset, with seeds or without."""
        self.seeds[which] = _UNKNOWN if seeds is None else seeds
        self._begins[which] = self._starts[which] = self._steps
        self._resets[which] = 0
        first = int(self._begins.min())
        del self._actions[: first * len(self.seeds)]
        self._begins -= first
        self._starts -= first

    @property
    def _steps(self) -> int:
        return len(self._actions) // len(self.seeds)

    def add(self, actions: Array, ended: NDArray[np.bool_]) -> None:
        """Add the actions of a step as executed, and which games were over and reset in it."""
        self._actions += actions.astype(np.uint8).tobytes()
        if ended.any():
            self._starts[ended] = self._steps
            self._resets[ended] += 1

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

        Also those at which their present episodes did, and how many ended in between.

        Raises:
            UnsavedError: A game was reset without a seed.
        """
        if (self.seeds == _UNKNOWN).any():
            raise UnsavedError("Atari games that were reset without a seed cannot be saved")
        actions = np.array(self._actions, np.uint8).reshape(self._steps, len(self.seeds))
        own = self._own()
        return {**{name: array.copy() for name, array in own.items()}, "actions": actions}

    def _own(self) -> dict[str, NDArray[np.int64]]:
        names = ("seeds", "begins", "starts", "resets")
        return dict(zip(names, (self.seeds, self._begins, self._starts, self._resets), strict=True))

    def check_state_dict(self, state: Any, choices: int) -> None:
        """Raise ValueError unless a state, which is not trusted, fits games with such actions."""
        own = self._own()
        if isinstance(state, dict) and not state.keys() & set(_LATER):
            own = {name: own[name] for name in own if name not in _LATER}
        require_like(state, {**own, "actions": None}, "the log")
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
        if "starts" in state:
            starts, resets = state["starts"], state["resets"]
            if ((starts < begins) | (starts > len(actions))).any():
                raise ValueError("the log has starts out of range")
            if ((resets < 0) | (resets > starts - begins)).any():
                raise ValueError("the log has more resets than steps")

    def load_state_dict(self, state: Tree) -> None:
        """Go on with a log that was checked, of which all is known."""
        for name, array in self._own().items():
            array[:] = state[name]
        self._actions = bytearray(state["actions"].tobytes())


@dataclass
class Played:
    """Games at the end of a log."""

    observations: Array
    infos: dict[str, Any]
    returns: NDArray[np.float64]
    """Sums of rewards of the present episodes."""
    log: Tree
    """The log, with the starts and resets that were found by playing."""

    def shows(self, lives: Array, returns: Array, shown: int) -> bool:
        """Whether they are as they were: lives, sums of rewards, and a `checksum` of pictures."""
        same = (self.infos["lives"] == lives).all() and (self.returns == returns).all()
        return bool(same) and checksum(self.observations) == shown


def replay(log: Tree, games: AtariVectorEnv, *, whole: bool = True) -> Played:
    """Play games again.

    They are stepped together: a game that began later plays anything until then.

    Args:
        log: The state of a `GameLog`, checked.
        games: New games of the same making.
        whole: Whether the episodes before the present ones are played too, rather than skipped by
            resets.
    """
    actions, seeds = log["actions"], log["seeds"]
    begins = log["begins"] if whole else log["starts"]
    skipped = np.zeros_like(begins) if whole else log["resets"]
    resets, starts, returns = np.zeros_like(begins), begins.copy(), np.zeros(len(begins))
    origin = int(begins.min())
    begun = begins == origin
    # Seeding loads ROMs, and a reset of few games leaves processors idle: what skips episodes is
    # done for all games at once, but the last reset, which is made where the episode begins, and as
    # many before it as there may be ends while the game waits, each of which resets it too.
    ends = np.ceil((begins - origin) * skipped / np.maximum(begins - log["begins"], 1))
    left = np.where(begun, 0, np.minimum(skipped, 1 + ends.astype(np.int64)))
    ahead = begun | (left > 0)
    obs, infos = games.reset(seed=np.where(ahead, seeds, _UNKNOWN))
    obs, infos = _reset(games, np.where(ahead, skipped - left, 0), obs, infos)
    for step in range(origin, len(actions) + 1):
        now = (begins == step) & ~begun
        if now.any():
            far = now & (left == 0)
            if far.any():
                obs, infos = games.reset(seed=seeds[far], options={"reset_mask": far})
            obs, infos = _reset(games, np.where(far, skipped, left * now), obs, infos)
            returns[now] = 0.0
        if step < len(actions):
            obs, rewards, terminated, truncated, infos = games.step(actions[step].astype(np.int64))
            ended = terminated | truncated
            returns = np.where(ended, 0.0, returns + rewards)
            # A game that waits and ends is reset: too early, in time, or once too often.
            begun |= (left == 1) & ended & (begins == step + 1)
            left -= ended & (left > 0)
            ended &= begins <= step
            starts[ended] = step + 1
            resets[ended] += 1
    return Played(obs, infos, returns, {**log, "starts": starts, "resets": skipped + resets})


def _reset(
    games: AtariVectorEnv, times: NDArray[np.int64], obs: Array, infos: dict[str, Any]
) -> tuple[Array, dict[str, Any]]:
    """Reset games without seeds, each as many times; what all of them show afterwards."""
    for number in range(int(times.max())):
        obs, infos = games.reset(options={"reset_mask": times > number})
    return obs, infos


def checksum(observations: Array) -> int:
    """A number by which replayed pictures are compared with those of before."""
    return zlib.crc32(np.ascontiguousarray(observations).tobytes())
