"""Networks of one's own from the door to the checkpoint: Python and command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from acktr import A2C, ACKTR, TRPO, Auxiliary, CheckpointError, ConfigError, preset
from acktr.cli.main import main
from acktr.compare.entries import parse_algo
from acktr.compare.grid import NamedNetwork, RunPlan, make_plans, train_args
from acktr.compare.status import State, survey
from acktr.kfac import GaussianLoss
from tests.tools.networks import Actor, Critic, Small

KINDS: dict[str, Any] = {"acktr": ACKTR, "a2c": A2C, "trpo": TRPO}


def spaces_of(env: str) -> tuple[Any, Any]:
    made = gymnasium.make(env)
    return made.observation_space, made.action_space


def few(algo: Any, env: str, like: str) -> Any:
    config = preset(like, algo)[0]
    network = dataclasses.replace(config.network, log_std_init=-1.0)
    config = dataclasses.replace(config, network=network)
    return dataclasses.replace(config, env=env, num_envs=2, num_steps=32, env_workers=1)


@pytest.mark.parametrize("algo", KINDS)
def test_a_copy_of_the_default_networks_trains_to_the_same_bits(algo: str) -> None:
    """With the MuJoCo preset, on Pendulum; in ACKTR's Fisher the log_std is a parameter as any."""
    config = few(algo, "Pendulum-v1", "Hopper-v5")
    own = KINDS[algo]("Pendulum-v1", config, network=(Actor, Critic)).learn(256)
    default = KINDS[algo]("Pendulum-v1", config)
    if algo == "acktr":
        network = default.trainer.network
        network.own = True
        default = ACKTR("Pendulum-v1", config, network=network)
    default.learn(256)
    pairs = zip(*(agent.trainer.network.parameters() for agent in (own, default)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    observation = np.array([0.5, 0.5, 1.0], np.float32)
    both = [agent.predict(observation, deterministic=True)[0] for agent in (own, default)]
    assert np.array_equal(*both)


@pytest.mark.parametrize("algo", ["acktr", "a2c"])
def test_a_shared_network_learns_and_comes_back(algo: str, tmp_path: Path) -> None:
    config = few(algo, "CartPole-v1", "CartPole-v1")
    size = {"sum": Auxiliary(GaussianLoss(), target=lambda batch: batch.observations[:, :3])}
    seen: list[dict[str, float]] = []
    agent = KINDS[algo]("CartPole-v1", config, network=Small, auxiliary=size)
    agent.learn(640, lambda stats: seen.append(stats.metrics))
    assert "train/sum_loss" in seen[0]
    assert algo == "a2c" or "train/value_kl" in seen[0]
    agent.save(tmp_path / "agent")
    kind, path = KINDS[algo], tmp_path / "agent"
    again = kind.load(path, network=Small, auxiliary=size)
    pairs = zip(*(a.trainer.network.parameters() for a in (agent, again)), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert again.learn(128).num_timesteps == agent.num_timesteps + 128
    with pytest.raises(CheckpointError, match=r"trained with the network tests\.tools\.networks:S"):
        kind.load(path)
    with pytest.raises(CheckpointError, match="auxiliary losses sum, not none: pass the same"):
        kind.load(path, network=Small)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        kind.load(path, network=(Small, Small), auxiliary=size)


def test_a_network_for_another_checkpoint_is_refused(tmp_path: Path) -> None:
    agent = ACKTR("CartPole-v1", few("acktr", "CartPole-v1", "CartPole-v1"))
    agent.save(tmp_path / "agent")
    message = r"does not fit the network: .* \(.* is \(2,\) in it and missing here\)"
    with pytest.raises(CheckpointError, match=message):
        ACKTR.load(tmp_path / "agent", network=Small)
    with pytest.raises(ConfigError, match=r"trpo needs a critic of its own: network=\(Actor, Cr"):
        TRPO("CartPole-v1", network=Small)
    with pytest.raises(ConfigError, match="policy for 3 observations"):
        ACKTR("CartPole-v1", network=(Critic, Critic))
    with pytest.raises(ConfigError, match=r"a class or function .* got 'MlpPolicy'"):
        ACKTR("CartPole-v1", network="MlpPolicy")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the environment comes first: ACKTR\(env\), with a ne"):
        ACKTR(Small, "CartPole-v1")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"masks must be one of .*, observation, None, got False"):
        ACKTR("CartPole-v1", masks=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("network", [None, (Actor, Critic)])
def test_the_network_of_another_agent_is_as_separate_as_there(network: Any, tmp_path: Path) -> None:
    config = few("acktr", "Pendulum-v1", "Hopper-v5")
    first, second = (ACKTR("Pendulum-v1", config, network=network) for _ in range(2))
    trpo = TRPO(
        "Pendulum-v1", few("trpo", "Pendulum-v1", "Hopper-v5"), network=first.trainer.network
    )
    assert not trpo.config.network.shared
    first.save(tmp_path / "agent")
    again = ACKTR.load(tmp_path / "agent", network=second.trainer.network)
    assert again.config.network.shared is again.trainer.network.shared is False


def test_a_module_of_a_second_agent_is_told(tmp_path: Path) -> None:
    net = Small(*spaces_of("CartPole-v1"))
    config = few("a2c", "CartPole-v1", "CartPole-v1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="device"):
            A2C("CartPole-v1", config, network=net, device="none")
        first = A2C("CartPole-v1", config, network=net)
        first.set_env("CartPole-v1")
        first.save(tmp_path / "agent")
        A2C("CartPole-v1", config, network=copy.deepcopy(net))
        A2C.load(tmp_path / "agent", network=net)
    for source in (net, first.trainer.network):
        A2C("CartPole-v1", config, network=Small)
        with pytest.warns(UserWarning, match="has been another agent's, whose weights") as told:
            A2C("CartPole-v1", config, network=source)
            A2C("CartPole-v1", config, network=source)
        assert told[0].filename == __file__


class Stateful(Small):
    """It has a state beside its tensors."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__(observation_space, action_space)
        self.state: Any = {"version": 1}

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_what_no_checkpoint_holds_is_told_when_it_is_made(tmp_path: Path) -> None:
    config = few("a2c", "CartPole-v1", "CartPole-v1")
    message = r"state_dict\(\) has 'network\._extra_state' of dict, which no checkpoint holds"
    with pytest.warns(UserWarning, match=f"it cannot be saved: .*{message}"):
        agent = A2C("CartPole-v1", config, network=Stateful).learn(64)
    for write in (
        lambda: agent.save(tmp_path / "agent"),
        lambda: agent.learn(64, run_dir=tmp_path / "runs"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            write()
        assert "\n" not in str(caught.value)
        assert agent.num_timesteps == 64 and not any(tmp_path.rglob("*.safetensors"))
    agent.set_parameters(agent.get_parameters())


@pytest.mark.parametrize("state", [torch.tensor([1.0, 2.0]), None])
def test_tensors_and_nothing_are_states_that_come_back(tmp_path: Path, state: Any) -> None:
    config = few("a2c", "CartPole-v1", "CartPole-v1")
    net = Stateful(*spaces_of("CartPole-v1"))
    net.state = state
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agent = A2C("CartPole-v1", config, network=net)
        agent.save(tmp_path / "agent")
        agent.set_parameters(agent.get_parameters())
        other = copy.deepcopy(net)
        other.state = state if state is None else torch.zeros(2)
        A2C.load(tmp_path / "agent", network=other)
    assert other.state is None if state is None else torch.equal(other.state, state)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = ["--network", "tests.tools.networks:Small"]
    few = ["--num-envs", "2", "--num-steps", "16", "--eval-episodes", "2"]
    train = ["train", "--env", "CartPole-v1", "--total-timesteps", "128", *few]
    assert main([*train, *own]) == 0
    run = "runs/CartPole-v1/acktr/seed0"
    config = json.loads(Path(run, "config.json").read_text())
    assert config["network"]["custom"] == "tests.tools.networks:Small"
    capsys.readouterr()
    evaluate = ["eval", run, "--episodes", "2", "--json"]
    assert main([*evaluate, *own]) == 0
    resume = ["train", "--resume", run, "--total-timesteps", "192"]
    assert main([*resume, *own]) == 0
    for argv in (evaluate, [*resume[:-1], "256"]):
        capsys.readouterr()
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "on the command line: --network tests.tools.networks:Small" in error
        assert error.count("\n") == 1
    for name, message in (
        ("Small", "MODULE:NET is needed"),
        ("tests.tools.networks:Large", "has no attribute 'Large'"),
        ("tests.tools.nowhere:Small", "No module named 'tests.tools.nowhere'"),
        ("tests.tools.networks:Critic", "policy"),
    ):
        assert main([*train, "--label", "bad", "--network", name]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not Path("runs/CartPole-v1/bad").exists()


def test_in_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run trains it, new or resumed; what it does not fit is said before anything starts."""
    few = {"num_envs": 2, "num_steps": 16, "eval_episodes": 1, "total_timesteps": 64}
    own = NamedNetwork("tests.tools.networks:Small", Small)

    def plan(algo: str) -> RunPlan:
        return make_plans(["CartPole-v1"], [parse_algo(algo)], [0], tmp_path, None, few, own)[0]

    run = plan("acktr")
    assert survey([run])[0].state is State.NEW
    assert main(train_args(run, False)) == 0
    assert survey([run])[0].state is State.FINISHED
    assert main([*train_args(run, True), "--total-timesteps", "128"]) == 0
    stored = json.loads((run.path / "config.json").read_text())
    assert (stored["network"]["custom"], stored["total_timesteps"]) == (own.name, 128)
    with pytest.raises(ConfigError, match="trpo needs a critic of its own"):
        plan("trpo")
    compare = ["compare", "--envs", "CartPole-v1", "--run-dir", str(tmp_path / "others")]
    for network, message in (
        ("tests.tools.networks:Large", "--network tests.tools.networks:Large: .*'Large'"),
        ("tests.tools.networks:Critic", "CartPole-v1 acktr: the network must return"),
    ):
        capsys.readouterr()
        assert main([*compare, "--algos", "acktr", "--network", network]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1
    assert not (tmp_path / "others").exists()
