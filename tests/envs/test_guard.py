"""Promises of vector environments that are not Atari."""

import functools
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.envs import EnvFault, GuardedVectorEnv, env_seeds, make_vec
from tests.tools import toys


def test_counting_env_has_no_dead_steps() -> None:
    env_id = toys.variant(toys.CountingEnv, {"terminate_at": 3})
    vec = make_vec(env_id, 2)
    assert vec.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = vec.reset()
    rows = [obs[0, 0]]
    for step in range(1, 10):
        obs, rewards, terminated, truncated, infos = vec.step(np.zeros(2, np.int64))
        rows.append(obs[0, 0])
        ends = step % 3 == 0
        assert rewards[0] == (step - 1) % 3 + 1
        assert bool(terminated[0]) == ends
        assert not truncated.any()
        assert ("_episode" in infos) == ends == ("_final_obs" in infos)
        if ends:
            assert infos["final_obs"].dtype == np.float32
            np.testing.assert_array_equal(infos["final_obs"], [[3.0], [3.0]])
            np.testing.assert_array_equal(infos["episode"]["r"], [6.0, 6.0])
            np.testing.assert_array_equal(infos["episode"]["l"], [3, 3])
    assert rows == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    vec.close()
    vec.close()


def test_only_ended_environments_are_marked() -> None:
    env_id = toys.variant(toys.CountingEnv, {"truncate_at": 4})
    vec = make_vec(env_id, 3)
    vec.reset()
    for _ in range(2):
        vec.step(np.zeros(3, np.int64))
    vec.reset(options={"reset_mask": np.array([False, True, False])})
    for _ in range(2):
        _, _, terminated, truncated, infos = vec.step(np.zeros(3, np.int64))
    np.testing.assert_array_equal(truncated, [True, False, True])
    assert not terminated.any()
    np.testing.assert_array_equal(infos["_final_obs"], truncated)
    np.testing.assert_array_equal(infos["_episode"], truncated)
    np.testing.assert_array_equal(infos["final_obs"][:, 0], [4, 0, 4])
    np.testing.assert_array_equal(infos["episode"]["r"], [10, 0, 10])
    infos = [vec.step(np.zeros(3, np.int64))[4] for _ in range(2)][1]
    np.testing.assert_array_equal(infos["episode"]["r"], [0, 10, 0])
    np.testing.assert_array_equal(infos["episode"]["l"], [0, 4, 0])
    vec.close()


def test_infos_of_single_environments_are_dropped() -> None:
    env_id = toys.variant(toys.CountingEnv, {"truncate_at": 2})
    vec = make_vec(env_id, 2)
    vec.reset()
    assert vec.step(np.zeros(2, np.int64))[4] == {}
    infos = vec.step(np.zeros(2, np.int64))[4]
    assert set(infos) == {"episode", "_episode", "final_obs", "_final_obs"}
    vec.close()


def test_time_limit_of_gymnasium() -> None:
    vec = make_vec("Pendulum-v1", 2)
    vec.reset(seed=0)
    total = np.zeros(2)
    for _ in range(200):
        _, rewards, terminated, truncated, infos = vec.step(np.zeros((2, 1), np.float32))
        total += rewards
    assert truncated.all()
    assert not terminated.any()
    np.testing.assert_allclose(infos["episode"]["r"], total)
    vec.close()


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("observation", -np.inf, r"environment 1 of .* observation at step 3: -inf at element"),
        ("reward", np.inf, r"environment 1 of .* non-finite reward at step 3: inf"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # Gymnasium's own checker warns of NaN at the first step
def test_infinite_numbers_are_faults_too(what: str, value: float, message: str) -> None:
    settings: dict[str, Any] = {"what": what, "at": 3, "index": 1, "value": value}
    env_id = toys.variant(toys.FaultyEnv, settings)
    toys.FaultyEnv.made = 0
    vec = make_vec(env_id, 3)
    vec.reset()
    for _ in range(2):
        vec.step(np.zeros(3, np.int64))
    with pytest.raises(EnvFault, match=message) as caught:
        vec.step(np.zeros(3, np.int64))
    assert "\n" not in str(caught.value)
    vec.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [5, -1])
