"""ACKTR on one page, for reading: Wu, Mansimov, Liao, Grosse and Ba 2017 (arXiv 1708.05144).

    python -m scripts.acktr_in_one_file CartPole-v1 --seed 0
    python -m scripts.acktr_in_one_file HalfCheetah-v5 --steps 200000

trains as `acktr train` does, without a line of the library: in float64 both give the same networks
(tests/scripts/test_acktr_in_one_file.py). Read `ACKTR` first, then `KFAC`; the rest is what any
actor-critic method needs. "Section" means a section of the paper.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any]
Trace = list[tuple[Tensor, Tensor]]
"""Input (B, in) and output (B, out) of every layer in one forward pass."""
Metric = Callable[[Tensor], Tensor]
"""From changes t of a network's output to t^T H t (B,), with H the Fisher matrix of the output."""


@dataclass(frozen=True)
class KFACSettings:
    """Settings of one network's steps."""

    lr: float  # eta_max, the longest step
    kl_clip: float  # 2 delta, twice the KL divergence that a step may cost
    damping: float = 0.01  # lambda
    stat_decay: float = 0.99  # rho of the factors' running averages
    stat_interval: int = 1  # steps from one batch that the factors learn from to the next
    refresh_interval: int = 10  # steps from one eigendecomposition to the next
    momentum: float = 0.0  # mu
    exact: bool = True  # q from the exact Fisher matrix instead of the Kronecker factors


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    steps: int  # of all environments together
    num_steps: int  # of each environment, per update
    actor: KFACSettings
    critic: KFACSettings
    critic_steps: int  # on each batch
    log_std: float = 0.0  # of a Gaussian policy, at the start
    normalize_observations: bool = True
    num_envs: int = 8
    gamma: float = 0.99
    gae_lambda: float = 0.95


CARTPOLE_CRITIC = KFACSettings(lr=0.25, kl_clip=1.0, momentum=0.9)
CHEETAH_ACTOR = KFACSettings(lr=0.1, kl_clip=0.02, refresh_interval=1)
CHEETAH_CRITIC = KFACSettings(0.3, 0.3, 0.1, 0.77, 5, 5, momentum=0.9, exact=False)
SETTINGS = {
    "CartPole-v1": Settings(
        100_000, 32, KFACSettings(0.25, 0.01), CARTPOLE_CRITIC, 5, normalize_observations=False
    ),
    "HalfCheetah-v5": Settings(1_000_000, 128, CHEETAH_ACTOR, CHEETAH_CRITIC, 20, log_std=-1.0),
}


class Network(nn.Module):
    """Two tanh layers of 64 and a linear one; a Gaussian policy's has a free log std as well."""

    def __init__(self, inputs: int, outputs: int, gain: float, log_std: float | None = None):
        super().__init__()
        self.layers = nn.ModuleList()
        for wide, narrow, scale in ((inputs, 64, 2**0.5), (64, 64, 2**0.5), (64, outputs, gain)):
            layer = nn.Linear(wide, narrow)
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
            self.layers.append(layer)
        self.log_std = None if log_std is None else nn.Parameter(torch.full((outputs,), log_std))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Trace]:
        """The output, and what went in and out of every layer."""
        trace: Trace = []
        for layer in self.layers:
            hidden = trace[-1][1].tanh() if trace else hidden
            trace.append((hidden, layer(hidden)))
        output = trace[-1][1]
        if self.log_std is not None:
            output = torch.cat([output, self.log_std.expand_as(output)], dim=1)
        return output, trace


