"""scripts/gpu: the check of a GPU, as far as a CPU can try it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.files import write_atomic
from acktr.interrupts import Interrupts
from scripts.gpu import __main__ as gpu
from scripts.gpu import report, updates, work
from scripts.gpu.bounds import BOUNDS
from scripts.gpu.noise import same_noise
from scripts.gpu.report import Outcome
from scripts.gpu.stages import STAGES, TOTAL, Row, Stage
from scripts.gpu.work import ROWS, Task

CHECK = Stage(name="kfac", kind="kfac", budget=9.0)
TESTS = Stage(name="tests", kind="tests", budget=9.0)


def judged(task: Task) -> Iterator[Row]:
    """A parameter and a factor, as exact as the CPU's."""
    begun = {"parameters": {"w": torch.zeros(3)}, "statistics": {}}
    near = {"parameters": {"w": torch.ones(3)}, "statistics": {"a": torch.eye(2)}}
    yield from work._judged(task, "toy", "float32", near, near, near, begun)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stages are done in this process; some may fail or hang."""
    trouble: dict[str, str] = {}

    def measured(task: Task, folder: Path, seconds: float, interrupts: Interrupts) -> Outcome:
        task.write(folder)
        work.work(folder)
        return Outcome(task.stage, gpu._rows(folder), 0.0, trouble.get(task.stage.name, "right"))

    kinds = dict.fromkeys(("updates", "kfac", "compile", "speed", "tests"), judged)
    monkeypatch.setattr(work, "_KINDS", kinds)
    monkeypatch.setattr(gpu, "measured", measured)
    return trouble


def check(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = gpu.main(["--dry-run", "--out", str(out), *options])
    found: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return code, {each["stage"]: each for each in found["stages"]}


@pytest.mark.usefixtures("here")
def test_a_dry_run_is_right_and_says_what_was_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, stages = check(tmp_path / "out")
    assert code == 0
    assert [name for name, each in stages.items() if each["state"] == "not run"] == [
        stage.name for stage in STAGES if not stage.dry
    ]
    assert stages["compile"]["why"] == "needs a GPU"
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert text == capsys.readouterr().out
    assert "| compile | (0 s) | | | | not run: needs a GPU |" in text
    assert "No number here" in text


@pytest.mark.usefixtures("here")
def test_a_wrong_result_is_found(tmp_path: Path) -> None:
    code, stages = check(tmp_path, "--fault", "kfac")
    assert code == 1
    assert {name for name, each in stages.items() if each["state"] == "WRONG"} == {"kfac"}
    assert "**WRONG**" in (tmp_path / "gpu_check.md").read_text()


@pytest.mark.parametrize("state", ["failed", "over time"])
def test_the_others_run_after_a_stage_that_hangs(
    state: str, here: dict[str, str], tmp_path: Path
) -> None:
    here["float32"] = state
    code, stages = check(tmp_path)
    assert code == 1
    assert (stages["float32"]["state"], stages["bfloat16"]["state"]) == (state, "right")


@pytest.mark.usefixtures("here")
def test_stages_that_are_left_out(tmp_path: Path) -> None:
    """Nothing checked is no success."""
    code, stages = check(tmp_path, "--only", "kfac")
    assert (code, stages["float32"]["why"]) == (0, "not asked for")
    code, stages = check(tmp_path, "--seconds", "0.001")
    assert (code, stages["kfac"]["why"]) == (1, "no time was left")


def test_a_stage_is_stopped_after_its_time(tmp_path: Path) -> None:
    """Rows that it had found are kept."""
    write_atomic(tmp_path / ROWS, b'[{"what": "first", "value": 1.0, "right": true}]')
    with Interrupts() as interrupts:
        found = gpu.measured(Task(CHECK, "cpu", dry=True), tmp_path, 0.2, interrupts)
    assert (found.state, found.why, len(found.rows)) == ("over time", "stopped after 0 s", 1)
    assert found.seconds < 5


@pytest.mark.parametrize(
    ("code", "last", "state"),
    [
        (0, "12 passed, 3 skipped in 61.0s", "right"),
        (1, "1 failed, 11 passed in 61.0s", "WRONG"),
        (0, "3 skipped in 2.0s", "not run"),
        (5, "no tests ran in 0.1s", "not run"),
        (0, "12/40 tests collected in 3.0s", "not run"),
        (4, "ERROR: usage", "failed"),
    ],
)
def test_what_pytest_said(code: int, last: str, state: str) -> None:
    assert report.settled(gpu.tests(Outcome(TESTS), code, last)).state == state


@pytest.mark.parametrize("name", work._ALONE)
def test_kfac_takes_the_settings_that_only_a_gpu_runs(name: str) -> None:
    task = Task(CHECK, "cpu", dry=True)
    begun, later = work._classified(task, name, torch.device("cpu"), torch.float32, (0,))
    assert (len(begun["parameters"]), later) == (4, [])


def test_bounds() -> None:
    bound = BOUNDS["float32"]
    assert bound.limit(0.0) == bound.least
    assert bound.limit(1e-4) == bound.times * 1e-4
    assert bound.limit(1.0) == bound.most
    assert math.isnan(bound.limit(math.nan))


@pytest.mark.parametrize("which", ["mine", "other"])
def test_no_number_is_never_right(which: str) -> None:
    task = Task(CHECK, "cpu", dry=True)
    ones = torch.ones(3).double()
    one = {kind: {"x": ones, "y": ones} for kind in ("parameters", "statistics")}
    begun = {kind: {"x": 0 * ones, "y": 0 * ones} for kind in one}
    lost = {kind: {"x": ones, "y": math.nan * ones} for kind in one}

    def right(**found: work.State) -> list[bool]:
        given = {"mine": one, "other": one, "wanted": one, "begun": begun} | found
        return [row["right"] for row in work._judged(task, "x", "float32", **given)]

    assert right() == [True, True]
    assert right(**{which: lost}) == [False, False]


def test_acting_without_a_number_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    def acting(*given: object) -> Any:
        return lambda seen: (torch.tensor(math.nan if given[-1] else 1.0), None)

    monkeypatch.setattr(updates, "Acting", acting)
    subject = work._subject(Task(CHECK, "cpu", dry=True), "acktr", False)
    assert math.isnan(updates.acting_difference(subject, torch.device("cpu"), 1))


def test_generators_give_the_same_numbers_in_every_type() -> None:
    drawn = []
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator().manual_seed(3)
        with same_noise():
            drawn.append(torch.randn((4,), generator=generator, dtype=dtype, device="cpu"))
    assert torch.equal(drawn[0].float(), drawn[1])


def test_input_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path), "--only", "nothing"]) == 2
    for more in (["--fault", "compile"], ["--fault", "kfac", "--only", "float32"]):
        assert gpu.main(["--out", str(tmp_path), "--dry-run", *more]) == 2
        assert "would not run" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path)]) == 2
        assert "torch finds no CUDA device here; --dry-run" in capsys.readouterr().err
    assert sum(stage.budget for stage in STAGES[:-1]) <= TOTAL


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code"), [([], 0), (["--fault", "kfac"], 1)])
def test_a_real_dry_run(fault: list[str], code: int, tmp_path: Path) -> None:
    found, stages = check(tmp_path, "--only", "kfac", "tests", *fault)
    assert found == code
    assert len(stages["kfac"]["rows"]) == 8
    assert "tests collected" in stages["tests"]["why"]
