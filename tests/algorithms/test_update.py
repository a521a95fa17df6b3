"""The update alone, over plain tensors: it is the trainer's, weights count, bad input is told."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr import A2CUpdate, ACKTRUpdate, Auxiliary, Config, ConfigError, TRPOUpdate, gae, preset
from acktr.algorithms import auxiliary, objectives
from acktr.config import ACKTRConfig, NetworkConfig, SampledKFACConfig
from acktr.environments import training_envs
from acktr.kfac import BernoulliLoss, GaussianLoss
from acktr.policies import action_head, own_network
from acktr.rollout import Batch, make_batch
from acktr.train import Trainer

UPDATES: dict[str, Any] = {"acktr": ACKTRUpdate, "a2c": A2CUpdate, "trpo": TRPOUpdate}


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Nodes(nn.Module):
    """A network of nodes under pooling, with logits of the nodes and two further outputs."""

    def __init__(self, nodes: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 16)
        self.score, self.value = nn.Linear(16, 1), nn.Linear(16, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, nodes: Tensor) -> dict[str, Tensor]:
        hidden = self.dropout(self.second(self.first(nodes).relu()).relu())
        return {
            "policy": self.score(hidden)[..., 0],
            "value": self.value(hidden.sum(1)),
            "large": 3 * self.score(hidden)[..., 0],
        }


class Part(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, width))

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.layers(rows)
        return found


def nodes_batch(rows: int = 48, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "observations": torch.randn(rows, 6, 3, generator=draw),
        "actions": torch.randint(6, (rows,), generator=draw),
        "advantages": torch.randn(rows, generator=draw),
        "returns": 5 * torch.randn(rows, generator=draw),
    }


@pytest.mark.parametrize("algo", UPDATES)
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_it_reproduces_the_trainer(algo: str, env: str) -> None:
    config = dataclasses.replace(preset(env, algo)[0], num_envs=4, num_steps=16, seed=3)
    with closing(training_envs(config)) as envs:
        trainer = Trainer(config, envs)
        update = UPDATES[algo](copy.deepcopy(trainer.network), envs.single_action_space, config)
        for number in range(3):
            rollout = trainer.collector.collect(config.num_steps)
            batch = make_batch(rollout, config.gamma, config.gae_lambda, trainer.device)
            trainer.learner.update(batch, number / 10)
            if number == 1:  # another session goes on
                state, network = update.state_dict(), update.network
                update = UPDATES[algo](copy.deepcopy(network), envs.single_action_space, config)
                update.load_state_dict(state)
            update(
                batch.observations,
                batch.actions,
                batch.advantages,
                batch.returns,
                progress=number / 10,
            )
            pairs = zip(trainer.network.parameters(), update.network.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


def general(algo: Any, **changes: Any) -> Config:
    return dataclasses.replace(preset("own", algo)[0], **changes)


def parameters(update: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in update.network.parameters()])


@pytest.mark.parametrize("algo", UPDATES)
@pytest.mark.parametrize("fractions", [False, True])
@pytest.mark.usefixtures("float64")
def test_weight_zero_is_left_out(algo: str, fractions: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = {name: values[:, :1, :].flatten(1) if values.dim() > 2 else values
            for name, values in nodes_batch(40).items()}  # fmt: skip
    mask = torch.rand(40, generator=draw) < 0.6
    weights = (1 + 3 * torch.rand(40, generator=draw) if fractions else torch.ones(40)) * mask
    spoilt = dict(rows)
    spoilt["observations"] = rows["observations"].where(mask[:, None], torch.tensor(1e6))
    spoilt["advantages"] = rows["advantages"].where(mask, torch.tensor(1e6))
    kept = {name: values[mask] for name, values in rows.items()}
    found = []
    for batch, weight in ((spoilt, weights), (kept, weights[mask])):
        torch.manual_seed(0)
        update = UPDATES[algo]((Part(6), Part(1)), spaces.Discrete(6), general(algo))
        for _ in range(3):
            metrics = update(**batch, weights=weight)
        found.append((parameters(update), metrics))
    assert torch.equal(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        assert name.startswith("time/") or value == found[1][1][name]


@pytest.mark.parametrize("algo", ["a2c", "trpo"])
@pytest.mark.usefixtures("float64")
def test_weight_two_is_a_sample_twice(algo: str) -> None:
    """Where nothing is drawn: TRPO's critic takes the whole batch."""
    rows = {n: v[:, 0] if v.dim() > 2 else v for n, v in nodes_batch(20).items()}
    config = general(algo)
    critic = dataclasses.replace(config.trpo.critic, batch_size=None)
    config = dataclasses.replace(config, trpo=dataclasses.replace(config.trpo, critic=critic))
    order = torch.tensor([*range(20), *range(5)])
    weights = torch.ones(20)
    weights[:5] = 2
    found = []
    for batch, weight in ((rows, weights), ({n: v[order] for n, v in rows.items()}, None)):
        torch.manual_seed(0)
        update = UPDATES[algo]((Part(6), Part(1)), spaces.Discrete(6), config)
        for _ in range(2):
            metrics = update(**batch, weights=weight, values=batch["returns"] - batch["advantages"])
        found.append((parameters(update), metrics))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-8, atol=1e-10)
    for name, value in found[0][1].items():
        assert name.startswith("time/") or value == pytest.approx(found[1][1][name], rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_objectives_take_weights_as_repetitions() -> None:
    """Loss, gradient and metric of ACKTR's whole objective, auxiliary output included."""
    rows = nodes_batch(12)
    order = torch.tensor([*range(12), 0, 0, 3])
    weights = torch.ones(12)
    weights[0], weights[3] = 3, 2
    extra = {
        "large": Auxiliary(BernoulliLoss(), weight=2.0, target=lambda b: b.observations.sum(2) > 0)
    }
    config = general("acktr", normalize_advantage=True)
    torch.manual_seed(0)
    net = own_network(Nodes(), None, spaces.Discrete(6), action_head(spaces.Discrete(6)), ["large"])
    found = []
    for index, weight in ((torch.arange(12), weights / weights.mean()), (order, None)):
        chosen = {name: values[index] for name, values in rows.items()}
        batch = Batch(**chosen, values=None, weights=weight)
        objective = objectives.JointObjective(
            action_head(spaces.Discrete(6)), batch, config, torch.Generator(), torch.float64, extra
        )
        outputs = net(batch.observations)
        every = slice(0, len(batch))
        loss, terms = objective.loss(outputs, every)
        slopes = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        tangents = [output.detach().cos() for output in outputs]
        form = objective.metric(outputs, every)(*tangents).mean()
        found.append([loss, *terms.values(), *slopes, form])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_every_part_of_a_shared_network_keeps_its_radius() -> None:
    """Where the Kronecker form is wrong by far: nodes under pooling, and a wild value function."""
    torch.manual_seed(0)
    own = {"large": Auxiliary(BernoulliLoss(), target=lambda batch: batch.observations[..., 0] > 0)}
    config = general("acktr", vf_coef=1.0)
    update = ACKTRUpdate(Nodes(), spaces.Discrete(6), config, auxiliary=own)
    policy, value, losses = [], [], []
    for number in range(30):
        metrics = update(**nodes_batch(96, number))
        policy.append(metrics["train/approx_kl"])
        value.append(metrics["train/value_kl"])
        losses.append(metrics["train/large_loss"])
    bounds = [config.acktr.actor.kl_clip, config.acktr.critic.kl_clip]
    for spent, bound in zip((policy, value), bounds, strict=True):
        assert bound is not None
        assert np.quantile(spent, 0.9) <= 2 * bound / 2
    assert np.median(policy) >= 1e-3 * bounds[0]  # the value function leaves it some room
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("micro_batch", [None, 30])
def test_the_radius_holds_with_statistics_of_a_part(micro_batch: int | None) -> None:
    """The Atari preset: a cold start, and factors of every eighth sample of every second batch."""
    config = dataclasses.replace(preset("PongNoFrameskip-v4")[0], micro_batch=micro_batch)
    torch.manual_seed(0)
    update = ACKTRUpdate(Nodes(), spaces.Discrete(6), config)
    found = [update(**nodes_batch(96, number)) for number in range(24)][
        config.acktr.actor.cold_steps :
    ]
    for tag, bound in (("train/approx_kl", 0.001), ("train/value_kl", 0.001)):
        assert np.quantile([metrics[tag] for metrics in found], 0.8) <= 2 * bound / 2


def test_masked_actions_stay_impossible() -> None:
    """The radius holds for the masked policy, and logits of what is forbidden have no gradient."""
    torch.manual_seed(0)
    free = nn.Parameter(torch.zeros(6))

    class Offset(Nodes):
        def __init__(self) -> None:
            super().__init__()
            self.free = free

        def forward(self, nodes: Tensor) -> dict[str, Tensor]:
            found = super().forward(nodes)
            return {"policy": found["policy"] + self.free, "value": found["value"]}

    update = ACKTRUpdate(Offset(), spaces.Discrete(6), general("acktr"))
    for number in range(12):
        batch = nodes_batch(96, number)
        masks = torch.ones(96, 6, dtype=torch.bool)
        masks[:, 5] = False
        batch["actions"] %= 5
        metrics = update(**batch, masks=masks)
        assert metrics["train/approx_kl"] <= 0.01
        assert np.isfinite(list(metrics.values())).all()
    assert float(free[5].detach()) == 0 != float(free[0].detach())


def test_dropout_is_for_the_loss_alone() -> None:
    modes: list[bool] = []

    class Watched(Nodes):
        def forward(self, nodes: Tensor) -> dict[str, Tensor]:
            modes.append(self.training)
            return super().forward(nodes)

    for algo, kind in (("acktr", ACKTRUpdate), ("a2c", A2CUpdate)):
        update = kind(Watched(dropout=0.5), spaces.Discrete(6), general(algo))
        modes.clear()
        metrics = update(**nodes_batch())
        assert True in modes
        assert not update.network.training
    torch.manual_seed(0)
    still = general("acktr", acktr=ACKTRConfig(actor=SampledKFACConfig(lr=1e-9)))
    metrics = ACKTRUpdate(Nodes(dropout=0.5), spaces.Discrete(6), still)(**nodes_batch())
    assert metrics["train/approx_kl"] < 1e-8  # which two masks would not leave there


def test_an_actor_may_have_auxiliary_outputs() -> None:
    class Actor(Part):
        def forward(self, rows: Tensor) -> Any:
            found = super().forward(rows)
            return {"policy": found[:, :6], "size": found[:, 6:]}

    rows = {n: v[:, 0] if v.dim() > 2 else v for n, v in nodes_batch(64).items()}
    size = Auxiliary(GaussianLoss(), weight=3.0, target=lambda b: b.observations[:, :1] ** 2)
    for algo, kind in (("acktr", ACKTRUpdate), ("a2c", A2CUpdate)):
        torch.manual_seed(0)
        config = general(algo, total_timesteps=1)
        update = kind((Actor(7), Part(1)), spaces.Discrete(6), config, auxiliary={"size": size})
        losses = [update(**rows)["train/size_loss"] for _ in range(40)]
        assert losses[-1] < losses[0]
    with pytest.raises(ConfigError, match="trpo takes no auxiliary losses"):
        TRPOUpdate((Actor(7), Part(1)), spaces.Discrete(6), auxiliary={"size": size})


def test_trpo_goes_on_without_parameters_that_do_not_learn() -> None:
    actor = Part(6)
    actor.unused = nn.Linear(2, 2)
    actor.layers[0].requires_grad_(False)
    update = TRPOUpdate((actor, Part(1)), spaces.Discrete(6), general("trpo"))
    rows = {n: v[:, 0] if v.dim() > 2 else v for n, v in nodes_batch(64).items()}
    before = [p.clone() for p in actor.parameters()]
    assert update(**rows)["train/line_search_accepted"] == 1
    moved = [not torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True)]
    assert moved == [False, False, True, True, False, False]
    with pytest.raises(ConfigError, match=r"a critic of its own: network=\(Actor, Critic\)"):
        TRPOUpdate(Nodes(), spaces.Discrete(6), general("trpo"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"returns": torch.zeros(3)}, r"returns must have the shape \(48,\), got \(3,\)"),
    "observations": ({"observations": torch.zeros(9, 6, 3)}, "for each of 48 advantages, got .9."),
    "width": ({"observations": torch.zeros(48, 6, 2)}, "cannot take observations"),
    "nan": ({"advantages": torch.full((48,), torch.nan)}, "advantages must be finite"),
    "classes": ({"actions": torch.full((48,), 6)}, r"class numbers from 0, got .* from 6 to 6"),
    "floats": ({"actions": torch.zeros(48)}, r"class numbers from 0, got torch\.float32"),
    "actions": ({"actions": torch.zeros(48, 1)}, r"must have the shape \(48,\), got \(48, 1\)"),
    "weights": ({"weights": -torch.ones(48)}, "weights must be at least 0 and not all 0"),
    "zeros": ({"weights": torch.zeros(48)}, "weights must be at least 0 and not all 0"),
    "one": ({"weights": torch.eye(48)[0]}, "needs 2 samples or more, got 1"),
    "masks": ({"masks": torch.ones(48, 5)}, r"masks must have the shape \(48, 6\), got \(48, 5\)"),
    "forbidden": ({"masks": torch.zeros(48, 6)}, "the mask of sample 0 forbids the action"),
    "list": ({"observations": [[1.0], [1.0, 2.0]]}, "a tensor .* or a dict of such tensors, got l"),
    "progress": ({"progress": 1.5}, r"progress must be in \[0, 1\]"),
    "mask numbers": ({"masks": torch.full((48, 6), 0.5)}, "masks must be 0 or 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_batches_are_one_line(kind: str) -> None:
    changes, message = BAD[kind]
    update = ACKTRUpdate(Nodes(), spaces.Discrete(6))
    before = parameters(update)
    with pytest.raises(ConfigError, match=message) as caught:
        update(**nodes_batch() | changes)
    assert "\n" not in str(caught.value)
    assert torch.equal(parameters(update), before)


def test_bad_losses_are_one_line() -> None:
    def large(**changes: Any) -> dict[str, Any]:
        given: dict[str, Any] = {
            "loss": BernoulliLoss(),
            "target": lambda b: b.observations[..., 0],
        }
        return {"large": Auxiliary(**given | changes)}

    for message, losses in (
        ("loss must be a loss of acktr.kfac", lambda: large(loss=nn.BCELoss())),
        ("weight must be a number > 0", lambda: large(weight=0)),
        ("target must be a function", lambda: large(target=torch.zeros(3))),
        ("must have reduction='mean'", lambda: large(loss=BernoulliLoss(reduction="sum"))),
        ("other than policy and value, got 'value'", lambda: {"value": large()["large"]}),
        (r"auxiliary\['large'\] must be Auxiliary", lambda: {"large": BernoulliLoss()}),
    ):
        with pytest.raises(ConfigError, match=message):
            auxiliary.checked_auxiliary(losses())
    for message, target in (
        (r"a row for each of 48 samples, got \(3,\)", lambda b: torch.zeros(3)),
        (r"'large': BernoulliLoss: target must be .* \(48, 6\)", lambda b: torch.zeros(48, 5)),
    ):
        losses = large(target=target)
        for kind in (ACKTRUpdate, A2CUpdate):
            with pytest.raises(ConfigError, match=message):
                kind(Nodes(), spaces.Discrete(6), auxiliary=losses)(**nodes_batch())


def test_configurations_of_another_algorithm_are_told() -> None:
    config = Config(env="own", algo="a2c", network=NetworkConfig(shared=False))
    with pytest.raises(ConfigError, match="use A2CUpdate"):
        ACKTRUpdate(Nodes(), spaces.Discrete(6), config)


def test_gae_takes_arrays_and_tensors() -> None:
    draw = np.random.default_rng(0)
    rewards, values, following = draw.normal(size=(3, 7, 2))
    terminated = draw.random((7, 2)) < 0.2
    ended = terminated | (draw.random((7, 2)) < 0.2)
    found = gae(rewards, values, following, terminated, ended, 0.9, 0.8)
    given = [torch.tensor(each) for each in (rewards, values, following, terminated, ended)]
    tensors = gae(*given, 0.9, 0.8)
    assert torch.equal(tensors, torch.tensor(found))
    single = gae(*[each[:, 1] for each in given], 0.9, 0.8)
    assert torch.equal(single, tensors[:, 1])
    with pytest.raises(ValueError, match=r"one shape \(T, N\), got \[\(2,\), \(7, 2\)\]"):
        gae(*given[:4], given[4][0], 0.9, 0.8)


@pytest.mark.parametrize("integers", [(0,), (0, 1, 2)])
def test_gae_of_integers_is_not_cut(integers: tuple[int, ...]) -> None:
    given = [torch.ones(3), torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.zeros(3)]
    expected = gae(*given, 0.5, 0.5)
    found = gae(*[e.long() if n in integers else e for n, e in enumerate(given)], 0.5, 0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
