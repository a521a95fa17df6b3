"""Settings of a run by keyword, as ``ACKTR(env, gamma=0.98, num_steps=64)`` has them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from acktr.config.network import NetworkConfig
from acktr.config.schema import ConfigError
from acktr.config.settings import Config, merge


class Settings(TypedDict, total=False):
    """The settings that agents take by keyword; all others are in :class:`Config`."""

    num_steps: int
    """Steps of each environment per update."""
    micro_batch: int | None
    """Most samples whose activations an update keeps."""
    gamma: float
    """Discount factor."""
    gae_lambda: float
    """Lambda of generalised advantage estimation."""
    ent_coef: float
    """Weight of the entropy bonus."""
    vf_coef: float
    """Weight of the value error in a shared network's loss."""
    normalize_advantage: bool
    """Standardise advantages over the batch."""
    normalize_observation: bool
    """Standardise observations by running statistics."""
    normalize_reward: bool
    """Divide rewards by the running deviation of the return."""
    hidden: tuple[int, ...]
    """network.hidden and network.critic_hidden."""
    activation: str
    """network.activation and network.critic_activation."""
    memory: str
    """network.memory: none, lstm, gru or attention."""
    precision: str
    """Compute type of convolutional networks."""
    compile: bool
    """Compile by torch.compile."""
    env_workers: int | str
    """Processes that step the environments."""
    eval_episodes: int
    """Episodes of each evaluation of a run."""
    checkpoint_freq: int
    """Steps between checkpoints of a run."""


_NETWORK = {
    "hidden": ("hidden", "critic_hidden"),
    "activation": ("activation", "critic_activation"),
    "memory": ("memory",),
}
_LEARN = {
    "log_interval": "nothing: a callback is told of every update",
    "tb_log_name": "label=, with run_dir=",
    "reset_num_timesteps": "nothing: learn() goes on counting; a new agent begins at 0",
    "eval_log_path": "run_dir=",
    "n_eval_episodes": "ACKTR(env, eval_episodes=...)",
    "save_freq": "ACKTR(env, checkpoint_freq=...), with run_dir=; or acktr.callbacks.Checkpoints",
    "callbacks": "callback=",
}
"""What to write instead of arguments of ``learn`` elsewhere."""
_LOAD = {
    "custom_objects": "network=, auxiliary= or learning_rate=",
    "print_system_info": "nothing: a run has versions.json",
    "force_reset": "nothing: episodes go on if they can, and a warning tells if not",
    "vec_env": "env=",
    **dict.fromkeys(("n_envs", "num_workers"), "num_envs="),
}
"""What to write instead of arguments of ``load`` elsewhere."""
_GIVEN = (
    *("config", "seed", "device", "num_envs", "env_kwargs", "wrappers", "record", "network"),
    *("auxiliary", "masks", "learning_rate", "tensorboard_log"),
)
"""Arguments of agents that are no settings by themselves."""
_PLACES = ("env", "envs")
"""Where an agent learns, which :meth:`acktr.agent.Agent.set_env` changes."""
_ELSEWHERE = {
    "n_steps": "num_steps",
    "n_envs": "num_envs",
    "policy_kwargs": "hidden=(64, 64), or network= with a module of your own",
    "net_arch": "hidden=(64, 64)",
    "policy": "nothing: the network follows the spaces",
    "max_grad_norm": "config= with a2c.max_grad_norm",
    "use_sde": "nothing: there is no gSDE",
    **dict.fromkeys(
        ("batch_size", "n_epochs", "clip_range", "clip_range_vf"),
        "nothing: that is PPO's; an update here is a step on all num_envs x num_steps samples",
    ),
    **dict.fromkeys(
        ("monitor_wrapper", "stats_window_size", "_init_setup_model"),
        "nothing: episodes are always counted, and told by their last 100",
    ),
    "rms_prop_eps": "config= with a2c.rms_eps",
    "target_kl": "config= with acktr.actor.kl_clip or trpo.max_kl",
    "total_timesteps": "learn(total_timesteps)",
    "progress_bar": "learn(..., progress_bar=True)",
    "eval_freq": "learn(..., run_dir=..., eval_freq=...)",
    "lr": "learning_rate",
}
"""What to write instead of arguments of Stable-Baselines3 and the like."""

