"""A report says what the runs say: every number against hand computation."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from acktr.report.page import ReportSettings, _write, write_report
from acktr.report.references import Reference, load_references
from acktr.report.tables import as_csv
from tests.tools.run_folders import write_run

TOYS = {
    "A-v0": Reference("A-v0", 0.0, 10.0, (5.0, 100.0), "me"),
    "B-v0": Reference("B-v0", -100.0, 100.0, (), ""),
}
SETTINGS = ReportSettings(TOYS, resamples=1000)
COMMAND = ["acktr", "report", "runs", "--out", "a b"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs/ and their report out/.

    A-v0: x returns 2, 4, 9 and y 4, 8. B-v0: x 50, 100 and y 0. C-v0: x only.
    """
    folder = tmp_path_factory.mktemp("made")
    for env, label, finals in (
        ("A-v0", "x", (2.0, 4.0, 9.0)),
        ("A-v0", "y", (4.0, 8.0)),
        ("B-v0", "x", (50.0, 100.0)),
        ("B-v0", "y", (0.0,)),
        ("C-v0", "x", (1.0,)),
    ):
        for seed, final in enumerate(finals):
            returns = [0.0] * 100 + [final] * 100
            evaluation = (final, final + 2)
            write_run(folder / "runs", env, label, seed, returns, evaluation=evaluation)
    write_run(folder / "runs", "A-v0", "y", 7, [3.0] * 5, evaluation=None)
    out = folder / "deep" / "out"
    done = write_report([folder / "runs"], out, SETTINGS, COMMAND)
    assert done == f"{out / 'report.md'}: 9 runs, 1 unfinished left out"
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "runs", tmp_path / "runs")


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "deep" / "out", tmp_path / "out")


def test_runs(out: Path) -> None:
    rows = table(out / "runs.csv")
    assert len(rows) == 10
    first = {
        "env": "A-v0",
        "label": "x",
        "algo": "acktr",
        "seed": "0",
        "total_steps": "10000",
        "steps": "10009",
        "finished": "yes",
        "last100_mean": "2",
        "eval_mean": "3",
        "eval_std": "1",
        "eval_episodes": "2",
        "minutes": "200.0",
        "commit": "abc",
    }
    assert rows[0] == first
    (unfinished,) = [row for row in rows if row["finished"] == "no"]
    assert (unfinished["seed"], unfinished["eval_mean"], unfinished["steps"]) == ("7", "", "10000")


def test_environments(out: Path) -> None:
    rows = {(r["env"], r["label"], r["metric"]): r for r in table(out / "environments.csv")}
    assert len(rows) == 10
    row = rows["A-v0", "x", "last100"]
    assert (row["runs"], row["mean"], row["iqm"]) == ("3", "5", "5")
    # The resampled mean is 2 with probability 1/27 > 2.5 %, as 9 is.
    assert (row["mean_low"], row["mean_high"]) == ("2", "9")
    assert rows["A-v0", "y", "eval"]["mean"] == "7"
    page = (out / "report.md").read_text()
    assert "| A-v0 | x | 3 | 5.00 [2.00, 9.00] | 5.00 [2.00, 9.00] | 6.00 [3.00, 10.00] |" in page
    assert "| B-v0 | y | 1 | 0.00 | 0.00 | 1.00 | 1.00 |" in page  # one run: no interval
    assert "| C-v0 | x | 1 | 1.00 |" in page


