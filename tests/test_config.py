"""Configurations and presets: round trips, strict checks, suggestions."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import acktr.config.former
from acktr.config import (
    ALGOS,
    PRESETS,
    Config,
    ConfigError,
    SampledKFACConfig,
    from_dict,
    merge,
    modules_of,
    preset,
    to_dict,
    with_learning_rate,
)
from acktr.kfac import KFACConfig

ENVIRONMENTS = ["HalfCheetah-v5", "PongNoFrameskip-v4", "ALE/Breakout-v5", "CartPole-v1", "X-v0"]
ENVIRONMENTS += ["Pixels/Walker2d-v5"]


@pytest.mark.parametrize("env", ENVIRONMENTS)
@pytest.mark.parametrize("algo", ALGOS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(env: str, algo: str, name: str) -> None:
    if name == "paper" and (algo != "acktr" or env in ("CartPole-v1", "X-v0")):
        with pytest.raises(ConfigError, match=r"no configuration for|ACKTR's only"):
            preset(env, algo, name)
        return
    config, line = preset(env, algo, name)
    assert config.env == env
    assert config.algo == algo
    assert config.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert line.startswith(f"preset {name} for {algo}")
    assert "\n" not in line


def test_presets_go_by_exact_id_then_family_then_default() -> None:
    assert "exact id CartPole-v1" in preset("CartPole-v1")[1]
    assert preset("Hopper-v5")[0].acktr == preset("Walker2d-v5")[0].acktr
    assert "Atari family" in preset("ALE/Pong-v5")[1]
    assert "MuJoCo family" in preset("Ant-v4")[1]
    assert "any environment" in preset("Pendulum-v1")[1]
    assert "Pixels family" in preset("module:Pixels/Mine-v0")[1]


@pytest.mark.parametrize("sigma", [0.5, "adaptive"])
def test_value_sigma_is_a_number_or_adaptive(sigma: float | str) -> None:
    config = merge(preset("PongNoFrameskip-v4")[0], {"acktr": {"value_sigma": sigma}})
    assert config.acktr.value_sigma == sigma
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_modules_that_names_come_from() -> None:
    names = {"env": "a.b:X-v0", "wrappers": ("c:W", "a.b:V.inner")}
    assert modules_of(Config(**names)) == ["a.b", "c"]
    assert modules_of(Config(env="ALE/Pong-v5")) == []


def test_no_variance_is_followed_where_no_fisher_has_it() -> None:
    given = {"acktr": {"value_sigma": "adaptive", "critic_optimizer": "first_order"}}
    with pytest.raises(ConfigError, match=r"adaptive is for K-FAC's critic"):
        merge(preset("HalfCheetah-v5")[0], given)
    with pytest.raises(ConfigError, match="value_fisher must be true"):
        merge(
            preset("PongNoFrameskip-v4")[0],
            {"acktr": {"value_sigma": "adaptive", "value_fisher": False}},
        )
    numbers = {"acktr": {"value_sigma": 0.5, "critic_optimizer": "first_order"}}  # as in the paper
    assert merge(preset("HalfCheetah-v5")[0], numbers).acktr.value_sigma == 0.5


@pytest.mark.parametrize("sigma", ["auto", "0.5", 0, None, True])
def test_other_value_sigmas_are_refused(sigma: object) -> None:
    with pytest.raises(ConfigError, match="value_sigma must be"):
        merge(preset("PongNoFrameskip-v4")[0], {"acktr": {"value_sigma": sigma}})


def test_a_separate_critic_has_a_fisher_of_its_own() -> None:
    merge(preset("PongNoFrameskip-v4")[0], {"acktr": {"value_fisher": False}})
    with pytest.raises(ConfigError, match=r"network\.shared must be true"):
        merge(preset("Hopper-v5")[0], {"acktr": {"value_fisher": False}})


def test_swimmer_has_a_preset_of_its_own() -> None:
    own, line = preset("Swimmer-v5")
    shared, other = preset("Swimmer-v5", name="family")
    assert line.startswith("preset default for acktr, exact id Swimmer-v5: ")
    assert "gamma 0.9999" in line
    assert other.startswith("preset family for acktr, MuJoCo family: ")
    assert (own.gamma, shared.gamma) == (0.9999, 0.99)
    assert (own.gae_lambda, own.network.log_std_init) == (0.99, 0.0)
    changed = {"gamma": 0.99, "gae_lambda": 0.95, "network": shared.network, "preset": "family"}
    assert shared == dataclasses.replace(own, **changed)
    walker = preset("Walker2d-v5")[0]
    assert dataclasses.replace(walker, env="Swimmer-v5", preset="family") == shared
    assert preset("CartPole-v1", name="family")[0].normalize_observation
    assert preset("Swimmer-v5", "a2c")[0].gamma == 0.99


def test_ant_has_a_preset_of_its_own() -> None:
    own, line = preset("Ant-v5")
    shared, _ = preset("Ant-v5", name="family")
    assert line.startswith("preset default for acktr, exact id Ant-v5: ") and "log -1.5" in line
    assert (own.network.log_std_init, shared.network.log_std_init) == (-1.5, -1.0)
    assert own == dataclasses.replace(shared, network=own.network, preset="default")
    assert own == dataclasses.replace(preset("Ant-v4")[0], env="Ant-v5")
    assert preset("Ant-v5", "a2c")[0].network.log_std_init == -1.0


def test_inverted_pendulum_has_a_preset_of_its_own() -> None:
    own, line = preset("InvertedPendulum-v5")
    shared, _ = preset("InvertedPendulum-v5", name="family")
    start = "preset default for acktr, exact id InvertedPendulum-v5: "
    assert line.startswith(start) and "log -2" in line and "advantages as they are" in line
    assert (own.network.log_std_init, shared.network.log_std_init) == (-2.0, -1.0)
    assert (own.normalize_advantage, shared.normalize_advantage) == (False, True)
    assert own == dataclasses.replace(
        shared, network=own.network, normalize_advantage=False, preset="default"
    )
    assert own == dataclasses.replace(preset("InvertedPendulum-v4")[0], env="InvertedPendulum-v5")
    assert preset("InvertedPendulum-v5", "trpo")[0].normalize_advantage


def test_hopper_has_a_preset_of_its_own() -> None:
    own, line = preset("Hopper-v5")
    shared, _ = preset("Hopper-v5", name="family")
    assert line.startswith("preset default for acktr, exact id Hopper-v5: ")
    changed = dataclasses.replace(shared, gamma=0.995, gae_lambda=0.97, preset="default")
    assert own == changed == dataclasses.replace(preset("Hopper-v4")[0], env="Hopper-v5")
    assert preset("Hopper-v5", "trpo")[0].gamma == preset("Pixels/Hopper-v5")[0].gamma == 0.99


def test_pixels() -> None:
    chosen = preset("Pixels/Hopper-v5")[0]
    assert (chosen.pixels.size, chosen.pixels.frame_stack, chosen.pixels.frame_skip) == (64, 3, 4)
    assert preset("Pixels/HalfCheetah-v5")[0].pixels.frame_skip == 1
    assert preset("Pixels/Reacher-v5", "a2c")[0].pixels.frame_skip == 2
    assert chosen.network.shared and chosen.acktr.actor.cold_steps == 0


def test_published_pixel_values() -> None:
    config = preset("Pixels/Reacher-v5", name="paper")[0]
    assert config.num_envs * config.num_steps == 8000
    assert (config.gamma, config.gae_lambda, config.acktr.target_kl) == (0.99, 1.0, 0.002)
    pixels = config.pixels
    assert (pixels.size, pixels.frame_stack, pixels.frame_skip) == (42, 2, 1)
    network, actor, critic = config.network, config.acktr.actor, config.acktr.critic
    assert (network.trunk, network.activation, network.critic_activation) == (
        *("strided", "relu", "elu"),
    )
    assert (actor.lr, actor.kl_clip, actor.momentum, actor.damping) == (0.03, 0.002, 0.9, 0.01)
    assert (actor.stat_decay, actor.refresh_interval, actor.cold_steps) == (0.99, 2, 2)
    assert (critic.lr, critic.kl_clip, critic.damping, critic.stat_decay) == (0.001, 0.3, 0.1, 0.95)
    assert (config.acktr.critic_steps, critic.cold_steps) == (25, 51)


def test_published_atari_values() -> None:
    config = preset("PongNoFrameskip-v4", "acktr", "paper")[0]
    assert (config.num_envs, config.num_steps, config.gamma) == (32, 20, 0.99)
    assert (config.ent_coef, config.vf_coef) == (0.01, 0.25)
    actor = config.acktr.actor
    assert (actor.lr, actor.kl_clip, actor.damping, actor.momentum) == (0.25, 0.001, 0.01, 0.9)
    assert (actor.cold_steps, actor.cold_lr, actor.cold_max_grad_norm) == (11, 0.25, 0.5)
    assert actor.structure == "kfac"
    assert config.acktr.value_sigma == 0.5


def test_published_mujoco_values() -> None:
    config = preset("Hopper-v5", "acktr", "paper")[0]
    assert config.num_envs * config.num_steps == 2500
    assert (config.gamma, config.gae_lambda) == (0.99, 0.97)
    assert config.acktr.target_kl == 0.002
    assert config.acktr.critic_steps == 25
    critic = config.acktr.critic
    assert (critic.lr, critic.kl_clip, critic.damping) == (0.001, 0.3, 0.1)
    assert (critic.stat_decay, critic.cold_steps) == (0.95, 51)
    assert config.network.critic_activation == "elu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma must be a finite number >= 0 and <= 1, got 1.5"),
        ({"gamma": float("nan")}, "gamma must be a finite number"),
        ({"ent_coef": -0.1}, "ent_coef must be a finite number >= 0, got -0.1"),
        ({"num_envs": 0}, "num_envs must be an integer >= 1, got 0"),
        ({"num_envs": 1.5}, "num_envs must be an integer >= 1, got 1.5"),
        ({"num_envs": True}, "num_envs must be an integer >= 1, got True"),
        ({"env_workers": 0}, "env_workers must be an integer >= 1, got 0"),
        ({"env_workers": "all"}, "env_workers must be an integer >= 1, got all"),
        ({"seed": -1}, "seed must be an integer >= 0 and <= 2146435071, got -1"),
        ({"algo": "ppo"}, "algo must be one of acktr, a2c, trpo, got 'ppo'"),
        ({"gama": 0.9}, r"unknown setting gama \(did you mean gamma\?\)"),
        ({"acktr": {"actor": {"lr": -1.0}}}, "acktr.actor.lr must be a finite number > 0, got -1"),
        ({"acktr": {"actor": {"dampin": 1}}}, r"acktr.actor.dampin \(did you mean damping\?\)"),
        ({"a2c": {"rms_alpha": 1.0}}, "a2c.rms_alpha must be a finite number >= 0"),
        ({"trpo": {"critic": {"epochs": 0}}}, "trpo.critic.epochs must be an integer >= 1"),
        ({"algo": "trpo"}, "^trpo needs a separate critic: network.shared must be false$"),
        ({"acktr": 3}, "acktr must be an object"),
        ({"network": {"hidden": 64}}, "network.hidden must be a list of integers, got 64"),
        (
            {"network": {"hidden": [0]}},
            "each of network.hidden must be an integer >= 1 and <= 16384, got 0",
        ),
        ({"network": {"activation": "gelu"}}, "activation must be one of tanh, relu, elu"),
        ({"num_envs": 1, "num_steps": 1}, r"num_envs \* num_steps must be at least 2"),
        ({"atari": {"sticky": 2.0}}, "sticky"),
        ({"record": [""]}, r"record must be keys of infos, each once, .* got \('',\)"),
        ({"record": ["a\n"]}, "record must be keys of infos"),
        ({"record": ["a", "a"]}, "record must be keys of infos"),
        ({"record": ["step"]}, "record must be keys of infos"),
        ({"wrappers": ["a:b:c"]}, "wrappers"),
        ({"wrappers": 3}, "wrappers must be a list of names, got 3"),
        ({"gamma": 10**400}, "gamma must be a finite number >= 0 and <= 1, got 1000"),
        (
            {"network": {"hidden": [3_000_000]}},
            "each of network.hidden must be an integer >= 1 and <= 16384, got 3000000",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict({"env": "CartPole-v1", **change})
    assert "\n" not in str(caught.value)


def test_environment_is_needed() -> None:
    with pytest.raises(ConfigError, match="env is missing"):
        from_dict({"gamma": 0.9})
    with pytest.raises(ConfigError, match="env must be an environment id"):
        Config(env="")


def test_compilation() -> None:
    assert from_dict({"env": "X-v0"}).compile is False  # as in configurations before it
    assert from_dict({"env": "X-v0", "compile": True}).compile is True


def test_processes_of_environments() -> None:
    assert from_dict({"env": "X-v0"}).env_workers == "auto"  # as in configurations before it
    assert from_dict({"env": "X-v0", "env_workers": "auto"}).env_workers == "auto"
    assert from_dict({"env": "X-v0", "env_workers": 3}).env_workers == 3
    with pytest.raises(ConfigError, match="env_workers must be an integer >= 1, got all"):
        Config(env="X-v0", env_workers="all")  # type: ignore[arg-type]


def test_settings_of_former_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acktr.config.former, "_UNUSED", {"turbo": 1, "acktr.actor.turbo": None})
    stored = {"env": "X-v0", "turbo": 1, "acktr": {"actor": {"turbo": None, "lr": 0.5}}}
    config = from_dict(stored)
    assert config.acktr.actor.lr == 0.5
    assert merge(Config(env="X-v0"), stored) == config
    with pytest.raises(ConfigError, match=r"acktr\.actor\.turbo was removed and only None can"):
        from_dict({"env": "X-v0", "acktr": {"actor": {"turbo": 3}}})
    with pytest.raises(ConfigError, match=r"unknown setting acktr\.critic\.turbo"):
        from_dict({"env": "X-v0", "acktr": {"critic": {"turbo": None}}})


@pytest.mark.parametrize(
    ("former", "structure"),
    [
        ({"structure": "kfac", "inverse": "eigen", "factored_damping": False}, "kfac"),
        ({"structure": "kfac", "inverse": "eigen", "factored_damping": True}, "kfac_factored"),
        ({"structure": "kfac", "inverse": "cholesky", "factored_damping": True}, "cholesky"),
        ({"structure": "ekfac", "inverse": "eigen", "factored_damping": False}, "ekfac"),
        ({"structure": "tridiagonal", "inverse": "eigen", "factored_damping": True}, "tridiagonal"),
        ({"factored_damping": True}, "kfac_factored"),
        ({"structure": "ekfac"}, "ekfac"),
        ({}, "kfac"),
    ],
)
def test_the_three_settings_that_structure_replaced(former: dict[str, Any], structure: str) -> None:
    stored = {"env": "X-v0", "acktr": {"critic": {**former, "lr": 0.5}}}
    config = from_dict(stored)
    assert (config.acktr.critic.structure, config.acktr.critic.lr) == (structure, 0.5)
    assert merge(Config(env="X-v0"), stored) == config
    assert from_dict(to_dict(config)) == config


def test_a_former_setting_over_a_preset_changes_its_part_alone() -> None:
    atari = preset("PongNoFrameskip-v4")[0]
    assert atari.acktr.actor.structure == "cholesky"
    for former, structure in (
        ({"inverse": "eigen"}, "kfac_factored"),
        ({"inverse": "eigen", "factored_damping": False}, "kfac"),
        ({"inverse": "cholesky"}, "cholesky"),
    ):
        changed = merge(atari, {"acktr": {"actor": former}})
        assert changed.acktr.actor == dataclasses.replace(atari.acktr.actor, structure=structure)
    with pytest.raises(ConfigError, match="factored_damping=False cannot go together; write") as e:
        merge(atari, {"acktr": {"actor": {"factored_damping": False}}})
    assert "\n" not in str(e.value)
    with pytest.raises(
        ConfigError, match=r"acktr\.actor: .* factored_damping=1 cannot go together"
    ):
        merge(atari, {"acktr": {"actor": {"factored_damping": 1}}})


def test_the_defaults_of_training_are_pinned() -> None:
    settings, pinned = SampledKFACConfig(), KFACConfig.for_rl()
    for item in dataclasses.fields(KFACConfig):
        assert getattr(settings, item.name) == getattr(pinned, item.name), item.name
    assert dataclasses.asdict(pinned) == {
        "lr": 0.25,
        "kl_clip": 0.001,
        "damping": 0.01,
        "structure": "kfac",
        "stat_decay": 0.99,
        "stat_interval": 1,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "refresh_interval": 10,
        "eager_start": False,
        "refresh_delay": None,
        "cold_steps": 0,
        "cold_lr": 0.03,
        "cold_max_grad_norm": 0.5,
        "conv_sharing": "expand",
        "linear_sharing": "expand",
        "small_parameters": "gradient",
        "max_factor_size": None,
        "factor_rows": None,
        "float64": False,
        "fast_products": False,
        "dense_limit": 1024,
        "quadratic": "kronecker",
        "max_failures": 10,
    }


def test_a_fraction_belongs_to_the_settings_of_acktr() -> None:
    for fraction in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"stat_fraction must be a finite number"):
            from_dict({"env": "X-v0", "acktr": {"actor": {"stat_fraction": fraction}}})


def test_the_configuration_of_an_environment_is_a_preset() -> None:
    assert Config.for_env("CartPole-v1") == preset("CartPole-v1")[0]
    assert Config.for_env("Ant-v5", "a2c") == preset("Ant-v5", "a2c")[0]
    with pytest.raises(ConfigError, match="preset must be one of default, family, paper, got 'x'"):
        Config.for_env("Ant-v5", preset="x")


def test_a_learning_rate_given_as_a_number_is_constant() -> None:
    for rate in (1e-12, 0.5, 1, 7.5):
        config = with_learning_rate(preset("HalfCheetah-v5")[0], rate)[0]
        assert (config.acktr.actor.lr, config.acktr.lr_schedule) == (rate, "constant")
        config = with_learning_rate(preset("HalfCheetah-v5", "a2c")[0], rate)[0]
        assert (config.a2c.lr, config.a2c.lr_schedule) == (rate, "constant")
    for bad in (0, -1, float("inf"), float("nan"), True, "1"):
        with pytest.raises(ConfigError, match="learning_rate must be a finite number > 0 or a fun"):
            with_learning_rate(preset("HalfCheetah-v5")[0], bad)  # type: ignore[arg-type]
