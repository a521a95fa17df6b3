"""Configurations built in Python have the types of files: what is near becomes that, or is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acktr import ACKTR
from acktr.config import (
    ACKTRConfig,
    Config,
    ConfigError,
    NetworkConfig,
    SampledKFACConfig,
    from_dict,
    preset,
    to_dict,
)
from acktr.kfac import KFACConfig


def test_integers_are_taken_for_floats_and_lists_for_tuples() -> None:
    given: dict[str, Any] = {"env": "X-v0", "gamma": 1, "record": ["a"], "wrappers": ["a:B"]}
    widths = np.arange(3, 5)
    for config in (
        from_dict({**given, "network": {"hidden": [3, 4]}}),
        Config(**given, network=NetworkConfig(hidden=[3, 4])),  # type: ignore[arg-type]
        Config(**given, network=NetworkConfig(hidden=[*widths])),  # type: ignore[arg-type]
    ):
        assert config.gamma == 1.0
        assert isinstance(config.gamma, float)
        assert config.network.hidden == (3, 4)
        assert {type(width) for width in config.network.hidden} == {int}
        assert (config.record, config.wrappers) == (("a",), ("a:B",))
        assert dataclasses.replace(config) == config
        assert isinstance(hash(config), int)
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Config, {"gamma": "a"}, "gamma must be a finite number >= 0 and <= 1, got a"),
        (
            Config,
            {"normalize_advantage": "no"},
            "normalize_advantage must be true or false, got 'n",
        ),
        (Config, {"compile": 1}, "compile must be true or false, got 1"),
        (Config, {"device": 0}, "device must be text, got 0"),
        (Config, {"record": "score"}, "record must be a list of names, got 'score'"),
        (Config, {"record": [3]}, "each of record must be text, got 3"),
        (Config, {"normalize_parts": {"a"}}, "normalize_parts must be a list of names, got {'a'}"),
        (Config, {"network": {"shared": True}}, "network must be of the class NetworkConfig, got"),
        (NetworkConfig, {"shared": "false"}, "shared must be true or false, got 'false'"),
        (NetworkConfig, {"hidden": 64}, "hidden must be a list of integers, got 64"),
        (NetworkConfig, {"hidden": ["64"]}, "each of hidden must be an integer >= 1 and <= 16384"),
        (NetworkConfig, {"custom": 3}, "custom must be text, got 3"),
        (SampledKFACConfig, {"lr": "1"}, "lr must be a number, got '1'"),
        (SampledKFACConfig, {"float64": "no"}, "float64 must be true or false, got 'no'"),
        (ACKTRConfig, {"actor": KFACConfig()}, "actor must be of the class SampledKFACConfig, got"),
    ],
)
def test_other_types_are_one_line(kind: Any, settings: dict[str, Any], message: str) -> None:
    needed = {"env": "X-v0"} if kind is Config else {}
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        kind(**needed, **settings)
    assert "\n" not in str(caught.value)


def test_a_run_of_lists_goes_on(tmp_path: Path) -> None:
    config = preset("CartPole-v1", "acktr")[0]
    network = dataclasses.replace(config.network, hidden=[8, 8])
    config = dataclasses.replace(config, network=network, num_envs=2, eval_episodes=1)
    with ACKTR("CartPole-v1", config) as agent:
        agent.learn(64, run_dir=tmp_path)
        agent.learn(64, run_dir=tmp_path)
