"""Threads of torch, compilation, and seconds by part."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from acktr.agent import ACKTR
from acktr.compute import Compiled, joined, one_thread, seeded, threads_for
from acktr.config import Config, ConfigError, NetworkConfig
from acktr.kfac import Stopwatch
from acktr.runs.saved import read_agent

VECTORS = spaces.Box(-1.0, 1.0, (5,), np.float32)
IMAGES = spaces.Box(0, 255, (4, 84, 84), np.uint8)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_one_thread_overlaps_and_new_threads_find_the_former_number() -> None:
    seen: list[int] = []
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            inside.set()
            done.wait(10)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=other)
    with one_thread():
        assert torch.get_num_threads() == 1
        thread.start()
        assert inside.wait(10)
    assert torch.get_num_threads() == 2
    done.set()
    thread.join()
    assert seen == [1, 2]
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen[-1] == 2


@pytest.mark.usefixtures("two_threads")
def test_one_thread_holds_until_the_outermost_context_ends() -> None:
    with pytest.raises(KeyError), one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("space", "threads"), [(VECTORS, 1), (IMAGES, 2)])
def test_only_networks_for_images_take_several_threads(
    space: gymnasium.Space[Any], threads: int
) -> None:
    with threads_for(space):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_agents_take_one_thread_and_give_the_others_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While they learn and predict; a callback finds the caller's number."""
    seen: list[int] = []
    agent = ACKTR("CartPole-v1", device="cpu")
    update, forward = agent.trainer.learner.update, agent.trainer.network.forward

    def watched(function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen.append(torch.get_num_threads())
            return function(*args)

        return call

    monkeypatch.setattr(agent.trainer.learner, "update", watched(update))
    monkeypatch.setattr(agent.trainer.network, "forward", watched(forward))
    between: list[int] = []
    agent.learn(1, lambda _stats: between.append(torch.get_num_threads()))
    agent.predict(np.zeros(4, np.float32))
    assert set(seen) == {1} and len(seen) > 1
    assert set(between) == {2} and torch.get_num_threads() == 2


class Bytes(gymnasium.Env[Any, Any]):
    """Numbers that have the shape of a picture."""

    observation_space = spaces.Box(0, 255, (12, 12, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 0.0, True, False, {}


@pytest.mark.usefixtures("two_threads")
def test_what_is_no_picture_takes_one_thread_in_every_policy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Config(env="Bytes", network=NetworkConfig(channels="none"), num_envs=2, env_workers=1)
    agent = ACKTR(Bytes, config, device="cpu")
    agent.save(tmp_path / "agent")
    saved = read_agent(tmp_path / "agent").policy(
        Bytes.observation_space, Bytes.action_space, torch.device("cpu")
    )
    seen: list[int] = []
    for policy in (agent.policy, agent.trainer.policy(0), saved):
        forward = policy.network.forward

        def watched(*args: Any, forward: Any = forward) -> Any:
            seen.append(torch.get_num_threads())
            return forward(*args)

        monkeypatch.setattr(policy.network, "forward", watched)
        policy.act(np.zeros((1, 12, 12, 3), np.uint8))
    assert set(seen) == {1}


@pytest.mark.parametrize(("dynamic", "times"), [(None, 2), (False, 5)])
def test_how_often_it_compiles(
    dynamic: bool | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the first size and once for all others, or for each of the five."""
    graphs: list[torch.fx.GraphModule] = []
    compile_with = torch.compile

    def backend(graph: torch.fx.GraphModule, _inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def watched(function: Any, mode: str | None, dynamic: bool | None) -> Any:
        assert mode is None
        return compile_with(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", watched)
    double = Compiled(lambda numbers: numbers * 2, "it", graph=False, dynamic=dynamic)
    for size in (8, 8, 7, 6, 5, 9):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(graphs) == times


@pytest.mark.usefixtures("no_compiler")
def test_where_torch_cannot_compile_it_says_so() -> None:
    """In one line, and as often as it is called: nothing runs uncompiled in silence."""
    double = Compiled(lambda numbers: numbers * 2, "it", graph=False, dynamic=None)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"cannot compile it \(no working compiler\); set "):
            double(torch.ones(2))


def test_an_unsupported_python_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", unsupported)
    with pytest.raises(ConfigError, match="not supported on Python 4"):
        Compiled(torch.sin, "it", graph=False, dynamic=None)


def test_errors_of_the_function_are_not_the_compilers() -> None:
    def wrong(numbers: torch.Tensor) -> torch.Tensor:
        return numbers @ torch.ones(4, 3)

    with pytest.raises(RuntimeError) as caught:
        Compiled(wrong, "it", graph=False, dynamic=None)(torch.ones(5, 6))
    assert not isinstance(caught.value, ConfigError)


def test_parts_add_up_and_survive_errors() -> None:
    clock = Stopwatch()
    for _ in range(2):
        with clock.part("a"):
            time.sleep(0.01)
    with pytest.raises(KeyError), clock.part("b"):
        raise KeyError
    assert clock.seconds["a"] >= 0.02
    assert 0 <= clock.seconds["b"] < clock.seconds["a"]


def test_joined_sums_by_name() -> None:
    assert joined({"a": 1.0}, {"a": 2.0, "b": 3.0}) == {"a": 3.0, "b": 3.0}
    assert joined() == {}


def test_a_seed_is_for_one_thread_at_a_time() -> None:
    begun, found = threading.Event(), []

    def draw(seconds: float) -> None:
        with seeded(0):
            begun.set()
            time.sleep(seconds)
            found.append(torch.rand(3))

    before = torch.get_rng_state()
    other = threading.Thread(target=draw, args=(0.1,))
    other.start()
    begun.wait()
    draw(0.3)  # would draw from what the other one has put back
    other.join()
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), before)