@pytest.mark.parametrize("what", ["observation", "final observation", "reset"])
def test_discrete_observations_out_of_range(what: str, value: int) -> None:
    settings: dict[str, Any] = {"what": what, "at": 2, "index": 1, "value": value, "states": 5}
    env_id = toys.variant(toys.FaultyEnv, settings)
    toys.FaultyEnv.made = 0
    vec = make_vec(env_id, 3)
    with pytest.raises(EnvFault, match=rf"environment 1 of .* {value} at .*for Discrete\(5\)"):
        vec.reset()
        for _ in range(2):
            vec.step(np.zeros(3, np.int64))
    vec.close()


@pytest.mark.filterwarnings("ignore")
def test_fault_at_reset() -> None:
    env_id = toys.variant(toys.FaultyEnv, {"what": "reset", "index": 2})
    toys.FaultyEnv.made = 0
    vec = make_vec(env_id, 3)
    with pytest.raises(EnvFault, match=r"environment 2 of .* non-finite observation at reset"):
        vec.reset()
    vec.close()


def place(vec: Any) -> str:
    """What follows on the message of a step with a NaN in environment 2 of 3."""
    vec.env.envs[2].unwrapped._at = vec.env.envs[2].unwrapped._steps + 1
    with pytest.raises(EnvFault) as caught:
        vec.step(np.zeros(3, np.int64))
    return str(caught.value).partition(": nan at element (1,)")[2]


@pytest.mark.filterwarnings("ignore")
def test_episodes_and_seeds_of_faults_are_those_of_the_environment() -> None:
    make = [functools.partial(toys.FaultyEnv, at=10**6) for _ in range(3)]
    last, row = [False, False, True], np.zeros(3, np.int64)
    for foreign in (False, True):
        toys.FaultyEnv.made = -2
        envs = SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)
        vec: Any = GuardedVectorEnv(envs, "toy", 0, foreign=foreign)
        # Gymnasium adds the number to a seed, but nobody knows what others do.
        seeds = [f", seed {env_seeds(seed, 3)[2]}" if not foreign else "" for seed in (0, 7, 8)]
        vec.reset()
        assert place(vec) == f" (episode 1{seeds[0]})"
        vec.reset()
        assert place(vec) == f" (episode 2{seeds[0]})"
        vec.reset(seed=7)
        assert place(vec) == f" (episode 1{seeds[1]})"
        vec.step(row)
        vec.reset(seed=8, options={"reset_mask": np.array([True, True, False])})
        vec.reset(options={"reset_mask": np.array(last)})
        assert place(vec) == f" (episode 2{seeds[1]})"
        vec._stats.load_state_dict(vec._stats.state_dict())
        vec.step(row)
        assert place(vec) == ""
        vec.reset(seed=8)
        assert place(vec) == f" (episode 1{seeds[2]})"
        vec.close()


@pytest.mark.parametrize("kind", list(toys.IDENTITY_ACTIONS))
def test_identity_environments_reward_the_right_action(kind: str) -> None:
    vec = make_vec(f"toys/Identity{kind}-v0", 4)
    obs, _ = vec.reset(seed=0)
    for _ in range(20):
        if kind == "Discrete":
            actions = obs.argmax(1)
        elif kind == "MultiDiscrete":
            actions = np.stack([obs[:, :3].argmax(1), obs[:, 3:].argmax(1)], 1)
        else:
            actions = obs if kind == "Box" else obs.astype(np.int64)
        obs, rewards, _, truncated, infos = vec.step(actions)
        np.testing.assert_allclose(rewards, 0.0 if kind == "Box" else 1.0, atol=1e-12)
    assert truncated.all()
    assert (infos["episode"]["l"] == 20).all()
    vec.close()


def test_lists_are_no_observations() -> None:
    class Listing(SyncVectorEnv):
        def reset(self, **given: Any) -> tuple[Any, dict[str, Any]]:
            return super().reset(**given)[0].tolist(), {}

    envs = GuardedVectorEnv(Listing([toys.CountingEnv] * 2), "Listing", 0, foreign=True)
    with pytest.raises(EnvFault, match="Listing returned the observation as a list at reset, not"):
        envs.reset()
