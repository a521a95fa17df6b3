"""Episodes of several processes go on from a checkpoint in as many, and begin anew in others."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from acktr.config import Config, preset
from acktr.envs import UnsavedError, make_vec
from acktr.kfac import Ranks
from acktr.rollout import Collector
from acktr.runs import episodes as episodes_module
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from acktr.runs.episodes import SharedEpisodes
from acktr.train import Trainer, TrainStats
from acktr.world import PARTS, World, part_of_envs
from tests.tools.ranks import on_threads, same

UPDATE, ENVS = 24, 4
CONFIG = dataclasses.replace(
    preset("CartPole-v1", "a2c")[0],
    num_envs=ENVS,
    num_steps=UPDATE // ENVS,
    normalize_observation=True,
    normalize_reward=True,
    checkpoint_freq=2 * UPDATE,
    eval_freq=0,
    total_timesteps=9 * UPDATE,
)


def made(ranks: Ranks | None, state: dict[str, Any] | None, config: Config = CONFIG) -> Trainer:
    """A trainer whose episodes have begun, or go on."""
    world = None if ranks is None else World(ranks)
    count, first = (
        (ENVS, 0) if world is None else part_of_envs(ENVS, world.ranks.rank, world.ranks.size)
    )
    envs = make_vec(config.env, count, config.seed, first=first)
    one = Trainer(config, envs, world=world)
    if state is not None:
        one.load_state_dict(copy.deepcopy(state))
    one.begin()
    return one


def trained(
    ranks: Ranks, updates: int, state: dict[str, Any] | None = None
) -> tuple[dict[str, Any], str | None, list[TrainStats]]:
    """The state for a checkpoint after some updates, and what began anew."""
    one = made(ranks, state)
    with closing(one.envs):
        assert one.world is not None
        shared = SharedEpisodes(one, one.world, updates * UPDATE)
        told = []
        for stats in one.run(CONFIG.total_timesteps):
            shared.after_update()
            told.append(stats)
            if stats.updates == updates:
                break
        found = one.state_dict()
        shared.put_into(found)
        return found, one.restarted, told


def rewards(told: list[TrainStats]) -> list[tuple[float, int]]:
    return [(end.reward, end.length) for stats in told for end in stats.episodes]


def test_episodes_go_on_in_as_many_processes(tmp_path: Path) -> None:
    """Bit for bit, through the file; a checkpoint has those of all of them."""
    whole = on_threads(lambda ranks: trained(ranks, 6), 2)
    half = on_threads(lambda ranks: trained(ranks, 3), 2)
    state = half[0][0]
    assert len(state["collector"][PARTS]) == 2
    save_checkpoint(tmp_path / "last", state, {})
    state = load_checkpoint(tmp_path / "last")[0]
    again = on_threads(lambda ranks: trained(ranks, 6, state), 2)
    for rank in range(2):
        assert again[rank][1] is None
        assert same(again[rank][0], whole[rank][0], {"seconds"})
        every = rewards(half[rank][2]) + rewards(again[rank][2])
        assert every == rewards(whole[rank][2]) and every


@pytest.mark.parametrize("size", [1, 4])
def test_they_begin_anew_in_other_numbers(size: int) -> None:
    state = on_threads(lambda ranks: trained(ranks, 2), 2)[0][0]

    def resumed(ranks: Ranks | None) -> tuple[str | None, int]:
        one = made(ranks, state)
        with closing(one.envs):
            return one.restarted, one.restarts

    found = [resumed(None)] if size == 1 else on_threads(resumed, size)
    why = f"processes that trained it were 2, and now there are {size}"
    assert found == [(f"environments start new episodes: {why}", 1)] * size


def test_those_of_one_process_begin_anew_in_two() -> None:
    one = made(None, None)
    with closing(one.envs):
        next(one.run(UPDATE))
        state = one.state_dict()
    for _, restarted, _ in on_threads(lambda ranks: trained(ranks, 2, state), 2):
        assert restarted is not None and "were 1, and now there are 2" in restarted


def test_they_are_exchanged_where_a_checkpoint_may_follow() -> None:
    """At its interval, at a signal and at the end; at other steps there are none to be had."""

    def moments(ranks: Ranks) -> list[int]:
        one, found = made(ranks, None), []
        with closing(one.envs):
            assert one.world is not None
            shared = SharedEpisodes(one, one.world, 5 * UPDATE)
            for stats in one.run(CONFIG.total_timesteps):
                shared.after_update()
                state: dict[str, Any] = {"timesteps": stats.timesteps, "collector": {}}
                shared.put_into(state)
                found += [stats.updates] if PARTS in state["collector"] else []
                if stats.updates == 2 and ranks.rank == 1:
                    one.asked = lambda: 15
                if stats.updates == 3:
                    one.asked = lambda: None
                if stats.updates == 5:
                    return found
        raise AssertionError

    assert on_threads(moments, 2) == [[2, 3, 4, 5]] * 2


def test_what_one_process_cannot_go_on_with_is_said_by_all() -> None:
    state = on_threads(lambda ranks: trained(ranks, 2), 2)[0][0]

    def resumed(ranks: Ranks) -> Any:
        def restore(self: Any, loaded: Any) -> None:
            raise UnsavedError("a game went another way")

        if ranks.rank == 1:
            with mock.patch.object(Collector, "_restore", restore):
                one = made(ranks, state)
        else:
            one = made(ranks, state)
        with closing(one.envs):
            assert one.world is not None
            SharedEpisodes(one, one.world, 5 * UPDATE)
            return one.restarted, one.restarts

    said = on_threads(resumed, 2)
    assert said[0] == said[1] and "another way" in said[0][0] and said[0][1] == 1


def test_what_no_file_can_hold_is_left_out() -> None:
    right = episodes_module.encode

    def encode(tree: Mapping[str, object], name: str) -> Any:
        if tree["envs"] is not None:
            raise TypeError("part/envs: a set cannot be saved")
        return right(tree, name)

    with mock.patch.object(episodes_module, "encode", encode):
        state = on_threads(lambda ranks: trained(ranks, 2), 2)[0][0]
    for _, restarted, _ in on_threads(lambda ranks: trained(ranks, 3, state), 2):
        assert restarted is not None and "a set cannot be saved" in restarted
