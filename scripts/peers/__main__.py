"""Train the algorithms of stable-baselines3 and sb3-contrib as our own runs are trained.

Environments, seeds, steps and evaluation are the same; RUN_DIR/ENV/PEER/seedN is written. Several
values of --peers, --envs or --seeds are a grid, of which finished runs are skipped. A run that is
stopped is made from the start the next time. sb3-a2c and sb3-trpo take the values of our own preset
for the environment; sb3-ppo takes those published for it in rl-baselines3-zoo, and where there are
none the library's defaults; sb3-maskable-ppo is the same with action masks.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.text import Text

from acktr.compare.pool import ChildProcess, Pool
from acktr.envs import describe
from acktr.files import safe_name
from acktr.interrupts import Interrupts
from acktr.runs.progress import Display, pace
from acktr.runs.session import TrainingFault
from scripts.common import ScriptError, complain, given_once, integer, parsed, run

if TYPE_CHECKING:
    from scripts.peers.runs import Job

PEERS = ("sb3-a2c", "sb3-trpo", "sb3-ppo", "sb3-maskable-ppo")
NUMERIC_FAILURE, ENVIRONMENT_FAULT = 70, 76
_LAST_SEED = 2**31 - 2**20 - 1
_POLL = 0.2
_INTERVAL = 30.0
"""Seconds between lines that say how far the runs are."""


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 done; 2 bad input; 70 training broke, or some runs of a grid failed; 76 the environment
    broke; 130 Ctrl-C, 75 SIGTERM.
    """
    note = "finished runs are kept, the same command makes the others"
    try:
        return run("peers", lambda interrupts: _train(argv, interrupts), note)
    except TrainingFault as error:
        complain("peers", f"error: {error}")
        return ENVIRONMENT_FAULT if error.environment else NUMERIC_FAILURE


def _train(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = _options(argv)
    for module in ("stable_baselines3", "sb3_contrib"):
        if find_spec(module) is None:
            raise ScriptError(f"{module} is not installed; pip install 'acktr[bench]' brings it")
    from scripts.peers.runs import Job, is_finished, make
    from scripts.peers.settings import choose

    for env in asked.envs:
        describe(env)
    jobs = []
    for env in asked.envs:
        for peer in asked.peers:
            settings, source = choose(peer, env)
            jobs += [
                Job(
                    peer=peer,
                    env=env,
                    seed=seed,
                    total_timesteps=asked.total_timesteps,
                    eval_episodes=asked.eval_episodes,
                    settings=settings,
                    source=source,
                )
                for seed in asked.seeds
            ]
    if len(jobs) == 1:
        print(make(jobs[0], asked.run_dir, ["python", "-m", "scripts.peers", *argv]))
        return 0
    left = [job for job in jobs if not is_finished(job, asked.run_dir)]
    print(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished", flush=True)
    failed = _make_all(left, asked, interrupts)
    if failed:
        complain("peers", f"error: {len(failed)} runs failed: {', '.join(failed)}")
    return NUMERIC_FAILURE if failed else 0


def _make_all(jobs: Sequence[Job], asked: argparse.Namespace, interrupts: Interrupts) -> list[str]:
    """Make runs in processes, each of which is this script with one run.

    One that fails does not stop the others. After a signal the processes are asked to stop, upon
    which they remove their unfinished folders; a second one kills them.

    Returns:
        Names of the runs that failed.

    Raises:
        Stopped: A signal came.
    """
    failed: list[str] = []
    done, started = 0, time.monotonic()
    display = Display("peers", _INTERVAL)
    display.due()  # the first interval begins: there is nothing to tell yet
    with TemporaryDirectory(prefix="peers-") as logs, closing(display), interrupts.deferred():
        children: dict[str, ChildProcess] = {}

        def launch(job: Job) -> ChildProcess:
            args = ["--peer", job.peer, "--env", job.env, "--seed", str(job.seed)]
            for flag in ("run_dir", "total_timesteps", "eval_episodes"):
                args += [f"--{flag.replace('_', '-')}", str(getattr(asked, flag))]
            log = Path(logs) / f"{safe_name(job.name)}.log"
            children[job.name] = ChildProcess(args, log, module="scripts.peers")
            return children[job.name]

        with Pool(jobs, asked.workers, launch) as pool:
            while pool.busy:
                if interrupts.requested is not None:
                    pool.stop()
                for end in pool.step():
                    done += 1
                    how = "" if end.code == 0 else f"{end.job.name} failed, code {end.code}: "
                    failed += [end.job.name] if how else []
                    if interrupts.requested is None:
                        print(f"[{done}/{len(jobs)}] {how}{end.line}", flush=True)
                if display.due():
                    eta = pace(done, len(jobs), done / (time.monotonic() - started))[1]
                    lines = [f"{done} of {len(jobs)} runs made, ETA {eta}"]
                    for job in pool.running:
                        lines.append(
                            f"  {job.name}: {children[job.name].last_line() or 'starting'}"
                        )
                    display.show("\n".join(lines), done, len(jobs), *map(Text, lines))
                time.sleep(_POLL)
        interrupts.check()
    return failed


def _options(argv: Sequence[str]) -> argparse.Namespace:
    """Options of a command line; help is printed and ends in SystemExit.

    Raises:
        ScriptError: One line that says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.peers", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    names = ", ".join(PEERS)
    add("--peers", "--peer", nargs="+", required=True, choices=PEERS, metavar="PEER", help=names)
    add("--envs", "--env", nargs="+", required=True, metavar="ENV")
    seed = integer(0, _LAST_SEED)
    add("--seeds", "--seed", nargs="+", type=seed, default=[0], metavar="SEED")
    add("--run-dir", type=Path, default=Path("runs"), help="default runs")
    steps = integer(1, 10**10)
    what = "environment steps, summed over parallel environments; default 1000000"
    add("--total-timesteps", type=steps, default=1_000_000, metavar="STEPS", help=what)
    add("--eval-episodes", type=integer(1, 10_000), default=20, metavar="N", help="default 20")
    add("--workers", type=integer(1, 256), default=1, help="processes of a grid; default 1")
    asked = parsed(parser, argv)
    given_once(asked, "peers", "envs", "seeds")
    return asked


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
