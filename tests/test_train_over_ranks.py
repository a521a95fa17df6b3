"""Training by ranks that share out the environments is training by one process with all of them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr import A2C, ACKTR, TRPO
from acktr import world as world_module
from acktr.algorithms import Auxiliary
from acktr.config import Config, ConfigError, preset
from acktr.envs import EnvFault, make_vec
from acktr.kfac import BernoulliLoss, RankError, Ranks
from acktr.policies import MergedMoments
from acktr.policies.normalize import RunningMoments
from acktr.rollout import Collector, NonFiniteError, Rollout
from acktr.train import Trainer
from acktr.world import UNKEPT, World, part_of_envs
from tests.tools.ranks import on_threads, same
from tests.tools.toys import IdentityEnv

ENVS, STEPS = 6, 8
OF_EACH = {"seconds", "returns", "dead"}
"""Parts of a state that are of a rank's own environments."""


class Policy(nn.Module):
    """Logits in float64, so that sums in another order make no difference to speak of."""

    outputs = 3

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 8, dtype=torch.float64)
        self.last = nn.Linear(8, self.outputs, dtype=torch.float64)

    def forward(self, observations: Tensor) -> Tensor:
        result: Tensor = self.last(self.hidden(observations.double()).tanh())
        return result


class Value(Policy):
    outputs = 1

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations)[:, 0]


NET = (Policy, Value)


class Uneven(IdentityEnv):
    """Episodes of other lengths, and rewards of another size, in every environment."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(3), 100)

    def reset(self, **more: Any) -> Any:
        found = super().reset(**more)
        self.horizon = int(self.np_random.integers(3, 9))
        return found

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, reward * self.horizon, *rest


def configuration(**settings: Any) -> Config:
    config = preset("CartPole-v1", settings.pop("algo", "acktr"))[0]
    plain = {"normalize_observation": False, "normalize_reward": False}
    return dataclasses.replace(
        config,
        **{"env": "Uneven", "num_envs": ENVS, "num_steps": STEPS, "seed": 3, **plain, **settings},
    )


def trainer(config: Config, ranks: Ranks | None, make: Any = Uneven, net: Any = NET) -> Trainer:
    world = None if ranks is None else World(ranks)
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    count, first = part_of_envs(config.num_envs, rank, size)
    envs = make_vec(make, count, config.seed, first=first)
    return Trainer(config, envs, net, world=world)


def trained(config: Config, ranks: Ranks | None, updates: int = 10) -> dict[str, Any]:
    """Parameters and episodes of some updates."""
    one = trainer(config, ranks)
    with closing(one.envs):
        episodes = []
        for stats in one.run(updates * ENVS * STEPS):
            episodes += [(end.reward, end.length) for end in stats.episodes]
        state = one.state_dict()
        seen = {name: value for name, value in stats.metrics.items() if name[:4] != "time"}
        return {"state": state, "episodes": sorted(episodes), "metrics": seen}


def near(found: dict[str, Any], wanted: dict[str, Any], off: float) -> None:
    assert found["episodes"] == wanted["episodes"]
    assert found["metrics"] == pytest.approx(wanted["metrics"], rel=100 * off, abs=100 * off)
    for name, tensor in wanted["state"]["network"].items():
        torch.testing.assert_close(found["state"]["network"][name], tensor, rtol=off, atol=off)


@pytest.fixture
def uneven_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is learned from the last steps of episodes, as from forced actions of Atari games."""
    receive = Collector._receive

    def received(*args: Any) -> Any:
        found = receive(*args)
        return found._replace(chosen=found.chosen & ~found.ended)

    monkeypatch.setattr(Collector, "_receive", received)


@pytest.mark.usefixtures("uneven_shares")
@pytest.mark.parametrize(("algo", "updates"), [("acktr", 10), ("a2c", 4), ("trpo", 3)])
def test_training_is_that_of_one_process(algo: Any, updates: int) -> None:
    """Noise of actions and of the Fisher matrix, seeds, schedules, and the numbers of all."""
    config = configuration(algo=algo)
    wanted = trained(config, None, updates)
    first, *others = on_threads(lambda ranks: trained(config, ranks, updates), 3)
    near(first, wanted, 1e-7)
    for mine in others:
        assert mine["episodes"] == first["episodes"] and mine["metrics"] == first["metrics"]
        assert same(mine["state"], first["state"], OF_EACH)
    assert first["state"]["timesteps"] == wanted["state"]["timesteps"] == updates * ENVS * STEPS
    assert first["state"].keys() == wanted["state"].keys()
    assert first["state"]["collector"].keys() == wanted["state"]["collector"].keys()


NORMALIZED = {"normalize_observation": True, "normalize_reward": True}


