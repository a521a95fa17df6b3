"""Every number of every preset, beside the file that says what it was.

Reported results, saved runs and what users know stand on these numbers: to change one is a
decision, which the CHANGELOG tells. `python -m tests.test_presets` writes the file anew.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from acktr.config import ALGOS, PRESETS, Config, ConfigError, known_presets, preset, to_dict
from acktr.files import flat

KNOWN = Path(__file__).with_name("presets.json")
PLACES = dict.fromkeys(place for _, _, place, _ in known_presets())
FAMILIES = {
    "any other environment": ["X-v0"],
    "Atari": ["PongNoFrameskip-v4"],
    "MuJoCo": ["HalfCheetah-v5"],
    "Pixels": [f"Pixels/{name}-v5" for name in ("Hopper", "Walker2d", "Reacher", "HalfCheetah")],
}
ENVIRONMENTS = [env for place in PLACES for env in FAMILIES.get(place, [place])]
"""Those with values of their own, and some of each family."""


@cache
def values() -> dict[str, dict[str, Any]]:
    """Numbers without a preset, and those of each preset that differ from them."""
    plain = flat(to_dict(Config(env="none")))
    found = {"no preset": plain}
    for algo in ALGOS:
        for name in PRESETS:
            for env in ENVIRONMENTS:
                try:
                    own = flat(to_dict(preset(env, algo, name)[0]))
                except ConfigError:
                    continue
                other = {k: v for k, v in own.items() if k not in plain or plain[k] != v}
                found[f"{algo} {name} {env}"] = other
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", json.loads(KNOWN.read_text()))
def test_no_number_of_a_preset_changes_unseen(name: str) -> None:
    assert values()[name] == json.loads(KNOWN.read_text())[name]


def test_the_file_has_all_presets() -> None:
    assert values().keys() == json.loads(KNOWN.read_text()).keys()


if __name__ == "__main__":
    KNOWN.write_text(json.dumps(values(), indent=1) + "\n")
