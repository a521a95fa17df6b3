"""References are read, found and used as they are meant."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from acktr.report.references import (
    SHIPPED,
    Reference,
    environment_name,
    find_reference,
    load_references,
    normalise,
    published_curves,
)

MUJOCO = "Ant HalfCheetah Hopper InvertedDoublePendulum InvertedPendulum Reacher Swimmer Walker2d"


def test_shipped_references() -> None:
    found = load_references()
    assert sorted(found) == MUJOCO.split()
    for env, reference in found.items():
        assert reference.env == env and reference.source
        assert reference.low is not None and reference.high is not None
        assert len(reference.thresholds) == 2
        assert all(reference.low < goal <= reference.high for goal in reference.thresholds)


def test_lower_references_are_the_measured_ones() -> None:
    lines = SHIPPED.with_name("random_returns.csv").read_text().splitlines()
    assert lines[0].startswith("# python scripts/random_returns.py")
    measured = {row["env"]: float(row["mean"]) for row in csv.DictReader(lines[1:])}
    found = {f"{env}-v5": reference.low for env, reference in load_references().items()}
    assert found == measured


def test_exact_environment_before_its_name(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("# mine\nenv,low,high,threshold\nX,0,1,\nX-v2,0,2,1; 2;\nns/Y-v0,,,3\n")
    found = load_references(path)
    assert find_reference(found, "X-v2") == Reference("X-v2", 0.0, 2.0, (1.0, 2.0), "")
    assert find_reference(found, "X-v3") == Reference("X", 0.0, 1.0, (), "")
    only_threshold = find_reference(found, "ns/Y-v0")
    assert only_threshold == Reference("ns/Y-v0", None, None, (3.0,), "")
    assert find_reference(found, "Z-v0") is None
    assert only_threshold is not None
    with pytest.raises(ValueError, match="has no low and high"):
        normalise(np.zeros(2), only_threshold)


def test_normalise() -> None:
    reference = Reference("X", -20.0, 30.0, (), "")
    np.testing.assert_allclose(
        normalise(np.array([-20.0, 5.0, 30.0, 80.0]), reference), [0, 0.5, 1, 2], atol=1e-15
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot read: No such file"),
        ("", "no header line"),
        ("env,low,high\nX,0,1\n", "columns env, low, high, threshold are needed"),
        ("env,low,high,threshold\nX,0,,\n", "both be given or both be empty"),
        ("env,low,high,threshold\nX,1,1,\n", "low must be below high, got 1 and 1"),
        ("env,low,high,threshold\nX,a,1,\n", "a finite number is needed, got 'a'"),
        ("env,low,high,threshold\nX,0,nan,\n", "a finite number is needed, got 'nan'"),
        ("env,low,high,threshold\nX,0,1,5;b\n", "a finite number is needed, got 'b'"),
        ("env,low,high,threshold\nX,0,1,\nX,0,2,\n", "stands twice"),
        ("env,low,high,threshold\n,0,1,\n", "env and source must be printable"),
        ("env,low,high,threshold\nX,0,1\n", "line 2 has 3 fields"),
    ],
)
def test_bad_references_are_one_line(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "r.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        load_references(path)
    assert "\n" not in str(caught.value) and "r.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("HalfCheetah-v5", "HalfCheetah"),
        ("PongNoFrameskip-v4", "Pong"),
        ("ALE/Pong-v5", "Pong"),
        ("PongDeterministic-v4", "Pong"),
        ("Reacher", "Reacher"),
        ("Pixels/Hopper-v5", "Pixels/Hopper"),
        ("gymnasium:Pixels/Hopper-v5", "Pixels/Hopper"),
        ("my.own:Hopper-v5", "my.own:Hopper"),
        ("MinAtar/Breakout-v1", "MinAtar/Breakout"),
        ("ale_py:ALE/Pong-v5", "Pong"),
    ],
)
def test_environment_name(env_id: str, name: str) -> None:
    assert environment_name(env_id) == name


def test_published_curves() -> None:
    assert published_curves("Pixels/HalfCheetah-v5") == []
    (paper,) = published_curves("HalfCheetah-v5")
    assert paper.label == "ACKTR, Wu et al. 2017 (HalfCheetah-v1, older version)"
    both = published_curves("PongNoFrameskip-v4")
    assert [ref.label for ref in both] == [
        "ACKTR, OpenAI Baselines (PongNoFrameskip-v4)",
        "ACKTR, Wu et al. 2017 (PongNoFrameskip-v3, older version)",
    ]
    assert all(18 < ref.returns[-1] <= 21 and ref.returns[0] < -18 for ref in both)
    assert len(published_curves("Hopper-v5", ("acktr", "a2c", "trpo"))) == 4
    assert published_curves("CartPole-v1") == []
    for env in ("BeamRider", "Breakout", "Qbert", "Seaquest", "SpaceInvaders", "Ant", "Walker2d"):
        for ref in published_curves(f"{env}-v5"):
            assert 2 <= len(ref.steps) <= 50 and (np.diff(ref.steps) > 0).all()
            assert np.isfinite(ref.returns).all()
