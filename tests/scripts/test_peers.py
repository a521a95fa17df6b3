"""Peers train on our environments and write run folders that our readers take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from acktr.envs import EnvFault, make_vec
from acktr.evaluate import evaluate
from acktr.files import safe_name
from acktr.report.curves import load_monitor
from acktr.runs.session import EVALUATION_SEED
from acktr.runs.tables import read_table
from scripts.peers import runs, settings
from scripts.peers.__main__ import main
from scripts.peers.models import PeerEnvs, linear, make_model
from scripts.peers.settings import Settings, choose
from tests.tools.peers import config, translated

ENV = "InvertedPendulum-v5"


def run(
    capsys: pytest.CaptureFixture[str], where: Path, *given: str, env: str = ENV
) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["--env", env, "--run-dir", str(where), "--eval-episodes", "9", *given])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets with small batches."""
    monkeypatch.setattr(settings, "preset", lambda env, algo: (config(algo, {"env": env}), "small"))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("peer", ["sb3-a2c", "sb3-trpo", "sb3-ppo"])
def test_a_run_has_the_files_of_our_own_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peer: str
) -> None:
    options = ["--peer", peer, "--seed", "5", "--total-timesteps", "1500"]
    code, out, err = run(capsys, tmp_path / "runs", *options)
    assert code == 0, err
    path = tmp_path / "runs" / ENV / peer / "seed5"
    assert out.startswith(f"done: {peer} {ENV} seed 5, 1,500 steps in 0:0")
    assert out.count("\n") == 1
    assert "ETA" in err
    assert [folder.name for folder in path.parent.iterdir()] == ["seed5"]

    made = json.loads((path / "config.json").read_text())
    assert made["env"] == ENV and made["algo"] == peer and made["seed"] == 5
    assert made["total_timesteps"] == 1500
    batch = made["num_envs"] * made["num_steps"]
    last = -(-1500 // batch) * batch

    monitor = load_monitor(path)
    # One reward per step but the last of an episode: the environment's own, not normalised.
    np.testing.assert_array_equal(monitor.returns, monitor.lengths - 1)
    assert set(monitor.steps % batch) == {0} and (np.diff(monitor.steps) >= 0).all()
    assert 0 < monitor.lengths.sum() <= last
    assert last - monitor.lengths.sum() < 200 * made["num_envs"]

    progress = read_table(path / "progress.csv").rows
    assert [int(row["updates"]) for row in progress] == list(range(1, last // batch + 1))
    assert int(progress[-1]["timesteps"]) == last
    recent = float(np.mean(monitor.returns[-100:]))
    assert float(progress[-1]["rollout/ep_rew_mean"]) == pytest.approx(recent, rel=1e-6)
    assert "train/value_loss" in progress[0]

    (row,) = read_table(path / "eval.csv").rows
    assert int(row["timesteps"]) == last
    returns = [float(value) for value in row["returns"].split(";")]
    assert len(returns) == 9 == int(row["episodes"])
    assert float(row["mean_reward"]) == pytest.approx(np.mean(returns))
    versions = json.loads((path / "versions.json").read_text())
    assert versions["stable-baselines3"] and versions["sb3-contrib"] and versions["torch"]
    assert versions["torch_threads"] == 1
    assert (path / "command.txt").read_text().startswith("python -m scripts.peers --env ")

    code, _, err = run(capsys, tmp_path / "runs", *options)
    assert (code, err) == (
        2,
        f"peers: error: {path} already holds this run, finished; choose another --run-dir\n",
    )
    options[options.index("1500")] = "1600"
    code, _, err = run(capsys, tmp_path / "runs", *options)
    assert code == 2 and "holds a run with another total_timesteps" in err


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("--peer", "sb3-dqn"), "argument --peers/--peer: invalid choice: 'sb3-dqn'"),
        (("--peer", "sb3-ppo", "--seed", "-1"), "argument --seeds/--seed: needs an integer in [0"),
        (("--peer", "sb3-ppo", "--seed", "1", "1"), "--seeds: each value may be given once"),
        (("--peer", "sb3-ppo", "--env", "Hoper-v5"), "Hoper"),
        (("--peer", "sb3-ppo", "--total-timesteps", "0"), "needs an integer in [1, 10000000000]"),
        (
            ("--peer", "sb3-a2c", "--env", "FrozenLake-v1"),
            "peers need vectors as observations",
        ),
        (("--workers", "2"), "the following arguments are required: --peers/--peer"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], why: str
) -> None:
    code, out, err = run(capsys, tmp_path / "runs", *given)
    assert (code, out) == (2, "")
    assert err.startswith("peers: error: ") and err.count("\n") == 1
    assert why in err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_finished_run_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ENV / "sb3-ppo" / "seed0"
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("mine")
    code, _, err = run(capsys, tmp_path, "--peer", "sb3-ppo", "--total-timesteps", "64")
    assert code == 2 and "not a run folder" in err and err.count("\n") == 1
    assert [file.name for file in path.iterdir()] == ["notes.txt"]


def test_training_that_breaks_leaves_nothing_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"a2c.lr": 1e9, "a2c.max_grad_norm": 1e9, "a2c.lr_schedule": "constant"}
    monkeypatch.setattr(settings, "preset", lambda *_: (config("a2c", changes), "too large"))
    options = ("--peer", "sb3-a2c", "--total-timesteps", "5000")
    code, _, err = run(capsys, tmp_path / "runs", *options)
    assert code == 70
    assert f"peers: error: sb3-a2c {ENV} seed 0: training broke at step " in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_actions_that_are_no_numbers_are_the_policys_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a step that makes the policy's mean and deviation infinite."""
    step_async = PeerEnvs.step_async

    def spoilt(self: PeerEnvs, actions: NDArray[Any]) -> None:
        step_async(self, np.full_like(actions, np.nan))

    monkeypatch.setattr(PeerEnvs, "step_async", spoilt)
    code, _, err = run(capsys, tmp_path / "runs", "--peer", "sb3-ppo")
    assert code == 70 and "training broke at step 0: the policy's actions are NaN" in err


