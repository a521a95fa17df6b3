"""Configurations of ours for the tests of peers."""

from __future__ import annotations

import copy
from typing import Any

from acktr.config import Config, from_dict
from scripts.peers.settings import Settings, read_settings
from scripts.peers.translate import translate

_COMMON: dict[str, Any] = {
    "env": "InvertedPendulum-v5",
    "preset": "default",
    "seed": 3,
    "total_timesteps": 5000,
    "num_envs": 4,
    "num_steps": 8,
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "ent_coef": 0.0,
    "vf_coef": 0.4,
    "normalize_advantage": True,
    "normalize_observation": True,
    "normalize_reward": True,
    "device": "auto",
    "precision": "auto",
    "eval_freq": 0,
    "eval_episodes": 10,
    "checkpoint_freq": 100_000,
    "network": {
        "shared": False,
        "hidden": [32, 16],
        "critic_hidden": [24],
        "activation": "tanh",
        "critic_activation": "tanh",
        "policy_gain": 0.01,
        "log_std_init": -0.5,
    },
    "acktr": {"critic_steps": 10},
    "a2c": {
        "lr": 2e-3,
        "lr_schedule": "linear",
        "rms_alpha": 0.95,
        "rms_eps": 1e-4,
        "max_grad_norm": 0.7,
    },
    "trpo": {
        "max_kl": 0.02,
        "cg_iterations": 12,
        "cg_damping": 0.05,
        "cg_tolerance": 1e-10,
        "fisher_fraction": 1.0,
        "backtrack_factor": 0.7,
        "backtrack_steps": 9,
        "critic": {
            "optimizer": "adam",
            "lr": 3e-3,
            "epochs": 6,
            "batch_size": 16,
            "momentum": 0.9,
            "adam_eps": 1e-6,
        },
    },
    "atari": {},
}


def ours(algo: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A configuration with other values than any default; changes by dotted name."""
    config = copy.deepcopy(_COMMON) | {"algo": algo}
    for name, value in (changes or {}).items():
        *path, last = name.split(".")
        place = config
        for key in path:
            place = place[key]
        place[last] = value
    return config


def config(algo: str, changes: dict[str, Any] | None = None) -> Config:
    """The same as a configuration."""
    return from_dict(ours(algo, changes))


def translated(algo: str, changes: dict[str, Any] | None = None, kl_parts: int = 1) -> Settings:
    """Settings of the peer that equals such a configuration."""
    peer = f"sb3-{algo}"
    return read_settings(peer, translate(peer, config(algo, changes), kl_parts))
