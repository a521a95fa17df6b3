from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from acktr.compare import pool as pool_module
from acktr.compare.pool import ChildProcess, Ended, Pool, child_environment


class FakeChild:
    """A process that ends when it is told to."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.calls: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.calls.append("terminate")

    def kill(self) -> None:
        self.calls.append("kill")

    def last_line(self) -> str:
        return f"code {self.code}"


class Launcher:
    def __init__(self, refuse: Sequence[str] = ()) -> None:
        self.children: dict[str, FakeChild] = {}
        self.refuse = refuse

    def __call__(self, job: str) -> FakeChild:
        if job in self.refuse:
            raise OSError(28, "No space left on device", "some.log")
        self.children[job] = FakeChild()
        return self.children[job]


class TestPool:
    def test_order_and_number_of_workers(self) -> None:
        launch = Launcher()
        pool = Pool("abcde", 2, launch)
        assert pool.busy and pool.running == []
        assert pool.step() == [] == pool.step()
        assert (pool.running, pool.waiting) == (["a", "b"], 3)
        launch.children["b"].code = 0
        assert pool.step() == [Ended("b", 0, "code 0")]
        assert (pool.running, pool.waiting) == (["a", "c"], 2)
        launch.children["a"].code, launch.children["c"].code = 70, -9
        assert pool.step() == [Ended("a", 70, "code 70"), Ended("c", -9, "code -9")]
        assert (pool.running, pool.waiting, pool.busy) == (["d", "e"], 0, True)
        for job in "de":
            launch.children[job].code = 0
        assert [end.job for end in pool.step()] == ["d", "e"]
        assert not pool.busy
        assert all(child.calls == [] for child in launch.children.values())

    def test_what_cannot_be_started_has_ended(self) -> None:
        launch = Launcher(refuse="ac")
        pool = Pool("abc", 1, launch)
        why = "cannot start: some.log: No space left on device"
        assert pool.step() == [Ended("a", None, why)]
        assert pool.running == ["b"]
        launch.children["b"].code = 0
        assert pool.step() == [Ended("b", 0, "code 0"), Ended("c", None, why)]
        assert not pool.busy

    def test_stop_starts_nothing_more(self) -> None:
        launch = Launcher()
        pool = Pool("abc", 2, launch)
        pool.step()
        pool.stop()
        launch.children["a"].code = 75
        assert pool.step() == [Ended("a", 75, "code 75")]
        assert (pool.running, pool.waiting, pool.busy) == (["b"], 1, True)
        launch.children["b"].code = 75
        pool.step()
        assert not pool.busy
        assert sorted(launch.children) == ["a", "b"]
        assert launch.children["b"].calls == ["terminate"]

    def test_leaving_kills_what_runs(self) -> None:
        launch = Launcher()
        with pytest.raises(ZeroDivisionError), Pool("abc", 2, launch) as pool:
            pool.step()
            launch.children["a"].code = 0
            pool.step()
            raise ZeroDivisionError
        assert launch.children["a"].calls == []
        assert launch.children["b"].calls == ["kill"]
        assert launch.children["c"].calls == ["kill"]

    def test_signals_while_killing_leave_nothing_behind(self) -> None:
        launch = Launcher()
        attempts = []

        def impatient() -> None:
            attempts.append(1)
            if len(attempts) < 3:
                raise KeyboardInterrupt

        with Pool("ab", 2, launch) as pool:
            pool.step()
            launch.children["b"].kill = impatient  # type: ignore[method-assign]
        assert len(attempts) == 3
        assert launch.children["a"].calls == ["kill"]


def test_child_environment() -> None:
    found = child_environment({"HOME": "/h", "OMP_NUM_THREADS": "8"}, ["", "/a", "/b.zip"])
    assert found["HOME"] == "/h"
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
    assert all(found[f"{name}_NUM_THREADS"] == "1" for name in names)
    assert found["PYTHONPATH"] == os.pathsep.join([os.getcwd(), "/a", "/b.zip"])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the package in children: runs the code that is its argument."""
    folder = tmp_path / "fake/acktr"
    folder.mkdir(parents=True)
    (folder / "__main__.py").write_text("import sys\nexec(sys.argv[1])\n")
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    return tmp_path


def wait(child: ChildProcess) -> int:
    for _ in range(1000):
        code = child.poll()
        if code is not None:
            return code
        time.sleep(0.01)
    raise AssertionError("the child does not end")


class TestChildProcess:
    def test_output_is_added_to_the_log(self, script: Path) -> None:
        log = script / "logs/some.log"
        code = "print('first'); print('acktr: the cause\\n\\n'); sys.exit(3)"
        child = ChildProcess([code], log)
        assert wait(child) == 3
        assert child.last_line() == "the cause"
        silent = ChildProcess(["pass"], log)
        assert wait(silent) == 0
        assert silent.last_line() == ""
        loud = ChildProcess(["sys.stderr.write('x' * 20_000 + '\\nlast')"], log)
        assert wait(loud) == 0
        assert loud.last_line() == "last"
        assert log.read_text().startswith("first\nacktr: the cause\n")

    def test_it_has_a_session_of_its_own_and_no_input(self, script: Path) -> None:
        code = "import os; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '')"
        child = ChildProcess([code], script / "some.log")
        assert wait(child) == 0
        assert child.last_line() == "True True"

    def test_terminate(self, script: Path) -> None:
        child = ChildProcess(["import time; time.sleep(60)"], script / "some.log")
        child.terminate()
        assert wait(child) == -signal.SIGTERM
        child.terminate()
        child.kill()

    def test_kill_reaches_what_it_started(self, script: Path) -> None:
        beats = script / "beats"
        heart = (
            f"import time\nwith open({str(beats)!r}, 'a', 1) as file:"
            "\n while True: file.write('x\\n'); time.sleep(0.02)"
        )
        code = (
            "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            f"subprocess.Popen([sys.executable, '-c', {heart!r}]); time.sleep(60)"
        )
        child = ChildProcess([code], script / "some.log")
        for _ in range(1000):
            if beats.exists() and beats.stat().st_size > 4:
                break
            time.sleep(0.01)
        child.terminate()
        assert child.poll() is None
        child.kill()
        assert child.poll() == -signal.SIGKILL
        time.sleep(0.1)
        size = beats.stat().st_size
        time.sleep(0.3)
        assert beats.stat().st_size == size > 4

    def test_log_that_cannot_be_written(self, script: Path) -> None:
        (script / "file").touch()
        with pytest.raises(OSError, match="file"):
            ChildProcess(["pass"], script / "file/some.log")

    def test_what_runs_is_this_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not one of the same name in the working directory."""
        (tmp_path / "acktr").mkdir()
        (tmp_path / "acktr/__init__.py").write_text("raise RuntimeError('foreign')\n")
        root = str(Path(pool_module.__file__).parents[2])
        monkeypatch.setattr(sys, "path", [root, *(entry for entry in sys.path if entry)])
        monkeypatch.chdir(tmp_path)
        child = ChildProcess(["--version"], tmp_path / "some.log")
        assert wait(child) == 0
        assert child.last_line() == "acktr 0.1.0"
