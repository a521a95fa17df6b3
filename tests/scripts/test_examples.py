"""The example programs run, and do what they say; none of them is long."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from acktr import ACKTR
from scripts.examples import (
    dict_observations,
    hub_folder,
    kfac_loop,
    memory,
    multidiscrete_masks,
    own_network,
)
from tests.tools.run_folders import write_run

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


def test_weights_and_biases_gets_metrics_and_settings(tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    from scripts.examples import wandb_logs

    for _ in range(2):
        wandb_logs.train("CartPole-v1", 512, str(tmp_path), "offline")
    wandb.teardown()  # waits for its process, which writes the files
    stored = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(stored) == 2
    for path in stored:
        for word in (b"rollout/ep_rew_mean", b"train/approx_kl", b"eval/mean_reward", b"kl_clip"):
            assert word in path.read_bytes(), word


def test_envpool_is_learned_in():
    pytest.importorskip("envpool", reason="envpool is not installed")
    from scripts.examples import envpool_vector

    agent = ACKTR(envpool_vector.EnvPool("CartPole-v1", 4, seed=0), seed=0)
    episodes = []
    agent.learn(2_000, callback=lambda stats: episodes.extend(stats.episodes))
    # The steps of all episodes, those that only reset not among them.
    assert 1_000 < sum(episode.length for episode in episodes) < 2_000
    assert all(episode.reward == episode.length for episode in episodes)


def test_a_run_is_made_ready_for_the_hub(tmp_path, capsys):
    run = write_run(tmp_path, "CartPole-v1", "acktr", 0, [1.0, 2.0])
    for name in ("events.out.tfevents.1", "fault.log"):
        (run / name).write_text("of this machine")
    assert hub_folder.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "README.md, command.txt, config.json" in said
    assert "events.out" not in said and "fault.log" not in said
    assert (run / "README.md").read_text().startswith("---\nlibrary_name: acktr\n")
    (run / "README.md").write_text("my own")
    hub_folder.prepare(run)
    assert (run / "README.md").read_text() == "my own"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """All of its cells, in their order, in one namespace, with fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((FOLDER / "first_steps.ipynb").read_text())
    assert notebook["nbformat"] == 4 and not any(cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(cell["source"]).replace("00_000", "_000").replace("50_000", "1_000")
            exec(code, names)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert losses[0] > losses[1] > losses[2]
