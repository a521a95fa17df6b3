"""Updates of ranks that share out a batch are the update of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr.algorithms import A2CLearner, ACKTRLearner, TRPOLearner, objectives, trpo
from acktr.config import (
    A2CConfig,
    ACKTRConfig,
    Config,
    ConfigError,
    CriticConfig,
    NetworkConfig,
    SampledKFACConfig,
    TRPOConfig,
)
from acktr.kfac import Ranks
from acktr.policies import action_head, build_network
from acktr.rollout import Batch, Moments, Rollout, Share, together
from tests.tools.kfac import parameters
from tests.tools.ranks import on_threads

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(4),
    "box": spaces.Box(-1, 1, (2,), np.float64),
}
FIRST_ORDER: dict[str, Any] = {
    "critic_optimizer": "first_order",
    "first_order": CriticConfig(epochs=2, batch_size=20, lr=0.01),
}
SHARES = {2: (40, 56), 3: (16, 47, 33)}
ROWS = 96
UPDATES = 4


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Case:
    """Some updates of a learner."""

    kfac: dict[str, Any] = field(default_factory=dict)
    acktr: dict[str, Any] = field(default_factory=dict)
    trpo: dict[str, Any] = field(default_factory=dict)
    shared: bool = True
    space: str = "discrete"
    settings: dict[str, Any] = field(default_factory=dict)
    algo: Any = "acktr"

    def config(self) -> Config:
        common = {"lr": 0.1, "kl_clip": 0.01, "damping": 0.03, "refresh_interval": 2}
        kfac = SampledKFACConfig(**{**common, **self.kfac})
        return Config(
            env="none",
            algo=self.algo,
            ent_coef=0.01,
            normalize_advantage=True,
            network=NetworkConfig(shared=self.shared, hidden=(8,), critic_hidden=(8,)),
            acktr=ACKTRConfig(actor=kfac, critic=kfac, **self.acktr),
            a2c=A2CConfig(lr=0.01),
            trpo=TRPOConfig(**self.trpo, critic=FIRST_ORDER["first_order"]),
            **self.settings,
        )

    def run(self, ranks: Ranks | None) -> dict[str, Tensor]:
        """Learn from a few batches; parameters, and the metrics of the last one."""
        torch.manual_seed(0)
        head, config = action_head(ACTIONS[self.space]), self.config()
        network = build_network(OBSERVATIONS, head, config.network)
        kind = {"acktr": ACKTRLearner, "a2c": A2CLearner, "trpo": TRPOLearner}[self.algo]
        noise = torch.Generator().manual_seed(0)
        learner = kind(network, head, config, noise, nullcontext, None, ranks)
        metrics: dict[str, float] = {}
        for step in range(UPDATES):
            batch = self.batch(head, network, step)
            if ranks is not None:
                batch = shared(batch, ranks)
            metrics = learner.update(batch, step / UPDATES)
        timeless = {n: torch.tensor(v) for n, v in metrics.items() if not n.startswith("time/")}
        return {**parameters(network), **timeless, "noise": noise.get_state().double()}

    def batch(self, head: Any, network: Any, step: int) -> Batch:
        draw = torch.Generator().manual_seed(step)
        observations = torch.randn(ROWS, 3, generator=draw)
        with torch.no_grad():
            outputs, values = network(observations)
            dist = head.make(outputs)
            actions = dist.sample(dist.noise(draw))
        advantages = 3 + 2 * torch.randn(ROWS, generator=draw)
        return Batch(observations, actions, advantages, values + advantages, values)


def shared(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's rows, in the order of the ranks."""
    shares = SHARES[ranks.size]
    first, mine = sum(shares[: ranks.rank]), shares[ranks.rank]
    rows = slice(first, first + mine)
    columns = ("observations", "actions", "advantages", "returns", "values")
    own = replace(batch, **{name: getattr(batch, name)[rows] for name in columns})
    rollout = Rollout(torch.zeros(1, ROWS), frozenset(), torch.device("cpu"))
    rollout.valid[0, :mine] = True
    rollout.kept = np.arange(mine)
    return together(ranks, rollout, own, []).batch


