"""Agents with a memory: learning, playing, checkpoints and what is refused."""

from __future__ import annotations

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from acktr import A2C, ACKTR, ACKTRUpdate
from acktr.config import Config, ConfigError, preset
from acktr.envs import GuardedVectorEnv
from acktr.evaluate import evaluate
from acktr.kfac import KFAC, KFACConfig
from acktr.policies.memory import Recurrent
from tests.tools.toys import CountingEnv

CART = "CartPole-v1"


def config(algo="acktr", memory="lstm", **changes):
    base = preset(CART, algo)[0]
    network = replace(base.network, memory=memory, memory_width=8, hidden=(8,), critic_hidden=(8,))
    return replace(base, network=network, num_envs=4, num_steps=16, **changes)


def parameters(agent):
    return {n: p.detach().clone() for n, p in agent.trainer.network.named_parameters()}


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_factors_over_time_are_those_of_the_written_out_cell(kind):
    torch.manual_seed(0)
    steps, num, inputs, width = 7, 3, 4, 5

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = Recurrent(kind, inputs, width), nn.Linear(width, 3)

        def forward(self, x, state, starts):
            return self.head(self.memory(x, state, starts)[0]).transpose(0, 1).flatten(0, 1)

    net = Net().double()
    x, starts = torch.randn(steps, num, inputs).double(), torch.rand(steps, num) < 0.3
    state = tuple(torch.randn(num, width).double() for _ in net.memory.initial_state(num))
    targets = torch.randint(3, (num * steps,))

    def score(logits):
        return torch.distributions.Categorical(logits=logits).log_prob(targets).sum()

    curvature = KFAC(net, replace(KFACConfig.for_rl(), stat_decay=0.0)).curvature
    with curvature.capture() as captured:
        output = net(x, state, starts)
    curvature.update_curvature(captured, score(output))
    block = curvature.stats["memory.core.hh_l0"]

    weights = dict(net.memory.core.named_parameters())
    before, products, outputs = [], [], []
    for t in range(steps):
        state = [part * (~starts[t]).double()[:, None] for part in state]
        given = x[t] @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        hidden = state[0] @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        before.append(state[0].detach())
        products.append(hidden)
        if kind == "lstm":
            i, f, g, o = (given + hidden).chunk(4, -1)
            cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            state = [o.sigmoid() * cell.tanh(), cell]
        else:
            (r, z, n), (rh, zh, nh) = given.chunk(3, -1), hidden.chunk(3, -1)
            new = (n + (r + rh).sigmoid() * nh).tanh()
            state = [new + (z + zh).sigmoid() * (state[0] - new)]
        outputs.append(net.head(state[0]))
    by_hand = torch.stack(outputs).transpose(0, 1).flatten(0, 1)
    assert torch.allclose(by_hand, output, atol=1e-12)
    rows = torch.cat([torch.stack(before), torch.ones(steps, num, 1)], -1).flatten(0, 1)
    gradients = torch.stack(torch.autograd.grad(score(by_hand), products)).flatten(0, 1)
    assert torch.allclose(block.a.value.double(), rows.T @ rows / len(rows), atol=1e-6)
    assert torch.allclose(block.g.value.double(), gradients.T @ gradients / len(rows), atol=1e-6)


@pytest.mark.parametrize("memory", ["lstm", "gru", "attention"])
@pytest.mark.parametrize("shared", [True, False])
def test_acktr_moves_all_of_it(memory, shared):
    settings = config(memory=memory)
    settings = replace(settings, network=replace(settings.network, shared=shared))
    agent = ACKTR(CART, settings, seed=0)
    before = parameters(agent)
    agent.learn(300)
    after = parameters(agent)
    # An attention's keys have no effect through their bias, and zeros stay until scores differ.
    still = [n for n in before if torch.equal(before[n], after[n]) and not n.endswith("key.bias")]
    assert still == [] and all(p.isfinite().all() for p in after.values())
    agent.close()


def test_exact_form_and_micro_batches_run_over_sequences():
    exact = config().acktr
    exact = replace(exact, actor=replace(exact.actor, quadratic="exact"))
    found = []
    for limit in (None, 20):
        agent = ACKTR(CART, config(acktr=exact, micro_batch=limit), seed=0)
        agent.learn(130)
        found.append(parameters(agent))
        agent.close()
    for name, mine in found[0].items():
        assert torch.allclose(mine, found[1][name], atol=2e-5), name


def test_a2c_learns_too():
    agent = A2C(CART, config("a2c"), seed=0)
    before = parameters(agent)
    agent.learn(128)
    assert all(not torch.equal(before[n], p) for n, p in parameters(agent).items())
    agent.close()


def test_predict_takes_and_gives_the_state():
    agent = ACKTR(CART, config(memory="gru"), seed=0)
    agent.learn(200)
    shown = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    policy = agent.policy

    def logits(observations, state, starts):
        step = policy._step(torch.tensor(observations), state, starts)
        return policy.network.unroll(step)[0][0]

    _, state = agent.predict(shown[0], deterministic=True)
    assert [part.shape for part in state] == [(5, 8)] * len(state)
    _, further = agent.predict(shown[1], state, deterministic=True)
    assert not np.allclose(state[0], further[0])
    # A state that an episode's start forgets is that of the first step.
    starts = np.array([True, False, True, False, False])
    mixed, fresh = (logits(shown[1], s, starts) for s in (state, None))
    assert torch.allclose(mixed[starts], fresh[starts])
    assert not torch.allclose(mixed[~starts], fresh[~starts])
    # One observation alone has a state of one row.
    action, one = agent.predict(shown[0, 0], episode_start=True)
    assert np.shape(action) == () and one[0].shape == (1, 8)
    with pytest.raises(ValueError, match=r"state must have the shapes \[\(5, 8\)"):
        agent.predict(shown[0], one)
    with pytest.raises(ValueError, match=r"episode starts must have the shape \(5,\)"):
        agent.predict(shown[0], state, starts[:2])
    agent.close()


