"""Every published table of results/ comes again, byte for byte, from the archived runs.

The commands are those of the reports and of the documents in results/.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from acktr.cli.main import main
from acktr.report import page
from scripts import band, batch_size, returns_at, six_games, time_to_score

RESULTS = Path(__file__).resolve().parents[2] / "results"
TABLES = (".md", ".csv")
BREAKOUT = (
    "results/batch_size/runs.zip/BreakoutNoFrameskip-v4/acktr-640 "
    "results/atari/runs.zip/BreakoutNoFrameskip-v4/float32-whole"
)
SCRIPTS: dict[str, tuple[Callable[[Sequence[str]], int], str, set[str]]] = {
    "band": (
        band.main,
        "results/atari/runs.zip/PongNoFrameskip-v4 --label final --within float32-whole "
        "--out results/atari",
        {"band.csv"},
    ),
    "band of Breakout": (
        band.main,
        f"{BREAKOUT} --label acktr-640 --within float32-whole --out results/atari/breakout",
        {"band.csv"},
    ),
    "band of two processes": (
        band.main,
        "results/distributed/runs.zip --label two-processes --within one-process "
        "--out results/distributed",
        {"band.csv"},
    ),
    "batch_size": (
        batch_size.main,
        "results/batch_size/runs.zip --speed results/performance/batch.json --threshold 3 "
        "--out results/batch_size",
        {"batch_size.csv"},
    ),
    "returns_at": (
        returns_at.main,
        "results/critic/runs.zip/HalfCheetah-v5 results/mujoco/runs.zip/HalfCheetah-v5/acktr-paper "
        "--labels acktr-paper acktr-paper-adam acktr-paper-sgd "
        "--steps 200000 400000 600000 700000 800000 960000 --out results/critic",
        {"returns_at.csv", "returns_at.md"},
    ),
    "returns_at of Breakout": (
        returns_at.main,
        "results/critic/breakout/runs.zip results/atari/runs.zip/BreakoutNoFrameskip-v4/acktr "
        "--labels acktr-separate acktr-separate-adam acktr "
        "--steps 500000 1000000 1500000 2000000 --out results/critic/breakout",
        {"returns_at.csv", "returns_at.md"},
    ),
    "returns_at of batches": (
        returns_at.main,
        "results/batch_size/long/runs.zip results/atari/runs.zip/BreakoutNoFrameskip-v4/acktr "
        "results/atari6/runs.zip/BreakoutNoFrameskip-v4/a2c "
        "results/atari6/runs.zip/QbertNoFrameskip-v4 --labels acktr-160 acktr a2c "
        "--steps 500000 1000000 1500000 2000000 2400000 3000000 4000000 5000000 6000000 6500000 "
        "--out results/batch_size/long",
        {"returns_at.csv", "returns_at.md"},
    ),
    "returns_at of adaptive sigma": (
        returns_at.main,
        "results/critic/adaptive_atari/runs.zip "
        "results/atari/runs.zip/BreakoutNoFrameskip-v4/acktr "
        "results/atari6/runs.zip/BeamRiderNoFrameskip-v4/acktr --labels acktr acktr-adaptive "
        "--steps 500000 1000000 1500000 2000000 2500000 3000000 "
        "--out results/critic/adaptive_atari",
        {"returns_at.csv", "returns_at.md"},
    ),
    "six_games": (
        six_games.main,
        "results/atari6/runs.zip results/atari/runs.zip/BreakoutNoFrameskip-v4/acktr "
        "--out results/atari6",
        {"games.csv", "games.md"},
    ),
    "time_to_score": (
        time_to_score.main,
        "results/mujoco/runs.zip results/atari6/runs.zip "
        "results/atari/runs.zip/BreakoutNoFrameskip-v4/acktr "
        "--speed results/performance/score.json --out results/performance",
        {"time_to_score.csv", "time_to_score.md"},
    ),
}
PLOTS = [
    plot
    for page in ("first/README.md", "critic/README.md", "batch_size/README.md")
    for plot in re.findall(r"    acktr (plot results/.*)", (RESULTS / page).read_text())
]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the archives and the reports of speed that scripts read."""
    for path in (*RESULTS.rglob("*.zip"), *(RESULTS / "performance").glob("*.json")):
        target = tmp_path / "results" / path.relative_to(RESULTS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def tables(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in TABLES}


@pytest.mark.parametrize(
    "published", sorted(RESULTS.rglob("report.md")), ids=lambda p: p.parent.name
)
def test_reports(published: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pictures depend on installed fonts, and what they show is tested elsewhere.
    monkeypatch.setattr(page, "curves_figure", lambda *_: {})
    monkeypatch.setattr(page, "profiles_figure", lambda *_: {})
    command = shlex.split(published.read_text().splitlines()[2])
    assert command[:2] == ["acktr", "report"]
    assert main(command[1:]) == 0
    made = tables(copy / published.parent.relative_to(RESULTS))
    assert len(made) == 5
    assert made == {name: (published.parent / name).read_bytes() for name in made}


@pytest.mark.parametrize("script", SCRIPTS)
def test_tables_of_scripts(script: str, copy: Path) -> None:
    run, options, names = SCRIPTS[script]
    command = f"python -m scripts.{script.split()[0]} {options}"
    assert any(command in page.read_text() for page in RESULTS.rglob("*.md")), "not documented"
    assert run(options.split()) == 0
    out = Path(options.split()[-1])
    made = {name: (out / name).read_bytes() for name in names}
    assert made == {name: (RESULTS.parent / out / name).read_bytes() for name in names}


@pytest.mark.parametrize("command", PLOTS, ids=lambda command: Path(command).stem)
def test_numbers_of_plots(command: str, copy: Path) -> None:
    assert main(command.split()) == 0
    numbers = Path(command.split()[-1]).with_suffix(".csv")
    assert numbers.read_bytes() == (RESULTS.parent / numbers).read_bytes()


def test_nothing_else_is_published() -> None:
    """Tables that a new campaign adds must come again as well."""
    tested = {path.parent / name for path in RESULTS.rglob("report.md") for name in page._NAMES}
    tested |= set(RESULTS.rglob("report.md"))
    for _, options, names in SCRIPTS.values():
        tested |= {RESULTS.parent / options.split()[-1] / name for name in names}
    tested |= {(RESULTS.parent / plot.split()[-1]).with_suffix(".csv") for plot in PLOTS}
    measured = (
        *("performance", "supervised", "approximation", "trust_region"),
        *("race", "reliability", "bayes", "distributed/batches"),
    )
    for path in RESULTS.rglob("*.csv"):
        if not re.match("|".join(measured), path.relative_to(RESULTS).as_posix()):
            assert path in tested, path
