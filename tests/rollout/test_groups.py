"""Groups of environments give the rollout that all of them give at once."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import Tensor, nn

from acktr.envs.groups import GroupedEnvs
from acktr.policies.distributions import action_head
from acktr.policies.normalize import ObservationNormalizer, RewardScaler
from acktr.rollout import Acting, Collector, Rollout
from acktr.rollout.groups import groups_of
from tests.tools.toys import CountingEnv

ENDS = [{"truncate_at": 3}, {"terminate_at": 4}, {}, {"truncate_at": 5}, {"terminate_at": 2}, {}]


class Group(RecordEpisodeStatistics):
    """Environments whose step has two halves; says in a common list what happened when."""

    def __init__(self, ends: list[dict[str, int]], mode: AutoresetMode, log: list[str]) -> None:
        makers = [lambda kwargs=each: CountingEnv(**kwargs) for each in ends]
        super().__init__(SyncVectorEnv(makers, autoreset_mode=mode))
        self.log = log

    def step_async(self, actions: Any) -> None:
        self.log.append("begin")
        self.actions = actions

    def step_wait(self) -> Any:
        self.log.append("end")
        return self.step(self.actions)


class Values(nn.Module):
    """One action is certain; the value is 10 times the observation."""

    shared = True
    recurrent = False

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.tensor([0.0, -1e9]).expand(len(observations), 2)
        return logits, 10 * observations[:, 0].float()


def collector(envs: Any, normalized: bool) -> Collector:
    network: Any = Values()
    head = action_head(envs.single_action_space)
    acting = Acting(network, head, torch.Generator().manual_seed(0), nullcontext)
    if not normalized:
        return Collector(envs, acting)
    return Collector(envs, acting, ObservationNormalizer((1,)), RewardScaler(len(ENDS), 0.9))


def found(envs: Any, normalized: bool) -> tuple[Rollout, dict[str, Any]]:
    runner = collector(envs, normalized)
    runner.collect(4)
    return runner.collect(7), runner.state_dict()


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("groups", [2, 3])
def test_rollouts_are_the_same(mode: AutoresetMode, groups: int) -> None:
    size = len(ENDS) // groups
    parts = [Group(ENDS[i : i + size], mode, []) for i in range(0, len(ENDS), size)]
    one, state = found(Group(ENDS, mode, []), False)
    other, grouped = found(GroupedEnvs(parts), False)
    for name in ("observations", "actions", "rewards", "values", "next_values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for name in ("terminated", "ended", "valid"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    np.testing.assert_array_equal(state["dead"], grouped["dead"])
    assert one.env_steps == other.env_steps
    ends = [sorted((e.reward, e.length) for e in each.episodes) for each in (one, other)]
    assert ends[0] == ends[1]
    assert one.terminated.any()
    assert (one.ended & ~one.terminated).any()


def test_normalisers_see_every_environment_once() -> None:
    """The order of the updates differs; the moments after a rollout do not."""
    mode = AutoresetMode.SAME_STEP
    _, one = found(Group(ENDS, mode, []), True)
    _, other = found(GroupedEnvs([Group(ENDS[:3], mode, []), Group(ENDS[3:], mode, [])]), True)
    np.testing.assert_array_equal(
        one["reward_scaler"]["returns"], other["reward_scaler"]["returns"]
    )
    for name in ("observation_normalizer", "reward_scaler"):
        first, second = (each[name].get("moments", each[name]) for each in (one, other))
        assert set(first) == set(second)
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=1e-9, err_msg=key)


def test_one_group_is_stepped_while_the_policy_acts_for_the_next() -> None:
    log: list[str] = []
    mode = AutoresetMode.SAME_STEP
    envs = GroupedEnvs([Group(ENDS[:3], mode, log), Group(ENDS[3:], mode, log)])
    found(envs, False)
    # begin A, begin B, then in turn: end A, begin A (B is under way), end B, begin B (A is)
    assert log[:8] == ["begin", "begin"] + ["end", "begin"] * 3
    assert log.count("begin") == log.count("end") == 2 * (4 + 7)


@pytest.mark.parametrize("where", [0, 1])
def test_an_interrupted_rollout_leaves_no_step_under_way(
    where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the policy acts, or while a group is waited for: the next rollout goes on."""
    log: list[str] = []
    mode = AutoresetMode.SAME_STEP
    groups = [Group(ENDS[:3], mode, log), Group(ENDS[3:], mode, log)]
    runner = collector(GroupedEnvs(groups), False)
    runner.collect(2)

    def interrupt(*_args: Any) -> Any:
        raise KeyboardInterrupt

    target = (runner.acting.network, "forward") if where == 0 else (groups[0], "step")
    sound = getattr(*target)
    calls = iter([sound] * 3 + [interrupt] + [sound] * 99)
    with monkeypatch.context() as patch:
        patch.setattr(*target, lambda *args: next(calls)(*args))
        with pytest.raises(KeyboardInterrupt):
            runner.collect(5)
    assert log.count("begin") == log.count("end")
    assert runner.collect(4).env_steps == 4 * len(ENDS)


def test_other_environments_are_one_group() -> None:
    envs = SyncVectorEnv([CountingEnv] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    (group,) = groups_of(envs)
    assert group.rows == slice(0, 3)
