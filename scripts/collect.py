"""Copy the small files of runs into an archive that reports are made from.

Usage: python -m scripts.collect RUN [RUN ...] --out results/NAME/runs.zip

RUNs are run folders, folders with runs below them, or archives. They are added to the archive, in
place of what it has of the same runs. Everything is read before anything is written, and the
archive is replaced as a whole.

Runs lie in it as ENV/LABEL/seedN, small enough to be kept by the hundred, and ``acktr report``
makes the tables and figures: the same from the copies as from the runs. Of a run with more than
1,000 episodes monitor.csv keeps the last 100, and moving_mean.csv has its learning curve at 1,000
equidistant steps; progress.csv keeps 25 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from acktr.files import read_limited, safe_name, write_atomic
from acktr.report.archives import SUFFIX, pack, read_archive, unpacked
from acktr.report.curves import MOVING_MEAN, Curve, evenly, load_monitor
from acktr.report.results import Result, find_runs, read_results
from acktr.report.tables import as_csv
from acktr.runs.tables import SIZE_CAP, WINDOW, read_table
from scripts.common import ScriptError, on_files, parsed

PROGRESS_ROWS = 25
EPISODES = 1000
COPIED = ("config.json", "versions.json", "protocol.json", "eval.csv")

Copies = dict[str, dict[str, bytes]]
"""Files of each copy, by its folder such as ENV/LABEL/seedN and their names."""


def thinned(path: Path, most: int) -> bytes:
    """A CSV with at most ``most`` of its rows, first and last included."""
    content = read_table(path)
    kept = evenly(len(content.rows), most)
    return as_csv(content.columns, [[*content.rows[i].values()] for i in kept])


def small_files(run: Path) -> dict[str, bytes]:
    """Whole files, a thinned progress.csv and the command without its paths, if they are there."""
    files = {name: read_limited(run / name, SIZE_CAP) for name in COPIED if (run / name).exists()}
    if (run / "progress.csv").exists():
        files["progress.csv"] = thinned(run / "progress.csv", PROGRESS_ROWS)
    if (run / "command.txt").exists():
        command = read_limited(run / "command.txt", SIZE_CAP).decode("utf-8", "replace")
        shown = re.sub(r" --(run-dir|resume)[ =]\S+", r" --\1 ...", command)
        files["command.txt"] = shown.encode()
    return files


def copied_files(result: Result) -> dict[str, bytes]:
    """What a report needs of a run, so that a report of the copy is that of the run."""
    run = result.folder
    files = small_files(run)
    if result.curve is None:  # no episode has ended yet
        return files
    monitor = load_monitor(run)
    if len(monitor.steps) <= EPISODES and not (run / MOVING_MEAN).exists():
        return files | {"monitor.csv": read_limited(run / "monitor.csv", SIZE_CAP)}
    columns = (monitor.returns, monitor.lengths, monitor.seconds, monitor.steps)
    rows = zip(*(column[-WINDOW:].tolist() for column in columns), strict=True)
    kept = f"last {WINDOW} episodes; the learning curve is in {MOVING_MEAN}"
    comment = json.dumps({"env_id": result.env, "kept": kept})
    curve = curve_csv(result.curve, math.inf if result.finished else result.steps)
    last = as_csv(["r", "l", "t", "step"], rows, comment)
    return files | {MOVING_MEAN: curve, "monitor.csv": last}


def curve_csv(curve: Curve, end: float = math.inf) -> bytes:
    """The content of moving_mean.csv: a curve with all its digits, as far as step ``end``."""
    columns = (curve.steps, curve.episodes, curve.returns)
    points = zip(*(column.tolist() for column in columns), strict=True)
    rows = ([step, episodes, repr(value)] for step, episodes, value in points if step <= end)
    comment = json.dumps({"return": f"mean of the last {WINDOW} episodes"})
    return as_csv(["step", "episodes", "return"], rows, comment)


def write(copies: Copies, archive: Path) -> None:
    """Add the copies to an archive, which is made if missing, in place of older ones.

    Raises:
        ValueError: It has a run of other settings in the place of one.
    """
    old = read_archive(archive) if archive.exists() else {}
    for target, copy in copies.items():
        name = f"{target}/config.json"
        if name in old and old[name] != copy.get("config.json"):
            raise ValueError(
                f"{archive}: it has a run of other settings as {target}; choose another --out"
            )
    files = {name: data for name, data in old.items() if name.rpartition("/")[0] not in copies}
    for target, copy in copies.items():
        files |= {f"{target}/{name}": data for name, data in copy.items()}
    archive.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(archive, pack(files))


def collect(results: Sequence[Result], archive: Path) -> str:
    """Copy the runs to an archive; returns a line that sums it up.

    Raises:
        ValueError: Two have one place there.
    """
    copies: Copies = {}
    for result in results:
        target = f"{safe_name(result.env)}/{result.label}/seed{result.seed}"
        if target in copies:
            raise ValueError(f"{result.folder}: another run goes to {target} too; collect it apart")
        copies[target] = copied_files(result)
    write(copies, archive)
    size = sum(len(data) for files in copies.values() for data in files.values())
    return f"{archive}: {len(results)} runs, {size / 1e6:.2f} MB unpacked\n"


def work(argv: Sequence[str]) -> None:
    """Do what a command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, help="the archive, FILE.zip")
    parser.add_argument("--compact", action="store_true", help="changes nothing; former pages")
    options = parsed(parser, argv)
    if options.out.suffix != SUFFIX:
        raise ScriptError(f"{options.out}: the name must end in {SUFFIX}")
    with unpacked(options.runs) as folders:
        sys.stdout.write(collect(read_results(find_runs(folders)), options.out))


def main(argv: Sequence[str]) -> int:
    """Collect the runs named on the command line; 2 with one line if that cannot be done."""
    return on_files("collect", lambda: work(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
