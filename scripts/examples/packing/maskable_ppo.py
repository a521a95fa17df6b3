"""sb3-contrib's MaskablePPO on bin packing, with our networks, as our own runs are made.

RUN_DIR/ENV/maskable-ppo/seedN is written, with the defaults of sb3-contrib but for eight
environments, which make the 2,048 samples of a batch together. Finished runs are skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from acktr.envs import AnyVectorEnv
from acktr.interrupts import Interrupts
from scripts.common import integer, parsed, run
from scripts.examples.packing.networks import HeightmapActor, HeightmapCritic
from scripts.peers.models import PeerEnvs
from scripts.peers.runs import Job, is_finished, make

ENV = "scripts.examples.packing:PackingHeightmap-v0"


@dataclass(frozen=True)
class Settings:
    """Arguments of MaskablePPO, which are its defaults but for the environments."""

    num_envs: int = 8
    n_steps: int = 256
    batch_size: int = 64
    n_epochs: int = 10
    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    network: str = (
        "scripts.examples.packing.networks:HeightmapActor,"
        "scripts.examples.packing.networks:HeightmapCritic"
    )


class Outputs(BaseFeaturesExtractor):
    """Our actor and critic; logits and, behind them, values are the features."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__(observation_space, int(action_space.n) + 1)
        self.actor = HeightmapActor(observation_space, action_space)
        self.critic = HeightmapCritic(observation_space, action_space)

    def forward(self, observations: Tensor) -> Tensor:
        """Logits and value (B, actions + 1)."""
        return torch.cat([self.actor(observations), self.critic(observations)], dim=1)


class Columns(nn.Module):
    """Some of the features."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, features: Tensor) -> Tensor:
        """Columns of (B, features)."""
        return features[:, self.columns]


class Policy(MaskableActorCriticPolicy):
    """A policy whose only parameters are our networks'."""

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        self.action_net = Columns(slice(0, -1))
        self.value_net = Columns(slice(-1, None))  # type: ignore[assignment]
        optimizer: Any = self.optimizer_class
        self.optimizer = optimizer(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)


class Player:
    """The model in evaluations."""

    def __init__(self, model: MaskablePPO) -> None:
        self._model = model

    def act(
        self, observations: NDArray[Any], deterministic: bool, masks: NDArray[np.bool_]
    ) -> NDArray[Any]:
        """Allowed actions."""
        return self._model.predict(observations, deterministic=deterministic, action_masks=masks)[0]


def build(job: Job, envs: AnyVectorEnv) -> tuple[MaskablePPO, Player]:
    """The model, ready to learn, and its player."""
    settings: Settings = job.settings
    model = MaskablePPO(
        Policy,
        PeerEnvs(envs),
        learning_rate=settings.learning_rate,
        n_steps=settings.n_steps,
        batch_size=settings.batch_size,
        n_epochs=settings.n_epochs,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        clip_range=settings.clip_range,
        ent_coef=settings.ent_coef,
        vf_coef=settings.vf_coef,
        max_grad_norm=settings.max_grad_norm,
        policy_kwargs={
            "features_extractor_class": Outputs,
            "features_extractor_kwargs": {"action_space": envs.single_action_space},
            "net_arch": [],
            "ortho_init": False,  # the networks have their own start
        },
        seed=job.seed,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model, Player(model)


def main(argv: Sequence[str]) -> int:
    """Make the runs that are not there yet."""
    parser = argparse.ArgumentParser(prog="scripts.examples.packing.maskable_ppo")
    add = parser.add_argument
    add("--seeds", nargs="+", type=integer(0), default=[0])
    add("--total-timesteps", type=integer(1), default=1_000_000)
    add("--eval-episodes", type=integer(1), default=200)
    add("--run-dir", type=Path, default=Path("runs"))
    command = ["python", "-m", "scripts.examples.packing.maskable_ppo", *argv]

    def work(interrupts: Interrupts) -> int:
        asked = parsed(parser, argv)
        for seed in asked.seeds:
            job = Job(
                peer="maskable-ppo",
                env=ENV,
                seed=seed,
                total_timesteps=asked.total_timesteps,
                eval_episodes=asked.eval_episodes,
                settings=Settings(),
                source="defaults of sb3-contrib",
            )
            if not is_finished(job, asked.run_dir):
                print(make(job, asked.run_dir, command, build), flush=True)
        return 0

    return run("maskable_ppo", work, "finished runs are kept, the same command makes the others")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
