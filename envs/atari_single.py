"""One Atari game that can be rendered, for videos."""

from __future__ import annotations

from typing import Any

import ale_py
import gymnasium
import numpy as np
from ale_py import roms
from numpy.typing import NDArray

from acktr.envs.atari import make_group, native_envs
from acktr.envs.errors import EnvFault
from acktr.envs.registry import AtariGame
from acktr.envs.replay import replay
from acktr.envs.settings import AtariSettings
from acktr.envs.values import Tree
from acktr.envs.vector import env_seeds

FRAMES_PER_SECOND = 60


class AtariSingle(gymnasium.Env[NDArray[np.uint8], Any]):
    """One game with the observations, FIRE and raw rewards of evaluation, and colour frames.

    The native vector environment gives no raw frames. A second one with the same seed and the same
    executed actions draws the game in colour at its own resolution (the maximum of the last two
    frames of a step, which removes flicker).
    """

    def __init__(
        self, game: AtariGame, settings: AtariSettings, *, render_mode: str | None
    ) -> None:
        fps = FRAMES_PER_SECOND / settings.frame_skip
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        self.render_mode = render_mode
        self._envs = make_group(game, 1, 0, settings, training=False, logged=True)
        self._screen = None
        if render_mode is not None:
            self._screen = native_envs(game, 1, settings, _screen_size(game))
        self._frame: NDArray[np.uint8] | None = None
        self._over = True
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.uint8], dict[str, Any]]:
        """Start a new game: that of environment 0 of `make_vec` after `reset(seed=seed)`.

        Without a seed, one is drawn from the environment's generator.
        """
        super().reset(seed=seed)
        game_seed = int(self.np_random.integers(2**31)) if seed is None else seed
        obs, infos = self._envs.reset(seed=game_seed)
        if self._screen is not None:
            frames, frame_infos = self._screen.reset(seed=np.array(env_seeds(game_seed, 1)))
            self._show(frames, infos, frame_infos)
        self._over = False
        return obs[0], _first(infos)

    def step(self, action: Any) -> tuple[NDArray[np.uint8], float, bool, bool, dict[str, Any]]:
        """Play one agent step; `info["forced"]` tells that FIRE was pressed instead of `action`.

        Raises:
            EnvFault: the game is over and was not reset, or the action is invalid.
        """
        if self._over:
            raise EnvFault("the game is over (or has not begun): call reset() first")
        obs, rewards, terminated, truncated, infos = self._envs.step(np.asarray(action)[None])
        self._over = bool(terminated[0] | truncated[0])
        if self._screen is not None:
            frames, *_, frame_infos = self._screen.step(self._envs.executed)
            self._show(frame_infos["final_obs"] if self._over else frames, infos, frame_infos)
        last = infos["final_obs"] if self._over else obs
        return last[0], float(rewards[0]), bool(terminated[0]), bool(truncated[0]), _first(infos)

    def state_dict(self) -> Tree:
        """What was done in this game, see `acktr.envs.replay`."""
        return {"games": self._envs.state_dict(), "over": self._over}

    def load_state_dict(self, state: Tree) -> None:
        """Play the game again up to a state.

        Raises:
            ValueError: It does not fit.
        """
        self._envs.load_state_dict(state["games"])
        self._over = bool(state["over"])
        if self._screen is not None:
            self._frame = replay(state["games"]["log"], self._screen).observations[0, 0].copy()

    def render(self) -> NDArray[np.uint8] | None:
        """The current screen, shape (height, width, 3), or None without a render mode."""
        return self._frame

    def close(self) -> None:
        """Close both games."""
        self._envs.close()
        if self._screen is not None:
            self._screen.close()

    def _show(
        self, frames: NDArray[np.uint8], infos: dict[str, Any], frame_infos: dict[str, Any]
    ) -> None:
        if not np.array_equal(infos["frame_number"], frame_infos["frame_number"]):
            raise EnvFault("the rendered Atari game no longer follows the played one")
        self._frame = frames[0, 0].copy()


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the only game."""
    names = ("lives", "frame_number", "episode_frame_number")
    info: dict[str, Any] = {name: int(infos[name][0]) for name in names}
    info["forced"] = bool(infos["forced"][0]) if "forced" in infos else False
    return info


def _screen_size(game: AtariGame) -> tuple[int, int]:
    """Height and width of the game's screen."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    ale = ale_py.ALEInterface()
    ale.loadROM(str(roms.get_rom_path(game.rom)))  # checked when the game was looked up
    height, width = ale.getScreenDims()
    return int(height), int(width)