def merged(ranks: Ranks) -> RunningMoments:
    """Some rounds of samples of this rank, between which all are merged; after the third a load."""
    moments = RunningMoments((4,))
    common = MergedMoments([moments, RunningMoments(())], ranks, torch.device("cpu"))
    for step, rows in enumerate(rounds(ranks.size)):
        for batch in np.array_split(rows[ranks.rank], 2):
            moments.update(batch)
        common.merge()
        if step == 2:
            moments.load_state_dict(moments.copy().state_dict())
            common.begin()
    return moments


def rounds(size: int) -> list[list[Any]]:
    """Samples of every rank, with a mean that moves, and none of rank 1 in the second round."""
    draw = np.random.default_rng(0)
    sizes = [
        [5 + rank if (step, rank) != (1, 1) else 0 for rank in range(size)] for step in range(5)
    ]
    return [
        [draw.normal(10 * step, 1 + step, (count, 4)) for count in counts]
        for step, counts in enumerate(sizes)
    ]


def test_normalisers_are_those_of_all_samples() -> None:
    wanted = RunningMoments((4,))
    wanted.update(np.concatenate([rows for each in rounds(3) for rows in each]))
    found = on_threads(merged, 3)
    for mine in found:
        assert mine.count == wanted.count
        np.testing.assert_allclose(mine.mean, wanted.mean, rtol=1e-12)
        np.testing.assert_allclose(mine.m2, wanted.m2, rtol=1e-12)
        assert np.array_equal(mine.m2, found[0].m2)
    with mock.patch.object(RunningMoments, "since", lambda self, former: self.copy()):  # totals
        assert on_threads(merged, 3)[0].count > 2 * wanted.count


@contextmanager
def held_back() -> Iterator[None]:
    """Samples of a rollout change the normalisers after it, in one process as in several."""
    collect, fold = Collector.collect, RunningMoments.update
    held: dict[int, list[Any]] = {}

    def hold(moments: RunningMoments, batch: Any) -> None:
        held.setdefault(id(moments), []).append(batch.copy())

    def collected(collector: Collector, num_steps: int) -> Rollout:
        rollout = collect(collector, num_steps)
        assert collector.observation_normalizer is not None and collector.reward_scaler is not None
        for one in (*collector.observation_normalizer.running(), collector.reward_scaler.moments):
            for batch in held.pop(id(one)):
                fold(one, batch)
        return rollout

    with (
        mock.patch.object(RunningMoments, "update", hold),
        mock.patch.object(Collector, "collect", collected),
    ):
        yield


def test_normalisers_differ_from_one_process_within_a_rollout_only() -> None:
    """What a rank has not heard yet of the others' samples is all of the difference."""
    config = configuration(**NORMALIZED)

    def both() -> tuple[dict[str, Any], dict[str, Any]]:
        return on_threads(lambda ranks: trained(config, ranks, 3), 3)[0], trained(config, None, 3)

    with held_back():
        near(*both(), 1e-6)
    several, one = (found["state"]["network"] for found in both())
    assert max(float((several[n] - one[n]).abs().max()) for n in one) > 1e-3


def test_states_of_normalised_training_load_in_any_number_of_processes() -> None:
    """Also with twice as many, and in one; counts are those of all steps, each once."""
    config = configuration(**NORMALIZED)
    first, *others = on_threads(lambda ranks: trained(config, ranks, 4), 2)
    assert all(same(mine["state"], first["state"], OF_EACH) for mine in others)
    state = first["state"]
    assert state["collector"]["observation_normalizer"]["count"] == 4 * ENVS * STEPS

    def resumed(ranks: Ranks | None) -> Any:
        one = trainer(config, ranks)
        with closing(one.envs):
            one.load_state_dict(copy.deepcopy(state))
            loaded = one.state_dict()
            if ranks is None:
                loaded["collector"]["unsaved"] = UNKEPT
            assert same(loaded["collector"], state["collector"], OF_EACH)
            assert same(loaded["network"], state["network"], OF_EACH)
            assert same(loaded["learner"], state["learner"], OF_EACH)
            assert len(list(one.run(7 * ENVS * STEPS))) == 3
            assert one.restarted is not None and UNKEPT in one.restarted
            return one.state_dict()

    for size in (2, 3):
        every = on_threads(resumed, size)
        assert all(same(mine, every[0], OF_EACH) for mine in every)
        count = every[0]["collector"]["observation_normalizer"]["count"]
        assert count == 7 * ENVS * STEPS
    assert resumed(None)["collector"]["observation_normalizer"]["count"] == 7 * ENVS * STEPS


# --- what goes wrong ------------------------------------------------------------------------------


