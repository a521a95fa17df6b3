"""The example programs run, and do what they say; none of them is long."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from scripts.examples import dict_observations, kfac_loop, memory, multidiscrete_masks, own_network

FOLDER = Path(memory.__file__).parent


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 80


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (dict_observations.main, ["--steps", "512"], "mean return"),
        (multidiscrete_masks.main, ["--steps", "256"], "mean return"),
        (memory.main, ["recall", "--memory", "gru", "--steps", "512"], "recall, gru, seed 0"),
        (memory.main, ["cartpole", "--memory", "none", "--steps", "256"], "cartpole, none, seed 0"),
    ],
)
def test_programs_run(main, arguments, said, capsys):
    assert main(arguments) == 0
    assert said in capsys.readouterr().out


def test_kfac_loop_learns():
    returns = kfac_loop.train(updates=25)
    assert np.mean(returns[-20:]) > 1.5 * np.mean(returns[:50])


@pytest.mark.parametrize(
    "make", [dict_observations.Fetch, multidiscrete_masks.Workshop, memory.Recall, memory.positions]
)
def test_environments_are_gymnasiums(make):
    env = make()
    check_env(env.unwrapped, skip_render_check=True)
    assert env.reset(seed=0)[0] in env.observation_space


def test_the_cue_must_be_remembered():
    env = memory.Recall(delay=3)
    cue = int(env.reset(seed=0)[0].argmax())
    steps = [env.step(cue) for _ in range(4)]
    assert [step[1] for step in steps] == [0, 0, 0, 1] and steps[-1][2]
    assert [int(step[0][-1]) for step in steps[:3]] == [0, 0, 1]
    assert not any(step[0][:-1].any() for step in steps)


def test_masks_forbid_what_earns_nothing():
    env = multidiscrete_masks.Workshop()
    env.reset(seed=0)
    reward = env.step(np.array([1, 2]))[1]
    assert reward > 0
    mask = env.action_masks()
    assert mask.shape == (10,) and not mask[6 + 2] and mask[:6].any()
    assert env.step(np.array([1, 2]))[1] == 0


def test_the_own_network_takes_frames():
    space = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    net = own_network.Net(space, gymnasium.spaces.Discrete(6))
    outputs = net(torch.randint(0, 255, (2, 4, 84, 84), dtype=torch.uint8))
    assert outputs["policy"].shape == (2, 6) and outputs["value"].shape == (2,)
    float_outputs = net(torch.rand(2, 4, 84, 84))
    assert float_outputs["policy"].abs().max() < 1


def test_optuna_cuts_poor_trials_short():
    pytest.importorskip("optuna", reason="optuna is not installed")
    from scripts.examples import optuna_search

    study = optuna_search.search("CartPole-v1", steps=2560, trials=8)
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 8 and set(states[:4]) == {"COMPLETE"}  # the first four are never cut
    assert "PRUNED" in states and study.best_value > 0
    cut = study.trials[states.index("PRUNED")]
    assert 2 <= max(cut.intermediate_values) < 10


def test_weights_and_biases_gets_tensorboards_events(tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from scripts.examples import wandb_logs

    for _ in range(2):
        wandb_logs.train("CartPole-v1", 512, str(tmp_path), "offline")
    wandb.teardown()  # waits for its process, which writes the files
    stored = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(stored) == 2
    for path in stored:
        assert b"rollout/ep_rew_mean" in path.read_bytes()  # of the events
        assert b"kl_clip" in path.read_bytes()  # of the settings
    assert len(list(tmp_path.glob("tensorboard/acktr_*/events*"))) == 2
