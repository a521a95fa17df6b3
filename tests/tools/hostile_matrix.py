"""Every way to misbehave, in every place, with every command: what is said, and what is left.

`python -m tests.tools.hostile_matrix FOLDER` runs all of them and prints a table; some minutes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.tools.command_line import environment
from tests.tools.hostile import ENV_ID, FAULTS, Fault

DEEDS = (
    *("raise", "sys.exit", "os._exit", "crash", "text", "nan", "shape", "dtype", "outside"),
    *("hang", "hang in reset", "hang in init", "hang in close"),
    *("default dtype", "working directory", "numpy's generator", "handler"),
)
PLACES = {"here": 1, "workers": 2, "apart": "auto"}
"""Numbers of processes: in the one that trains, in another one too, or in another one only."""
COMMANDS = ("train", "eval", "compare", "agent")
TIMEOUT = 1.0
_LIMIT = 120.0
_AGENT = """
import dataclasses, sys
from acktr import ACKTR
from acktr.config import preset
from acktr.envs import EnvError, EnvFault
config = dataclasses.replace(preset({env!r})[0], **{settings!r})
try:
    with ACKTR({env!r}, config, env_kwargs={{"deed": {deed!r}}}) as agent:
        agent.learn(240)
except EnvFault as error:
    sys.exit(f"76 {{error}}")
except EnvError as error:
    sys.exit(f"2 {{error}}")
"""


@dataclass(frozen=True)
class Case:
    """A deed done in a place while a command runs."""

    deed: str
    place: str
    command: str

    @property
    def fault(self) -> Fault:
        """What is known about the deed."""
        return FAULTS[self.deed]


def cases() -> Iterator[Case]:
    """All cases."""
    for command in COMMANDS:
        for place in PLACES:
            if (command, place) != ("agent", "apart"):  # its environments are the caller's
                yield from (Case(deed, place, command) for deed in DEEDS)


def problem(case: Case, folder: Path) -> str:
    """Run a case in an empty folder; what was wrong about it, nothing if nothing was.

    Within the time limit the process ends with the right code, the line that names the fault is
    said, there is no traceback, and no process is left.
    """
    settings = {"num_envs": 3, "num_steps": 8, "total_timesteps": 240, "eval_episodes": 2}
    settings |= {"device": "cpu", "env_timeout": TIMEOUT, "env_workers": PLACES[case.place]}
    (folder / "settings.json").write_text(json.dumps(settings))
    argv, variables = _command(case, settings), {"OMP_NUM_THREADS": "1"}
    if case.command == "eval":
        train = [*_ACKTR, "train", "--env", ENV_ID, "--config", "settings.json"]
        _ended(train, folder, variables)
        variables["HOSTILE"] = case.deed
    code, said, left = _ended(argv, folder, variables)
    for log in sorted(folder.glob("runs/logs/**/*.log")):
        said += log.read_text()
    if left or code is None:
        return "a process is left" if left else f"not ended within {_LIMIT:g} s"
    if code not in _codes(case):
        return f"exit code {code}, not {_codes(case)}: {said[-400:]}"
    dies = case.deed == "crash" and -signal.SIGSEGV in _codes(case)
    if dies and case.command == "agent":  # a caller's program says nothing unless it asks for it
        return ""
    if not re.search("Segmentation fault" if dies else case.fault.said, said):
        return f"not named: {said[-400:]}"
    return f"a traceback: {said[-400:]}" if "Traceback" in said else ""


_RUN = f"runs/{ENV_ID.replace(':', '_')}/acktr/seed0"
_ACKTR = [sys.executable, "-m", "acktr"]


def _command(case: Case, settings: dict[str, object]) -> list[str]:
    chosen = ["--config", "settings.json", "--env-kwargs", f"deed={case.deed}"]
    if case.command == "train":
        return [*_ACKTR, "train", "--env", ENV_ID, *chosen]
    module = ["--import", ENV_ID.partition(":")[0]]
    if case.command == "compare":
        algos = ["--algos", "acktr", "--seeds", "0"]
        return [*_ACKTR, "compare", "--envs", ENV_ID, *algos, *chosen, *module]
    if case.command == "eval":
        return [*_ACKTR, "eval", _RUN, "--num-envs", "3", *module]
    return [sys.executable, "-c", _AGENT.format(env=ENV_ID, settings=settings, deed=case.deed)]


def _codes(case: Case) -> tuple[int, ...]:
    """The exit codes that are right."""
    fault = case.fault
    if fault.goes_on:
        return (0,)
    if case.command == "agent":
        alone = case.place != "workers"
        return (-signal.SIGSEGV,) if case.deed == "crash" and alone else (1,)
    if fault.where == "init":
        return (2,)
    if case.command == "compare":
        return (1,)
    return (-signal.SIGSEGV,) if case.deed == "crash" and case.place == "here" else (76,)


def _ended(
    argv: list[str], folder: Path, variables: dict[str, str]
) -> tuple[int | None, str, bool]:
    """The exit code and output of a process, and whether others of its session are left."""
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return None, said, False
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, said, True
    return process.returncode, said, False


def main(root: Path) -> int:
    """Run all cases in folders of their own; the number of those with a problem."""
    wrong = 0
    for number, case in enumerate(cases()):
        folder = root / str(number)
        folder.mkdir(parents=True)
        found = problem(case, folder)
        wrong += bool(found)
        print(f"{case.command} {case.place} {case.deed}: {found or 'named'}", flush=True)  # noqa: T201
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]))))
