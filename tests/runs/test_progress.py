from __future__ import annotations

import io
import math
import sys

import pytest
from rich.text import Text

from acktr.runs.progress import Display, Meter, Progress, Sparkline, counting, score
from acktr.train import TrainStats


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stats(timesteps: int, **metrics: float) -> TrainStats:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return TrainStats(timesteps, timesteps // 10, named, ())


def run(progress: Progress, clock: Clock, updates: int, seconds: float, steps: int) -> None:
    for k in range(1, updates + 1):
        clock.now += seconds
        progress.update(
            stats(
                k * steps,
                train__approx_kl=0.00123,
                time__env=0.5 * seconds,
                time__forward=0.1 * seconds,
                time__update=0.25 * seconds,
                time__refresh=0.05 * seconds,
            ),
            None if k == 1 else 12.34,
        )


def test_plain_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(10_000, interval=10.0, stream=stream, clock=clock) as progress:
        progress.note("preset mujoco\nenv HalfCheetah-v5")
        run(progress, clock, updates=35, seconds=1.0, steps=100)
        progress.note("saved")
    share = "time env 50%, forward 10%, update 25%, refresh 5%"
    assert stream.getvalue().splitlines() == [
        "preset mujoco",
        "env HalfCheetah-v5",
        f"steps 100/10,000 (1.0%)  steps/s 100  ETA 0:01:39  return -  KL 0.0012  {share}",
        f"steps 1,100/10,000 (11.0%)  steps/s 100  ETA 0:01:29  return 12.3  KL 0.0012  {share}",
        f"steps 2,100/10,000 (21.0%)  steps/s 100  ETA 0:01:19  return 12.3  KL 0.0012  {share}",
        f"steps 3,100/10,000 (31.0%)  steps/s 100  ETA 0:01:09  return 12.3  KL 0.0012  {share}",
        "saved",
        f"steps 3,500/10,000 (35.0%)  steps/s 100  ETA 0:01:05  return 12.3  KL 0.0012  {share}",
    ]


def test_last_line_is_not_repeated() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(100, stream=stream, clock=clock)
    run(progress, clock, updates=1, seconds=1.0, steps=100)
    progress.close()
    progress.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_nothing_without_updates() -> None:
    for stream in (io.StringIO(), Terminal()):
        Progress(100, stream=stream).close()
        assert stream.getvalue() == ""


def test_speed_after_a_resume_counts_new_steps_only() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(2_000, start_timesteps=1_000, stream=stream, clock=clock)
    clock.now += 2.0
    progress.update(stats(1_100), None)
    assert stream.getvalue() == (
        "steps 1,100/2,000 (55.0%)  steps/s 50  ETA 0:00:18  return -  KL -\n"
    )


def test_no_time_passed_and_overshoot() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(50, interval=0.0, stream=stream, clock=clock)
    progress.update(stats(40), None)
    clock.now += 1.0
    progress.update(stats(60), None)
    assert [line.split("  ")[:3] for line in stream.getvalue().splitlines()] == [
        ["steps 40/50 (80.0%)", "steps/s -", "ETA -"],
        ["steps 60/50 (100.0%)", "steps/s 60", "ETA 0:00:00"],
    ]


def test_meter_forgets_what_is_older_than_its_window() -> None:
    meter = Meter(0.0, 0, window=10.0)
    for second in range(1, 21):  # 100 steps/s, then 10 steps/s
        meter.add(second, 100 * second, {"env": 1.0})
    for second in range(21, 31):
        meter.add(second, 2_000 + 10 * (second - 20), {"env": 0.0, "update": 0.5})
        expected = (100 * (30 - second) + 10 * (second - 20)) / 10
        assert meter.speed() == pytest.approx(expected)
    assert meter.shares() == {"env": 0.0, "update": 0.5}


def test_meter_with_updates_longer_than_its_window() -> None:
    meter = Meter(0.0, 0, window=10.0)
    meter.add(100.0, 1_000, {})
    assert meter.speed() == 10.0
    meter.add(200.0, 3_000, {})
    assert meter.speed() == 20.0


def test_days() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1 + 100_000, stream=stream, clock=clock)
    clock.now += 1.0
    progress.update(stats(1), None)
    assert "ETA 1d 3:46:40" in stream.getvalue()


