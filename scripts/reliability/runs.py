"""Training runs that are killed or signalled and must come out as if they had not been."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from acktr.files import write_atomic
from acktr.interrupts import STOPPED
from acktr.runs.checkpoint import checkpoint_exists, load_checkpoint
from acktr.runs.folder import RunFolder
from acktr.runs.tables import last_row
from scripts.reliability.fingerprints import differing, fingerprint, require_events_agree
from scripts.reliability.processes import Command, alive, descendants, gone
from scripts.reliability.trials import Trial, forked, remove

ALGOS = ("acktr", "a2c", "trpo")
SMALL = {
    "CartPole-v1": "--num-envs 4 --num-steps 32 --total-timesteps 7680 --checkpoint-freq 640"
    " --eval-freq 2560",
    "Hopper-v5": "--num-envs 2 --num-steps 64 --total-timesteps 3840 --checkpoint-freq 384"
    " --eval-freq 1280",
    "BreakoutNoFrameskip-v4": "--num-envs 4 --num-steps 20 --total-timesteps 1600"
    " --checkpoint-freq 160 --eval-freq 800",
}
"""Runs of a few seconds, with ten checkpoints and a few evaluations."""

KILLS = 4
"""Kills in a trial."""
_LIMIT = 600.0
"""Seconds that a command may take, on a busy machine."""
_GONE = 5.0
"""Seconds within which what a killed trainer started must be gone."""


def settings(env: str, algo: str) -> list[str]:
    """The words of a command that trains a small run in the folder ``runs``."""
    words = f"train --env {env} --algo {algo} --seed 7 --device cpu --eval-episodes 2 {SMALL[env]}"
    return [*words.split(), "--run-dir", "runs"]


def run_folder(here: Path, argv: list[str]) -> Path:
    """The folder of the run of a command."""
    env, algo = argv[argv.index("--env") + 1], argv[argv.index("--algo") + 1]
    return here / "runs" / env / algo / "seed7"


def continued(here: Path, argv: list[str]) -> list[str]:
    """The command that goes on with a run: the same one where it was killed at its start."""
    run = run_folder(here, argv)
    if not checkpoint_exists(RunFolder(run).last):
        return argv
    return ["train", "--resume", str(run.relative_to(here))]


def finish(here: Path, argv: list[str]) -> None:
    """Go on with a run to its end; AssertionError if that fails."""
    command = Command(continued(here, argv), here)
    code = command.wait(_LIMIT)
    assert code == 0, f"going on gave exit code {code}: {command.said[-400:]}"
    assert "warning" not in command.said, command.said[command.said.index("warning") :][:300]


def reference(scratch: Path, argv: list[str]) -> tuple[dict[str, str], float]:
    """The fingerprint of the run that nothing disturbs, and its seconds; made once."""
    known = scratch / f"{'-'.join(run_folder(scratch, argv).parts[-3:-1])}.json"
    if not known.exists():
        here = scratch / f"{known.stem}-whole"
        remove(here)
        here.mkdir(parents=True)

        def whole() -> str:
            began = time.monotonic()
            finish(here, argv)
            seconds = time.monotonic() - began
            return json.dumps([fingerprint(run_folder(here, argv)), seconds])

        outcome = forked(lambda: _in_file(whole, here / "found.json"), here / "log.txt", _LIMIT)
        if outcome.wrong:
            raise RuntimeError(f"the undisturbed run fails: {outcome.said}")
        write_atomic(known, (here / "found.json").read_bytes())
        remove(here)
    found, seconds = json.loads(known.read_text())
    return found, seconds


def _in_file(work: Callable[[], str], path: Path) -> str:
    path.write_text(work())
    return "done"


def require_same(here: Path, argv: list[str], straight: dict[str, str]) -> None:
    """The run must be as the undisturbed one."""
    run = run_folder(here, argv)
    found = fingerprint(run)
    assert found == straight, f"differs from the undisturbed run: {differing(found, straight)}"
    require_events_agree(run)


def steps_done(here: Path, argv: list[str]) -> int:
    """Steps of the last checkpoint, which must be sound if it is there; 0 without one."""
    last = RunFolder(run_folder(here, argv)).last
    return int(load_checkpoint(last)[0]["timesteps"]) if checkpoint_exists(last) else 0


def plan_grid(count: int, cases: int) -> list[Trial]:
    """Trials of so many cases each, over environments and algorithms in turn."""
    envs, trials = list(SMALL), -(-count // cases)
    return [
        Trial(
            f"{envs[number % 3]} {ALGOS[(number + number // 3) % 3]}",
            number,
            min(cases, count - number * cases),
        )
        for number in range(trials)
    ]


def plan_kills(count: int, scratch: Path) -> list[Trial]:
    """Several kills in each trial."""
    return plan_grid(count, KILLS)


def plan_signals(count: int, scratch: Path) -> list[Trial]:
    """Half of them single SIGTERMs, half two signals within 10 ms."""
    grid = plan_grid(count, 1)
    return [
        Trial(f"{('SIGTERM', 'two signals')[trial.seed % 2]} {trial.what}", trial.seed)
        for trial in grid
    ]


def killed_at_random(trial: Trial, here: Path) -> str:
    """Kill -9 a run at random moments; nothing is lost, no process stays, the end is the same."""
    rng = random.Random(f"kill {trial.seed}")
    argv = settings(*trial.what.split())
    straight, seconds = reference(here.parent, argv)
    total = int(argv[argv.index("--total-timesteps") + 1])
    kills, steps, where = 0, 0, []
    while kills < trial.cases:
        command = Command(continued(here, argv), here)
        share = 1 - steps / total
        code = command.wait_at_most(rng.uniform(0.0, seconds * (0.4 + 0.6 * share)))
        if code is not None:  # it was done before
            assert code == 0, f"exit code {code}: {command.said[-400:]}"
            require_same(here, argv, straight)
            remove(here / "runs")
            steps = 0
            continue
        family = descendants(command.pid)
        command.send(signal.SIGKILL)
        command.wait(10)
        left = gone(family, _GONE)
        assert not left, f"{len(left)} processes survive"
        now = steps_done(here, argv)
        assert now >= steps, f"the checkpoint of step {steps} is lost: {now}"
        kills, steps = kills + 1, now
        where.append(f"{now}")
    finish(here, argv)
    require_same(here, argv, straight)
    return f"killed with {', '.join(where)} of {total} steps saved"


def signalled(trial: Trial, here: Path) -> str:
    """A signal, or two at once, lead to a checkpoint of the last update, within 20 s."""
    rng = random.Random(f"signal {trial.seed}")
    *kind, env, algo = trial.what.split()
    argv = settings(env, algo)
    straight, seconds = reference(here.parent, argv)
    command = Command(argv, here)
    command.wait_at_most(rng.uniform(0.05, seconds))
    sent = [signal.SIGTERM] if kind[0] == "SIGTERM" else rng.choices(sorted(STOPPED), k=2)
    for number in sent:
        command.send(number)
        time.sleep(rng.uniform(0, 0.01))
    began = time.monotonic()
    code = command.wait(20)
    took = time.monotonic() - began
    assert "Traceback" not in command.said, command.said[-600:]
    names = " and ".join(number.name for number in sent)
    assert code in (0, *(STOPPED[number] for number in sent)), f"exit code {code} after {names}"
    run = RunFolder(run_folder(here, argv))
    steps = steps_done(here, argv)
    row = last_row(run.progress) if run.progress.exists() else None
    logged = 0 if row is None else int(row["timesteps"])
    assert steps == logged, f"{logged} steps were logged, {steps} are in the checkpoint"
    if code != 0:
        finish(here, argv)
    require_same(here, argv, straight)
    return f"{names} at step {steps}: exit code {code} within {took:.1f} s"


def plan_parents(count: int, scratch: Path) -> list[Trial]:
    """Four of five a trainer with workers, the others a comparison with trainers."""
    kinds = ("2 workers", "3 workers", "2 workers", "4 workers", "compare")
    return [Trial(kinds[number % len(kinds)], number) for number in range(count)]


def parent_killed(trial: Trial, here: Path) -> str:
    """Kill -9 a parent: nobody survives it."""
    rng = random.Random(f"parent {trial.seed}")
    if trial.what == "compare":
        words = "compare --envs CartPole-v1 --algos acktr a2c --seeds 0 --workers 2"
        wanted, patience, most = 2, 25.0, 12.0
    else:
        workers = trial.what.split()[0]
        words = f"train --env Hopper-v5 --num-envs 4 --env-workers {workers} --device cpu"
        wanted, patience, most = int(workers) - 1, _GONE, 3.0
    words += " --total-timesteps 100000000 --run-dir runs"
    command = Command(words.split(), here)
    until = time.monotonic() + 60
    while len(alive(descendants(command.pid))) < wanted:
        assert command.poll() is None and time.monotonic() < until, command.said[-400:]
        time.sleep(0.02)
    time.sleep(rng.uniform(0, most))
    assert command.poll() is None, command.said[-400:]
    family = alive(descendants(command.pid))
    command.send(signal.SIGKILL)
    command.wait(10)
    began = time.monotonic()
    left = gone(family, patience)
    assert not left, f"{len(left)} of {len(family)} processes survive"
    return f"{len(family)} processes were gone within {time.monotonic() - began:.1f} s"