class Broken(Uneven):
    """Some environment returns NaN at its third step."""

    number = 0

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return observation, np.nan if self._steps == 3 and self.number == 5 else reward, *rest


def messages(make: Any, config: Config, net: Any = NET) -> list[str]:
    """What each of three ranks says."""

    def failed(ranks: Ranks) -> str:
        one = trainer(config, ranks, make, net)
        with closing(one.envs), pytest.raises((EnvFault, RankError, NonFiniteError)) as caught:
            list(one.run(1000))
        return f"{type(caught.value).__name__}: {caught.value}"

    return on_threads(failed, 3)


def test_a_fault_of_one_rank_ends_all() -> None:
    made: list[Broken] = []

    def make() -> Broken:
        made.append(Broken())
        made[-1].number = len(made)
        return made[-1]

    said = sorted(messages(make, configuration()))
    assert said[0].startswith("EnvFault: environment") and "non-finite reward" in said[0]
    assert all(line.startswith("RankError: rank ") for line in said[1:])
    assert len(set(said[1:])) == 1 and said[1].endswith("failed in its rollout")


class NaN(Value):
    """NaN for some observations."""

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).where(observations[:, 0] < 0.5, torch.nan)


def test_values_that_are_not_finite_end_all() -> None:
    said = messages(Uneven, configuration(), (Policy, NaN))
    assert len(set(said)) == 1 and said[0].startswith("NonFiniteError: the value function is NaN")


def test_parameters_of_their_own_end_all() -> None:
    def failed(ranks: Ranks) -> str:
        one = trainer(configuration(algo="a2c"), ranks)
        if ranks.rank == 1:
            with torch.no_grad():
                next(one.network.parameters()).mul_(1.5)
        with closing(one.envs), pytest.raises(RankError) as caught:
            list(one.run(1000))
        return str(caught.value)

    assert on_threads(failed, 3) == ["rank 1 has other parameters than rank 0"] * 3


def test_a_signal_of_one_rank_stops_all() -> None:
    def stopped(ranks: Ranks) -> list[int | None]:
        one = trainer(configuration(), ranks)
        found = []
        with closing(one.envs):
            for stats in one.run(3 * ENVS * STEPS):
                found.append(one.stop)
                if stats.updates == 1 and ranks.rank == 2:
                    one.asked = lambda: 15
        return found

    assert on_threads(stopped, 3) == [[None, 15, 15]] * 3


REFUSED: dict[str, Callable[[Ranks], Any]] = {
    "num_envs must be a multiple of the 4 processes": lambda ranks: trainer(configuration(), ranks),
    "an auxiliary loss trains in one process only, not in 4": lambda ranks: World(ranks).begin(
        configuration(),
        trainer(configuration(), None).network,
        {"more": Auxiliary(BernoulliLoss(), target=lambda batch: batch.returns)},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    def refused(ranks: Ranks) -> str:
        with pytest.raises(ConfigError) as caught:
            REFUSED[message](ranks)
        return str(caught.value)

    assert all(message in said for said in on_threads(refused, 4))


def test_every_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs are pretended, for what is said to CUDA and for the error."""
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    ranks = cast(Ranks, None)  # which this does not ask
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert World(ranks, 1).device(cpu) == cpu and told == []
    assert World(ranks, 1).device(cuda) == torch.device("cuda", 1) and told == [1]
    with pytest.raises(ConfigError, match=r"process 2 of this machine has no GPU .* sees 2; start"):
        World(ranks, 2).device(cuda)
    assert told == [1]


@pytest.mark.parametrize("kind", [ACKTR, A2C, TRPO])
def test_an_agent_beside_others_is_refused(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of torch.distributed would train alone, in silence."""
    monkeypatch.setattr(world_module, "processes", lambda: 2)
    with pytest.raises(ConfigError, match=r"each of the 2 processes .* `acktr train --nproc 2`"):
        kind(Uneven, num_envs=1)


class Wide(Value):
    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 9, dtype=torch.float64)
        self.last = nn.Linear(9, 1, dtype=torch.float64)


class Dropped(Policy):
    """With a layer that several processes may not have."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.hidden = nn.Sequential(self.hidden, nn.Dropout())  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ((Policy, Wide), "rank 1 has other names, shapes or types of parameters and buffers"),
        ((Dropped, Value), "rank 1 has other kinds of networks"),
    ],
)
def test_networks_of_their_own_are_refused_before_anything_is_sent(net: Any, message: str) -> None:
    def begin(ranks: Ranks) -> str:
        with pytest.raises(ValueError) as caught:
            trainer(configuration(), ranks, net=net if ranks.rank else NET)
        return str(caught.value)

    assert all(said.startswith(message) for said in on_threads(begin, 2))