CASES = {
    "shared": Case(),
    "exact": Case({"quadratic": "exact"}),
    "kronecker": Case({"quadratic": "kronecker"}, space="box"),
    "separate": Case(shared=False, space="box", acktr={"critic_steps": 2}),
    "first-order critic": Case(shared=False, acktr=FIRST_ORDER),
    "target_kl": Case(acktr={"target_kl": 1e-3}),
    "a sample": Case({"stat_fraction": 1 / 8}),
    "micro-batches": Case({"quadratic": "exact"}, settings={"micro_batch": 25}),
    "a2c": Case(algo="a2c"),
    "a2c, separate": Case(algo="a2c", shared=False, space="box", settings={"micro_batch": 25}),
    "trpo": Case(algo="trpo", shared=False),
    "trpo, a sample": Case(
        algo="trpo",
        shared=False,
        space="box",
        trpo={"fisher_fraction": 1 / 8, "max_kl": 0.3, "cg_damping": 0.3},
    ),
}


def distance(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest difference, relative where numbers are large; names must be the same."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - w).norm() / (1e-3 + w.norm())) for n, w in wanted.items())


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_one_process(name: str) -> None:
    wanted = CASES[name].run(None)
    for size in (2, 3) if name == "shared" else (3,):
        found = on_threads(CASES[name].run, size)
        assert all(torch.equal(mine[key], found[0][key]) for mine in found for key in wanted)
        assert distance(found[0], wanted) < 1e-10


def test_what_would_be_wrong_is_seen() -> None:
    """Equal shares of uneven parts, advantages and noise of each rank alone."""
    case = CASES["shared"]
    wanted, right = case.run(None), Ranks.average

    def means(ranks: Ranks, module: nn.Module, rows: float) -> None:
        right(ranks, module, 1.0)

    with mock.patch.object(Ranks, "average", means):
        assert distance(on_threads(case.run, 3)[0], wanted) > 1e-4

    def own_moments(self: Moments, other: Moments) -> Moments:  # without the means' differences
        count = self.count + other.count
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Moments(count, mean, self.m2 + other.m2)

    with mock.patch.object(Moments, "__or__", own_moments):
        assert distance(on_threads(case.run, 3)[0], wanted) > 1e-6

    def own_noise(batch: Batch, draw: Any) -> Any:
        return draw(len(batch))

    with mock.patch.object(objectives, "drawn", own_noise):
        assert distance(on_threads(case.run, 3)[0], wanted) > 1e-4


def test_moments_of_both() -> None:
    values = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1e-3 + 100
    wanted, found = Moments.of(values), Moments.of(values[:7]) | Moments.of(values[7:])
    assert found.count == 50 and found.mean == pytest.approx(wanted.mean, rel=1e-14)
    assert found.variance == pytest.approx(float(values.var(correction=0)), rel=1e-9)
    assert Moments.of(values[:0]) | wanted == wanted == wanted | Moments.of(values[:0])
    assert Moments.of(values[:0]).deviation == 0


def test_what_would_be_wrong_of_trpo_is_seen() -> None:
    """Means of the ranks' means, and a line search that looks at one's own samples."""
    case = CASES["trpo, a sample"]
    wanted, right = case.run(None), Share.mean

    def of_means(share: Share, vector: Tensor, rows: int) -> Tensor:
        return right(share, vector, 1)

    with mock.patch.object(Share, "mean", of_means):
        assert distance(on_threads(case.run, 3)[0], wanted) > 1e-4

    def own(batch: Batch, means: dict[str, Tensor]) -> dict[str, Tensor]:
        return means

    with mock.patch.object(trpo, "over_ranks", own):
        first, *others = on_threads(case.run, 3)
        assert any(distance(mine, first) > 1e-4 for mine in others)


FRACTIONS = {
    "stat_fraction": Case({"stat_fraction": 1 / 20}),
    "fisher_fraction": Case(algo="trpo", shared=False, trpo={"fisher_fraction": 1 / 20}),
}


@pytest.mark.parametrize("setting", FRACTIONS)
def test_too_few_samples_of_a_rank(setting: str) -> None:
    def refused(ranks: Ranks) -> str:
        with pytest.raises(ConfigError) as caught:
            FRACTIONS[setting].run(ranks)
        return str(caught.value)

    (said,) = set(on_threads(refused, 3))
    assert f"{setting}=0.05 takes every 20-th sample, but a rank has 16" in said
