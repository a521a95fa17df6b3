"""Action masks from the environment to the command line: agents, evaluation, runs, videos."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acktr import A2C, ACKTR, TRPO
from acktr.config import ConfigError, preset
from acktr.envs import MASK, EnvError, make_vec
from acktr.evaluate import evaluate
from tests.tools.command_line import call
from tests.tools.masked import MODES, MaskedEnv, shown_masks, sync
from tests.tools.toys import variant


@pytest.mark.parametrize("kind", [ACKTR, A2C, TRPO])
@pytest.mark.parametrize(
    ("nvec", "source"), [((5,), "observation"), ((3, 1, 4), "action_masks"), ((3, 4), "info")]
)
def test_agents_learn_predict_and_are_evaluated_with_masks(
    kind: Any, nvec: Any, source: str
) -> None:
    """A forbidden action would raise inside of the environment."""
    env_id = variant(MaskedEnv, {"nvec": nvec, "source": source})
    agent = kind(env_id, seed=0).learn(400)
    envs = make_vec(env_id, 3, training=False)
    played = evaluate(agent.policy, envs, 20, seed=1, deterministic=False)
    assert len(played.returns) == 20
    observations, infos = envs.reset(seed=2)
    for _ in range(10):
        asked = None if source == "observation" else infos[MASK]  # which has it itself
        actions, _ = agent.predict(observations, action_masks=asked)
        observations, *_, infos = envs.step(actions)
    first: Any = observations[0] if source != "observation" else None
    if first is None:
        first = {name: part[0] for name, part in observations.items()}
    one, _ = agent.predict(first, action_masks=list(infos[MASK][0]), deterministic=True)
    many, _ = agent.predict(observations, action_masks=infos[MASK], deterministic=True)
    np.testing.assert_array_equal(one, many[0])
    agent.close()


@pytest.mark.parametrize("mode", MODES)
def test_agents_of_vectors_of_others(mode: Any) -> None:
    agent = ACKTR(sync(mode, 4, source="action_masks", nvec=(3, 1, 4)), seed=0).learn(400)
    assert agent.num_timesteps >= 400


def test_predictions_without_masks_are_told_before_a_reset(tmp_path: Path) -> None:
    observation = np.zeros(16, np.float32)
    env = variant(MaskedEnv, {"nvec": (3, 1, 4), "source": "action_masks"})
    ACKTR(env, seed=0).save(tmp_path / "agent")
    agent = ACKTR.load(tmp_path / "agent", env)
    for ask in (agent.predict, agent.action_probability):
        with pytest.warns(UserWarning, match=f"{ask.__name__} was called without action_masks"):
            ask(observation)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ACKTR(env, seed=0, masks=None).predict(observation)
        agent.predict(observation, action_masks=np.ones(8))


def test_masks_that_cannot_be_predicted_with() -> None:
    agent = ACKTR(variant(MaskedEnv, {"nvec": (3, 1, 4)}), seed=0)
    observation = np.zeros(16, np.float32)
    for mask, said in (
        (np.ones(7), r"action_masks cannot be used: it has the shape \(7,\), not \(8,\)"),
        (np.array([0, 0, 0, 1, 1, 1, 1, 1]), "it allows no action in component 0 of 3"),
        (np.full(8, 2), "other values than 0 and 1: 2"),
    ):
        with pytest.raises(ValueError, match=said):
            agent.predict(observation, action_masks=mask)
    agent.learn(200)
    with pytest.warns(UserWarning, match="predict was called without action_masks"):
        agent.predict(observation)
    pendulum = ACKTR("Pendulum-v1", seed=0)
    with pytest.raises(ValueError, match="for Discrete and MultiDiscrete actions, not Box"):
        pendulum.predict(np.zeros(3, np.float32), action_masks=np.ones(2))


def test_masks_are_not_left_aside_in_silence() -> None:
    env_id = variant(MaskedEnv, {"source": "info", "lenient": True})
    with pytest.warns(UserWarning, match=r'\(info\["action_mask"\]\) that are not used: masks is'):
        ACKTR(env_id, seed=0, masks=None).learn(200)
    with pytest.raises(EnvError, match=r"masks='action_masks': .* has no env.action_masks"):
        ACKTR(env_id, seed=0, masks="action_masks").learn(200)
    with pytest.raises(ConfigError, match="masks must be one of auto, action_masks, info"):
        ACKTR(env_id, seed=0, masks="method")  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ACKTR("CartPole-v1", seed=0).learn(200)


def test_masks_make_learning_better() -> None:
    """The same task, where a forbidden action ends the episode: with the mask, and without."""
    settings = {"nvec": (8,), "horizon": 10, "lenient": True}
    last = {}
    for masks in ("auto", None):
        agent: Any = ACKTR(variant(MaskedEnv, settings), seed=0, masks=masks)
        rewards: list[float] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agent.learn(4_000, lambda s: rewards.extend(e.reward for e in s.episodes))  # noqa: B023
        last[masks] = float(np.mean(rewards[-100:]))
    assert last["auto"] > 5.5  # a random allowed choice gives 5
    assert last["auto"] > last[None] + 1


@pytest.mark.parametrize("source", ["action_masks", "info"])
def test_the_command_line_says_which_masks_it_found(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    env = f"toys/Masked{source.title()}-v0"
    argv = ("train", "--env", env, "--total-timesteps", "300", "--eval-episodes", "3")
    code, _, err = call(capsys, *argv, "--env-workers", "2", "--eval-freq", "100")
    assert code == 0, err
    place = 'info["action_mask"]' if source == "info" else "env.action_masks()"
    assert err.splitlines()[0].endswith(f"; action masks from {place}")
    run = tmp_path / "runs" / env / "acktr" / "seed0"
    run = next((tmp_path / "runs").rglob("protocol.json")).parent
    protocol = json.loads((run / "protocol.json").read_text())
    assert protocol["environment"]["action_masks"] == source
    assert call(capsys, "eval", str(run), "--episodes", "4", "--stochastic")[0] == 0
    assert call(capsys, "record", str(run), "--out", "clip.gif")[0] == 0
    code, _, err = call(capsys, "train", "--resume", str(run), "--total-timesteps", "600")
    assert code == 0, err
    assert f"action masks from {place}" in err.splitlines()[0]


def test_the_command_line_refuses_masks_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ("train", "--env", "CartPole-v1", "--total-timesteps", "300", "--masks", "info")
    code, _, err = call(capsys, *argv)
    assert code == 2
    assert "masks='info': environment 0 of CartPole-v1 has no info" in err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.json"))


def test_the_command_line_warns_of_masks_that_it_leaves_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    env = variant(MaskedEnv, {"source": "info", "lenient": True})
    argv = ("train", "--env", env, "--total-timesteps", "300", "--eval-episodes", "1")
    code, _, err = call(capsys, *argv, "--masks", "None")
    assert code == 0, err
    assert "that are not used: masks is None" in err
    protocol = json.loads(next(tmp_path.rglob("protocol.json")).read_text())
    assert protocol["environment"]["action_masks"] is None


def test_shown_masks_are_those_of_the_toy() -> None:
    env = MaskedEnv("info")
    observation, info = env.reset(seed=0)
    np.testing.assert_array_equal(shown_masks(observation), info[MASK])
    assert preset("CartPole-v1")[0].masks == "auto"
