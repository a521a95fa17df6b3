"""Chains of hashes: the network after every update, the same in each run, whole or split.

`golden.json` has the chains of machines that are known, by versions and processor. After a change
that is meant to change numbers: `python -m tests.test_golden`.
"""

from __future__ import annotations

import json
import platform
from contextlib import closing
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from acktr.environments import training_envs
from acktr.train import Trainer
from scripts.common import cpu_model
from scripts.reliability.fingerprints import chain, digest
from scripts.reliability.runs import ALGOS
from scripts.reliability.splits import small

GOLDEN = Path(__file__).with_name("golden.json")
UPDATES = 20


def machine() -> str:
    versions = f"torch {torch.__version__}, numpy {np.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{versions}, gymnasium {gymnasium.__version__}, Python {platform.python_version()},"
        f" {cpu_model()}, {capability}, 1 thread"
    )


def networks(algo: str) -> list[str]:
    """A hash of the network for every update."""
    found = []
    config = small("CartPole-v1", algo, 3)
    with closing(training_envs(config)) as envs:
        trainer = Trainer(config, envs)
        for _ in trainer.run(UPDATES * config.num_envs * config.num_steps):
            found.append(digest(dict(trainer.network.state_dict())))
    assert len(set(found)) == UPDATES
    return found


@pytest.mark.parametrize("algo", ALGOS)
def test_each_update_is_the_same_again_and_split(algo: str, tmp_path: Path) -> None:
    config = small("CartPole-v1", algo, 3)
    straight = chain(config, UPDATES)
    first = chain(config, 7, save=tmp_path / "7")
    rest = chain(config, UPDATES, origin=tmp_path / "7")
    assert first[:6] + rest == straight[:6] + straight[7:]
    assert chain(small("CartPole-v1", algo, 4), 1)[0] != straight[0]


@pytest.mark.parametrize("algo", ALGOS)
def test_each_update_is_as_it_was(algo: str) -> None:
    known = json.loads(GOLDEN.read_text()).get(machine())
    if known is None:
        pytest.skip(f"nothing is known of {machine()}")
    found = networks(algo)
    wrong = [number for number, (a, b) in enumerate(zip(found, known[algo], strict=True)) if a != b]
    assert not wrong, f"from update {wrong[0] + 1} on the network is another one"


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[machine()] = {algo: networks(algo) for algo in ALGOS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
