"""Exported policies give what ``predict`` gives, in torch.export and in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from acktr import A2C, ACKTR, ExportError
from acktr.cli.main import main
from acktr.config import merge, preset
from acktr.envs import MASK, make_vec
from acktr.export import export_policy
from acktr.policies import ActorCritic, Policy
from tests.tools.masked import MaskedEnv
from tests.tools.toys import SpacesEnv, variant

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
CASES: dict[str, tuple[spaces.Space[Any], spaces.Space[Any]]] = {
    "vector, Discrete": (VECTOR, spaces.Discrete(3, start=4)),
    "vector, Box": (VECTOR, spaces.Box(-0.1, 0.2, (2, 2), np.float64)),
    "integers, MultiDiscrete": (spaces.Box(0, 9, (4,), np.int16), spaces.MultiDiscrete([2, 3])),
    "Discrete, MultiBinary": (spaces.Discrete(5, start=2), spaces.MultiBinary(2)),
    "picture, Discrete": (spaces.Box(0, 255, (12, 12, 3), np.uint8), spaces.Discrete(4)),
    "number, Box": (spaces.Box(-1, 1, (), np.float32), spaces.Box(-1, 1, (1,), np.float32)),
}


def trained(case: str) -> ACKTR:
    """An agent; after a few updates, with normalised observations, where they are no pictures."""
    observations, actions = CASES[case]
    maker = [lambda: SpacesEnv(observations, actions)] * 2
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    envs = gymnasium.vector.SyncVectorEnv(maker, autoreset_mode=mode)
    config = merge(
        preset("CartPole-v1")[0],
        {"num_envs": 2, "num_steps": 8, "normalize_observation": True, "precision": "float32"},
    )
    config = merge(config, {"network": {"policy_gain": 1.0}})
    agent = ACKTR(envs, config, seed=2)
    return agent if case.startswith("picture") else agent.learn(64)


def rows(case: str, count: int) -> Any:
    space = CASES[case][0]
    space.seed(3)
    return np.stack([np.asarray(space.sample()) for _ in range(count)])


def check(case: str, agent: ACKTR, run: Any) -> None:
    """Compare actions, parameters and values for batches of several sizes."""
    for count in (1, 2, 7):
        batch = rows(case, count)
        actions, parameters, values = run(batch)
        wanted, _ = agent.predict(batch, deterministic=True)
        outputs, critic = agent.policy.outputs(batch)
        np.testing.assert_allclose(parameters, outputs.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values, critic.numpy(), rtol=1e-4, atol=1e-5)
        assert actions.dtype == wanted.dtype and actions.shape == wanted.shape
        np.testing.assert_allclose(actions, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["vector, Box", "picture, Discrete", "integers, MultiDiscrete"])
def test_torch_export_agrees_with_predict(case: str, tmp_path: Path) -> None:
    agent = trained(case)
    agent.export(tmp_path / "policy.pt2")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    with torch.no_grad():
        check(case, agent, lambda x: [y.numpy() for y in program(torch.from_numpy(x))])


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_agrees_with_predict(case: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    agent = trained(case)
    agent.export(tmp_path / "policy.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.onnx"]
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    assert [entry.name for entry in session.get_outputs()] == ["action", "parameters", "value"]
    assert [entry.name for entry in session.get_inputs()] == ["observation"]
    check(case, agent, lambda x: session.run(None, {"observation": x}))


PARTS = spaces.Dict({"camera": spaces.Box(0, 255, (8, 8), np.uint8), "arm.left": VECTOR})


class Net(torch.nn.Module):
    """A network of a user's, of the parts of an observation."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.seen, self.felt = torch.nn.Linear(64, 3), torch.nn.Linear(3, 3)

    def forward(self, obs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        both = self.seen(obs["camera"].flatten(1).float()) + self.felt(obs["arm.left"])
        return {"policy": both, "value": both.sum(-1)}


@pytest.mark.parametrize("network", [pytest.param(None, marks=pytest.mark.slow), Net])
def test_parts_of_observations_and_networks_of_ones_own(network: Any, tmp_path: Path) -> None:
    env = variant(SpacesEnv, {"observation_space": PARTS, "action_space": spaces.Discrete(3)})
    config = merge(preset(env)[0], {"num_envs": 2, "num_steps": 8})
    agent = ACKTR(env, config, seed=1, network=network).learn(16)
    agent.export(tmp_path / "policy.pt2")
    PARTS.seed(1)
    shown = [PARTS.sample() for _ in range(5)]
    batch = {name: np.stack([one[name] for one in shown]) for name in PARTS.spaces}
    tensors = {name: torch.from_numpy(part) for name, part in batch.items()}
    program = torch.export.load(tmp_path / "policy.pt2").module()
    with torch.no_grad():
        actions, _, values = program(tensors)
    np.testing.assert_array_equal(actions.numpy(), agent.predict(batch, deterministic=True)[0])
    np.testing.assert_allclose(values.numpy(), agent.value(batch), rtol=1e-4, atol=1e-5)
    runtime = pytest.importorskip("onnxruntime")
    agent.export(tmp_path / "policy.onnx")
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    assert {entry.name for entry in session.get_inputs()} == set(batch)
    np.testing.assert_array_equal(session.run(["action"], batch)[0], actions.numpy())


@pytest.mark.parametrize(
    "source", ["action_masks", pytest.param("observation", marks=pytest.mark.slow)]
)
def test_masks_are_an_input(source: str, tmp_path: Path) -> None:
    """After loading too, before the first step."""
    env = variant(MaskedEnv, {"nvec": (3, 4), "source": source})
    with ACKTR(env, merge(preset(env)[0], {"num_envs": 2, "num_steps": 8}), seed=0) as agent:
        agent.save(tmp_path / "agent.zip")
    envs = make_vec(env, 40, training=False)
    observations, infos = envs.reset(seed=3)
    masks = infos[MASK]
    with ACKTR.load(tmp_path / "agent.zip") as loaded:
        loaded.export(tmp_path / "policy.pt2")
        program = torch.export.load(tmp_path / "policy.pt2").module()
        nested = isinstance(observations, dict)
        shown: Any = observations if nested else {"": observations}
        tensors: Any = {name: torch.from_numpy(part) for name, part in shown.items()}
        given = (tensors,) if nested else (tensors[""], torch.from_numpy(masks))
        with torch.no_grad():
            actions = program(*given)[0].numpy()
        asked = None if nested else masks
        wanted, _ = loaded.predict(observations, action_masks=asked, deterministic=True)
        np.testing.assert_array_equal(actions, wanted)
        each = loaded.action_probability(observations, wanted, action_masks=asked)
        assert (each > 0).all()
        both = loaded.action_probability(observations, action_masks=asked)
        assert isinstance(both, tuple)
        np.testing.assert_array_equal(np.concatenate(both, -1) > 0, masks)
    envs.close()
    runtime = pytest.importorskip("onnxruntime")
    assert main(["export", str(tmp_path / "agent.zip"), "--out", str(tmp_path / "p.onnx")]) == 0
    session = runtime.InferenceSession(tmp_path / "p.onnx")
    fed = dict(observations) if nested else {"observation": observations, MASK: masks}
    np.testing.assert_array_equal(session.run(["action"], fed)[0], wanted)


def test_masks_in_parts_of_observations_are_joined(tmp_path: Path) -> None:
    """A tuple with a mask for each component, as environments may give it."""
    bits = spaces.Box(0, 1, (2,), np.int8), spaces.Box(0, 1, (3,), np.int8)
    space = spaces.Dict({"x": VECTOR, MASK: spaces.Tuple(bits)})
    given = {"x": np.ones((6, 3), np.float32)}
    masks = (np.tile(np.eye(2, dtype=np.int8), (3, 1)), np.tile(np.eye(3, dtype=np.int8), (2, 1)))

    class Tupled(gymnasium.Env[Any, Any]):
        observation_space, action_space = space, spaces.MultiDiscrete([2, 3])

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            return {"x": np.ones(3, np.float32), MASK: (masks[0][0], masks[1][0])}, {}

        def step(self, action: Any) -> Any:
            return self.reset()[0], 1.0, False, False, {}

    with A2C(Tupled, num_envs=1, num_steps=4) as agent:
        agent.export(tmp_path / "policy.pt2")
        wanted, _ = agent.predict({**given, MASK: masks}, deterministic=True)
    program = torch.export.load(tmp_path / "policy.pt2").module()
    fed = {**given, f"{MASK}/0": masks[0], f"{MASK}/1": masks[1]}
    with torch.no_grad():
        actions = program({name: torch.from_numpy(each) for name, each in fed.items()})[0]
    np.testing.assert_array_equal(actions.numpy(), wanted)
    np.testing.assert_array_equal(wanted, [[i % 2, i % 3] for i in range(6)])


class Counting(torch.nn.Module):
    """A recurrent network of a user's, with one tensor as state and a pair of outputs."""

    def __init__(self, observation_space: Any, action_space: Any) -> None:
        super().__init__()
        self.cell, self.heads = torch.nn.GRUCell(3, 5), torch.nn.Linear(5, 4)

    def initial_state(self, n: int) -> torch.Tensor:
        return torch.zeros(n, 5)

    def forward(self, obs: torch.Tensor, state: torch.Tensor, starts: torch.Tensor) -> Any:
        hidden = []
        for seen, start in zip(obs, starts, strict=True):
            state = self.cell(seen, state.masked_fill(start[:, None], 0.0))
            hidden.append(state)
        outputs = self.heads(torch.stack(hidden))
        return (outputs[..., :3], outputs[..., 3]), state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "shared"),
    [
        ("lstm", True),
        ("gru", True),
        ("attention", True),
        ("own", True),
        ("lstm", False),
        ("attention", False),
    ],
)
def test_a_memory_goes_in_and_out(memory: str, shared: bool, tmp_path: Path) -> None:
    """Over a sequence in which episodes begin, in onnxruntime and in torch.export."""
    env = variant(SpacesEnv, {"observation_space": VECTOR, "action_space": spaces.Discrete(3)})
    config = merge(preset(env)[0], {"num_envs": 2, "num_steps": 8})
    network: Any = Counting if memory == "own" else None
    if network is None:
        settings = {"memory": memory, "memory_width": 8, "memory_window": 4, "shared": shared}
        config = merge(config, {"network": {**settings, "policy_gain": 1.0}})
    agent = ACKTR(env, config, seed=1, network=network).learn(32)
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("policy.onnx", "policy.pt2"):
        agent.export(tmp_path / name)
    session = runtime.InferenceSession(tmp_path / "policy.onnx")
    program = torch.export.load(tmp_path / "policy.pt2").module()
    names = [each.name for each in session.get_inputs()]
    assert names[:2] == ["observation", "episode_start"] and names[2:] == [
        f"state_{place}" for place in range(len(names) - 2)
    ]
    assert [each.name for each in session.get_outputs()][3:] == [f"next_{n}" for n in names[2:]]
    generator = np.random.default_rng(0)
    count, state = 3, None
    empty = agent.policy.network.initial_state(count)
    given = [part.numpy() for part in empty]
    for step in range(9):
        rows = generator.normal(size=(count, 3)).astype(np.float32)
        starts = generator.random(count) < (0.3 if step else 1)
        wanted, state = agent.predict(rows, state, starts, deterministic=True)
        inputs = dict(zip(names, (rows, starts, *given), strict=True))
        action, _, _, *given = session.run(None, inputs)
        np.testing.assert_array_equal(action, wanted)
        tensors = tuple(torch.from_numpy(inputs[name]) for name in names[2:])
        with torch.no_grad():
            again = program(
                torch.from_numpy(rows), episode_start=torch.from_numpy(starts), state=tensors
            )
        np.testing.assert_array_equal(again[0].numpy(), wanted)
        assert state is not None
        for ours, theirs, traced in zip(given, state, again[3:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(traced.numpy(), theirs, rtol=1e-4, atol=1e-5)


def test_the_agent_is_left_as_it_was(tmp_path: Path) -> None:
    config = merge(preset("CartPole-v1")[0], {"num_envs": 2, "num_steps": 8})
    agent, other = (ACKTR("CartPole-v1", config, seed=2).learn(16) for _ in range(2))
    agent.export(tmp_path / "policy.pt2")
    ours, theirs = agent.learn(32).get_parameters(), other.learn(32).get_parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("policy.pt", "TorchScript is deprecated in torch; write .pt2 or .onnx"),
        ("policy", r"must end in .onnx, or in .pt2 for torch.export.load"),
        ("absent/policy.pt2", "cannot write: No such file"),
    ],
)
def test_bad_names(name: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=line) as caught:
        trained("vector, Discrete").export(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r'package onnx: pip install "acktr\[export\]"'):
        trained("vector, Discrete").export(tmp_path / "policy.onnx")
    assert not list(tmp_path.iterdir())


class Unforeseen(ActorCritic):
    """A network that Python decides about, which no trace can hold."""

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if float(observations.sum()) > 0:
            raise RuntimeError("never\nmind")
        return observations, observations[:, 0]


def test_a_network_that_cannot_be_traced_leaves_nothing(tmp_path: Path) -> None:
    network: Any = Unforeseen()
    network.weight = torch.nn.Parameter(torch.zeros(1))
    policy = Policy(network, VECTOR, spaces.Discrete(3), None)
    with pytest.raises(ExportError, match="torch cannot export the network") as caught:
        export_policy(policy, tmp_path / "policy.pt2")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_parts_with_the_names_of_outputs_are_refused(tmp_path: Path) -> None:
    """onnxruntime would refuse the file, which nobody would see before."""

    class Named(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Dict(
            value=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
            state=gymnasium.spaces.Box(-1, 1, (2,), np.float32),
        )
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.observation_space.sample(), {}

    why = "part 'value' of the observation"
    with A2C(Named, num_envs=1) as agent, pytest.raises(ExportError, match=why):
        agent.export(tmp_path / "policy.pt2")  # as .onnx, where its packages are installed
    assert not list(tmp_path.iterdir())
