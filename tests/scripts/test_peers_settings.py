"""Settings of peers: translated from ours value by value, published ones as published."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from typing import Any

import pytest
import sb3_contrib
from stable_baselines3 import PPO

from acktr.config import ConfigError, preset
from scripts.common import ScriptError
from scripts.peers import translate as module
from scripts.peers.settings import choose, kl_parts, read_settings
from scripts.peers.translate import translate
from tests.tools.peers import config, translated

SHARED = {
    "num_envs": 4,
    "num_steps": 8,
    "gamma": 0.98,
    "gae_lambda": 0.9,
    "normalize_advantage": True,
    "normalize_observation": True,
    "normalize_reward": True,
    "network": {
        "hidden": (32, 16),
        "critic_hidden": (24,),
        "activation": "tanh",
        "ortho_init": True,
        "log_std_init": -0.5,
    },
}


def test_every_value_of_a2c_is_translated() -> None:
    assert asdict(translated("a2c", {"ent_coef": 0.03})) == SHARED | {
        "optimizer": {
            "name": "rmsprop_tf",
            "lr": 2e-3,
            "lr_schedule": "linear",
            "eps": 1e-4,
            "alpha": 0.95,
        },
        "algorithm": {"ent_coef": 0.03, "vf_coef": 0.4, "max_grad_norm": 0.7},
    }


def test_every_value_of_trpo_is_translated() -> None:
    assert asdict(translated("trpo")) == SHARED | {
        "optimizer": {
            "name": "adam",
            "lr": 3e-3,
            "lr_schedule": "constant",
            "eps": 1e-6,
            "alpha": None,
        },
        "algorithm": {
            "target_kl": 0.02,
            "cg_max_steps": 12,
            "cg_damping": 0.05,
            "line_search_shrinking_factor": 0.7,
            "line_search_max_iter": 9,
            "n_critic_updates": 6,
            "batch_size": 16,
        },
    }


def test_the_kl_of_a_vector_of_actions_is_taken_per_dimension() -> None:
    """The peer averages over dimensions; the same step needs bound and damping divided."""
    one, six = (asdict(translated("trpo", kl_parts=parts)) for parts in (1, 6))
    assert six["algorithm"].pop("target_kl") == one["algorithm"].pop("target_kl") / 6
    assert six["algorithm"].pop("cg_damping") == one["algorithm"].pop("cg_damping") / 6
    assert one == six
    assert translated("a2c", kl_parts=6) == translated("a2c")
    wanted = {"HalfCheetah-v5": 6, "InvertedPendulum-v5": 1, "CartPole-v1": 1}
    assert {env: kl_parts(env) for env in wanted} == wanted
    settings, source = choose("sb3-trpo", "HalfCheetah-v5")
    bound = asdict(settings)["algorithm"]["target_kl"]
    assert bound == preset("HalfCheetah-v5", "trpo")[0].trpo.max_kl / 6
    assert source.endswith("; KL and damping divided by 6 action dimensions")


def test_a_full_batch_of_the_critic_is_the_whole_rollout() -> None:
    found = translated("trpo", {"trpo.critic.batch_size": None})
    assert asdict(found)["algorithm"]["batch_size"] == 4 * 8


def test_what_does_not_concern_the_peer_changes_nothing() -> None:
    irrelevant = {"seed": 9, "total_timesteps": 1, "trpo.max_kl": 5, "eval_freq": 7, "acktr": {}}
    assert translated("a2c", irrelevant) == translated("a2c")
    irrelevant = {"vf_coef": 9.0, "a2c.lr": 5.0, "trpo.critic.momentum": 0.1}
    assert translated("trpo", irrelevant) == translated("trpo")


@pytest.mark.parametrize(
    ("algo", "changes", "why"),
    [
        ("a2c", {"network.shared": True}, "cannot express network.shared = True, only False"),
        ("a2c", {"network.policy_gain": 0.1}, "network.policy_gain = 0.1, only 0.01"),
        ("a2c", {"network.critic_activation": "elu"}, "critic_activation = 'elu', only tanh"),
        ("a2c", {"precision": "bfloat16"}, "precision = 'bfloat16', only auto or float32"),
        ("trpo", {"ent_coef": 0.01}, "cannot express ent_coef = 0.01, only 0.0"),
        ("trpo", {"trpo.cg_tolerance": 1e-6}, "trpo.cg_tolerance = 1e-06, only 1e-10"),
        ("trpo", {"trpo.fisher_fraction": 0.2}, "trpo.fisher_fraction = 0.2, only 1.0"),
        ("trpo", {"trpo.critic.optimizer": "sgd"}, "trpo.critic.optimizer = 'sgd', only adam"),
    ],
)
def test_what_the_peer_cannot_express_is_refused(
    algo: str, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ScriptError) as caught:
        translated(algo, changes)
    assert why in str(caught.value)
    with pytest.raises(ScriptError, match="is compared with a run of"):
        translate("sb3-a2c" if algo == "trpo" else "sb3-trpo", config(algo), 1)


@pytest.mark.parametrize("algo", ["a2c", "trpo"])
def test_a_setting_that_is_new_here_is_not_passed_over(
    algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting of ours has an influence that is known, or is refused."""
    monkeypatch.setattr(module, "_WITHOUT_INFLUENCE", module._WITHOUT_INFLUENCE - {"compile"})
    with pytest.raises(ScriptError, match="cannot translate compile: unknown to this script"):
        translated(algo)


