"""A forbidden action is no action: updates with masks equal those of a network without it."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr.algorithms import A2CLearner, ACKTRLearner, ACKTRUpdate, TRPOLearner
from acktr.algorithms.likelihoods import PolicyLoss
from acktr.config import (
    A2CConfig,
    ACKTRConfig,
    Config,
    CriticConfig,
    NetworkConfig,
    SampledKFACConfig,
    TRPOConfig,
    preset,
)
from acktr.policies import ActionHead, action_head, build_network
from acktr.rollout import Batch

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float64)
ROWS = 48
WIDE: dict[str, gymnasium.Space[Any]] = {
    "Discrete": spaces.Discrete(5),
    "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
}
NARROW: dict[str, gymnasium.Space[Any]] = {
    "Discrete": spaces.Discrete(3),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3]),
}
KEPT = {"Discrete": [0, 1, 2], "MultiDiscrete": [0, 1, 3, 4, 5]}
"""Choices of the wide space that the narrow one has: the last of each component are missing."""
LEARNERS = {"acktr": ACKTRLearner, "a2c": A2CLearner, "trpo": TRPOLearner}


@pytest.fixture(autouse=True)
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclasses.dataclass(frozen=True)
class Thinned(ActionHead):
    """The narrow head with the noise that the wide one draws."""

    wide: ActionHead | None = None
    kept: tuple[int, ...] = ()

    def noise(self, rows: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        assert self.wide is not None
        return self.wide.noise(rows, generator, dtype)[:, list(self.kept)]


def configuration(algo: Any, shared: bool, exact: bool, micro_batch: int | None) -> Config:
    kfac = SampledKFACConfig(quadratic="exact" if exact else "kronecker", damping=1e-2)
    return Config(
        env="none",
        algo=algo,
        ent_coef=0.01,
        micro_batch=micro_batch,
        network=NetworkConfig(shared=shared, hidden=(8,), critic_hidden=(8,), policy_gain=1.0),
        acktr=ACKTRConfig(actor=kfac, critic=kfac),
        a2c=A2CConfig(lr=1e-3),
        trpo=TRPOConfig(fisher_fraction=0.5, critic=CriticConfig(epochs=1)),
    )


def policy_layer(network: Any) -> Any:
    return network.policy.linear if hasattr(network, "policy") else network.actor.head.linear


def learners(kind: str, config: Config) -> list[tuple[Any, Any]]:
    """Learner and network, of the wide space and of the narrow, with equal weights in common."""
    torch.manual_seed(0)
    wide, plain = action_head(WIDE[kind]), action_head(NARROW[kind])
    narrow = Thinned(plain.outputs, plain.gaussian, plain.make, wide, tuple(KEPT[kind]))
    networks = [build_network(OBSERVATIONS, head, config.network) for head in (wide, narrow)]
    state = networks[0].state_dict()
    shapes = networks[1].state_dict()
    cut = {k: v if v.shape == shapes[k].shape else v[KEPT[kind]] for k, v in state.items()}
    networks[1].load_state_dict(cut)
    make = LEARNERS[config.algo]
    return [
        (make(network, head, config, torch.Generator().manual_seed(3), nullcontext), network)
        for network, head in zip(networks, (wide, narrow), strict=True)
    ]


def batches(kind: str, network: Any, seed: int) -> tuple[Batch, Batch]:
    draw = torch.Generator().manual_seed(seed)
    observations = torch.randn(ROWS, 3, generator=draw)
    sizes = torch.tensor([3]) if kind == "Discrete" else torch.tensor([2, 3])
    actions = (torch.rand(ROWS, len(sizes), generator=draw) * sizes).long()
    actions = actions[:, 0] if kind == "Discrete" else actions
    advantages = torch.randn(ROWS, generator=draw)
    with torch.no_grad():
        values = network(observations)[1]
    mask = torch.zeros(ROWS, action_head(WIDE[kind]).outputs, dtype=torch.bool)
    mask[:, KEPT[kind]] = True
    narrow = Batch(observations, actions, advantages, values + advantages, values)
    return dataclasses.replace(narrow, masks=mask), narrow


CASES = [
    ("acktr", True, False, None),
    ("acktr", True, True, None),
    ("acktr", True, True, 20),
    ("acktr", False, False, 20),
    ("a2c", True, False, None),
    ("a2c", True, False, 20),
    ("trpo", False, False, None),
]


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize(("algo", "shared", "exact", "micro_batch"), CASES)
def test_a_forbidden_action_is_no_action(
    kind: str, algo: str, shared: bool, exact: bool, micro_batch: int | None
) -> None:
    """Three updates: shared weights and metrics agree, weights of what is forbidden stay."""
    config = configuration(algo, shared, exact, micro_batch)
    (wide, network), (narrow, thin) = learners(kind, config)
    forbidden = [i for i in range(action_head(WIDE[kind]).outputs) if i not in KEPT[kind]]
    layer = policy_layer(network)
    before = layer.weight[forbidden].clone()
    start = policy_layer(thin).weight.clone()
    for seed in range(3):
        masked, plain = batches(kind, network, seed)
        found, expected = wide.update(masked, 0.0), narrow.update(plain, 0.0)
        for name, value in expected.items():
            if name.startswith("train/"):
                assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    torch.testing.assert_close(layer.weight[forbidden], before, rtol=0, atol=1e-13)
    own = dict(network.named_parameters())
    for name, parameter in thin.named_parameters():
        mine = own[name] if own[name].shape == parameter.shape else own[name][KEPT[kind]]
        torch.testing.assert_close(mine, parameter, rtol=1e-7, atol=1e-9)
    assert not torch.allclose(policy_layer(thin).weight, start)


@pytest.mark.parametrize("algo", LEARNERS)
def test_an_action_that_the_mask_forbids_is_one_error(algo: str) -> None:
    (wide, network), _ = learners("MultiDiscrete", configuration(algo, algo != "trpo", False, None))
    masked, _ = batches("MultiDiscrete", network, 0)
    assert masked.masks is not None
    before = [p.clone() for p in network.parameters()]
    wrong = masked.masks.clone()
    wrong[7] = True
    wrong[7, masked.actions[7, 0]] = False
    nothing = masked.masks.clone()
    nothing[5, :3] = False
    for masks, said in (
        (wrong, r"sample 7 forbids the action \[\d, \d\] that was taken there"),
        (nothing, "sample 5 forbids"),
        (masked.masks[:, :-1], r"torch.bool of shape \(48, 7\), got torch.bool of shape \(48, 6\)"),
        (masked.masks.double(), "got torch.float64"),
    ):
        with pytest.raises(ValueError, match=said):
            wide.update(dataclasses.replace(masked, masks=masks), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


class Own(nn.Module):
    """A shared network of one's own, whose trust region is measured with the exact Fisher."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.score, self.value = nn.Linear(8, outputs), nn.Linear(8, 1)

    def forward(self, observations: Tensor) -> Any:
        hidden = self.trunk(observations)
        return {"policy": self.score(hidden), "value": self.value(hidden)[:, 0]}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("micro_batch", [None, 20])