_HERE = {
    "get_env": "envs",
    "env": "envs",
    "n_envs": "num_envs",
    "get_vec_normalize_env": "policy.normalizer",
    "set_random_seed": "seed= when the agent is made",
    "set_logger": "tensorboard_log= when the agent is made, or learn(..., run_dir=...)",
    "ep_info_buffer": "logger.ep_rew_mean, or callbacks, which have the episodes",
    "rollout_buffer": "acktr.ACKTRUpdate for batches of one's own",
    "collect_rollouts": "learn",
    "train": "learn",
    "fit": "learn",
    "act": "predict",
    "get_action": "predict",
    "n_steps": "config.num_steps",
    "learning_rate": "learning_rate= when the agent is made",
    "device": "trainer.device",
    "seed": "config.seed",
    "network": "policy.network",
    "model": "policy.network",
}
"""What to write instead of an agent's attributes elsewhere."""


def lacking_attribute(agent: str, name: str) -> str:
    """What to say of an attribute that agents do not have."""
    text = f"{agent} has no attribute {name}"
    if name in typing.get_type_hints(Settings):
        return f"{text}; its settings are in config"
    return f"{text}; here it is {_HERE[name]}" if name in _HERE else text


def require_attribute(agent: str, name: str) -> None:
    """Refuse what would change nothing of an agent that is made.

    Raises:
        AttributeError: It is the name of a setting, here or elsewhere.
    """
    if name in _PLACES:
        raise AttributeError(
            f"{name} cannot be set in an agent that is made, where it would change nothing; use"
            " set_env(...)"
        )
    own = name in ("policy", "verbose")
    if not own and name in (*typing.get_type_hints(Settings), *_GIVEN, *_ELSEWHERE):
        here = _ELSEWHERE.get(name, f"{agent}(env, {name}=...)")
        raise AttributeError(
            f"{name} cannot be set in an agent that is made, where it would change nothing; give"
            f" it before: {here}"
        )


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with settings given by keyword.

    Raises:
        ConfigError: There is no such setting, with the one that was meant, or its value is unfit.
    """
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _NETWORK:
            changes.setdefault("network", {}).update(dict.fromkeys(_NETWORK[name], value))
        elif name in typing.get_type_hints(Settings):
            changes[name] = value
        else:
            raise ConfigError(f"unknown argument {name}; {_hint(name)}")
    return merge(config, changes) if changes else config


def refuse_learn(others: Iterable[str]) -> None:
    """Raise ConfigError for arguments that ``learn`` does not have."""
    for name in others:
        known = "there are run_dir, label, eval_freq, eval_env, tensorboard"
        hint = f"write {_LEARN[name]}" if name in _LEARN else known
        raise ConfigError(f"learn() has no argument {name}; {hint}")


def refuse_load(others: Iterable[str]) -> None:
    """Raise ConfigError for arguments that ``load`` does not have."""
    for name in others:
        hint = (
            "there are env, device, num_envs, env_kwargs, wrappers, network, auxiliary,"
            " learning_rate, verbose, tensorboard_log"
        )
        if name in (*typing.get_type_hints(Settings), *_GIVEN):
            hint = (
                f"settings stay those of training: a new agent with {name}= takes the weights alone"
                " by set_parameters(loaded.get_parameters())"
            )
        elif name in _LOAD:
            hint = f"write {_LOAD[name]}"
        raise ConfigError(f"load() has no argument {name}; {hint}")


def _hint(name: str) -> str:
    """What to write instead."""
    if name in _ELSEWHERE:
        return f"write {_ELSEWHERE[name]}"
    known = [*typing.get_type_hints(Settings)]
    if near := difflib.get_close_matches(name, known, 1, 0.8):
        return f"did you mean {near[0]}?"
    fields = {field.name for kind in (Config, NetworkConfig) for field in dataclasses.fields(kind)}
    if name in fields:
        return "give it in config=, such as dataclasses.replace(Config.for_env(env), ...)"
    return f"there are {', '.join(known)}, and config= for all settings"
