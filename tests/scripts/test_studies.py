"""Every file of settings for the paper's ablations makes a run that is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from acktr.compare.entries import parse_algo
from acktr.compare.grid import make_plans
from acktr.config import Config

FOLDER = Path(__file__).resolve().parents[2] / "scripts/studies"


def study(name: str) -> Config:
    entry = parse_algo(f"{name}={FOLDER / name}.json")
    atari = name.startswith(("separate", "value", "sigma"))
    env = "BreakoutNoFrameskip-v4" if atari else "HalfCheetah-v5"
    (plan,) = make_plans([env], [entry], [0], Path("runs"))
    return plan.config


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_settings_are_what_their_name_says(file: Path) -> None:
    config = study(file.stem)
    acktr, words = config.acktr, file.stem.split("-")
    assert config.preset == ("paper" if "paper" in words else "default")
    assert (acktr.critic_optimizer == "first_order") == bool({"adam", "sgd"} & set(words))
    assert acktr.first_order.optimizer == ("sgd" if "sgd" in words else "adam")
    assert acktr.value_fisher == ("apart" not in words)
    assert (acktr.value_sigma == "adaptive") == ("adaptive" in words)
    if "separate" in words:
        assert not config.network.shared
        assert acktr.first_order.epochs == acktr.critic_steps == 1 or "kfac" in words
        for name in ("lr", "kl_clip", "damping", "structure", "stat_fraction", "cold_steps"):
            assert "kfac" not in words or getattr(acktr.critic, name) == getattr(acktr.actor, name)
