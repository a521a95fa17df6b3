"""Online 3D bin packing against its rules, written out on single cells."""

from __future__ import annotations

import dataclasses
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from acktr import ACKTR
from acktr.config import preset
from scripts.examples.packing import HeightmapPacking, LeafPacking
from scripts.examples.packing.__main__ import main
from scripts.examples.packing.geometry import landings, maximal_spaces, rectangle_tops, turned
from scripts.examples.packing.networks import HeightmapActor, HeightmapCritic, LeafNetwork
from scripts.examples.packing.players import (
    deepest_bottom_left,
    least_waste,
    play,
    random_allowed,
)

SMALL = {"size": (5, 4, 6), "sides": (1, 3)}


class Cells:
    """A bin as single cells, full or empty."""

    def __init__(self, size, boxes):
        self.full = np.zeros(size, bool)
        for x, y, z, length, width, height in boxes:
            part = self.full[x : x + length, y : y + width, z : z + height]
            assert part.shape == (length, width, height), "outside"
            assert not part.any(), "overlap"
            part[:] = True

    def landing(self, x, y, length, width):
        """How far an item falls from above."""
        z = self.full.shape[2]
        while z > 0 and not self.full[x : x + length, y : y + width, z - 1].any():
            z -= 1
        return z

    def stable(self, x, y, z, length, width):
        if z == 0:
            return True
        below = self.full[x : x + length, y : y + width, z - 1]
        corners = sum(int(below[i, j]) for i in (0, -1) for j in (0, -1))
        share = below.sum() / below.size
        return share > 0.95 or (share > 0.8 and corners >= 3) or (share > 0.6 and corners == 4)

    def allowed(self, sides, stable):
        """All placements (x, y, z, length, width, height) of an item with these sides."""
        length, width, height = sides
        size = self.full.shape
        for x, y in itertools.product(range(size[0] - length + 1), range(size[1] - width + 1)):
            z = self.landing(x, y, length, width)
            inside = z + height <= size[2]
            if inside and (not stable or self.stable(x, y, z, length, width)):
                yield (x, y, z, *sides)