def test_aggregates(out: Path) -> None:
    rows = table(out / "aggregate.csv")
    values = {(r["metric"], r["statistic"], r["label"]): float(r["value"]) for r in rows}
    # Scores of x: 0.2, 0.4, 0.9 on A, 0.75, 1 on B; of y: 0.4, 0.8 on A, 0.5 on B.
    assert values["last100", "mean", "x"] == pytest.approx((0.5 + 0.875) / 2)
    assert values["last100", "median", "x"] == pytest.approx((0.5 + 0.875) / 2)
    # Weights 2, 2, 2 and 3, 3 of 12: 0.2 and half of 0.4 go, and 1 goes.
    assert values["last100", "IQM", "x"] == pytest.approx((0.4 + 3 * 0.75 + 2 * 0.9) / 6, abs=1e-7)
    assert values["last100", "optimality gap", "x"] == pytest.approx((0.5 + 0.125) / 2)
    assert values["last100", "mean", "y"] == pytest.approx((0.6 + 0.5) / 2)
    # Evaluations are higher by 1: scores by 0.1 on A and 0.005 on B; the gap stops at 1.
    assert values["eval", "mean", "x"] == pytest.approx((0.6 + 0.88) / 2)
    assert values["eval", "optimality gap", "x"] == pytest.approx((0.4 + 0.245 / 2) / 2)
    assert len(rows) == 2 * (2 * 4 + 1)
    page = (out / "report.md").read_text()
    assert re.search(r"\| x \| 0\.742 \[0\.\d{3}, 0\.\d{3}\] \| 0\.688 ", page)
    assert "Only 2 of 3 environments have runs of every algorithm and reference returns" in page
    assert "Without a finished run: C-v0/y." in page
    assert page.index("Mean of the last 100") < page.index("Evaluation at the end:")


def test_interval_of_an_aggregate_by_enumeration(out: Path) -> None:
    """Of y there are four resamples of A and one of B, equally likely."""
    rows = table(out / "aggregate.csv")
    (row,) = [
        r for r in rows if (r["metric"], r["statistic"], r["label"]) == ("last100", "mean", "y")
    ]
    means = [(np.mean(a) + 0.5) / 2 for a in itertools.product([0.4, 0.8], repeat=2)]
    assert float(row["value_low"]) == pytest.approx(min(means))
    assert float(row["value_high"]) == pytest.approx(max(means))


def test_probability_of_improvement(out: Path) -> None:
    rows = [r for r in table(out / "aggregate.csv") if r["other"]]
    assert [(r["metric"], r["label"], r["other"]) for r in rows] == [
        ("last100", "x", "y"),
        ("eval", "x", "y"),
    ]
    # On A of six pairs 9 > 4, 9 > 8 and 4 = 4; on B both win.
    assert float(rows[0]["value"]) == pytest.approx((2.5 / 6 + 1) / 2)
    assert "| x | y | 0.708 [" in (out / "report.md").read_text()


def test_steps(out: Path) -> None:
    rows = table(out / "steps.csv")
    found = {(r["threshold"], r["label"]): r for r in rows}
    assert len(rows) == 4
    # Episodes end every 50 steps. After 100 zeros the moving mean of x's third run (9) reaches 5
    # with its 56th nine, at step 50 * 156; the first two never do; of y 8 does with its 63rd.
    assert (found["5", "x"]["reached"], found["5", "x"]["median_steps"]) == ("1", "inf")
    assert (found["5", "y"]["reached"], found["5", "y"]["runs"]) == ("1", "2")
    assert found["5", "x"]["ratio"] == ""
    page = (out / "report.md").read_text()
    assert "| A-v0 | 5.00 | never (1/3) | never (1/2) |" in page
    assert "| A-v0 | 100.0 | never (0/3) | never (0/2) |" in page


