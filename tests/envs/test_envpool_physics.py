"""EnvPool's environments are Gymnasium's: the same steps, and the same statistics."""

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest

from acktr.envs import make_vec
from acktr.envs.envpool_backend import SAME
from tests.tools.envpool import actions_for, limit, make

pytest.importorskip("envpool")

ROBOTS = ("HalfCheetah-v5", "Hopper-v5", "InvertedPendulum-v5")


def copy_state(env: Any, obs: Any) -> None:
    """Put a single MuJoCo environment into the state of a first observation of its kind."""
    name, nq, nv = env.spec.name, env.model.nq, env.model.nv
    hidden = {"Ant": 2, "Swimmer": 2, "InvertedPendulum": 0}.get(name, 1)
    qpos = np.concatenate([np.zeros(hidden), obs[: nq - hidden]])
    qvel = obs[nq - hidden : nq - hidden + nv]
    if name == "InvertedDoublePendulum":
        qpos, qvel = np.array([obs[0], *np.arctan2(obs[1:3], obs[3:5])]), obs[5:8]
    elif name == "Reacher":
        qpos = np.array([*np.arctan2(obs[2:4], obs[:2]), *obs[4:6]])
        qvel = np.array([*obs[6:8], 0.0, 0.0])
    elif name == "Pusher":
        qpos, qvel = np.array([*obs[:7], 0, 0, 0, 0]), np.array([*obs[7:14], 0, 0, 0, 0])
        for body, first, place in (("object", 7, obs[17:19]), ("goal", 9, obs[20:22])):
            at = [_placed(env, qpos, first, step, body) for step in ((0, 0), (1, 0), (0, 1))]
            axes = np.stack([at[1] - at[0], at[2] - at[0]], axis=1)
            qpos[first : first + 2] = np.linalg.solve(axes, place - at[0])
    _set(env, qpos, qvel)


def _set(env: Any, qpos: Any, qvel: Any) -> None:
    env.reset()
    mujoco.mj_resetData(env.model, env.data)
    env.set_state(qpos, qvel)


def _placed(env: Any, qpos: Any, first: int, step: tuple[int, int], body: str) -> Any:
    moved = qpos.copy()
    moved[first : first + 2] = step
    _set(env, moved, np.zeros(env.model.nv))
    return env.get_body_com(body)[:2].copy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", sorted(SAME))
def test_equal_states_have_equal_steps(env_id: str) -> None:
    """The claim behind SAME, for every id: the same physics, rewards and ends of episodes."""
    vec = make(env_id, 8, seed=3)
    env: Any = gymnasium.make(env_id).unwrapped
    first = vec.reset()[0]
    actions = actions_for(vec, 10)
    steps = [vec.step(batch) for batch in actions]
    for index in range(vec.num_envs):
        copy_state(env, first[index])
        np.testing.assert_allclose(env._get_obs(), first[index], atol=1e-12)
        for batch, (obs, rewards, terminated, _, infos) in zip(actions, steps, strict=True):
            wanted, reward, done, _, _ = env.step(batch[index])
            found = infos["final_obs"][index] if terminated[index] else obs[index]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
            np.testing.assert_allclose(rewards[index], reward, rtol=1e-6, atol=1e-6)
            assert bool(terminated[index]) == done
            if done:
                break
    vec.close()
    env.close()


def within_four_errors(ours: Any, theirs: Any) -> None:
    """Means and variances of independent rows (n, ...) agree within 4 standard errors."""
    centre = (ours.mean(0) + theirs.mean(0)) / 2
    for one, other in ((ours, theirs), ((ours - centre) ** 2, (theirs - centre) ** 2)):
        error = np.sqrt(one.var(0, ddof=1) / len(one) + other.var(0, ddof=1) / len(other))
        assert (np.abs(one.mean(0) - other.mean(0)) <= 4 * error + 1e-12).all()


def statistics(vec: Any, steps: int) -> tuple[Any, Any]:
    """Per environment: mean observation; per episode: return and length."""
    total, ends = vec.reset()[0], []
    for actions in actions_for(vec, steps):
        obs, _, _, _, infos = vec.step(actions)
        total += obs
        for index in np.flatnonzero(infos.get("_episode", False)):
            ends.append([infos["episode"][key][index] for key in ("r", "l")])
    vec.close()
    return total / (steps + 1), np.array(ends)


@pytest.mark.parametrize("env_id", ROBOTS)
def test_statistics_of_a_random_policy(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, env_id, 50)
    ours, theirs = statistics(make(env_id, 48, 5), 100), statistics(make_vec(env_id, 48, 6), 100)
    within_four_errors(ours[0], theirs[0])
    assert min(len(ours[1]), len(theirs[1])) >= 48 * 2
    within_four_errors(ours[1], theirs[1])


@pytest.mark.parametrize("env_id", ROBOTS)
def test_noise_of_first_observations(env_id: str) -> None:
    ours, theirs = (
        np.concatenate([vec.reset()[0] for _ in range(60)])
        for vec in (make(env_id, 16, 5), make_vec(env_id, 16, 6))
    )
    assert len(np.unique(ours, axis=0)) == len(ours) == 960
    within_four_errors(ours, theirs)
    np.testing.assert_allclose(np.ptp(ours, 0), np.ptp(theirs, 0), rtol=0.35)
