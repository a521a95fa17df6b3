"""A long run: memory, open files, threads, processes and speed stay as they are."""

from __future__ import annotations

import csv
import math
import os
import signal
import time
from pathlib import Path
from statistics import fmean, median

from acktr.runs.tables import last_row
from scripts.reliability.processes import Command, alive, descendants, kill
from scripts.reliability.trials import Trial

ENVS = ("BreakoutNoFrameskip-v4", "Hopper-v5")
GROWTH = 0.05
"""The most that memory may grow after the warm-up."""
_EVERY = 5.0
_COLUMNS = ("seconds", "rss_mb", "files", "threads", "processes", "steps")


def plan(count: int, scratch: Path) -> list[Trial]:
    """One trial of so many minutes for both environments at once."""
    return [Trial(f"{count} minutes", 0, count)]


def soaked(trial: Trial, here: Path) -> str:
    """Train both environments side by side and look at them every few seconds."""
    commands = {}
    for env in ENVS:
        folder = here / env
        folder.mkdir()
        words = f"train --env {env} --num-envs 8 --device cpu --total-timesteps 1000000000"
        commands[env] = Command([*words.split(), "--run-dir", "runs"], folder)
    seconds = 60.0 * trial.cases
    samples: dict[str, list[dict[str, float]]] = {env: [] for env in ENVS}
    began = time.monotonic()
    try:
        while (now := time.monotonic() - began) < seconds:
            for env, command in commands.items():
                assert command.poll() is None, f"{env} ended: {command.said[-300:]}"
                samples[env].append(_sample(env, command, now, here / env))
            time.sleep(_EVERY)
        codes = []
        for command in commands.values():
            command.send(signal.SIGTERM)
            codes.append(command.wait(60))
        assert codes == [75, 75], f"exit codes {codes}"
    finally:
        for command in commands.values():
            kill({command.pid, *descendants(command.pid)} if command.poll() is None else ())
    kept = here.parent.parent.parent
    for env, rows in samples.items():
        with (kept / f"soak-{env}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)
    warm = min(600.0, seconds / 3)
    return "; ".join(f"{env}: {judged(rows, warm)}" for env, rows in samples.items())


def judged(rows: list[dict[str, float]], warm: float) -> str:
    """What the samples after the warm-up say; AssertionError if something grew.

    Files, threads and processes are compared by their medians, since a sample may come while a
    file is written; what leaks one of them stays.
    """
    rows = [row for row in rows if row["seconds"] >= warm]
    quarter = max(1, len(rows) // 4)
    early, late = rows[:quarter], rows[-quarter:]
    growth = _mean(late, "rss_mb") / _mean(early, "rss_mb") - 1
    for name in ("files", "threads", "processes"):
        low, high = (median(row[name] for row in part) for part in (early, late))
        assert high <= low, f"{name}: {low:g}, later {high:g}"
    assert growth < GROWTH, f"memory grew by {growth:.1%}"
    speed = [(part[-1]["steps"] - part[0]["steps"]) for part in (early, late)]
    drift = speed[1] / speed[0] - 1 if speed[0] > 0 else math.nan
    return f"memory {growth:+.2%} to {_mean(late, 'rss_mb'):.0f} MB, speed {drift:+.1%}"


def _mean(rows: list[dict[str, float]], name: str) -> float:
    return fmean(row[name] for row in rows)


def _sample(env: str, command: Command, now: float, here: Path) -> dict[str, float]:
    """What the processes of a run hold."""
    family = alive({command.pid, *descendants(command.pid)})
    row = last_row(here / "runs" / env / "acktr" / "seed0" / "progress.csv")
    found = dict.fromkeys(_COLUMNS, 0.0) | {"seconds": now, "processes": len(family)}
    for pid in family:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        found["rss_mb"] += int(fields["VmRSS"].split()[0]) / 1024
        found["threads"] += int(fields["Threads"])
        found["files"] += len(os.listdir(f"/proc/{pid}/fd"))
    found["steps"] = float(row["timesteps"]) if row is not None else 0.0
    return found
