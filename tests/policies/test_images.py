"""Images: one conversion, in memory that is used again, and batches without gaps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from acktr.config import NetworkConfig
from acktr.envs import Picture, picture
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.policies.images import FrameStore, convert, pack
from acktr.policies.policy import Policy
from acktr.rollout import Acting, Collector, make_batch
from tests.tools.toys import Forced

CPU = torch.device("cpu")
FIRST = spaces.Box(0, 255, (4, 20, 24), np.uint8)
LAST = spaces.Box(0, 255, (20, 24, 4), np.uint8)


def seen(space: spaces.Box) -> Picture:
    found = picture(space)
    assert found is not None
    return found


def images(num: int, space: spaces.Box = FIRST, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (num, *space.shape), np.uint8)


@pytest.mark.parametrize("space", [FIRST, LAST])
def test_conversion_is_division_by_255_with_channels_last(space: spaces.Box) -> None:
    raw = images(3, space)
    found = convert(torch.from_numpy(raw), seen(space))
    expected = raw.transpose(0, 3, 1, 2) if space is LAST else raw
    np.testing.assert_allclose(found.numpy(), expected / 255, rtol=1e-6)
    assert seen(space).shape == found.shape[1:] == (4, 20, 24)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_conversion_has_the_type_of_autocast() -> None:
    raw = torch.from_numpy(images(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convert(raw, seen(FIRST)).dtype == torch.bfloat16
    assert convert(raw, seen(FIRST)).dtype == torch.float32


def test_a_store_keeps_its_memory_and_equals_single_conversions() -> None:
    store = FrameStore(seen(FIRST), CPU)
    places = set()
    for turn in range(3):
        frames = store.room(2, 3, torch.float32)
        raw = images(6, seed=turn)
        shown = [store.put(raw[3 * step : 3 * step + 3], frames[step]) for step in range(2)]
        expected = convert(torch.from_numpy(raw), seen(FIRST))
        assert torch.equal(torch.cat(shown), expected)
        assert torch.equal(frames.flatten(0, 1), expected)
        assert frames.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in shown)
        places.add(frames.data_ptr())
    assert len(places) == 1
    assert store.room(4, 3, torch.float32).shape[:2] == (4, 3)


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_array_may_change_once_it_was_put_into_the_store(place: str) -> None:
    """Also where it is still on its way to the device."""
    store = FrameStore(seen(FIRST), torch.device(place))
    steps = [images(64, seed=step) for step in range(8)]
    frames = store.room(len(steps), 64, torch.float32)
    array = np.empty_like(steps[0])
    for step, shown in enumerate(steps):
        array[...] = shown
        store.put(array, frames[step])
    array[...] = 0
    expected = np.concatenate(steps) / 255
    np.testing.assert_allclose(frames.flatten(0, 1).cpu().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_valid_row_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    valid = rng.random(17) < 0.6
    rows = torch.arange(17.0)[:, None].clone()
    packed, order = pack(rows, valid)
    assert sorted(order) == list(np.flatnonzero(valid))
    np.testing.assert_array_equal(packed[:, 0].numpy(), order)
    again, same = pack(rows, valid)
    assert torch.equal(again, packed)
    np.testing.assert_array_equal(order, same)


class Screen(gymnasium.Env[Any, Any]):
    """Random images; the reward is the mean brightness of the image acted on."""

    observation_space = FIRST
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._draw(), {}

    def _draw(self) -> Any:
        self.seen = self.np_random.integers(0, 256, FIRST.shape, np.uint8)
        return self.seen

    def step(self, action: Any) -> Any:
        reward = float(self.seen.mean()) / 255
        self.steps += 1
        return self._draw(), reward, False, self.steps == 5, {}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_batches_of_images_pair_each_image_with_its_step(shared: bool, mode: AutoresetMode) -> None:
    """The reward tells which image a row belongs to; values are the network's own for it."""
    envs: Any = Forced(SyncVectorEnv([Screen, Screen], autoreset_mode=mode))
    head = action_head(Screen.action_space)
    torch.manual_seed(0)
    network = build_network(FIRST, head, NetworkConfig(shared=shared))
    generator = torch.Generator().manual_seed(0)
    runner = Collector(envs, Acting(network, head, generator, nullcontext))
    runner.reset(0)
    for _ in range(2):
        found = runner.collect(7)
        assert found.valid.sum() < found.valid.size
        batch = make_batch(found, 0.0, 1.0, CPU)
        assert len(batch) == found.valid.sum() == len(batch.observations) == len(batch.actions)
        assert isinstance(batch.observations, torch.Tensor)
        brightness = batch.observations.mean((1, 2, 3))
        torch.testing.assert_close(batch.returns, brightness, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            values = network(batch.observations)[1]
        torch.testing.assert_close(batch.values, values, rtol=1e-4, atol=1e-5)


class Floats(gymnasium.vector.VectorWrapper):
    """Gives the images as float32, against its space."""

    def reset(self, **given: Any) -> Any:
        observation, infos = self.env.reset(**given)
        return observation.astype(np.float32), infos

    def step(self, actions: Any) -> Any:
        observation, *rest = self.env.step(actions)
        return observation.astype(np.float32), *rest


def test_images_that_come_as_floats_are_the_same() -> None:
    head = action_head(Screen.action_space)
    torch.manual_seed(0)
    network = build_network(FIRST, head, NetworkConfig(shared=True))
    found = []
    for wrap in (Floats, gymnasium.vector.VectorWrapper):
        envs: Any = SyncVectorEnv([Screen, Screen], autoreset_mode=AutoresetMode.SAME_STEP)
        generator = torch.Generator().manual_seed(0)
        runner = Collector(wrap(envs), Acting(network, head, generator, nullcontext))
        runner.reset(0)
        found.append(runner.collect(7))
    np.testing.assert_array_equal(found[0].values, found[1].values)
    np.testing.assert_array_equal(found[0].next_values, found[1].next_values)
    policy = Policy(network, FIRST, Screen.action_space, None)
    raw = images(9)
    expected = policy.act(raw, deterministic=True)
    np.testing.assert_array_equal(policy.act(raw.astype(np.float32), deterministic=True), expected)