def test_a_checkpoint_goes_on_with_the_state(tmp_path):
    agent = ACKTR(CART, config(), seed=0)
    agent.learn(150)
    agent.save(tmp_path / "agent")
    loaded = ACKTR.load(tmp_path / "agent")
    assert loaded.config.network.memory == "lstm"
    shown = np.ones((2, 4), np.float32)
    for mine, theirs in zip(agent.predict(shown)[1], loaded.predict(shown)[1], strict=True):
        assert np.array_equal(mine, theirs)
    saved, found = agent.trainer.collector.recurrence, loaded.trainer.collector.recurrence
    loaded.trainer.collector.begin(None)
    assert not saved.starts.all() and np.array_equal(saved.starts, found.starts)
    assert all(torch.equal(a, b) for a, b in zip(saved.state, found.state, strict=True))
    agent.close()
    loaded.close()


class Own(nn.Module):
    """A recurrent module of one's own, with a tensor for its state."""

    def __init__(self, observation_space, action_space):
        super().__init__()
        self.cell = nn.GRUCell(observation_space.shape[0], 6)
        self.policy, self.value = nn.Linear(6, int(action_space.n)), nn.Linear(6, 1)

    def initial_state(self, n):
        return torch.zeros(n, 6)

    def forward(self, observations, state, starts):
        hidden = []
        for shown, start in zip(observations, starts, strict=True):
            state = self.cell(shown, state * ~start[:, None])
            hidden.append(state)
        together = torch.stack(hidden)
        return {"policy": self.policy(together), "value": self.value(together)}, state


def test_a_recurrent_module_of_ones_own_learns():
    agent = ACKTR(CART, config(memory="none"), seed=0, network=Own)
    before = parameters(agent)
    agent.learn(300)
    assert all(not torch.equal(before[n], p) for n, p in parameters(agent).items())
    _, state = agent.predict(np.zeros((2, 4), np.float32))
    assert state[0].shape == (2, 6)
    agent.close()


class NoState(Own):
    def forward(self, observations, state, starts):
        return super().forward(observations, state, starts)[0]


class WrongState(Own):
    def initial_state(self, n):
        return torch.zeros(1, 6)


class Lasting(Own):
    def forward(self, observations, state, starts):  # it does not look at the starts
        return super().forward(observations, state, torch.zeros_like(starts))


class Backwards(Own):
    def forward(self, observations, state, starts):  # the last step comes first
        outputs, state = super().forward(observations.flip(0), state, starts.flip(0))
        return {name: part.flip(0) for name, part in outputs.items()}, state


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (NoState, r"must return \(outputs, state\)"),
        (WrongState, r"must give a tensor \(\d, \.\.\."),
        (Lasting, "does not forget its state where starts is true"),
        (Backwards, "are not those of its steps one by one"),
    ],
)
def test_wrong_recurrent_modules_get_one_line(network, message):
    with pytest.raises(ConfigError, match=message):
        ACKTR(CART, config(memory="none"), seed=0, network=network)


def test_what_a_memory_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="trpo does not take networks with a memory"):
        config("trpo")
    with pytest.raises(ConfigError, match="networks with a memory are not compiled"):
        config(compile=True)
    base = config("acktr").acktr
    separate = replace(preset(CART, "acktr")[0].network, shared=False, memory="gru")
    with pytest.raises(ConfigError, match="critic_optimizer must be kfac"):
        Config(env=CART, network=separate, acktr=replace(base, critic_optimizer="first_order"))
    space = gymnasium.spaces
    net = Own(space.Box(-1, 1, (4,)), space.Discrete(2))
    with pytest.raises(ConfigError, match="learns from whole rollouts"):
        ACKTRUpdate(net, space.Discrete(2))
    with pytest.raises(ConfigError, match="both the actor and the critic a memory"):
        plain = nn.Linear(4, 1)
        ACKTR(CART, config(memory="none"), seed=0, network=(Own, plain))


@pytest.mark.parametrize("mode", ["SAME_STEP", "NEXT_STEP"])
@pytest.mark.parametrize("most", [2, 99])
def test_an_evaluation_forgets_with_the_first_observation_of_an_episode(mode, most):
    """In vector environments of either autoreset mode, and where episodes are cut short."""
    seen = []

    class Player:
        def act(self, *given):
            raise AssertionError

        def advance(self, observations, state, starts, deterministic, masks):
            seen.append((observations[:, 0] == 0, starts.copy()))  # the counting begins with 0
            return np.zeros(2, np.int64), ()

    makers = [lambda n=n: CountingEnv(terminate_at=n) for n in (2, 4)]
    mode = gymnasium.vector.AutoresetMode[mode]
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    envs = GuardedVectorEnv(envs, "counting", 0, foreign=True)
    found = evaluate(Player(), envs, 6, seed=0, max_episode_steps=most)
    assert all(np.array_equal(first, starts) for first, starts in seen)
    assert sorted(found.lengths) == [2, 2, 2] + 3 * [min(4, most)]
    assert sorted(found.returns) == [3.0, 3.0, 3.0] + 3 * [10.0 if most == 99 else 3.0]
    assert found.cut == (0 if most == 99 else 3)