def test_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    clock, stream = Clock(), Terminal()
    with Progress(10_000, stream=stream, clock=clock) as progress:
        progress.note("preset [mujoco]")
        run(progress, clock, updates=8, seconds=0.1, steps=100)
    output = stream.getvalue()
    assert "preset [mujoco]" in output
    assert output.count("╭") == 5  # at 0.1, 0.4, 0.7 s and, closing, the last (redrawn by rich)
    for value in ("800/10,000 (8.0%)", "1,000", "0:00:09", "12.3", "refresh 5%"):
        assert value in output.rpartition("╭")[2]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_panel_leaves_room_for_what_ctrl_c_writes(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the last line it must not wrap, whatever the panel holds."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    display = Display("title", 1.0, stream)
    display.show("line", 1, 2, Text("word " * 100))
    display.close()
    last = next(line for line in stream.getvalue().splitlines() if "╯" in line)
    assert len(last[last.index("╰") : last.index("╯") + 1]) == columns - len("^C")


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Progress(10, stream=stream).update(stats(1), None)
    assert stream.getvalue().startswith("steps 1/10")


@pytest.mark.parametrize("term", ["dumb", "xterm"])
def test_control_characters_do_not_reach_the_terminal(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    stream = Terminal()
    Progress(10, stream=stream).note("a\x1b]0;title\x07b\r")
    assert stream.getvalue() == "a?]0;title?b?\n"


def test_a_broken_stream_stops_nothing() -> None:
    class Broken(io.StringIO):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            raise BrokenPipeError

    clock, stream = Clock(), Broken()
    with Progress(100, interval=0.0, stream=stream, clock=clock) as progress:
        run(progress, clock, updates=3, seconds=1.0, steps=10)
    assert stream.calls == 1


def test_returns_have_digits_where_they_are_small() -> None:
    shown = {None: "-", 0.0: "0", 0.5642: "0.564", -7.25: "-7.25", 12.34: "12.3", 1e4: "10,000.0"}
    assert {value: score(value) for value in shown} == shown
    assert score(math.nan) == "nan"


def test_a_sparkline_has_the_shape_of_its_values() -> None:
    line = Sparkline(8)
    assert str(line) == ""
    for value in range(8):
        line.add(value)
    assert str(line) == "▁▂▃▄▅▆▇█"
    line.add(math.nan)
    for value in range(8, 1000):
        line.add(value)
    drawn = str(line)
    assert 4 <= len(drawn) <= 8 and list(drawn) == sorted(drawn)
    flat = Sparkline(8)
    for _ in range(5):
        flat.add(-3.0)
    assert str(flat) == "▁▁▁▁▁"


def test_a_panel_shows_evaluations_and_a_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; without Unicode there is no curve."""
    for encoding, has_curve in (("utf-8", True), ("ascii", False)):
        stream = EncodedTerminal()
        stream.named = encoding
        monkeypatch.setenv("TERM", "xterm")
        progress = Progress(100, stream=stream, clock=Clock())
        progress.evaluated(20.0, 10)
        progress.evaluated(15.0, 20)
        progress.update(stats(20), 7.0)
        progress.evaluated(17.0, 20)
        progress.close()
        shown = stream.getvalue()
        assert "15.0 at step 20" in shown and "20.0 at step 10" in shown
        assert "17.0 at step 20" in shown.rpartition("15.0 at step 20")[2]
        assert ("▁" in shown) == has_curve


class EncodedTerminal(Terminal):
    """A terminal of an encoding."""

    named = "utf-8"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.named


def test_counting() -> None:
    clock, stream = Clock(), io.StringIO()
    show = counting(Display("x", 5.0, stream, clock), "reading runs", clock)
    for count, clock.now in enumerate((100.0, 104.0, 106.0, 108.0, 112.0)):
        show(count, 10)
    clock.now = 120.0
    show(0, 10)  # a first one that takes long
    assert stream.getvalue() == (
        "reading runs 2/10 (20.0%)  ETA 0:00:24\n"
        "reading runs 4/10 (40.0%)  ETA 0:00:18\n"
        "reading runs 0/10 (0.0%)  ETA -\n"
    )


def test_a_panel_that_is_hidden_leaves_standard_output_to_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = Display("title", 1.0, stream)
    for number in range(2):
        display.show("line", number, 2, Text(f"row {number}"))
        display.hide()
        sys.stdout.write(f"result {number}\n")
    display.close()
    assert capsys.readouterr().out == "result 0\nresult 1\n"
    shown = stream.getvalue()
    assert "row 0" in shown and "row 1" in shown and "result" not in shown
    assert shown.endswith("\x1b[2K")  # the last panel's first line is cleared as well
