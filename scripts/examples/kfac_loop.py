"""K-FAC alone in a policy-gradient loop of one's own: python -m scripts.examples.kfac_loop."""

from __future__ import annotations

import sys
from dataclasses import replace

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, GaussianLoss, KFACConfig, SumLoss


class Net(nn.Module):
    """A policy and a value function that share their hidden layers."""

    def __init__(self, inputs: int, actions: int, width: int = 64) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
        self.trunk = nn.Sequential(*layers)
        self.policy, self.value = nn.Linear(width, actions), nn.Linear(width, 1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, actions) and values (B, 1)."""
        hidden = self.trunk(states)
        return self.policy(hidden), self.value(hidden)


def train(updates: int, num_envs: int = 16, steps: int = 32, seed: int = 0) -> list[float]:
    """Returns of the episodes on CartPole, in the order of their ends."""
    mode = {"autoreset_mode": AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec("CartPole-v1", num_envs, "sync", vector_kwargs=mode)
    torch.manual_seed(seed)
    model, gamma = Net(4, 2), 0.99
    # Each part of the loss has a trust region of its own: so many nats a step at most.
    optimizer = KFAC(model, replace(KFACConfig.for_supervised(), kl_clip=(0.01, 0.1)))
    loss = SumLoss(CategoricalLoss(), GaussianLoss(), weights=(1.0, 0.5))
    state, returns, running = envs.reset(seed=seed)[0], [], np.zeros(num_envs)
    for _ in range(updates):
        seen, actions = (
            np.zeros((steps, *state.shape), np.float32),
            np.zeros((steps, num_envs), int),
        )
        rewards, going = np.zeros((steps, num_envs)), np.zeros((steps, num_envs), bool)
        for t in range(steps):
            with torch.no_grad():
                logits = model(torch.tensor(state))[0]
            actions[t] = torch.multinomial(logits.softmax(-1), 1)[:, 0].numpy()
            seen[t] = state
            state, rewards[t], terminated, truncated, _ = envs.step(actions[t])
            going[t] = ~(terminated | truncated)
            running += rewards[t]
            returns += running[~going[t]].tolist()
            running *= going[t]
        with torch.no_grad():
            target = model(torch.tensor(state))[1][:, 0].numpy()
        targets = np.zeros((steps, num_envs), np.float32)
        for t in reversed(range(steps)):  # the time limit counts as a failure here
            targets[t] = target = rewards[t] + gamma * target * going[t]
        with optimizer.capture() as captured:
            logits, values = model(torch.tensor(seen.reshape(-1, 4)))
        optimizer.observe(captured, (logits, values), loss)
        errors = torch.tensor(targets.reshape(-1)) - values[:, 0]
        taken = torch.tensor(actions.reshape(-1, 1))
        chances = logits.log_softmax(-1).gather(1, taken)[:, 0]
        optimizer.zero_grad()
        (0.25 * errors.square() - errors.detach() * chances).mean().backward()
        optimizer.step()
    envs.close()
    return returns


if __name__ == "__main__":
    found = train(updates=int(sys.argv[1]) if len(sys.argv) > 1 else 200)
    print(f"mean return of the last 100 episodes: {np.mean(found[-100:]):.1f}")