def states(env, seed, steps):
    """States of episodes with random allowed actions."""
    player = random_allowed(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        yield Cells(env.size, env.boxes)
        ended = env.step(player(env))[2]
        if ended:
            env.reset()


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("orientations", [1, 2])
def test_heightmap_allows_what_the_rules_allow(stable, orientations):
    env = HeightmapPacking(**SMALL, orientations=orientations, stable=stable)
    refused = 0
    for cells in states(env, 3, 60):
        expected = {
            placement
            for sides in turned(env.item, orientations)
            for placement in cells.allowed(sides, stable)
        }
        actions = np.flatnonzero(env.action_masks()).tolist()
        found = [env.placement(action) for action in actions]
        assert len(found) == len(expected) and set(found) == expected
        refused += env.allowed.size - len(found)
    assert refused > 100


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("orientations", [1, 2, 6])
def test_candidates_are_allowed_and_none_is_missed(stable, orientations):
    env = LeafPacking(**SMALL, orientations=orientations, stable=stable, candidates=200)
    for cells in states(env, 4, 60):
        expected = {
            placement
            for sides in turned(env.item, orientations)
            for placement in cells.allowed(sides, stable)
        }
        found = [tuple(row) for row in env.candidates.tolist()]
        assert len(found) == len(set(found)) == env.allowed.sum()
        assert set(found) <= expected
        assert [row[2] for row in found] == sorted(row[2] for row in found)
        if not stable:  # a candidate exists whenever the item fits anywhere
            assert bool(found) == bool(expected)


def plain_landings(heights, length, width):
    """The definition on views of the heights, for landings."""
    rows, columns = heights.shape[0] - length + 1, heights.shape[1] - width + 1
    under = np.lib.stride_tricks.as_strided(
        heights, (rows, columns, length, width), heights.strides * 2
    )
    tops = under.max((2, 3))
    carried = under == tops[:, :, None, None]
    share = carried.mean((2, 3))
    corners = [carried[:, :, x, y] for x in (0, -1) for y in (0, -1)]
    held = np.sum(corners, axis=0)
    stable = (share > 0.95) | ((share > 0.8) & (held >= 3)) | ((share > 0.6) & (held == 4))
    return tops, stable


def test_landings_are_those_of_the_plain_definition():
    generator = np.random.default_rng(5)
    seen = set()
    for shape, rounds in (((10, 10), 150), ((7, 5), 50)):
        for _ in range(rounds):
            heights = generator.integers(0, generator.integers(2, 11), shape).astype(np.int16)
            x, y = generator.integers(0, shape)
            # Large items are stable on a plateau.
            heights[x : x + 6, y : y + 6] = generator.integers(0, 11)
            for length, width in itertools.product(range(1, 6), repeat=2):
                tops, stable = landings(heights, length, width)
                expected, held = plain_landings(heights, length, width)
                assert np.array_equal(tops, expected) and np.array_equal(stable, held)
                seen |= {(length, width, each) for each in np.unique(stable).tolist()}
    assert len(seen) > 40  # stable and not stable, of nearly all bases


def test_an_episode_ends_when_the_item_fits_nowhere():
    env = LeafPacking(**SMALL)
    player = random_allowed(0)
    for seed in range(20):
        env.reset(seed=seed)
        ended, rewards = False, []
        while not ended:
            _, reward, ended, truncated, info = env.step(player(env))
            assert not truncated
            rewards.append(reward)
        cells = Cells(env.size, env.boxes)
        ways = itertools.permutations(env.item)
        assert not any(list(cells.allowed(sides, stable=False)) for sides in ways)
        assert info["ratio"] == pytest.approx(cells.full.mean()) == pytest.approx(sum(rewards))
        assert info["counter"] == len(env.boxes) == len(rewards)


def test_maximal_spaces_are_all_that_cannot_grow():
    generator = np.random.default_rng(0)
    for _ in range(20):
        heights = generator.integers(0, 4, (4, 5)).astype(np.int16)
        spaces = {}
        for x1, y1 in itertools.product(range(4), range(5)):
            for x2, y2 in itertools.product(range(x1, 4), range(y1, 5)):
                spaces[x1, x2, y1, y2] = heights[x1 : x2 + 1, y1 : y2 + 1].max()

        def grown(x1, x2, y1, y2):
            return [(x1 - 1, x2, y1, y2), (x1, x2 + 1, y1, y2), (x1, x2, y1 - 1, y2),
                    (x1, x2, y1, y2 + 1)]  # fmt: skip

        expected = {
            space
            for space, floor in spaces.items()
            if floor < 3 and all(spaces.get(more, 9) > floor for more in grown(*space))
        }
        found = maximal_spaces(rectangle_tops(heights), ceiling=3).tolist()
        assert len(found) == len(expected) and {tuple(row) for row in found} == expected


def test_stability_by_hand():
    env = HeightmapPacking(size=(6, 6, 6), sides=(1, 5), stable=True)
    env.reset(seed=0)
    env.heights[:] = 0
    env.heights[0:3, 0:3] = 2
    env.item = (4, 3, 1)  # 9 of 12 cells carried and two corners
    env._look()
    assert not env.allowed[0] and env.allowed[3]  # from its fourth row of cells it is on the floor
    env.item = (3, 3, 1)
    env._look()
    assert env.allowed[0]
    env.heights[2, 2] = 1  # 8 of 9 cells, three corners
    env._look()
    assert env.allowed[0]
    env.heights[1, 1] = 1  # 7 of 9 cells, three corners
    env._look()
    assert not env.allowed[0]
    env.heights[2, 2] = 2  # 8 of 9 cells, four corners
    env.heights[1, 0:3] = 1  # 6 of 9 cells, four corners
    env._look()
    assert env.allowed[0]


def test_observations_tell_the_state():
    env = HeightmapPacking()
    shown, _ = env.reset(seed=1)
    env.step(0)
    shown = env._observe()
    assert np.array_equal(shown[0] * 10, env.heights)
    assert [plane.max() * 10 for plane in shown[1:]] == pytest.approx(env.item)

    leaves = LeafPacking(boxes=2)
    leaves.reset(seed=1)
    for _ in range(3):
        seen = leaves.step(0)[0]
    assert np.allclose(seen["boxes"] * 10, leaves.boxes[-2:])
    count = int(seen["action_mask"].sum())
    assert np.allclose(seen["candidates"][:count] * 10, leaves.candidates)
    assert not seen["candidates"][count:].any() and count == len(leaves.candidates)
    assert np.allclose(seen["item"] * 10, leaves.item)


def test_a_forbidden_action_ends_the_episode():
    env = LeafPacking()
    env.reset(seed=0)
    _, reward, ended, _, info = env.step(len(env.allowed) - 1)
    assert ended and reward == 0 and info == {"ratio": 0.0, "counter": 0}


@pytest.mark.parametrize("name", ["PackingHeightmap-v0", "PackingLeaves-v0"])
def test_gymnasium_accepts_them(name):
    env = gymnasium.make(name)
    check_env(env.unwrapped, skip_render_check=True)
    env.unwrapped.reset(seed=7)
    first = env.unwrapped.item
    env.unwrapped.reset(seed=7)
    assert env.unwrapped.item == first


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (HeightmapPacking, {"orientations": 6}),
        (LeafPacking, {"orientations": 3}),
        (LeafPacking, {"sides": (1, 11)}),
        (LeafPacking, {"sides": (0, 2)}),
    ],
)
def test_impossible_settings_are_refused(make, arguments):
    with pytest.raises(ValueError, match=r"orientations must be|items with sides"):
        make(**arguments)