def test_an_environment_that_breaks_has_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: PeerEnvs) -> None:
        raise EnvFault("environment 0 of Broken-v0 returned a non-finite reward at step 1")

    monkeypatch.setattr(PeerEnvs, "step_wait", broken)
    code, _, err = run(capsys, tmp_path / "runs", "--peer", "sb3-ppo")
    assert code == 76 and "returned a non-finite reward" in err
    assert not (tmp_path / "runs").exists()


def test_a_grid_makes_what_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where, steps = tmp_path / "runs", ("--total-timesteps", "64")
    assert run(capsys, where, "--peer", "sb3-ppo", *steps)[0] == 0
    before = (where / ENV / "sb3-ppo" / "seed0" / "eval.csv").stat().st_mtime_ns
    grid = ("--peers", "sb3-ppo", "--seeds", "0", "1", *steps)
    code, out, err = run(capsys, where, *grid)
    assert code == 0, out + err
    first, second = out.splitlines()
    assert first == "2 runs, 1 of them finished"
    assert second.startswith(f"[1/1] done: sb3-ppo {ENV} seed 1, 64 steps")
    assert (where / ENV / "sb3-ppo" / "seed1" / "eval.csv").exists()
    assert (where / ENV / "sb3-ppo" / "seed0" / "eval.csv").stat().st_mtime_ns == before
    assert run(capsys, where, *grid)[:2] == (0, "2 runs, 2 of them finished\n")


