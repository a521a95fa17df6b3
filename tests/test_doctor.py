"""Each check of the doctor against a machine that lacks something."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from acktr import doctor
from acktr.doctor import Finding, Trial
from acktr.interrupts import Interrupts, Stopped

ROOT = Path(__file__).resolve().parents[1]


def only(findings: Any, name: str) -> Finding:
    (found,) = (finding for finding in findings if finding.name == name)
    assert isinstance(found, Finding)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended, or does within seconds."""
    for _ in range(100):
        with suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                time.sleep(0.05)
                continue
        return True
    return False


class TestVersions:
    @pytest.mark.parametrize(
        "version, wanted, fits",
        [
            ("2.13.0+cpu", ">=2.11", True),
            ("2.9.1", ">=2.11", False),
            ("1.2", ">=1.2.0", True),
            ("3.0.1", "==3.0.1", True),
            ("3.0.2", "==3.0.1", False),
            ("3.13.1", "<3.14,>=3.11", True),
            ("3.14.0", ">=3.11,<3.14", False),
            ("5", "", True),
        ],
    )
    def test_satisfied(self, version: str, wanted: str, fits: bool) -> None:
        assert doctor.satisfied(version, wanted) is fits

    def test_requirements_are_those_of_training(self) -> None:
        lines = ["gymnasium[mujoco]>=1.2", "ale-py (>=0.12,<1)", 'onnx>=1.17; extra == "export"']
        assert doctor.requirements(lines) == {"gymnasium": ">=1.2", "ale-py": ">=0.12,<1"}

    def test_tested_versions_are_those_of_the_constraints(self) -> None:
        pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
        assert pins.items() >= doctor.TESTED.items()
        project = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2]
        needed = re.findall(r'^ +"([^"]+)",$', project.partition("]\n\n")[0], re.M)
        assert set(doctor.requirements(needed)) == set(doctor.TESTED)

    def test_python(self) -> None:
        assert doctor.check_python(">=3.11").status == "ok"
        assert doctor.check_python(">=3.99").status == "problem"