def test_players_differ_as_they_should(capsys):
    env = LeafPacking()
    lucky = np.mean(play(env, random_allowed(0), 20, 0)[0])
    assert np.mean(play(env, deepest_bottom_left, 20, 0)[0]) > lucky + 0.02
    assert np.mean(play(env, least_waste, 20, 0)[0]) > lucky + 0.02
    assert main(["--episodes", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert main(["--episodes", "none"]) == 2


def test_the_leaf_network_does_not_see_what_does_not_exist():
    env = LeafPacking()
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        observation = env.step(0)[0]
    torch.manual_seed(0)
    net = LeafNetwork(env.observation_space, env.action_space, layers=2).double()
    batch = {key: torch.tensor(value)[None].double() for key, value in observation.items()}
    whole = net(batch)
    assert whole["policy"].shape == (1, 50) and whole["value"].shape == (1,)
    count, boxes = len(env.candidates), len(env.boxes)
    cut = {
        "boxes": batch["boxes"][:, :boxes],
        "candidates": batch["candidates"][:, :count],
        "item": batch["item"],
    }
    less = net(cut)
    assert torch.allclose(whole["policy"][:, :count], less["policy"], atol=1e-12)
    assert torch.allclose(whole["value"], less["value"], atol=1e-12)
    # The order of the boxes does not matter, and that of the candidates is that of the logits.
    turned_round = {**cut, "boxes": cut["boxes"].flip(1), "candidates": cut["candidates"].flip(1)}
    other = net(turned_round)
    assert torch.allclose(other["policy"].flip(1), less["policy"], atol=1e-12)
    assert torch.allclose(other["value"], less["value"], atol=1e-12)
    with pytest.raises(ValueError, match="needs the observations of LeafPacking"):
        LeafNetwork(gymnasium.spaces.Dict(item=env.observation_space["item"]), env.action_space)


def test_the_heightmap_actor_has_a_logit_for_each_action():
    env = HeightmapPacking(orientations=2)
    net = HeightmapActor(env.observation_space, env.action_space)
    observation, _ = env.reset(seed=0)
    shown = torch.tensor(observation)[None].expand(3, -1, -1, -1)
    assert net(shown).shape == (3, 200)
    assert HeightmapCritic(env.observation_space, env.action_space)(shown).shape == (3, 1)


def test_the_heightmap_actor_sees_what_an_item_would_lie_on():
    """And one row of cells around it, at each cell's logit."""
    env = HeightmapPacking()
    torch.manual_seed(0)
    net = HeightmapActor(env.observation_space, env.action_space).double()
    shown = torch.rand(1, 4, 10, 10, dtype=torch.float64, requires_grad=True)
    net(shown)[0, 3 * 10 + 2].backward()
    assert shown.grad is not None
    rows, columns = (shown.grad[0, 0] != 0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 8, 1, 7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_heightmap_networks_learn_in_every_precision(precision):
    config = dataclasses.replace(preset("PackingHeightmap-v0")[0], precision=precision)
    arguments = {"size": (4, 4, 4), "sides": (1, 2)}
    moves = []
    networks = (HeightmapActor, HeightmapCritic)
    with ACKTR(HeightmapPacking, config, network=networks, env_kwargs=arguments, seed=0) as agent:
        agent.learn(1024, callback=lambda stats: moves.append(stats.metrics["train/approx_kl"]))
    assert len(moves) == 4 and all(0 < kl < 0.02 for kl in moves)