# rl-baselines3-zoo, hyperparams/ppo.yml: what was read there, in its own names.
ZOO: dict[str, dict[str, Any]] = {
    "Ant": {},
    "Swimmer": {"n_envs": 4, "n_steps": 1024, "gamma": 0.9999, "gae_lambda": 0.98, "lr": 6e-4},
    "HalfCheetah": {"n_steps": 512, "gamma": 0.98, "gae_lambda": 0.92, "lr": 2.0633e-5},
    "Hopper": {"n_steps": 512, "gamma": 0.999, "gae_lambda": 0.99, "lr": 9.80828e-5},
    "Walker2d": {"n_steps": 512, "gamma": 0.99, "gae_lambda": 0.95, "lr": 5.05041e-5},
    "InvertedPendulum": {"n_steps": 32, "gamma": 0.999, "gae_lambda": 0.9, "lr": 0.000222425},
    "InvertedDoublePendulum": {"n_steps": 128, "gamma": 0.98, "gae_lambda": 0.8, "lr": 0.000155454},
    "Reacher": {"n_steps": 512, "gamma": 0.9, "gae_lambda": 1.0, "lr": 0.000104019},
}
LOSS = {  # batch_size, n_epochs, clip_range, ent_coef, vf_coef, max_grad_norm
    "Ant": (64, 10, 0.2, 0.0, 0.5, 0.5),
    "Swimmer": (256, 10, 0.2, 0.0, 0.5, 0.5),
    "HalfCheetah": (64, 20, 0.1, 0.000401762, 0.58096, 0.8),
    "Hopper": (32, 5, 0.2, 0.00229519, 0.835671, 0.7),
    "Walker2d": (32, 20, 0.1, 0.000585045, 0.871923, 1.0),
    "InvertedPendulum": (64, 5, 0.4, 1.37976e-7, 0.19816, 0.3),
    "InvertedDoublePendulum": (512, 10, 0.4, 1.05057e-6, 0.695929, 0.5),
    "Reacher": (32, 5, 0.3, 7.52585e-8, 0.950368, 0.9),
}


@pytest.mark.parametrize("name", ZOO)
def test_ppo_has_the_published_values(name: str) -> None:
    chosen, source = choose("sb3-ppo", f"{name}-v5")
    assert "rl-baselines3-zoo" in source
    settings = asdict(chosen)
    zoo = {"n_envs": 1, "n_steps": 2048, "gamma": 0.99, "gae_lambda": 0.95, "lr": 3e-4} | ZOO[name]
    rollout = ("num_envs", "num_steps", "gamma", "gae_lambda")
    assert [settings[key] for key in rollout] + [settings["optimizer"]["lr"]] == list(zoo.values())
    order = ("batch_size", "n_epochs", "clip_range", "ent_coef", "vf_coef", "max_grad_norm")
    assert tuple(settings["algorithm"][key] for key in order) == LOSS[name]
    wide = name in ("HalfCheetah", "Hopper")
    assert settings["network"] == {
        "hidden": (256, 256) if wide else (64, 64),
        "critic_hidden": (256, 256) if wide else (64, 64),
        "activation": "relu" if wide else "tanh",
        "ortho_init": not wide,
        "log_std_init": -2.0 if wide else 0.0,
    }
    assert settings["normalize_observation"] and settings["normalize_reward"]


@pytest.mark.parametrize("peer", ["sb3-ppo", "sb3-maskable-ppo"])
def test_ppo_without_published_values_has_the_librarys_defaults(peer: str) -> None:
    chosen, source = choose(peer, "Pendulum-v1")
    assert source.startswith("defaults of stable-baselines3, with running normalisation; none are")
    there = inspect.signature(sb3_contrib.MaskablePPO if "mask" in peer else PPO).parameters
    ours = asdict(chosen.algorithm)
    ours |= {"gamma": chosen.gamma, "gae_lambda": chosen.gae_lambda, "n_steps": chosen.num_steps}
    ours |= {"learning_rate": chosen.optimizer.lr}
    assert ours == {name: there[name].default for name in ours}


def test_settings_survive_json() -> None:
    settings = translated("trpo")
    assert read_settings("sb3-trpo", json.loads(json.dumps(asdict(settings)))) == settings
    values = {name: 1 for name in ("ent_coef", "vf_coef", "max_grad_norm")}
    with pytest.raises(ConfigError, match=r"algorithm\.n_epochs is missing"):
        read_settings("sb3-ppo", asdict(settings) | {"algorithm": values})
