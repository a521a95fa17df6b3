"""Who waits for the first process of a run, and for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import distributed

from acktr.config import ConfigError, preset
from acktr.interrupts import Interrupts, Stopped
from acktr.kfac import RankError, Ranks
from acktr.runs import meeting as meeting_module
from acktr.runs import start
from acktr.runs.meeting import UNKNOWN, Meeting
from tests.tools.ranks import on_threads

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")


def meetings(timeout: float) -> tuple[Meeting, Meeting]:
    """The first process of two, and the other; both are threads of this one."""
    store, found = distributed.HashStore(), []
    for rank in range(2):
        one = Meeting(Interrupts(), timeout)
        one.rank, one.size, one._store = rank, 2, store
        found.append(one)
    return found[0], found[1]


def beside(act: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_others_wait_longer_than_the_limit_for_one_that_is_busy() -> None:
    first, other = meetings(0.4)

    def evaluate() -> None:
        with first.busy():
            time.sleep(1.0)

    for _ in range(2):
        thread, begun = beside(evaluate), time.monotonic()
        other.pause()
        assert time.monotonic() - begun > 0.9
        thread.join()


def test_one_that_hangs_is_named() -> None:
    _, other = meetings(0.3)
    with pytest.raises(RankError, match=r"process 0 of 2 gave no sign of life for 0\.3 s"):
        other.pause()


def test_one_whose_evaluation_fails_does_not_let_the_others_go_on() -> None:
    first, other = meetings(0.3)
    with pytest.raises(ZeroDivisionError), first.busy():
        raise ZeroDivisionError
    with pytest.raises(RankError):
        other.pause()


def test_a_signal_ends_the_waiting_in_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_module, "_GRACE", 0.2)
    _, other = meetings(10)
    other._interrupts.requested = 15
    with pytest.raises(Stopped):
        other.pause()


def helped(timeout: float) -> tuple[Meeting, Meeting]:
    """The first process, and the one that decomposes for it."""
    first, other = meetings(timeout)
    first.curvature = other.curvature = 1
    return first, other


def test_the_last_process_decomposes() -> None:
    first, other = helped(1.0)
    assert not first.serves and other.serves and first.part(7) == (7, 0)
    assert not any(one.serves for one in meetings(1.0))


def test_it_waits_for_as_long_as_the_first_gives_signs_of_life() -> None:
    first, other = helped(0.4)
    with first._alive(meeting_module._ALIVE):
        begun = time.monotonic()
        while time.monotonic() - begun < 1.0:
            other.attend()
            time.sleep(0.05)
    with pytest.raises(RankError, match=r"process 0 of 2 gave no sign of life for 0\.4 s"):
        while time.monotonic() - begun < 5.0:
            other.attend()


def test_its_signal_is_one_to_the_first() -> None:
    first, other = helped(1.0)
    assert first.asked() is None
    other._interrupts.requested = 15
    other.attend()
    assert first.asked() == 15
    first._interrupts.requested = 2
    assert first.asked() == 2


def agreed(facts: list[dict[str, object]]) -> list[str]:
    """What processes with these facts say; nothing where they agree."""

    def join(ranks: Ranks) -> str:
        one = Meeting(Interrupts())
        one.rank, one.size, one.ranks = ranks.rank, ranks.size, ranks
        try:
            one._agree(facts[ranks.rank])
        except ConfigError as error:
            return str(error)
        return ""

    return on_threads(join, len(facts))


def test_what_a_process_does_not_know_is_no_difference() -> None:
    one, other, none = ({"gamma": 0.9, "git_commit": commit} for commit in ("a", "b", UNKNOWN))
    assert agreed([one, none, one]) == [""] * 3
    for said in agreed([none, one, other]):
        assert said.startswith("process 2 of 3 has another git_commit than process 1: start all")
    for said in agreed([{**one, "gamma": None}, one]):
        assert said.startswith("process 1 of 2 has another gamma than process 0")
    for said in agreed([one, {**one, "env_kwargs.x": 1}]):
        assert said.startswith("process 1 of 2 has another names of settings")


def test_pictures_must_be_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [start._alike(preset(env)[0]) for env in ("CartPole-v1", "Hopper-v5")]
    assert [facts["what draws pictures"] for facts in seen] == [None, None]
    drawn = []
    for by in ("egl, a", "egl, b"):
        monkeypatch.setattr(start, "drawer", lambda env, by=by: by if "Pixels" in env else None)
        drawn.append(start._alike(preset("Pixels/Hopper-v5")[0]))
    said = agreed(drawn)
    assert said[1].startswith("process 1 of 2 has another what draws pictures than process 0")


@pytest.mark.parametrize(("commit", "told"), [("abc", "abc"), (None, UNKNOWN)])
def test_commits_are_compared(commit: Any, told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version stays the same from one release to the next, whatever the source is."""
    facts = {"platform": "", "cpu_count": 1, "git_commit": commit}
    monkeypatch.setattr(start, "versions", lambda: facts)
    assert start._alike(preset("CartPole-v1", "acktr")[0])["git_commit"] is told
