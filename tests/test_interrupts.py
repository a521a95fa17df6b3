from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from acktr import interrupts as interrupts_module
from acktr.interrupts import PARENT, STOPPED, Interrupts, Stopped
from tests.runs.test_progress import Clock
from tests.tools.command_line import ROOT

OTHERS = [signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Handlers as in a program that was just started, whoever started this one."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in OTHERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class TestInterrupts:
    def test_exit_codes(self) -> None:
        assert STOPPED == {
            signal.SIGINT: 130,
            signal.SIGTERM: 75,
            signal.SIGHUP: 75,
            signal.SIGUSR1: 75,
        }

    @pytest.mark.parametrize("number", STOPPED)
    def test_first_signal_waits_and_second_raises(self, number: signal.Signals) -> None:
        clock = Clock()
        with Interrupts(clock) as interrupts, interrupts.deferred():
            signal.raise_signal(number)
            assert interrupts.requested == number
            clock.now += 1.5
            with pytest.raises(Stopped) as stop:
                signal.raise_signal(signal.SIGINT)
        assert stop.value.signum == signal.SIGINT

    def test_burst_counts_as_one(self) -> None:
        clock = Clock()
        with Interrupts(clock) as interrupts, interrupts.deferred():
            for _ in range(5):
                signal.raise_signal(signal.SIGTERM)
                clock.now += 0.01
            assert interrupts.requested == signal.SIGTERM
            clock.now += 1.0
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # nor is the second one's burst a third

    def test_third_signal_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Left(BaseException):
            pass

        def leave(code: int) -> None:
            raise Left(code)

        monkeypatch.setattr(os, "_exit", leave)
        clock = Clock()
        with Interrupts(clock) as interrupts, interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            clock.now += 2
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)
            clock.now += 2
            with pytest.raises(Left, match="75"):
                signal.raise_signal(signal.SIGHUP)

    def test_raises_outside_deferred_and_where_it_must_not_wait(self) -> None:
        with Interrupts(), pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        with Interrupts() as interrupts, interrupts.deferred():
            with pytest.raises(Stopped), interrupts.at_once():
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped), interrupts.at_once():
                raise AssertionError("the recorded signal was forgotten")

    def test_breaks_off_what_may_be_after_some_seconds(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(interrupts_module, "PATIENCE", 0.05)
        may = False
        with Interrupts() as interrupts, interrupts.deferred(lambda: may):
            signal.raise_signal(signal.SIGUSR1)
            time.sleep(0.2)  # it may not be broken off yet
            may = True
            with pytest.raises(Stopped) as stop:
                time.sleep(30)
        assert stop.value.signum == signal.SIGUSR1

    def test_handlers_are_put_back(self) -> None:
        before = [signal.getsignal(number) for number in STOPPED]
        with Interrupts():
            assert all(
                signal.getsignal(number) != handler
                for number, handler in zip(STOPPED, before, strict=True)
            )
        assert [signal.getsignal(number) for number in STOPPED] == before

    @pytest.mark.parametrize("number", OTHERS)
    def test_what_is_ignored_stays_so(self, number: signal.Signals) -> None:
        signal.signal(number, signal.SIG_IGN)
        with Interrupts() as interrupts:
            signal.raise_signal(number)
        assert interrupts.requested is None


class TestParent:
    """A process whose parent ends."""

    @pytest.fixture
    def child(self) -> Iterator[Callable[[str], tuple[subprocess.Popen[bytes], int]]]:
        started: list[subprocess.Popen[bytes]] = []

        def start(code: str) -> tuple[subprocess.Popen[bytes], int]:
            watched, life = os.pipe()
            code = f"import os, time; from acktr.interrupts import *; {code}"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, PARENT: str(watched), "PYTHONPATH": str(ROOT)},
                pass_fds=[watched],
                stdout=subprocess.PIPE,
            )
            os.close(watched)
            started.append(process)
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            return process, life

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_its_end_is_a_sigterm(
        self, child: Callable[[str], tuple[subprocess.Popen[bytes], int]]
    ) -> None:
        process, life = child(
            "end_with_parent()\n"
            "with Interrupts() as interrupts:\n"
            " try: print('ready', flush=True); time.sleep(60)\n"
            " except Stopped as stop: os._exit(stop.signum + ('ACKTR_PARENT' in os.environ))"
        )
        assert process.poll() is None
        os.close(life)
        assert process.wait(timeout=20) == signal.SIGTERM

    def test_who_does_not_end_is_ended(
        self, child: Callable[[str], tuple[subprocess.Popen[bytes], int]]
    ) -> None:
        process, life = child(
            "import signal; import acktr.interrupts as module; module._ORPHAN = 0.2\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "end_with_parent(); print('ready', flush=True)\n"
            "time.sleep(60)"
        )
        os.close(life)
        assert process.wait(timeout=20) == 75