class Categorical:
    """A policy over K actions; the network's output are the logits (B, K)."""

    def __init__(self, logits: Tensor):
        self.log_p = logits.log_softmax(1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One action per row, by the Gumbel-max trick."""
        uniform = torch.rand(self.log_p.shape, generator=generator)
        return (self.log_p - (-uniform.log()).log()).argmax(1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probabilities (B,)."""
        return self.log_p.gather(1, actions[:, None])[:, 0]

    def metric(self, t: Tensor) -> Tensor:
        """t^T H t (B,) with H = diag(p) - p p^T, the Fisher matrix of the logits."""
        p = self.log_p.exp()
        return (p * (t - (p * t).sum(1, keepdim=True)).square()).sum(1)


class Gaussian:
    """A policy over vectors; the network's output is [mean, log std] (B, 2 D)."""

    def __init__(self, output: Tensor):
        self.mean, self.log_std = output.chunk(2, dim=1)

    def sample(self, generator: torch.Generator) -> Tensor:
        """One action per row, not clipped to any bounds."""
        noise = torch.randn(self.mean.shape, generator=generator)
        return (self.mean + self.log_std.exp() * noise).detach()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-densities (B,) up to a constant."""
        return (-0.5 * ((actions - self.mean) / self.log_std.exp()) ** 2 - self.log_std).sum(1)

    def metric(self, t: Tensor) -> Tensor:
        """t^T H t (B,) with H = diag(1 / std^2) for the mean and 2 I for the log std."""
        mean, log_std = t.chunk(2, dim=1)
        return ((mean / self.log_std.exp()) ** 2 + 2 * log_std**2).sum(1)


class KFAC:
    """Natural-gradient steps (section 2.2) within a trust region (section 3.2)."""

    def __init__(self, network: Network, settings: KFACSettings):
        self.network, self.settings = network, settings
        self.named = dict(network.named_parameters())
        self.velocity = {name: torch.zeros_like(p) for name, p in self.named.items()}
        self.factors: list[tuple[Any, Any]] = [(0.0, 0.0)] * len(network.layers)
        self.weight = 0.0  # the averages start at 0: what their weights add up to
        self.steps = 0

    def observe(self, trace: Trace, log_likelihood: Tensor) -> None:
        """Average A = E[a a^T] and G = E[g g^T] of every layer: its Fisher matrix is A (x) G.

        a is the input of the layer with a 1 appended for the bias, and g the gradient of one
        sample's log-likelihood with respect to the layer's output. The targets must be drawn from
        the network's own distribution: rewards and returns have no part in the Fisher matrix.
        """
        if self.steps % self.settings.stat_interval:
            return
        rho, outputs = self.settings.stat_decay, [output for _, output in trace]
        gradients = torch.autograd.grad(log_likelihood.sum(), outputs, retain_graph=True)
        self.weight = rho * self.weight + (1 - rho)
        for index, ((inputs, _), g) in enumerate(zip(trace, gradients, strict=True)):
            a = torch.cat([inputs.detach(), torch.ones(len(inputs), 1)], dim=1)
            old_a, old_g = self.factors[index]
            new_a, new_g = a.T @ a / len(a), g.T @ g / len(g)
            self.factors[index] = rho * old_a + (1 - rho) * new_a, rho * old_g + (1 - rho) * new_g

    def direction(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """U = (F + lambda I)^-1 g, layer by layer, in the eigenbasis of A (x) G.

        U = Q_G [(Q_G^T g Q_A) / (b a^T + lambda)] Q_A^T, where g is the gradient [W, bias] of the
        layer, and a, b are the eigenvalues of A, G.
        """
        if self.steps % self.settings.refresh_interval == 0:
            self.bases = [
                (*torch.linalg.eigh(a / self.weight), *torch.linalg.eigh(g / self.weight))
                for a, g in self.factors
            ]
        step = {}
        if "log_std" in gradients:  # its Fisher matrix is known: 2 I
            step["log_std"] = gradients["log_std"] / (2 + self.settings.damping)
        for index, (a, q_a, b, q_g) in enumerate(self.bases):
            weight, bias = f"layers.{index}.weight", f"layers.{index}.bias"
            gradient = torch.cat([gradients[weight], gradients[bias][:, None]], dim=1)
            solved = (q_g.T @ gradient @ q_a) / (b[:, None] * a + self.settings.damping)
            update = q_g @ solved @ q_a.T
            step[weight], step[bias] = update[:, :-1], update[:, -1]
        return step

    def step(self, loss: Tensor, inputs: Tensor, metric: Metric, lr: float) -> None:
        """Reduce a loss, the mean over B samples, by one step.

        The trust region: eta = min(eta_max, sqrt(2 delta / q)), written as lr nu, with q = U^T F U.
        Exactly, q is the mean over the samples of the metric at t = J U, the change of the
        network's output along U. By the factors it is g . U, as (F + lambda I) U = g.
        """

        def output(parameters: dict[str, Tensor]) -> Any:
            return torch.func.functional_call(self.network, parameters, (inputs,))[0]

        flat = torch.autograd.grad(loss, list(self.named.values()))
        gradients = dict(zip(self.named, flat, strict=True))
        with torch.no_grad():
            step = self.direction(gradients)
            if self.settings.exact:
                q = metric(torch.func.jvp(output, (self.named,), (step,))[1]).mean()
            else:
                q = torch.stack([(gradients[name] * step[name]).sum() for name in step]).sum()
            nu = (self.settings.kl_clip / (lr**2 * q)).sqrt().clamp(max=1.0)
            mu = self.settings.momentum
            for name, parameter in self.named.items():
                self.velocity[name] = mu * self.velocity[name] + nu * step[name]
                parameter.sub_(lr * (1 - mu) * self.velocity[name])
        self.steps += 1


class Batch(NamedTuple):
    """What an update learns from: B = num_envs * num_steps samples."""

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    returns: Tensor


class ACKTR:
    """Actor and critic with a K-FAC optimizer each (section 3.1)."""

    def __init__(self, env: gymnasium.Env[Any, Any], settings: Settings, seed: int):
        self.settings = settings
        torch.manual_seed(seed)
        inputs, actions = int(np.prod(env.observation_space.shape or ())), env.action_space
        self.policy: Callable[[Tensor], Categorical | Gaussian] = Gaussian
        if isinstance(actions, gymnasium.spaces.Discrete):
            self.policy = Categorical
            self.actor = Network(inputs, int(actions.n), 0.01)
        else:
            self.actor = Network(inputs, int(np.prod(actions.shape or ())), 0.01, settings.log_std)
        self.critic = Network(inputs, 1, 1.0)
        self.actor_kfac = KFAC(self.actor, settings.actor)
        self.critic_kfac = KFAC(self.critic, settings.critic)
        self.generator = torch.Generator().manual_seed(2 * seed + 2)

    def update(self, batch: Batch, progress: float) -> None:
        """Fit the critic to the returns, then improve the policy; progress is in [0, 1]."""
        for _ in range(self.settings.critic_steps):
            self.critic_step(batch)
        self.actor_step(batch, self.settings.actor.lr * (1 - progress / 1.1))

    def critic_step(self, batch: Batch) -> None:
        """A Gauss-Newton step, the natural gradient of a critic that says v ~ N(V(s), 1)."""
        output, trace = self.critic(batch.observations)
        values = output[:, 0]
        drawn = (values + torch.randn(len(values), generator=self.generator)).detach()
        self.critic_kfac.observe(trace, -0.5 * (values - drawn).square())
        loss = (values - batch.returns).square().mean()
        lr = self.settings.critic.lr
        self.critic_kfac.step(loss, batch.observations, lambda t: t[:, 0].square(), lr)

    def actor_step(self, batch: Batch, lr: float) -> None:
        """A natural policy-gradient step for the loss -E[A(s, a) log pi(a|s)]."""
        output, trace = self.actor(batch.observations)
        policy = self.policy(output)
        drawn = policy.sample(self.generator)  # not the rollout's actions, which were rewarded
        self.actor_kfac.observe(trace, policy.log_prob(drawn))
        advantages = batch.advantages - batch.advantages.mean()
        advantages = advantages / (advantages.square().mean().sqrt() + 1e-8)
        loss = -(advantages * policy.log_prob(batch.actions)).mean()
        self.actor_kfac.step(loss, batch.observations, self.policy(output.detach()).metric, lr)


class Moments:
    """Running mean and variance of all that was seen (Chan et al. 1979)."""

    def __init__(self, *shape: int):
        self.mean, self.squares, self.count = np.zeros(shape), np.zeros(shape), 0

    def update(self, batch: Array) -> None:
        """Fold in a batch (N, ...)."""
        size, total, mean = len(batch), self.count + len(batch), batch.mean(0)
        within = ((batch - mean) ** 2).sum(0)
        between = (mean - self.mean) ** 2 * (self.count * size / total)
        self.squares = self.squares + within + between
        self.mean = self.mean + (mean - self.mean) * (size / total)
        self.count = total

    def scaled(self, values: Array) -> NDArray[np.float32]:
        """Values over the deviation, clipped to +-10."""
        deviation = np.sqrt(self.squares / self.count + 1e-8)
        return np.clip(values / deviation, -10, 10).astype(np.float32)


def gae(rewards: Array, values: Array, following: Array, ended: Array, settings: Settings) -> Array:
    """Generalised advantage estimates (T, N) (Schulman et al. 2016).

    delta_t = r_t + gamma V(s_{t+1}) - V(s_t), A_t = delta_t + gamma lambda A_{t+1}; V(s_{t+1}) is
    0 after a terminal state, and A_{t+1} after the end of an episode.
    """
    deltas = rewards + settings.gamma * following - values
    carry = settings.gamma * settings.gae_lambda * ~ended
    advantages, running = np.zeros(rewards.shape), np.zeros(rewards.shape[1])
    for t in reversed(range(len(rewards))):
        advantages[t] = running = deltas[t] + carry[t] * running
    return advantages


class Rollouts:
    """Parallel environments that the policy acts in; an episode that ends is reset at once."""

    def __init__(self, env_id: str, agent: ACKTR, settings: Settings, seed: int):
        self.agent, self.settings = agent, settings
        self.envs = SyncVectorEnv(
            [lambda: gymnasium.make(env_id)] * settings.num_envs,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        seeds = np.random.SeedSequence(seed).generate_state(settings.num_envs) >> 1
        self.shown = self.envs.reset(seed=seeds.tolist())[0]
        self.generator = torch.Generator().manual_seed(2 * seed + 1)
        self.moments, self.return_moments = Moments(*self.shown.shape[1:]), Moments()
        self.discounted = np.zeros(settings.num_envs)  # R_t = gamma R_{t-1} + r_t
        self.running = np.zeros(settings.num_envs)  # returns of the episodes under way
        self.finished: deque[float] = deque(maxlen=100)

    def normalized(self, observations: Array) -> Tensor:
        """Observations as the networks take them."""
        if self.settings.normalize_observations:
            observations = self.moments.scaled(observations - self.moments.mean)
        return torch.tensor(observations, dtype=torch.get_default_dtype())

    def values(self, observations: Tensor) -> Any:
        """V(s) (B,)."""
        return self.agent.critic(observations)[0][:, 0].float().numpy()

    @torch.no_grad()
    def collect(self) -> Batch:
        """num_steps steps of all environments, with advantages and returns."""
        shape = self.settings.num_steps, self.settings.num_envs
        rewards, following = np.zeros(shape, np.float32), np.full(shape, np.nan, np.float32)
        observations, actions, ended = [], [], []
        for t in range(shape[0]):
            self.moments.update(self.shown)
            observations.append(self.normalized(self.shown))
            policy = self.agent.policy(self.agent.actor(observations[t])[0])
            actions.append(policy.sample(self.generator))
            action = self.to_environment(actions[t])
            self.shown, raw, terminated, truncated, info = self.envs.step(action)
            following[t, terminated] = 0.0
            for i in np.flatnonzero(truncated & ~terminated):  # but for the limit it would go on
                following[t, i] = self.values(self.normalized(info["final_obs"][i][None]))[0]
            done = terminated | truncated
            rewards[t] = self.scaled(raw, done)
            ended.append(done)
        values = self.values(torch.cat(observations)).reshape(shape)
        after = np.concatenate([values[1:], self.values(self.normalized(self.shown))[None]])
        following = np.where(np.isnan(following), after, following)
        advantages = gae(rewards, values, following, np.stack(ended), self.settings)
        learned = (torch.tensor(x.ravel()).float() for x in (advantages, advantages + values))
        return Batch(torch.cat(observations), torch.cat(actions), *learned)

    def scaled(self, rewards: Array, ended: Array) -> Array:
        """Rewards over the deviation of the discounted return; records the episodes' returns."""
        self.running += rewards
        self.finished.extend(self.running[ended].tolist())
        self.discounted = self.settings.gamma * self.discounted + rewards
        self.return_moments.update(self.discounted)
        self.running[ended] = self.discounted[ended] = 0.0
        return self.return_moments.scaled(rewards)

    def to_environment(self, actions: Tensor) -> Any:
        """Actions within the bounds of the space."""
        space = self.envs.single_action_space
        if isinstance(space, gymnasium.spaces.Box):
            return np.clip(actions.float().numpy(), space.low, space.high)
        return actions.numpy()


def main() -> None:
    """Train, and print the mean return of the last 100 episodes now and then."""
    parser = argparse.ArgumentParser(description="ACKTR in one file")
    parser.add_argument("env", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="environment steps; by default the preset's")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on more, networks of this size are slower
    settings = SETTINGS[options.env]
    total = settings.steps if options.steps is None else options.steps
    agent = ACKTR(gymnasium.make(options.env), settings, options.seed)
    rollouts = Rollouts(options.env, agent, settings, options.seed)
    size = settings.num_envs * settings.num_steps
    for done in range(0, total, size):
        agent.update(rollouts.collect(), done / total)
        if (done + size) * 20 // total > done * 20 // total and rollouts.finished:
            print(f"{done + size:>9,} steps {np.mean(rollouts.finished):9.1f}", flush=True)


if __name__ == "__main__":
    main()
