"""The benchmark measures what it says, tells its parts apart and stops without a trace."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acktr.config import Config, ConfigError, from_dict, preset
from acktr.envs import EnvError, make_vec, rendering
from acktr.train import Trainer
from scripts.bench import cases, runner
from scripts.bench.__main__ import main
from scripts.bench.cases import SUITES, Case, Timing
from scripts.bench.drawing import measure_drawing
from scripts.bench.kfac import measure_kfac
from scripts.bench.measure import (
    measure_compute,
    measure_environment,
    measure_training,
)
from scripts.bench.peers import measure_peer
from scripts.bench.ranks import measure_ranks
from scripts.bench.report import PARTS, rate, results
from scripts.bench.runner import turns

SCRIPT = Path(__file__).resolve()
TINY = Timing(threads=1, seconds=0.02, windows=3, warm_up=0.01, warm_up_updates=3)
FAST = ("--seconds", "0.02", "--warmup", "0.01", "--warmup-updates", "2", "--torch-threads", "1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a process that measures; several threads are slow where other tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(TINY.threads)
    yield
    torch.set_num_threads(before)


def small(algo: str, env: str = "InvertedPendulum-v5") -> Config:
    return dataclasses.replace(preset(env, algo)[0], num_envs=2, num_steps=8, device="cpu")


def case(kind: str = "training", key: str = "acktr", env: str = "CartPole-v1") -> Case:
    config = small("acktr", "CartPole-v1")
    values = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(config, env=env))))
    return Case(key=key, what=key, kind=kind, env=env, num_envs=2, num_steps=8, settings=values)  # type: ignore[arg-type]


@pytest.mark.parametrize("algo", ["acktr", "a2c", "trpo"])
def test_training_is_timed_with_its_parts(algo: str) -> None:
    found = measure_training(small(algo), TINY)
    assert len(found["rates"]) == 3 and min(found["rates"]) > 0
    assert found["seconds"] >= 3 * TINY.seconds and found["updates"] >= 3
    steps = found["updates"] * 16
    assert steps / found["seconds"] == pytest.approx(sum(found["rates"]) / 3, rel=0.5)
    parts = found["shares"]
    assert math.fsum(parts.values()) == pytest.approx(1, abs=1e-9)
    assert min(parts.values()) >= 0 and set(parts) <= set(PARTS)
    assert parts["env"] > 0 and parts["act"] > 0
    expected = {
        "acktr": {"forward", "fisher", "backward", "statistics", "refresh", "precondition"},
        "a2c": {"forward", "backward", "step"},
        "trpo": {"policy", "critic"},
    }[algo]
    assert expected <= {name for name, part in parts.items() if part > 0}


@pytest.mark.slow
def test_training_in_two_processes_is_timed_with_its_messages() -> None:
    two = dataclasses.replace(case(), ranks=2)
    found = measure_ranks(two, TINY)
    assert len(found["rates"]) == 3 and found["updates"] >= 3
    assert math.fsum(found["shares"].values()) == pytest.approx(1, abs=1e-9)
    network = Trainer(from_dict(two.settings), make_vec("CartPole-v1", 2, 0)).network
    gradients = 4 * sum(parameter.numel() for parameter in network.parameters())
    assert found["messages"]["bytes"] > gradients and 5 < found["messages"]["calls"] < 100
    twice = runner.together(found, {**found, "messages": dict.fromkeys(found["messages"], 0.0)})
    assert twice["messages"]["calls"] == found["messages"]["calls"] / 2


@pytest.mark.parametrize(("algo", "env"), [("acktr", "CartPole-v1"), ("trpo", "Pendulum-v1")])
def test_the_limits_are_measured(algo: str, env: str) -> None:
    for measure in (measure_environment, measure_compute):
        found = measure(small(algo, env), TINY)
        assert len(found["rates"]) == 3 and min(found["rates"]) > 0
    # Every update of the computation alone starts at the same parameters: the speeds are alike.
    assert found["updates"] >= 3


def test_kfac_is_timed_beside_sgd() -> None:
    settings = {"size": 8, "batch": 16, "statistics_part": 2, "refresh_every": 2}
    one = Case(key="kfac", what="kfac", kind="kfac", settings=settings)
    found = measure_kfac(one, TINY)["overhead"]
    assert found["blocks"] == 3 and found["block_updates"] % 2 == 0
    assert found["contestants"]["sgd"]["ratio_to_sgd"] == 1
    assert found["contestants"]["kfac"]["milliseconds"] > 0


def named(suite: str) -> dict[str, Case]:
    return {each.key: each for each in SUITES[suite]()}


@pytest.mark.parametrize("peer", ["sb3-trpo", "sb3-ppo"])
def test_mujoco_peers_are_timed(peer: str) -> None:
    found = named("mujoco")[peer]
    assert found.env == "HalfCheetah-v5"
    settings = {**found.settings, "values": {**found.settings["values"], "num_steps": 64}}
    result = measure_peer(
        dataclasses.replace(found, env="InvertedPendulum-v5", settings=settings), TINY
    )
    assert len(result["rates"]) == 3 and min(result["rates"]) > 0
    assert result["updates"] >= 3


@pytest.mark.parametrize("peer", ["sb3-a2c-DummyVecEnv", "sb3-ppo-DummyVecEnv"])
def test_atari_peers_are_timed(peer: str) -> None:
    pytest.importorskip("cv2")
    found = named("atari")[peer]
    values = found.settings["values"]
    if "batch_size" in values["model"]:
        values["model"]["batch_size"] = 8
    result = measure_peer(dataclasses.replace(found, num_envs=2, num_steps=4), TINY)
    assert len(result["rates"]) == 3 and min(result["rates"]) > 0


def test_pictures_are_counted_and_compared() -> None:
    try:
        rendering.choose_backend()
    except EnvError:
        pytest.skip("no EGL and no OSMesa here")
    made = named("pixels")
    pair = [made[f"drawing-Reacher-v5-64-{by}"] for by in ("ours", "gymnasium")]
    found = {
        case.key: measure_drawing(
            dataclasses.replace(case, settings={**case.settings, "size": 16}), TINY
        )
        for case in pair
    }
    assert all(len(each["rates"]) == 3 and min(each["rates"]) > 0 for each in found.values())
    first, second = ({**each, "peak_mib": None} for each in found.values())
    assert len(runner.together(first, second)["rates"]) == 6  # of two rounds
    ours, gymnasiums = results(pair, found, {})["drawing"]
    assert ours["what"] == "64 x 64, ours" and ours["env"] == "Pixels/Reacher-v5"
    assert ours["ratio"] == rate(found[pair[0].key]) / rate(found[pair[1].key])
    assert gymnasiums["ratio"] == 1


@pytest.mark.parametrize("name", ["atari", "mujoco"])
def test_every_training_of_a_suite_has_its_limits(name: str) -> None:
    made = SUITES[name]()
    keys = [each.key for each in made]
    assert len(set(keys)) == len(keys)
    for each in made:
        if each.kind == "training":
            assert {each.environment_key, each.compute_key} <= set(keys)
            assert from_dict(each.settings).device == "cpu"
        json.dumps(each.settings, allow_nan=False)


def test_atari_compares_at_the_same_batch() -> None:
    suite = named("atari")
    assert {each.env for each in suite.values()} == {"BreakoutNoFrameskip-v4"}
    assert suite["acktr"].batch == suite["a2c-equal"].batch == "32 x 20"
    assert suite["a2c"].batch == suite["sb3-a2c-DummyVecEnv"].batch == "16 x 5"
    assert suite["acktr"].settings["acktr"]["actor"]["stat_fraction"] == 0.125
    whole = suite["acktr-whole"].settings["acktr"]["actor"]
    assert (whole["stat_fraction"], whole["stat_interval"]) == (1, 1)


def test_batches_are_the_same_for_both_algorithms_and_the_largest_comes_in_parts() -> None:
    made = SUITES["batch"]()
    found = [(each.what, each.batch, each.settings["micro_batch"]) for each in made]
    for name, part in (("ACKTR", found[:4]), ("A2C", found[4:])):
        assert part == [
            (f"{name}, batch 160", "32 x 5", None),
            (f"{name}, batch 640", "32 x 20", None),
            (f"{name}, batch 2560", "32 x 80", None),
            (f"{name}, batch 2560 in parts of 640", "32 x 80", 640),
        ]
    assert [each.key for each in made].count("acktr") == 1


@pytest.fixture
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(case(key="broken"), settings={"env": "CartPole-v1", "gamma": 7})
    made = [case(), case("mujoco peer", "peer"), broken]
    monkeypatch.setitem(SUITES, "atari", lambda: made)
    monkeypatch.setitem(cases.NEEDS, "mujoco peer", ("no_such_module",))


@pytest.mark.usefixtures("tiny_suite")
def test_a_suite_is_reported_with_what_was_skipped_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "here"
    assert main(["--suite", "atari", "--out", str(out), *FAST]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == (
        "atari: skipping peer: no_such_module not installed (pip install 'acktr[bench]' brings it)"
    )
    assert lines[1].startswith("[1/2] acktr CartPole-v1, ETA -")
    module = ConfigError.__module__
    failure = f"{module}.ConfigError: gamma must be a finite number >= 0 and <= 1, got 7"
    assert lines[3] == f"  failed: {failure}"

    assert sorted(path.name for path in out.iterdir()) == ["atari.json", "atari.md"]
    assert (out / "atari.md").read_text() == captured.out
    found = json.loads((out / "atari.json").read_text())
    (row,) = found["rows"]
    assert row["what"] == "acktr" and row["ratio"] == 1 and row["batch"] == "2 x 8"
    assert len(row["steps_per_second"]["windows"]) == 3
    assert math.fsum(row["shares"].values()) == pytest.approx(1, abs=1e-9)
    assert found["skipped"] == [{"what": "peer", "why": "no_such_module not installed"}]
    assert found["failed"] == [{"what": "broken", "env": "CartPole-v1", "why": failure}]
    assert found["command"].startswith("python -m scripts.bench --suite atari --out ")
    assert found["timing"]["threads"] == 1 and found["machine"]["torch"]
    assert "- peer: skipped, no_such_module not installed" in captured.out


@pytest.mark.usefixtures("tiny_suite")
def test_rounds_go_through_all_cases_and_put_their_windows_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(case: Case, *_: object) -> dict[str, Any]:
        measured.append(case.key)
        turn = measured.count(case.key)
        return {"failure": "broke"} if (case.key, turn) == ("broken", 2) else numbers(float(turn))

    def numbers(turn: float) -> dict[str, Any]:
        shares = {"env": turn / 4, "act": 1 - turn / 4}
        parts = {"updates": 2, "seconds": turn, "peak_mib": 10 * turn, "shares": shares}
        work = {"steps": 50, "processor": 2 * turn}
        return {"rates": [100 * turn], **parts, **work}

    monkeypatch.setattr(runner, "measure", measure)
    assert main(["--suite", "atari", "--out", str(tmp_path), "--rounds", "3", *FAST]) == 1
    assert measured == ["acktr", "broken"] * 3
    found = json.loads((tmp_path / "atari.json").read_text())
    (row,) = found["rows"]
    assert row["steps_per_second"]["windows"] == [100, 200, 300]
    assert row["milliseconds_per_update"] == 1000 * (1 + 2 + 3) / 6
    assert row["peak_mib"] == 30
    assert row["processor_seconds_per_million"] == 1e6 * (2 + 4 + 6) / 150
    assert row["shares"]["env"] == pytest.approx((1 + 4 + 9) / 4 / 6)
    assert [each["why"] for each in found["failed"]] == ["broke"]
    assert "9 windows of at least" in (tmp_path / "atari.md").read_text()
    assert ", in 3 rounds through all lines" in (tmp_path / "atari.md").read_text()


def test_a_comparison_that_alternates_by_itself_has_the_windows_of_all_rounds_in_one_turn() -> None:
    compared = case("kfac", "compared")
    found = turns((case(), compared), TINY, 3)
    assert [each.key for each, _ in found] == ["acktr", "compared", "acktr", "acktr"]
    assert found[1] == (compared, dataclasses.replace(TINY, windows=9))
    assert all(timing == TINY for each, timing in found if each.key == "acktr")


def test_peers_that_are_not_installed_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    peer = named("atari")["sb3-a2c-DummyVecEnv"]
    assert peer.missing() == ["stable_baselines3", "sb3_contrib", "cv2"]
    assert case().missing() == []


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((), "the following arguments are required: --suite"),
        (("--suite", "pong"), "argument --suite: invalid choice: 'pong' (choose from"),
        (("--suite", "kfac", "kfac"), "argument --suite: each value may be given once"),
        (("--suite", "kfac", "--seconds", "nan"), "argument --seconds: needs a number in (0, 3600"),
        (("--suite", "kfac", "--torch-threads", "0"), "argument --torch-threads: needs an integer"),
        (("--suite", "kfac", "--out", f"{SCRIPT}/x"), f"argument --out: {SCRIPT} is not a folder"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], given: tuple[str, ...], why: str
) -> None:
    assert main(given) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bench: error: {why}") and captured.err.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_stop_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "scripts.bench", "--suite", "kfac", "--torch-threads", "1"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("[1/2] K-FAC beside SGD, statistics from 1/8")
    while not list(tmp_path.glob("tmp/bench-*/output.txt")):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (
        code,
        "bench: stopped; reports of complete suites are kept\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"]
    assert not list((tmp_path / "tmp").glob("bench-*"))
    assert not any(str(tmp_path).encode() in line for line in _command_lines())


def _command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            yield path.read_bytes()
