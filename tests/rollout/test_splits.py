"""However environments and batches are split, training gives the same network."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector import VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acktr.config import A2CConfig, ACKTRConfig, Config, NetworkConfig, SampledKFACConfig
from acktr.envs.groups import GroupedEnvs
from acktr.envs.parallel import ParallelEnvs
from acktr.train import Trainer
from tests.tools.toys import IdentityEnv

ENVS, STEPS, UPDATES = 6, 8, 3
KFAC = SampledKFACConfig(
    lr=0.1,
    kl_clip=1e-3,
    damping=1e-2,
    momentum=0.5,
    refresh_interval=2,
    cold_steps=1,
    stat_fraction=0.25,
    quadratic="exact",
)


class Group(VectorWrapper):
    """Environments whose step has two halves, with seeds by their places among all."""

    def __init__(self, envs: Any, first: int) -> None:
        super().__init__(envs)
        self.seeds = list(range(first, first + envs.num_envs))

    def reset(self, **_given: Any) -> Any:
        return self.env.reset(seed=self.seeds)

    def step_async(self, actions: Any) -> None:
        self.actions = actions

    def step_wait(self) -> Any:
        return self.step(self.actions)


def group(size: int, first: int, workers: int) -> Group:
    """Environments with horizons of their own, wherever they are."""
    envs = [IdentityEnv(spaces.Discrete(4), horizon=3 + first + i) for i in range(size)]
    return Group(RecordEpisodeStatistics(ParallelEnvs(envs, "identity", workers)), first)


def trained(algo: Any, shared: bool, groups: int, workers: int, micro_batch: int | None) -> Tensor:
    """The network's parameters after some updates in float64, as one vector."""
    config = Config(
        env="toy",
        algo=algo,
        num_envs=ENVS,
        num_steps=STEPS,
        micro_batch=micro_batch,
        normalize_observation=False,
        normalize_reward=False,
        network=NetworkConfig(shared=shared, hidden=(8,), critic_hidden=(7,)),
        acktr=ACKTRConfig(actor=KFAC, critic=KFAC),
        a2c=A2CConfig(max_grad_norm=0.1),
    )
    torch.set_default_dtype(torch.float64)
    size = ENVS // groups
    envs = GroupedEnvs([group(size, size * n, min(workers, size)) for n in range(groups)])
    try:
        trainer = Trainer(config, envs)
        for _ in trainer.run(UPDATES * ENVS * STEPS):
            pass
    finally:
        envs.close()
        torch.set_default_dtype(torch.float32)
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


@cache
def undivided(algo: str, shared: bool) -> Tensor:
    return trained(algo, shared, 1, 1, None)


@settings(max_examples=30, deadline=None)
@given(
    algo=st.sampled_from(["acktr", "a2c"]),
    shared=st.booleans(),
    groups=st.sampled_from([1, 2, 3, 6]),
    workers=st.integers(1, 3),
    micro_batch=st.none() | st.integers(1, ENVS * STEPS + 5),
)
def test_any_split_gives_the_same_network(
    algo: str, shared: bool, groups: int, workers: int, micro_batch: int | None
) -> None:
    """Groups, worker processes, micro-batches; the noise of discrete actions is one stream."""
    parameters = trained(algo, shared, groups, workers, micro_batch)
    torch.testing.assert_close(parameters, undivided(algo, shared), rtol=1e-8, atol=1e-10)
