"""One case of a campaign each: a corrupt checkpoint, senseless settings, a senseless command line.

A case is its number. What must never happen is an AssertionError that says what did: a traceback, a
checkpoint that is loaded although its hashes do not fit, NaN in what was loaded, an exit code that
is not documented, or a message that is long or drives the terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from acktr.cli import commands
from acktr.cli.main import main
from acktr.config import preset, to_dict
from acktr.environments import training_envs
from acktr.envs import EnvError, EnvFault
from acktr.kfac import FactorError
from acktr.rollout import NonFiniteError
from acktr.runs.checkpoint import CheckpointError, restoring
from acktr.runs.saved import broken_number, read_agent
from acktr.train import Trainer
from scripts.reliability import corruption

LONGEST = 8_000
"""Characters of the longest message; the parser's own take several lines."""

COMMANDS = (
    "train --env CartPole-v1 --seed 3 --acktr.actor.lr 0.1 --network.hidden 64 64 --env-kwargs a=1",
    "train --env CartPole-v1 --total-timesteps 1000 --run-dir runs --label x --algo a2c",
    "train --resume runs --total-timesteps 10",
    "compare --envs CartPole-v1 --algos acktr a2c --seeds 0-4 --workers 1",
    "eval runs --episodes 3 --seed 1 --checkpoint best",
    "record runs --out x.mp4 --max-steps 10",
    "export runs --out x.onnx",
    "plot runs --out x.png",
    "report runs --out x --resamples 200 --labels a b",
)


class Checkpoints:
    """Corrupt copies of one checkpoint, which are loaded and trained on.

    Args:
        sound: The checkpoint's folder.
        here: A folder for the copies.
    """

    def __init__(self, sound: Path, here: Path) -> None:
        self._sound, self._copy = corruption.read(sound), here / "copy"
        self._agent = read_agent(sound)
        self._envs = training_envs(self._agent.config)
        self._trainer = Trainer(self._agent.config, self._envs)

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def case(self, number: int) -> str:
        """Try a case: same, refused, loaded, or stopped if training then ended with a line.

        Raises:
            AssertionError: What must never happen did.
        """
        rng = random.Random(number)
        make = corruption.damaged if rng.random() < 0.4 else corruption.forged
        kind, files = make(self._sound, rng)
        if files == self._sound:
            return "same"
        corruption.write(self._copy, files)
        try:
            agent = read_agent(self._copy)
            if make is corruption.damaged:
                kind += " was loaded"
                raise LookupError("the hashes do not fit")
            with restoring(self._copy):
                self._trainer.load_state_dict(agent.state)
        except CheckpointError as error:
            _check_message(f"case {number}, {kind}", str(error), 1_000)
            assert "\n" not in str(error), f"case {number}: {kind}: several lines"
            return "refused"
        except Exception as error:
            raise AssertionError(f"case {number}: {kind}: {type(error).__name__}") from error
        broken = broken_number(self._trainer.state_dict())
        assert broken is None, f"case {number}: {kind}: {broken} is NaN or Inf"
        try:
            for _ in self._trainer.run(self._trainer.timesteps + 1):
                pass
        except (EnvError, EnvFault, FactorError, NonFiniteError):
            self.close()
            self._envs = training_envs(self._agent.config)
            self._trainer = Trainer(self._agent.config, self._envs)
            return "stopped"
        except Exception as error:
            raise AssertionError(f"case {number}: {kind}: {type(error).__name__}") from error
        return "loaded"


def settings_case(number: int, here: Path) -> int:
    """Try a file of settings; the exit code. Nothing is trained.

    Raises:
        AssertionError: What must never happen did.
    """
    values = to_dict(preset("CartPole-v1")[0])
    file = here / "settings.json"
    file.write_bytes(corruption.settings(values, random.Random(number)))
    return _run(number, ["train", "--env", "CartPole-v1", "--config", str(file)])


def command_case(number: int) -> int:
    """Try a command line in the present folder; the exit code. Nothing is trained.

    Raises:
        AssertionError: What must never happen did.
    """
    rng = random.Random(number)
    return _run(number, corruption.command(rng.choice(COMMANDS).split(), rng))


def _run(number: int, words: Sequence[str]) -> int:
    said, errors = io.StringIO(), io.StringIO()
    shown = " ".join(word[:60] for word in words)
    try:
        with _untrained(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = main(words)
    except Exception as error:
        raise AssertionError(f"case {number}: {shown!r}: {type(error).__name__}") from error
    assert code in (0, 2), f"case {number}: {shown!r}: exit code {code}"
    _check_message(f"case {number}: {shown!r}", errors.getvalue(), LONGEST)
    assert (code == 0) or errors.getvalue().strip(), f"case {number}: {shown!r}: no message"
    return code


@contextlib.contextmanager
def _untrained() -> Iterator[None]:
    """The commands stop before anything is trained."""

    def checked(config: Any, *_: Any, **__: Any) -> str:
        return json.dumps(to_dict(config), allow_nan=False)[:10]

    with (
        mock.patch.object(commands, "start", checked),
        mock.patch.object(commands, "compare", lambda *_, **__: "compared"),
    ):
        yield


def _check_message(what: str, text: str, most: int) -> None:
    assert len(text) <= most, f"{what}: a message of {len(text)} characters"
    odd = [c for c in text if not c.isprintable() and c != "\n"]
    assert not odd, f"{what}: a message with {odd[0]!r}"
