"""Atari games on ale-py's native vector environment, with the published protocol."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import Any

import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from acktr.envs.episodes import EpisodeStats
from acktr.envs.errors import EnvFault, UnsavedError
from acktr.envs.groups import GroupedEnvs
from acktr.envs.registry import AtariGame
from acktr.envs.replay import GameLog, Played, checksum, replay
from acktr.envs.settings import AtariSettings
from acktr.envs.spaces import check_actions
from acktr.envs.values import Tree, require_like
from acktr.envs.vector import AnyVectorWrapper, Array, StepResult, check_seed, env_seeds

FIRE = 1


class AtariEnvs(AnyVectorWrapper):
    """Reward clipping, life loss and FIRE after it, on top of `AtariVectorEnv`.

    The native environment runs without reward clipping and without any treatment of lives, so
    that its `terminated` means the end of the game only; a life loss is a fall of `lives` to a
    value above zero within a game (Baselines' `EpisodicLifeEnv`). The native FIRE at the start of
    a game is one emulator frame, in any game whose action set contains FIRE. FIRE after a life
    loss is one agent step, in games whose second action is FIRE and that have three actions or
    more (the rule of Baselines' `FireResetEnv`); `infos["forced"]` marks these steps.

    Args:
        env: the native environment.
        settings: protocol.
        training: whether rewards are clipped and lost lives end returns, as the settings say.
        press_fire: whether the game needs FIRE after a lost life.
        seed: of the first reset.
        first: number of the first of these games among all that share a seed.
        log: keeps what is done, so that the games can be saved.

    Attributes:
        executed: the actions of the last step as executed, shape (num_envs,).
    """

    reports_episodes = True
    """Its infos have the statistics of ended episodes."""

    def __init__(
        self,
        env: AtariVectorEnv,
        settings: AtariSettings,
        *,
        training: bool,
        press_fire: bool,
        seed: int,
        first: int = 0,
        log: GameLog | None = None,
    ) -> None:
        super().__init__(env)
        self._native = env
        self._first = first
        self._clip = training and settings.clip_reward
        self._life_ends = training and settings.life_loss_ends_return
        self._press_fire = press_fire
        self._seed: int | None = check_seed(seed)
        self._stats = EpisodeStats(env.num_envs)
        self._lives = np.zeros(env.num_envs, np.int32)
        self._press = np.zeros(env.num_envs, np.bool_)
        self._forced: NDArray[np.bool_] | None = None  # of the step that is under way
        self.executed = np.zeros(env.num_envs, np.int64)
        self._log = log
        self._shown: Array = np.zeros(0, np.uint8)  # the present observations
        self._frames = np.zeros(env.num_envs, np.int32)  # of all episodes since the seed
        self._skipped = np.zeros(env.num_envs, np.int32)  # of these, those of a skipped episode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start new games in all environments, or in those of `options["reset_mask"]`."""
        mask = (options or {}).get("reset_mask")
        if self._forced is not None:
            if mask is not None:
                raise EnvFault("a step is under way: call step_wait() before a partial reset")
            self.step_wait()  # what is under way would be taken for the next step
        seed, self._seed = (self._seed if seed is None else check_seed(seed)), None
        seeds: Array | None = None
        if seed is not None:
            seeds = np.array(env_seeds(seed, self._first + self.num_envs)[self._first :], np.int64)
            seeds = seeds if mask is None else seeds[mask]
        # The native environment takes an array of seeds although the base class does not say so.
        obs, infos = self.env.reset(seed=seeds, options=options)  # type: ignore[arg-type]
        self._stats.reset(mask)
        self._lives = infos["lives"].copy()
        which = np.ones(self.num_envs, np.bool_) if mask is None else mask
        self._press[which] = False
        if self._log is not None:
            self._log.begin(which, seeds)
            self._skipped[which] *= seeds is None
            self._count(infos)
        self._shown = obs
        return obs, infos

    def step(self, actions: Any) -> StepResult:
        """Step all games; games that end are reset within the step."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Any) -> None:
        """Begin a step; the games run while this thread goes on.

        Raises:
            EnvFault: the actions cannot be executed, or a step is under way.
        """
        batch = check_actions(actions, self.single_action_space, self.num_envs)
        if self._forced is not None:
            raise EnvFault("step_async() was called while a step is under way: call step_wait()")
        self.executed = np.where(self._press, FIRE, batch)
        self._forced = self._press
        self._native.send(self.executed)

    def step_wait(self) -> StepResult:
        """Wait for the end of the step that `step_async` began.

        Raises:
            EnvFault: no step is under way.
        """
        if self._forced is None:
            raise EnvFault("step_wait() was called while no step is under way: call step_async()")
        forced, self._forced = self._forced, None  # also if an interrupt ends the waiting
        obs, rewards, terminated, truncated, infos = self._native.recv()
        dones = terminated | truncated
        raw = rewards.astype(np.float64)
        # Games that lost a life and go on press FIRE at the next step.
        lives = infos["lives"]
        lost: NDArray[np.bool_] = (lives < self._lives) & (lives > 0) & ~dones
        self._lives = lives.copy()
        self._press = lost if self._press_fire else np.zeros_like(lost)
        infos["forced"] = forced
        infos.update(self._stats.step(raw, dones))
        if dones.any():
            final = infos["final_obs"].copy()
            final[~dones] = 0  # rows of unfinished games are undefined
            infos["final_obs"], infos["_final_obs"] = final, dones.copy()
        if self._log is not None:
            self._count(infos)
            self._log.add(self.executed, dones)
            due = self._log.due(dones)
            if due.any():
                obs = self._seed_anew(due, obs)
        if self._life_ends:
            terminated = terminated | lost
        self._shown = obs
        return obs, np.sign(raw) if self._clip else raw, terminated, truncated, infos

    def _count(self, infos: dict[str, Any]) -> None:
        """Correct the count of frames since the seed by those that a resume has skipped."""
        infos["frame_number"] = self._frames = infos["frame_number"] + self._skipped

    def _seed_anew(self, which: NDArray[np.bool_], obs: Array) -> Array:
        """Begin games with new seeds in place of those that began just now; their observations."""
        assert self._log is not None
        seeds = self._log.next_seeds(which)
        fresh, infos = self._native.reset(seed=seeds, options={"reset_mask": which})
        self._skipped[which] = 0
        self._count(infos)
        self._log.begin(which, seeds)
        self._lives[which] = infos["lives"][which]
        obs = obs.copy()
        obs[which] = fresh[which]
        return obs

    def state_dict(self) -> Tree:
        """What the games are in the middle of: their logs, see `acktr.envs.replay`.

        Raises:
            UnsavedError: They are not logged, or were reset without a seed.
            EnvFault: a step is under way.
        """
        if self._log is None:
            raise UnsavedError("Atari games are saved in training only, with atari.reseed_steps")
        if self._forced is not None:
            raise EnvFault("a step is under way: call step_wait() before state_dict()")
        return {
            "log": self._log.state_dict(),
            "press": self._press.copy(),
            "lives": self._lives.copy(),
            "episodes": self._stats.state_dict(),
            "shown": checksum(self._shown),
            "frames": self._frames.copy(),
        }

    def check_state_dict(self, state: Any) -> None:
        """Raise ValueError, with one line, unless a state fits; it is not trusted."""
        if self._log is None:
            raise ValueError("the games are not logged")
        template = {"press": self._press, "lives": self._lives, "shown": 0, "log": None}
        if isinstance(state, dict) and "frames" in state:  # which earlier versions did not write
            template["frames"] = self._frames
        require_like(state, {**template, "episodes": self._stats.state_dict()}, "the games' state")
        space: Any = self.single_action_space
        self._log.check_state_dict(state["log"], int(space.n))

    def load_state_dict(self, state: Tree) -> None:
        """Play the games again up to a state.

        Raises:
            ValueError: It does not fit.
            UnsavedError: Played again, they show something else.
        """
        self.check_state_dict(state)
        assert self._log is not None
        played = self._played(state)
        self._log.load_state_dict(played.log)
        self._stats.load_state_dict(state["episodes"])
        self._press, self._lives = state["press"].copy(), state["lives"].copy()
        self._shown, self._seed = played.observations, None

    def _played(self, state: Tree) -> Played:
        """The games played again: their present episodes alone if that suffices."""
        assert self._log is not None
        log, returns = state["log"], state["episodes"]["returns"]
        short = not self._log.sticky and "starts" in log and "frames" in state
        for whole in (False, True) if short else (True,):
            played = replay(log, self._native, whole=whole)
            if played.shows(state["lives"], returns, state["shown"]):
                self._skipped[:] = 0 if whole else state["frames"] - played.infos["frame_number"]
                self._frames = played.infos["frame_number"] + self._skipped
                return played
        raise UnsavedError("played again, the games look different: is ale-py another one?")


def native_envs(
    game: AtariGame, num_envs: int, settings: AtariSettings, screen: tuple[int, int] | None = None
) -> AtariVectorEnv:
    """The native environment with same-step resets; all values are checked before.

    Observations are stacks of grey images, of shape (num_envs, stack, size, size), or where the
    (height, width) of a screen is given single colour images (num_envs, 1, height, width, 3).
    """
    height, width = screen or (settings.screen_size, settings.screen_size)
    return AtariVectorEnv(
        game.rom,
        num_envs,
        num_threads=min(settings.num_threads, num_envs),
        max_num_frames_per_episode=settings.max_frames,
        repeat_action_probability=game.sticky if settings.sticky is None else settings.sticky,
        full_action_space=settings.full_action_space,
        autoreset_mode=AutoresetMode.SAME_STEP,
        img_height=height,
        img_width=width,
        grayscale=screen is None,
        stack_num=settings.frame_stack if screen is None else 1,
        frameskip=settings.frame_skip,
        maxpool=True,
        noop_max=settings.noop_max,
        episodic_life=False,
        life_loss_info=False,
        reward_clipping=False,
        use_fire_reset=settings.fire_reset,
    )


def make_atari(
    game: AtariGame,
    num_envs: int,
    seed: int,
    settings: AtariSettings,
    *,
    training: bool,
    first: int = 0,
) -> GroupedEnvs:
    """Parallel games with the protocol of `settings`.

    They are in as many groups as it allows and as divide them into equal ones. ``first`` is the
    number of the first of them among all that share a seed.
    """
    size = num_envs // max(n for n in range(1, settings.num_groups + 1) if num_envs % n == 0)
    with ExitStack() as made:
        groups = [
            made.enter_context(
                closing(make_group(game, size, seed, settings, training=training, first=place))
            )
            for place in range(first, first + num_envs, size)
        ]
        made.pop_all()
    return GroupedEnvs(groups)


def make_group(
    game: AtariGame,
    num_envs: int,
    seed: int,
    settings: AtariSettings,
    *,
    training: bool,
    first: int = 0,
    logged: bool | None = None,
) -> AtariEnvs:
    """Parallel games that are stepped together; first is the number of the first of them.

    They are ``logged`` in training, unless told otherwise.
    """
    native = native_envs(game, num_envs, settings)
    names = [str(action.name) for action in native.ale.get_action_set()]
    fire = settings.fire_after_life_loss and len(names) >= 3 and names[FIRE] == "FIRE"
    longest = settings.reseed_steps if training else None
    sticky = (game.sticky if settings.sticky is None else settings.sticky) > 0
    log = GameLog(num_envs, longest, settings.max_frames, sticky=sticky)
    return AtariEnvs(
        native,
        settings,
        training=training,
        press_fire=fire,
        seed=seed,
        first=first,
        log=log if (bool(longest) if logged is None else logged) else None,
    )