class TestPackages:
    def test_missing(self) -> None:
        found = doctor.check_package("no-such-package", ">=1.5", {})
        assert (found.status, found.seen) == ("problem", "not installed")
        assert found.advice == 'pip install "no-such-package>=1.5"'

    @pytest.mark.parametrize(
        "version, status, says",
        [
            ("2.10.9", "problem", ">=2.11 is needed"),
            ("2.11.0", "ok", "2.11.0"),
            ("2.13.7+cu130", "ok", "2.13.7"),
            ("2.14.0", "warning", "newer than tested (2.13.0)"),
        ],
    )
    def test_old_and_new(
        self, monkeypatch: pytest.MonkeyPatch, version: str, status: str, says: str
    ) -> None:
        monkeypatch.setattr(metadata, "version", lambda name: version)
        found = doctor.check_package("torch", ">=2.11", {})
        assert found.status == status and says in found.seen
        assert bool(found.advice) == (status != "ok")

    def test_what_cannot_be_imported(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Each of them is named, also where one ends the process, leaves it or hangs."""
        modules = {
            "good_a": "",
            "raises": "raise RuntimeError('two\\nlines')",
            "crashes": "import os; os.kill(os.getpid(), 11)",
            "leaves": "import sys; sys.exit(0)",
            "vanishes": "import os; os._exit(0)",
            "hangs": "import time; time.sleep(60)",
            "good_b": "print('library says hello', end='')",
        }
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
        broken = doctor.broken_imports([*modules, "no-such-package"], limit=2.0)
        assert broken == {
            "raises": "RuntimeError: two lines",
            "crashes": "the process was ended: Segmentation fault",
            "leaves": "SystemExit: 0",
            "vanishes": "its import ends the process",
            "hangs": "not done after 2 s",
            "no-such-package": "ModuleNotFoundError: No module named 'no_such_package'",
        }
        monkeypatch.setattr(metadata, "version", lambda name: "1.0")
        found = doctor.check_package("crashes", ">=1", broken)
        assert found.status == "problem" and "Segmentation" in found.seen

    def test_a_wrong_backend_breaks_mujoco(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MUJOCO_GL", "wrong")
        broken = doctor.broken_imports(["mujoco"])
        found = doctor.check_package("mujoco", ">=3.2", broken)
        assert found.status == "problem" and found.advice.startswith("unset MUJOCO_GL (now wrong)")


class TestChildren:
    def test_its_last_error_is_the_reason(self) -> None:
        trial = doctor.attempt("say([1, 'a'])\nraise ValueError('no\\n  good')")
        assert trial == Trial(([1, "a"],), "ValueError: no good")
        assert doctor.attempt("sys.exit(3)").failure == "it did not say why"

    def test_one_that_hangs_is_ended_with_its_children(self) -> None:
        program = "pid = os.fork()\nif pid: say(pid)\nimport time; time.sleep(60)"
        trial = doctor.attempt(program, limit=1.5)
        assert trial.failure == "not done after 1.5 s"
        (child,) = trial.said
        assert gone(child)

    def test_a_signal_ends_it(self, tmp_path: Path) -> None:
        note = tmp_path / "pid"
        program = f"open({str(note)!r}, 'w').write(str(os.getpid()))\nimport time; time.sleep(60)"

        def stop() -> None:
            for _ in range(200):
                if note.exists() and note.read_text():
                    break
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        with Interrupts():
            thread = threading.Thread(target=stop)
            thread.start()
            with pytest.raises(Stopped):
                doctor.attempt(program)
        thread.join()
        assert gone(int(note.read_text()))

    def test_none_can_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        assert doctor.attempt("").failure == "no process can be started: No such file or directory"

    def test_what_training_does_not_need_is_a_warning(self) -> None:
        dead = doctor.attempt("say('began')\nos.kill(os.getpid(), 11)")
        found = doctor.check_trial("drawing", dead, "install EGL", needed=False)
        seen = "began; the process was ended: Segmentation fault"
        assert found == Finding("drawing", "warning", seen, "install EGL")
        assert doctor.check_trial("MuJoCo", dead, "").status == "problem"


class TestPlace:
    def test_nothing_is_left(self, tmp_path: Path) -> None:
        found = [*doctor.check_place(tmp_path / "a" / "runs")]
        assert [finding.status for finding in found] == ["ok", "ok"]
        assert [*tmp_path.iterdir()] == []

    def test_a_file_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "runs").write_text("")
        found = only(doctor.check_place(tmp_path / "runs" / "deeper"), "run folder")
        assert found.status == "problem" and "Not a directory" in found.seen

    @pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
    def test_it_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
    ) -> None:
        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(doctor, "write_atomic", refuse)
        found = only(doctor.check_place(tmp_path), "run folder")
        assert found.status == "problem" and os.strerror(number) in found.seen
        assert "--run-dir" in found.advice

    @pytest.mark.parametrize("free, status", [(5e7, "problem"), (1e9, "warning"), (5e9, "ok")])
    def test_it_is_full(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: float, status: str
    ) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        assert only(doctor.check_place(tmp_path), "free space").status == status


@pytest.mark.parametrize(
    "flags, status, says",
    [
        ("sse4_2 avx", "warning", "without AVX512-BF16 or AMX"),
        ("avx avx2 avx512f", "ok", "AVX2 AVX512 without AVX512-BF16"),
        ("avx2 avx512f avx512_bf16 amx_tile", "ok", "AVX2 AVX512 AVX512-BF16 AMX"),
        (None, "ok", "not known"),
    ],
)
def test_processor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None, status: str, says: str
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(doctor, "_CPUINFO", tmp_path / "cpuinfo")
    found = doctor.check_processor()
    assert found.status == status and says in found.seen
    assert ("without AVX2" in found.advice) == (status == "warning")


class TestTorch:
    def about(self, **changes: Any) -> Trial:
        values = {"threads": 2, "cores": 2, "gpus": [], "failure": "", "cuda": None} | changes
        return Trial((values,), "")

    def test_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert only(doctor.check_torch(self.about()), "threads").status == "ok"
        many = only(doctor.check_torch(self.about(threads=64)), "threads")
        assert many.status == "warning" and "OMP_NUM_THREADS=2" in many.advice
        for text, status in (("1", "ok"), ("4,2", "ok"), ("all", "warning"), ("0", "warning")):
            monkeypatch.setenv("OMP_NUM_THREADS", text)
            assert only(doctor.check_torch(self.about()), "threads").status == status

    def test_gpu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor, "_NVIDIA", tmp_path / "none")
        assert "none" in only(doctor.check_torch(self.about()), "GPU").seen
        old = only(doctor.check_torch(self.about(failure="RuntimeError: driver too old")), "GPU")
        assert old.status == "warning" and old.seen == "RuntimeError: driver too old"
        monkeypatch.setattr(doctor, "_NVIDIA", tmp_path)
        found = only(doctor.check_torch(self.about()), "GPU")
        assert found.status == "warning" and "this torch has no CUDA" in found.seen
        found = only(doctor.check_torch(self.about(gpus=["H100, 80 GiB"], cuda="13.0")), "GPU")
        assert (found.status, found.seen) == ("ok", "H100, 80 GiB")

    def test_it_breaks(self) -> None:
        (found,) = doctor.check_torch(Trial((), "OSError: libc10.so"))
        assert (found.status, found.seen) == ("problem", "OSError: libc10.so")


class TestSystem:
    @pytest.mark.parametrize("limit, status", [(20, "problem"), (256, "warning"), (-1, "ok")])
    def test_open_files(self, monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
        assert resource.RLIM_INFINITY == -1
        monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
        assert only(doctor.check_system(), "open files").status == status

    def test_shared_memory(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor, "_SHARED", tmp_path / "none")
        assert only(doctor.check_system(), "/dev/shm").status == "warning"

    @pytest.mark.parametrize("encoding, status", [("ascii", "warning"), ("UTF8", "ok")])
    def test_streams(self, monkeypatch: pytest.MonkeyPatch, encoding: str, status: str) -> None:
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
            monkeypatch.setattr(sys, name, stream)
        found = only(doctor.check_system(), "text")
        assert found.status == status and f"output {encoding}" in found.seen


class TestExamine:
    @pytest.fixture
    def healthy(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
        """All packages are there and each child does well, but for what a test says."""

        def look(failing: str = "", broken: dict[str, str] | None = None) -> dict[str, Finding]:
            about = {"threads": 1, "cores": 1, "gpus": [], "failure": "", "cuda": None}

            def attempt(program: str) -> Trial:
                said = (about,) if program == doctor._TORCH else ("well",)
                return Trial(said, "it died" if failing and failing in program else "")

            monkeypatch.setattr(doctor, "attempt", attempt)
            monkeypatch.setattr(doctor, "broken_imports", lambda names: broken or {})
            return {finding.name: finding for finding in doctor.examine(Path("."))}

        return look

    @pytest.mark.parametrize(
        "failing, name, status",
        [
            ("ale_py", "Atari", "problem"),
            ("env.step", "MuJoCo", "problem"),
            ("make_vec", "workers", "problem"),
            ("choose_backend", "drawing", "warning"),
            ("import torch", "threads", "problem"),
        ],
    )
    def test_a_child_fails(
        self,
        healthy: Callable[..., dict[str, Finding]],
        failing: str,
        name: str,
        status: str,
    ) -> None:
        found = healthy(failing)[name]
        assert found.status == status and "it died" in found.seen and found.advice

    def test_what_lacks_its_package_is_left_out(
        self, healthy: Callable[..., dict[str, Finding]]
    ) -> None:
        found = healthy(broken={"mujoco": "ImportError: x"})
        assert found["mujoco"].status == "problem"
        for name in ("MuJoCo", "workers", "drawing"):
            assert found[name].seen == "not looked at, as it needs mujoco"
        assert found["Atari"].status == "ok"

    def test_a_check_that_breaks_is_a_warning(
        self, monkeypatch: pytest.MonkeyPatch, healthy: Callable[..., dict[str, Finding]]
    ) -> None:
        def fail(*_: object) -> None:
            raise RuntimeError("unheard of")

        monkeypatch.setattr(shutil, "disk_usage", fail)
        found = healthy()
        assert found["system"].seen == "cannot be looked at: RuntimeError: unheard of"
        assert found["run folder"].status == "warning"