def test_the_update_alone_takes_masks(kind: str, micro_batch: int | None) -> None:
    """What is never allowed learns nothing; rows of weight zero may allow nothing."""
    torch.manual_seed(0)
    head = action_head(WIDE[kind])
    network = Own(head.outputs)
    config = dataclasses.replace(preset("own", "acktr")[0], micro_batch=micro_batch)
    update = ACKTRUpdate(network, WIDE[kind], config)
    forbidden = [i for i in range(head.outputs) if i not in KEPT[kind]]
    before, first = network.score.weight[forbidden].clone(), network.trunk[0].weight.clone()
    for seed in range(4):
        batch, _ = batches(kind, lambda seen: (None, network(seen)["value"]), seed)
        assert batch.masks is not None
        masks, weights = batch.masks.clone(), torch.ones(ROWS)
        masks[3], weights[3] = False, 0
        sizes = [5] if kind == "Discrete" else [3, 4]
        given = (batch.observations, batch.actions, batch.advantages, batch.returns)
        metrics = update(*given, masks=tuple(masks.int().split(sizes, -1)), weights=weights)
        assert all(np.isfinite(value) for value in metrics.values())
        entropy = -metrics["train/entropy_loss"]
        assert 0 < entropy < sum(np.log(size - 1 - (size == 5)) for size in sizes) + 1e-9
    torch.testing.assert_close(network.score.weight[forbidden], before, rtol=0, atol=1e-13)
    assert not torch.allclose(network.trunk[0].weight, first)


@pytest.mark.parametrize("kind", WIDE)
def test_the_policy_as_a_loss_takes_masks_in_place_of_targets(kind: str) -> None:
    head = action_head(WIDE[kind])
    batch, _ = batches(kind, lambda seen: (None, seen[:, 0]), 0)
    output, other = torch.randn(2, ROWS, head.outputs)
    loss = PolicyLoss(head=head).weighted(output, None, batch.masks)
    dist = head.make(output, batch.masks)
    tangent = torch.randn(ROWS, head.outputs)
    torch.testing.assert_close(loss.hessian_product(output, tangent), dist.fisher_product(tangent))
    torch.testing.assert_close(loss.kl(output, other).sum(), dist.kl(other).mean())
    drawn = dist.sample(dist.noise(torch.Generator().manual_seed(0)))
    sampled = loss.sampled(output, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampled, -dist.log_prob(drawn).sum())


def test_actions_without_choices_take_no_masks() -> None:
    head = action_head(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match="action masks are for Discrete and MultiDiscrete"):
        head.make(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))
