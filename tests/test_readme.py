"""What the README prints works: its commands, its Python, its claims about itself."""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

from acktr.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUICK = re.findall(r"```(sh|python)\n(.*?)```", README, re.DOTALL)
PYTHON = {
    f"{path.relative_to(ROOT)} {number}": code
    for path in (ROOT / "README.md", *ROOT.glob("acktr/**/*.md"), *ROOT.glob("envs/*.md"))
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))
}


def test_there_are_three_quick_starts_of_at_most_twelve_lines() -> None:
    assert [kind for kind, _ in QUICK] == ["sh", "python", "python"]
    assert all(len([line for line in code.splitlines() if line]) <= 12 for _, code in QUICK)
    assert len(PYTHON) == 21


def program(code: str, folder: Path) -> None:
    """Run a program in a folder; what it raises is written there too."""
    os.chdir(folder)
    try:
        exec(code, {"__name__": "__main__"})
    except BaseException:
        Path("raised").write_text(traceback.format_exc())
        raise


@pytest.mark.parametrize("name", PYTHON)
def test_python_runs_as_printed(name: str, tmp_path: Path) -> None:
    """With fewer steps, in a process that has what the README's first program imports."""
    code = PYTHON[name].replace("100_000", "2_000").replace("90_000", "1_500")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "gymnasium", "acktr.agent"])
    process = context.Process(target=program, args=(code, tmp_path))
    process.start()
    process.join(120)
    process.kill()
    raised = tmp_path / "raised"
    assert process.exitcode == 0, raised.read_text() if raised.exists() else process.exitcode


def test_commands_run_as_printed(tmp_path: Path) -> None:
    """With fewer steps and seeds, of another environment, on as many threads as torch takes."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    few = ["--total-timesteps", "600", "--num-envs", "2", "--eval-episodes", "2"]
    compared = ["--total-timesteps", "600", "--eval-episodes", "2"]
    printed = QUICK[0][1].replace("--seeds 0-1", "--seeds 0")
    for line in printed.replace("HalfCheetah-v5", "CartPole-v1").splitlines():
        program, name, *rest = shlex.split(line)
        assert program == "acktr"
        more = {"train": few, "compare": compared}.get(name, [])
        done = subprocess.run(
            [sys.executable, "-m", "acktr", name, *rest, *more],
            cwd=tmp_path,
            env=variables | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, (line, done.stderr)
    assert "CartPole-v1" in (tmp_path / "report" / "report.md").read_text()


def test_the_two_commands_are_there() -> None:
    assert "\n    pip install -c constraints.txt . && acktr train --env HalfCheetah-v5\n" in README
    assert '\n    pip install -c constraints.txt ".[test]" && python -m pytest\n' in README
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and f"pip install {pinned[0]} --index-url" in README


def test_every_command_is_in_the_table() -> None:
    table = (ROOT / "acktr" / "cli" / "README.md").read_text()
    assert set(re.findall(r"^\| `acktr (\w+)", table, re.MULTILINE)) == set(COMMANDS)


def test_it_fits_on_a_page() -> None:
    assert len(README.splitlines()) <= 140


def test_the_scores_are_those_of_the_report() -> None:
    """In the README the evaluations, in results/README.md both."""
    with (ROOT / "results" / "mujoco" / "aggregate.csv").open(newline="") as file:
        rows = {
            (r["metric"], r["statistic"], r["label"], r["other"]): r for r in csv.DictReader(file)
        }

    def numbers(*key: str) -> list[float]:
        return [float(rows[key][f"value{end}"]) for end in ("", "_low", "_high")]

    for name, label in (("ACKTR", "acktr"), ("PPO", "sb3-ppo"), ("TRPO", "trpo"), ("A2C", "a2c")):
        value, low, high = numbers("eval", "IQM", label, "")
        assert f"{name} {value:.2f} [{low:.2f}, {high:.2f}]" in README
    claims = (ROOT / "results" / "README.md").read_text()
    shown = re.findall(r"\| (0\.\d\d) \| (0\.\d\d) to (0\.\d\d) \|", claims)
    better = "probability of improvement"
    worse = numbers("last100", better, "a2c", "acktr")
    expected = [numbers(metric, "IQM", "acktr", "") for metric in ("last100", "eval")]
    expected.append([1 - worse[0], 1 - worse[2], 1 - worse[1]])
    expected += [numbers("last100", better, "acktr", other) for other in ("trpo", "sb3-ppo")]
    for printed, values in zip(shown, expected, strict=True):
        assert [float(number) for number in printed] == pytest.approx(values, abs=0.00501)


def test_the_speeds_are_those_of_the_report() -> None:
    for suite, peer in (
        ("atari", "SB3 A2C, DummyVecEnv"),
        ("mujoco_30", "SB3-contrib TRPO, DummyVecEnv"),
    ):
        report = (ROOT / "results" / "performance" / f"{suite}.md").read_text()
        lines = [line.split(" | ") for line in report.splitlines()]
        ours, theirs = (
            float(next(x[3] for x in lines if x[0] == f"| {n}").split()[0].replace(",", ""))
            for n in ("ACKTR", peer)
        )
        assert f"{ours:,.0f}" in README
        assert f"{ours / theirs:.1f} times" in README
    assert (
        "time per step, ACKTR over A2C at the same batch: 1.11"
        in (ROOT / "results" / "performance" / "atari.md").read_text()
    )
    assert "1.11 times A2C's time per step" in README
