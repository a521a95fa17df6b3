"""Rollouts with recurrent networks: what was acted with is what is learned from."""

from __future__ import annotations

from contextlib import closing, nullcontext

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.config import NetworkConfig
from acktr.envs import make_vec
from acktr.policies import action_head, build_network
from acktr.rollout import Acting, Collector, make_batch, parts_of
from acktr.tree import rows

SAME, NEXT = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP
MODES = [SAME, NEXT]


class Walk(gymnasium.Env):
    """Random numbers, episodes of 3 to 6 steps, of which half are truncated."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(3, 7))
        return self.np_random.normal(size=2), {}

    def step(self, action):
        self.left -= 1
        over, cut = self.left == 0, self.np_random.random() < 0.5
        return self.np_random.normal(size=2), 1.0, over and not cut, over and cut, {}


def collector(mode, memory="lstm", shared=True, num=3):
    config = NetworkConfig(memory=memory, memory_width=4, hidden=(6,), shared=shared)
    envs = SyncVectorEnv([Walk] * num, autoreset_mode=mode)
    head = action_head(Walk.action_space)
    torch.manual_seed(0)
    network = build_network(Walk.observation_space, head, config).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    generator = torch.Generator().manual_seed(1)
    made = Collector(envs, Acting(network, head, generator, nullcontext))
    made.reset(2)
    return made, network


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("memory", ["lstm", "gru", "attention"])
@pytest.mark.parametrize("mode", MODES)
def test_the_batch_gives_the_values_that_acting_gave(mode, memory, shared):
    made, network = collector(mode, memory, shared)
    for _ in range(3):  # the second and third begin within episodes
        rollout = made.collect(8)
        batch = make_batch(rollout, 0.9, 0.8, torch.device("cpu"))
        assert len(batch) == rollout.valid.sum() == len(batch.observations)
        assert (len(batch) < rollout.valid.size) == (mode == NEXT)
        policy, values = network(batch.observations)
        assert policy.shape == (len(batch), 3)
        assert torch.allclose(values.float(), batch.values, atol=1e-6)
        assert batch.values.std() > 0.01


def steps_by_hand(network, rollout, state):
    """States of a network after every step of a rollout, and values before, one env at a time."""
    after, values = {}, {}
    for env in range(rollout.valid.shape[1]):
        own = tuple(part[env : env + 1] for part in state)
        for t in range(len(rollout.valid)):
            if rollout.memory.starts[t, env]:
                own = network.initial_state(1)
            shown = rollout.observations[t, env][None, None]
            module = network.network
            no = torch.zeros(1, 1, dtype=torch.bool)
            outputs, own = module(shown, own, no)
            values[t, env], after[t, env] = float(outputs["value"]), own
    return after, values


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_successors_are_valued_with_the_state_of_their_moment(mode):
    made, network = collector(mode)
    made.collect(5)
    state = tuple(part.clone() for part in made.recurrence.state)
    rollout = made.collect(16)
    after, values = steps_by_hand(network, rollout, state)
    checked = 0
    for (t, env), value in values.items():
        assert rollout.values[t, env] == pytest.approx(value, abs=1e-6)
        if not rollout.valid[t, env] or rollout.terminated[t, env]:
            continue
        if (t, env) in rollout.finals:
            shown = torch.tensor(rollout.finals[t, env])[None]
        elif t + 1 < len(rollout.valid):
            shown = rollout.observations[t + 1, env][None, None]
        else:
            shown = torch.tensor(made.observations.now[env])[None, None]
        no = torch.zeros(1, 1, dtype=torch.bool)
        expected = network.network(shown, after[t, env], no)[0]["value"]
        assert rollout.next_values[t, env] == pytest.approx(float(expected), abs=1e-6)
        checked += int(rollout.ended[t, env])
    assert checked > 1  # truncated episodes were among them


@pytest.mark.parametrize("mode", MODES)
def test_episodes_begin_where_they_should(mode):
    made, _ = collector(mode)
    rollout = made.collect(20)
    starts, ended = rollout.memory.starts, rollout.ended
    assert starts[0].all()
    shift = 1 if mode == SAME else 2  # the step after the end only resets
    for t in range(1, 20):
        before = ended[t - shift] if t >= shift else np.zeros(3, bool)
        assert (starts[t] == before).all()


def test_parts_are_whole_sequences_and_add_up():
    made, network = collector(NEXT, num=5)
    batch = make_batch(made.collect(8), 0.9, 0.8, torch.device("cpu"))
    policy, values = network(batch.observations)
    total = (policy.square().sum(1) + values * batch.returns).mean()
    whole = torch.autograd.grad(total, list(network.parameters()))
    parts = parts_of(batch.observations, 17)
    assert len(parts) == 3 and parts[-1].last and sum(p.share for p in parts) == pytest.approx(1)
    found = [torch.zeros_like(g) for g in whole]
    for part in parts:
        policy, values = network(rows(batch.observations, part.rows))
        mean = (policy.square().sum(1) + values * batch.returns[part.rows]).mean()
        gradients = torch.autograd.grad(part.share * mean, list(network.parameters()))
        found = [a + b for a, b in zip(found, gradients, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, whole, strict=True))
    with pytest.raises(ValueError, match="are not whole sequences"):
        rows(batch.observations, slice(1, 3))
    some = batch.observations.some(0.4, 1)
    assert some == slice(batch.observations.edges[2], batch.observations.edges[4])
    assert [p.rows for p in parts_of(batch.observations, None, some)] == [some]


def test_a_saved_collector_goes_on_with_its_state():
    made, _ = collector(SAME)
    made.collect(4)
    state = made.recurrence.state_dict()
    other, _ = collector(SAME)
    other.recurrence.load_state_dict(state)
    pairs = zip(made.recurrence.state, other.recurrence.state, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert np.array_equal(made.recurrence.starts, other.recurrence.starts)
    assert other.recurrence.state[0].abs().max() > 0.01


def saved_by_environments(seed):
    config = NetworkConfig(memory="lstm", memory_width=4, hidden=(6,))
    envs = make_vec("CartPole-v1", 3, 0)
    head = action_head(envs.single_action_space)
    torch.manual_seed(0)
    network = build_network(envs.single_observation_space, head, config).double()
    generator = torch.Generator().manual_seed(seed)
    return Collector(envs, Acting(network, head, generator, nullcontext))


def test_episodes_and_memory_go_on_in_another_collector():
    one, other = saved_by_environments(1), saved_by_environments(2)
    with closing(one.envs), closing(other.envs):
        one.reset(5)
        one.collect(30)
        state = one.state_dict()
        assert state["memory"]["state"]["0"].abs().max() > 0 and not state["dead"].any()
        other.check_episodes(state)
        other.load_state_dict(state)
        assert other.unsaved is None
        other.begin(None)
        for _ in range(2):
            mine, theirs = one.collect(20), other.collect(20)
            assert np.array_equal(mine.rewards, theirs.rewards)
            assert np.array_equal(mine.values, theirs.values)
            assert np.array_equal(mine.memory.starts, theirs.memory.starts)


def test_episodes_that_do_not_fit_are_refused_in_a_line():
    made = saved_by_environments(1)
    with closing(made.envs):
        made.reset(5)
        made.collect(3)
        state = made.state_dict()
        other = {"0": torch.zeros(3, 5), "1": torch.zeros(3, 4)}
        memory = "^the memory has another shape than the network's$"
        for name, value, said in [
            ("observation", np.zeros(2), "^the observation"),
            ("dead", np.zeros(2, bool), "^dead "),
            ("masks", np.ones((3, 3), bool), "^masks "),
            ("memory", {**state["memory"], "state": other}, memory),
            ("memory", {**state["memory"], "state": {}}, memory),
            ("memory", {**state["memory"], "starts": np.zeros(2, bool)}, "^starts "),
        ]:
            with pytest.raises(ValueError, match=said):
                made.check_episodes({**state, name: value})
        made.check_episodes(state)
