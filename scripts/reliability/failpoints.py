"""Death at every change that a run makes to its files, found by watching it.

A fail point is a call of the system (rename, fsync, write, ...) on a file of the run, in a run that
starts or in one that is resumed. The library knows nothing of them: the functions of ``os`` are
replaced in the process that shall die, which kills itself before or after a call, or half-way
through a write.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shlex
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.reliability import runs
from scripts.reliability.processes import Command
from scripts.reliability.trials import Trial, forked, remove

TIMES = 5
"""Trials of each fail point."""

_CALLS = ("rename", "replace", "fsync", "write", "ftruncate", "mkdir", "rmdir", "unlink")
_WORDS = (
    "train --env CartPole-v1 --algo a2c --seed 7 --device cpu --num-envs 4 --num-steps 16 "
    "--total-timesteps 640 --checkpoint-freq 64 --eval-episodes 2 --run-dir runs --eval-freq "
)
_ARGV = {
    "start": shlex.split(f"{_WORDS} 256"),
    "resume": shlex.split(f"{_WORDS} 256"),
    "unjudged": shlex.split(f"{_WORDS} 0"),
}
"""Commands of runs that start, of such that were killed and are resumed, and of those that start
without evaluations, whose best checkpoint is that of the best training return."""
_BREAK = ("after rename checkpoints/last.tmp > checkpoints/last", 4)
"""Where a run is killed that is resumed then: its logs go further than its checkpoint soon."""
_LIMIT = 600.0


class Watch:
    """Counts the calls on files of a folder; kills its process at one of them.

    Args:
        here: The folder.
        point: A moment (before, after, half) and a call, as :meth:`_seen` names it.
        number: Which of those calls.
    """

    def __init__(self, here: Path, point: str = "", number: int = 0) -> None:
        self._here, self._number = f"{here}/", number
        self._moment, _, self._name = point.partition(" ")
        self.seen: Counter[str] = Counter()

    def install(self) -> None:
        """Replace the functions, in this process, for good."""
        for name in _CALLS:
            setattr(os, name, self._watched(name, getattr(os, name)))
        opened = io.open

        def open_new(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wxa"):
                return opened(file, mode, *rest, **more)
            return self._call("open", lambda: opened(file, mode, *rest, **more), file)

        io.open = open_new

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            places = args[:2] if name in ("rename", "replace") else args[:1]
            return self._call(
                name,
                lambda: function(*args, **more),
                *places,
                at=more.get("dir_fd"),
                half=lambda: function(args[0], args[1][: len(args[1]) // 2]),
            )

        return call

    def _call(
        self,
        name: str,
        do: Callable[[], Any],
        *places: Any,
        at: int | None = None,
        half: Callable[[], Any] | None = None,
    ) -> Any:
        found = [self._place(place, at) for place in places]
        if None in found:
            return do()
        point = f"{name} {' > '.join(map(str, found))}"
        self.seen[point] += 1
        struck = point == self._name and self.seen[point] == self._number
        if struck and self._moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        given = half() if struck and half is not None and self._moment == "half" else do()
        if struck:
            os.kill(os.getpid(), signal.SIGKILL)
        return given

    def _place(self, place: Any, at: int | None) -> str | None:
        """A file of the folder by its name there, without what is random in it."""
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        elif at is not None:
            place = os.path.join(os.readlink(f"/proc/self/fd/{at}"), os.fspath(place))
        path = os.path.abspath(os.fspath(place))
        if not path.startswith(self._here) or "events.out" in path or path.endswith("said.txt"):
            return None
        return re.sub(r"\.tmp-[0-9a-f]{8}", ".tmp", path[len(self._here) :])


def points(scratch: Path) -> dict[str, int]:
    """The fail points, as "start BEFORE CALL FILE", and how often a run passes each; found once."""
    known = scratch / "points.json"
    if not known.exists():
        outcome = forked(lambda: _found(scratch), scratch / "watched.txt", _LIMIT)
        if outcome.wrong:
            raise RuntimeError(f"the watched run fails: {outcome.said}")
    found: dict[str, int] = json.loads(known.read_text())
    return found


def plan(count: int, scratch: Path) -> list[Trial]:
    """Each fail point so many times, at different passes; the first times of all points first."""
    found = points(scratch)
    trials = [Trial(name, number) for number in range(TIMES) for name in found]
    if count >= len(trials):
        return trials
    return random.Random(0).sample(trials, count)


def struck(trial: Trial, here: Path) -> str:
    """Die at a fail point, then go on: the end is that of the undisturbed run."""
    stage, point = trial.what.split(" ", 1)
    argv = _ARGV[stage]
    straight, _ = runs.reference(here.parent / f"whole-{stage}", argv)
    number = random.Random(trial.what).randrange(points(here.parent)[trial.what])
    number = (number + trial.seed) % points(here.parent)[trial.what] + 1
    if stage == "resume":
        _broken(here)
    code, _ = _watched(here, argv, Watch(runs.run_folder(here, argv), point, number))
    assert code in (0, -signal.SIGKILL), f"exit code {code}: {(here / 'said.txt').read_text()}"
    steps = runs.steps_done(here, argv)
    runs.finish(here, argv)
    runs.require_same(here, argv, straight)
    passed = "" if code else " (not passed)"
    return f"pass {number}{passed}, {steps} steps saved"


def _found(scratch: Path) -> str:
    here = scratch / "watched"
    found: dict[str, int] = {}
    for stage, argv in _ARGV.items():
        remove(here)
        here.mkdir()
        if stage == "resume":
            _broken(here)
        _, seen = _watched(here, argv, Watch(runs.run_folder(here, argv)))
        for call, times in seen.items():
            if stage == "unjudged" and not re.match("rename .*checkpoints/best", call):
                continue  # the others are those of a start
            halves = ("half",) if call.startswith("write") else ()
            found |= {f"{stage} {each} {call}": times for each in ("before", *halves, "after")}
    remove(here)
    (scratch / "points.json").write_text(json.dumps(found, indent=1))
    return f"{len(found)} points"


def _broken(here: Path) -> None:
    """A run whose trainer was killed."""
    argv = _ARGV["resume"]
    code, _ = _watched(here, argv, Watch(runs.run_folder(here, argv), *_BREAK))
    assert code == -signal.SIGKILL, f"exit code {code}: {(here / 'said.txt').read_text()}"


def _watched(here: Path, argv: list[str], watch: Watch) -> tuple[int, dict[str, int]]:
    """Run the command under a watch; its exit code, and what was seen if it ended by itself."""
    seen = here / "seen.json"
    seen.unlink(missing_ok=True)

    def before() -> None:
        watch.install()
        leave = os._exit

        def told(code: int) -> None:
            seen.write_text(json.dumps(watch.seen))
            leave(code)

        os._exit = told  # type: ignore[assignment]

    code = Command(runs.continued(here, argv), here, before).wait(_LIMIT)
    return code, json.loads(seen.read_text()) if seen.exists() else {}
