"""Environments of training that others play in: new episodes begin there, and that is told."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from acktr import A2C, EnvError
from acktr.envs import EnvWarning

PLAYED = "environments of training were reset or stepped by others since: new episodes"


class Watched(gymnasium.Env[Any, Any]):
    """Shows the number of the step; a step after the end, or after closing, is an error."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(2)
    closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        assert self.count < 5 and not self.closed
        self.count += 1
        return np.full(1, self.count, np.float32), 1.0, self.count == 5, False, {}

    def close(self) -> None:
        self.closed = True


def learner(env: Any, **more: Any) -> A2C:
    return A2C(env, seed=0, num_steps=8, **more)


def shown(agent: A2C) -> Any:
    """What the next action is chosen by."""
    return agent.trainer.collector.observations.now.copy()


def test_steps_of_the_agents_own_environments_are_seen() -> None:
    """Also those that a callback takes between two updates, and what is saved then says so."""
    with learner("CartPole-v1", num_envs=2) as agent:
        agent.learn(16)
        agent.envs.step(np.zeros(2, np.int64))
        assert "stepped" in agent.trainer.state_dict()["collector"]["unsaved"]
        with pytest.warns(UserWarning, match=PLAYED) as told:
            agent.learn(48)
        assert len(told) == 1
        with pytest.warns(UserWarning, match=PLAYED):
            agent.learn(32, lambda stats: agent.envs.reset() and None)


def test_a_reset_after_steps_by_hand_begins_new_episodes() -> None:
    """The next rollout begins with an action for an old observation, in an episode that is over."""
    one = Watched()
    agent = learner(one)
    agent.learn(16)
    one.reset()
    for _ in range(5):
        one.step(0)
    agent.envs.reset()
    with pytest.warns(UserWarning, match=PLAYED):
        agent.learn(16)
    assert shown(agent).max() == one.count


def test_a_reset_after_the_last_update_is_seen() -> None:
    """By a callback that is still told of it, or at the end of training."""

    class AtTheEnd:
        def begin(self, agent: Any, total_timesteps: int) -> None:
            self.agent = agent

        def __call__(self, stats: Any) -> None:
            if stats.updates == 2:
                self.agent.envs.reset()

        def end(self) -> None:
            pass

    with learner("CartPole-v1", num_envs=1) as agent:
        agent.learn(16, AtTheEnd())
        with pytest.warns(UserWarning, match=PLAYED):
            agent.learn(16)


def test_learning_goes_on_as_before_where_nobody_plays(tmp_path: Path) -> None:
    """Asking, saving and evaluating elsewhere is no play."""
    one = Watched()
    agent = learner(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (3, 1, 4):  # 8 steps a time, of episodes of 5
            agent.learn(8)
            assert one.count == shown(agent).max() == count
            agent.predict(np.zeros(1))
            agent.save(tmp_path / "agent.zip")
            agent.evaluate(Watched, episodes=2)


class Rendered(Watched):
    """Counts pictures and keeps what it once computed."""

    frames, table = 0, None

    def render(self) -> None:
        self.frames += 1
        self.table, self.notes = 7, ["drawn"]


def draw(env: Any) -> None:
    env.render()


def lighten(env: Any) -> None:
    env.unwrapped.gravity = env.unwrapped.gravity + 0.1
    env.unwrapped.screen, env.unwrapped.isopen = object(), False


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: gymnasium.make("FrozenLake-v1", render_mode="ansi"), draw),
        (lambda: gymnasium.make("CartPole-v1"), lighten),
        (Rendered, draw),
    ],
)
def test_what_is_no_step_cuts_no_episode(make: Any, change: Any) -> None:
    """Episodes of a curriculum, which began anew at every call, never ended."""
    env = make()
    agent = learner(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            agent.learn(8)
            change(env)


def test_evaluation_does_not_close_what_is_learned_in() -> None:
    one = Watched()
    agent = learner(lambda: one, num_envs=1)
    agent.learn(16)
    for episodes, why in ((1, "that the agent learns in: it must make a new"), (3, "one and the")):
        with pytest.raises(EnvError, match=why):
            agent.evaluate(episodes=episodes)
    with pytest.raises(EnvError, match="that the agent learns in"):
        agent.evaluate(lambda: one, episodes=1)
    assert not one.closed
    same = SyncVectorEnv([lambda: one], autoreset_mode=AutoresetMode.SAME_STEP)
    assert agent.evaluate(same, episodes=1).lengths == (5,)
    agent.learn(16)


def test_a_run_is_not_evaluated_where_it_learns(tmp_path: Path) -> None:
    one = Watched()
    with pytest.raises(EnvError, match="eval_env is where the agent learns"):
        learner(one).learn(16, run_dir=tmp_path, eval_env=one)


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward])
def test_new_statistics_of_evaluations_are_told(wrapper: Any) -> None:
    what = wrapper.__name__.removeprefix("Normalize").lower()
    line = f"the statistics of {wrapper.__name__} are not the agent's.* normalize_{what}=True"
    agent = learner(Watched, wrappers=[wrapper], num_envs=2)
    with agent, pytest.warns(EnvWarning, match=line):
        agent.evaluate(episodes=2)