def test_ratio_of_steps(tmp_path: Path) -> None:
    for label, finals in (("x", (9.0, 8.0, 8.0)), ("y", (6.0, 0.0, 6.0)), ("z", (0.0,))):
        for seed, final in enumerate(finals):
            write_run(tmp_path / "runs", "A-v0", label, seed, [0.0] * 100 + [final] * 100)
    write_report([tmp_path / "runs"], tmp_path / "out", SETTINGS, COMMAND)
    found = {(r["threshold"], r["label"]): r for r in table(tmp_path / "out" / "steps.csv")}
    # 8 reaches 5 with its 63rd episode (50 * 163), 6 with its 84th (50 * 184); grid steps are 10.
    assert [found["5", label]["median_steps"] for label in "xyz"] == ["8150", "9200", "inf"]
    assert float(found["5", "y"]["ratio"]) == pytest.approx(9200 / 8150, rel=1e-5)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| A-v0 | 5.00 | 8,150 (3/3) | 9,200 (2/3) x1.13 | never (0/1) |" in page
    other = ReportSettings(TOYS, baseline="y", resamples=100)
    write_report([tmp_path / "runs"], tmp_path / "out", other, COMMAND)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| A-v0 | 5.00 | 8,150 (3/3) x0.89 | 9,200 (2/3) | never (0/1) |" in page
    assert "| y | x |" in page and "| y | z |" in page


def test_page(out: Path) -> None:
    page = (out / "report.md").read_text()
    for line in (
        "    acktr report runs --out 'a b'\n",
        "Finished runs: 9. Environments: 3. Algorithms: x, y. Seeds: 0 to 2. "
        "Wall-clock in all: 30.0 hours.",
        "Unfinished and left out everywhere: A-v0/y/seed7.\n",
        "| git\\_commit | abc (9) |\n",
        "| A-v0 | 0.00 | 10.00 | 5.00, 100.0 | me |\n",
    ):
        assert line in page
    names = {path.name for path in out.iterdir()}
    for name in re.findall(r"\]\((.*?)\)", page):
        assert name in names
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "profiles.svg").read_bytes()


