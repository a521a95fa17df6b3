from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from acktr.envs import make_vec


def make(env_id: str, num_envs: int, seed: int = 0, threads: int = 1) -> Any:
    return make_vec(env_id, num_envs, seed, env_workers=threads, env_backend="envpool")


def limit(monkeypatch: pytest.MonkeyPatch, env_id: str, steps: int) -> None:
    """A shorter time limit, with either backend."""
    monkeypatch.setattr(gymnasium.registry[env_id], "max_episode_steps", steps)


def actions_for(vec: Any, steps: int, seed: int = 1) -> Any:
    space, rng = vec.single_action_space, np.random.default_rng(seed)
    drawn = rng.uniform(space.low, space.high, (steps, vec.num_envs, *space.shape))
    return drawn.astype(space.dtype)