def test_a_stopped_grid_stops_its_workers_and_leaves_no_unfinished_run(tmp_path: Path) -> None:
    where = tmp_path / "runs"
    command = [sys.executable, "-m", "scripts.peers", "--peers", "sb3-ppo", "--envs", ENV]
    process = subprocess.Popen(
        [*command, "--seeds", "0", "1", "--run-dir", str(where)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not list(where.glob("*/*/.seed0.tmp-*/progress.csv")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "peers: stopped; finished runs are kept, the same command makes the others\n"
    assert not where.exists()


def test_environments_are_those_of_our_own_runs() -> None:
    """Same first observations and steps as from make_vec; ends are reported as the library's."""
    env, count, rng = "Reacher-v5", 3, np.random.default_rng(0)
    mine, theirs = make_vec(env, count, 7), make_vec(env, count, 7)
    peers = PeerEnvs(theirs)
    try:
        np.testing.assert_array_equal(peers.reset(), mine.reset()[0])
        for step in range(1, 52):
            actions = rng.uniform(-1, 1, (count, 2)).astype(np.float32)
            obs, rewards, _, truncated, found = mine.step(actions)
            got, scaled, dones, infos = peers.step(actions)
            np.testing.assert_array_equal(got, obs)
            np.testing.assert_array_equal(scaled, rewards.astype(np.float32))
            np.testing.assert_array_equal(dones, truncated)
            assert dones.all() == (step == 50)  # Reacher's time limit
            for index, info in enumerate(infos):
                if step != 50:
                    assert info == {}
                    continue
                final = found["final_obs"][index]
                np.testing.assert_array_equal(info["terminal_observation"], final)
                assert info["TimeLimit.truncated"]
                assert info["episode"]["r"] == found["episode"]["r"][index]
    finally:
        mine.close()
        theirs.close()


def test_a_termination_is_no_time_limit() -> None:
    theirs = make_vec(ENV, 1, 0)
    peers = PeerEnvs(theirs)
    peers.reset()
    while True:
        _, _, dones, infos = peers.step(np.full((1, 1), 3.0, np.float32))
        if dones[0]:
            break
    theirs.close()
    assert not infos[0]["TimeLimit.truncated"]


def model_of(settings: Settings, total: int = 320) -> Any:
    envs = make_vec(ENV, settings.num_envs, 0)
    return make_model(settings, envs, 0, total)


def test_a2c_is_built_as_translated() -> None:
    model, normalized = model_of(translated("a2c", {"ent_coef": 0.03}))
    optimizer = model.policy.optimizer
    assert type(optimizer).__name__ == "RMSpropTFLike"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["alpha"], group["eps"]) == (2e-3, 0.95, 1e-4)
    assert (group["momentum"], group["centered"], group["weight_decay"]) == (0, False, 0)
    assert (model.n_envs, model.n_steps, model.gamma, model.gae_lambda) == (4, 8, 0.98, 0.9)
    assert (model.ent_coef, model.vf_coef, model.max_grad_norm) == (0.03, 0.4, 0.7)
    assert model.normalize_advantage is True
    assert normalized.norm_obs and normalized.norm_reward and normalized.gamma == 0.98
    assert normalized.clip_obs == normalized.clip_reward == 10.0


def test_trpo_is_built_as_translated() -> None:
    model, _ = model_of(translated("trpo"))
    group = model.policy.optimizer.param_groups[0]
    assert (group["lr"], group["eps"], group["betas"]) == (3e-3, 1e-6, (0.9, 0.999))
    assert (model.target_kl, model.cg_max_steps, model.cg_damping) == (0.02, 12, 0.05)
    assert (model.line_search_shrinking_factor, model.line_search_max_iter) == (0.7, 9)
    assert (model.n_critic_updates, model.batch_size, model.sub_sampling_factor) == (6, 16, 1)
    assert model.lr_schedule(0.0) == 3e-3


def test_ppo_is_built_as_published() -> None:
    model, normalized = model_of(choose("sb3-ppo", "Hopper-v5")[0])
    assert (model.n_steps, model.batch_size, model.n_epochs) == (512, 32, 5)
    assert model.clip_range(1.0) == 0.2 and model.clip_range_vf is None and model.target_kl is None
    assert (model.ent_coef, model.vf_coef, model.max_grad_norm) == (0.00229519, 0.835671, 0.7)
    assert normalized.gamma == model.gamma == 0.999
    assert isinstance(model.policy.mlp_extractor.policy_net[1], torch.nn.ReLU)
    torch.testing.assert_close(model.policy.log_std.detach(), torch.tensor([-2.0]))


def test_networks_start_with_the_gains_of_ours() -> None:
    model, _ = model_of(translated("a2c"))
    policy = model.policy
    parts = policy.mlp_extractor
    assert [layer.out_features for layer in parts.policy_net[::2]] == [32, 16]
    assert [layer.out_features for layer in parts.value_net[::2]] == [24]
    gains = [(layer, 2.0) for layer in [*parts.policy_net[::2], *parts.value_net[::2]]]
    gains += [(policy.action_net, 0.01**2), (policy.value_net, 1.0)]
    for layer, square in gains:
        weight = layer.weight.detach().double()
        gram = weight @ weight.T if weight.shape[0] < weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, square * torch.eye(len(gram)).double(), atol=1e-5, rtol=0)
        assert not layer.bias.any()
    torch.testing.assert_close(policy.log_std.detach(), torch.tensor([-0.5]))


def test_step_sizes_are_those_of_our_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours: lr (1 - steps done before the batch / all steps), at every update."""
    model, _ = model_of(translated("a2c"), total=320)
    used: list[float] = []
    step = model.policy.optimizer.step
    monkeypatch.setattr(
        model.policy.optimizer,
        "step",
        lambda: (used.append(model.policy.optimizer.param_groups[0]["lr"]), step()),
    )
    model.learn(320, log_interval=None)
    np.testing.assert_allclose(used, [2e-3 * (1 - 32 * i / 320) for i in range(10)], rtol=1e-12)
    assert linear(1.0, 0.1)(-0.5) == 0.0  # a last batch that goes beyond the end


def test_evaluation_is_ours_with_frozen_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second computation, from the model's own tensors, gives the same returns."""
    kept: list[Any] = []

    def keep(*given: Any) -> Any:
        kept.append(make_model(*given))
        return kept[0]

    monkeypatch.setattr(runs, "make_model", keep)
    code, _, err = run(capsys, tmp_path, "--peer", "sb3-ppo", "--total-timesteps", "640")
    assert code == 0, err
    model, normalized = kept[0]
    moments, policy = normalized.obs_rms, model.policy

    class Second:
        def act(
            self, observations: NDArray[Any], deterministic: bool = False
        ) -> NDArray[np.float32]:
            scaled = (observations - moments.mean) / np.sqrt(moments.var + 1e-8)
            inputs = torch.as_tensor(np.clip(scaled, -10, 10), dtype=torch.float32)
            with torch.no_grad():
                mean = policy.action_net(policy.mlp_extractor.policy_net(inputs))
            return np.asarray(mean.clamp(-3, 3))

    envs = make_vec(ENV, 8, EVALUATION_SEED, training=False)
    try:
        found = evaluate(Second(), envs, 9, seed=EVALUATION_SEED)
    finally:
        envs.close()
    (row,) = read_table(tmp_path / ENV / "sb3-ppo" / "seed0" / "eval.csv").rows
    assert [float(value) for value in row["returns"].split(";")] == list(found.returns)


MASKED = "tests.tools.masked:toys/MaskedAction_Masks-v0"


def test_ppo_with_masks_makes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The environment raises at an action that is not allowed, in training and evaluation."""
    options = ["--peer", "sb3-maskable-ppo", "--total-timesteps", "64"]
    code, out, err = run(capsys, tmp_path, *options, env=MASKED)
    assert (code, out.count("\n")) == (0, 1), err
    assert len(load_monitor(tmp_path / safe_name(MASKED) / "sb3-maskable-ppo/seed0").returns) > 64


def test_ppo_without_masks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, tmp_path, "--peer", "sb3-ppo", env=MASKED)
    assert (code, out) == (2, "")
    assert err.endswith("error: the environment has action masks: the peer is sb3-maskable-ppo\n")
    assert not list(tmp_path.iterdir())