def test_same_bytes_again(runs: Path, out: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(first) == 9
    write_report([runs / "B-v0", runs / "A-v0", runs / "C-v0"], out, SETTINGS, COMMAND)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_without_references(runs: Path, out: Path) -> None:
    """Raw returns are still compared, and figures of scores from before do not stay."""
    assert (out / "profiles.png").exists()
    write_report([runs], out, ReportSettings({}, resamples=1000), COMMAND)
    page = (out / "report.md").read_text()
    assert "None: no environment has both runs of every algorithm and reference returns." in page
    assert "None: no environment has a threshold." in page
    assert "| x | y | 0.708 [" in page and "| A-v0 | x | 3 | 5.00 [2.00, 9.00] |" in page
    assert not (out / "profiles.png").exists() and "profiles" not in page


def test_labels_metric_and_one_label(runs: Path, out: Path) -> None:
    chosen = ReportSettings(TOYS, metric="eval", labels=("y", "x"), resamples=100)
    write_report([runs], out, chosen, COMMAND)
    page = (out / "report.md").read_text()
    assert page.index("Evaluation at the end:") < page.index("Mean of the last 100 training")
    assert page.index("| A-v0 | y |") < page.index("| A-v0 | x |")
    write_report([runs], out, ReportSettings(TOYS, labels=("x",), resamples=100), COMMAND)
    page = (out / "report.md").read_text()
    assert "there are no two algorithms" in page and "seed7" not in page
    assert "C-v0" in page and "| y |" not in page
    assert {row["label"] for row in table(out / "runs.csv")} == {"x"}


def test_runs_of_different_length(runs: Path, tmp_path: Path) -> None:
    write_run(runs, "A-v0", "y", 9, [1.0], total=500)
    why = (
        "runs of A-v0 have different lengths, which no report compares: 500 steps in y/seed9,"
        " 10,000 steps in x/seed0, .*; name those of one length, such as "
    )
    with pytest.raises(ValueError, match=why) as caught:
        write_report([runs], tmp_path / "out", SETTINGS, COMMAND)
    assert not (tmp_path / "out").exists()
    named = [Path(word) for word in str(caught.value).rpartition("such as ")[2].split(" ")]
    assert runs / "A-v0/x/seed0" in named and runs / "A-v0/y/seed9" not in named


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (ReportSettings({}, labels=("z",)), "no finished run of label 'z'; there are x, y"),
        (ReportSettings({}, baseline="z"), "the baseline 'z' is not in x, y"),
        (ReportSettings({}, labels=("x",), baseline="y"), "the baseline 'y' is not in x"),
    ],
)
def test_refused_settings(runs: Path, tmp_path: Path, settings: ReportSettings, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        write_report([runs], tmp_path / "out", settings, COMMAND)
    assert not (tmp_path / "out").exists()


def test_nothing_has_finished(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "A-v0", "x", 0, [1.0], evaluation=None)
    with pytest.raises(ValueError, match="none of the 1 runs has finished"):
        write_report([tmp_path / "runs"], tmp_path / "out", SETTINGS, COMMAND)


def test_other_files_are_not_replaced(runs: Path, tmp_path: Path) -> None:
    for name in ("report.md", "runs.csv"):
        out = tmp_path / f"has {name}"
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match="would be replaced by the report"):
            write_report([runs], out, SETTINGS, COMMAND)
        assert [path.read_text() for path in out.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is not a folder"):
        write_report([runs], tmp_path / "file", SETTINGS, COMMAND)
    with pytest.raises(ValueError, match="cannot write: Not a directory"):
        write_report([runs], tmp_path / "file" / "below", SETTINGS, COMMAND)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_leaves_nothing(beside: bool, tmp_path: Path) -> None:
    """A limit to the size of files stands for it."""
    import resource

    out = tmp_path / "reports" / "one"
    if beside:
        out.mkdir(parents=True)
        (out / "notes.txt").write_text("mine")
    files = {"runs.csv": b"env", "curves.png": b"x" * 9000, "report.md": b"# Comparison of runs"}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(ValueError, match="one: cannot write: File too large"):
            _write(out, files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*.*")] == (["notes.txt"] if beside else [])
    assert out.parent.exists() == beside
    _write(out, files)
    assert {path.name for path in out.iterdir()} == {*files, *(["notes.txt"] if beside else [])}


def test_names_cannot_break_the_tables(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "A|<b>_`-v0", "x", 0, [1.0], commit="a|b\nc")
    command = ["acktr", "report", "two\nlines"]
    write_report([tmp_path / "runs"], tmp_path / "out", SETTINGS, command)
    page = (tmp_path / "out" / "report.md").read_text()
    assert r"| A\|\<b\>\_\`-v0 | x | 1 |" in page
    assert "    acktr report 'two lines'\n" in page
    assert "git\\_commit" not in page  # not printable


def test_published_curves_and_shipped_references(tmp_path: Path) -> None:
    for label, algo in (("ours", "acktr"), ("a2c", "a2c")):
        for seed in range(2):
            returns = np.linspace(0, 3000, 150)
            write_run(tmp_path / "runs", "Hopper-v5", label, seed, returns, total=10**6, algo=algo)
    shipped = load_references()
    for published in (True, False):
        settings = ReportSettings(shipped, resamples=100, published=published)
        write_report([tmp_path / "runs"], tmp_path / "out", settings, COMMAND)
        svg = (tmp_path / "out" / "curves.svg").read_text()
        # Text is drawn as glyphs, each named in a comment before it.
        assert ("<!-- ACKTR, Wu et al. 2017 -->" in svg) is published
        assert ("<!-- A2C, Wu et al. 2017 -->" in svg) is published
        assert "TRPO" not in svg
        assert ("published" in (tmp_path / "out" / "report.md").read_text()) is published
    assert "| Hopper-v5 | 2,000 |" in (tmp_path / "out" / "report.md").read_text()


def test_names_from_files_are_no_formulas_and_numbers_stay_numbers() -> None:
    data = as_csv(["env", "=x"], [["=cmd|' /C calc'!A0", "-3.5"], ["@A", -2.0], ["a", "-inf"]])
    assert data == b"env,'=x\n'=cmd|' /C calc'!A0,-3.5\n'@A,-2.0\na,-inf\n"
