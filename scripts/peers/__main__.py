"""From the command line to the run folders."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from acktr.envs import EnvError, describe
from acktr.interrupts import STOPPED, Interrupts, Stopped
from acktr.runs.folder import RunError
from scripts.peers import options
from scripts.peers.errors import PeerError, PeerFault

BAD_INPUT, NUMERIC_FAILURE, ENVIRONMENT_FAULT = 2, 70, 76


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code.

    0 done; 2 bad input; 70 training broke, or some runs of a grid failed; 76 the environment
    broke; 130 Ctrl-C, 75 SIGTERM.
    """
    try:
        with Interrupts() as interrupts:
            return _run(argv, interrupts)
    except (PeerError, EnvError, RunError) as error:
        _complain(f"error: {error}")
        return BAD_INPUT
    except PeerFault as error:
        _complain(f"error: {error}")
        return ENVIRONMENT_FAULT if error.environment else NUMERIC_FAILURE
    except Stopped as stop:
        _complain("stopped; finished runs are kept, the same command makes the others")
        return STOPPED[signal.Signals(stop.signum)]


def _complain(text: str) -> None:
    line = "".join(c if c.isprintable() else " " for c in text)
    sys.stderr.write(f"peers: {line}\n")
    sys.stderr.flush()


def _say(text: str) -> None:
    sys.stdout.write("".join(c if c.isprintable() else " " for c in text) + "\n")
    sys.stdout.flush()


def _run(argv: Sequence[str], interrupts: Interrupts) -> int:
    asked = options.parse(argv)
    for module in ("stable_baselines3", "sb3_contrib"):
        if find_spec(module) is None:
            raise PeerError(f"{module} is not installed; pip install 'acktr[bench]' brings it")
    from scripts.peers.chosen import choose
    from scripts.peers.grid import Grid
    from scripts.peers.runs import Job, is_finished, make

    for env in asked.envs:
        describe(env)
    jobs = [
        Job(
            peer=peer,
            env=env,
            seed=seed,
            total_timesteps=asked.total_timesteps,
            eval_episodes=asked.eval_episodes,
            chosen=choose(peer, env, asked.like, asked.settings),
        )
        for env in asked.envs
        for peer in asked.peers
        for seed in asked.seeds
    ]
    if len(jobs) == 1:
        _say(make(jobs[0], asked.run_dir, ["python", "-m", "scripts.peers", *argv]))
        return 0
    left = [job for job in jobs if not is_finished(job, asked.run_dir)]
    _say(f"{len(jobs)} runs, {len(jobs) - len(left)} of them finished")
    failed = Grid(left, asked.workers, options.shared(asked), _say, interrupts).run()
    if failed:
        _complain(f"error: {len(failed)} runs failed: {', '.join(failed)}")
    return NUMERIC_FAILURE if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
