"""Networks of one's own: what they may return, and what is said of those that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import Space, spaces
from torch import Tensor, nn

from acktr.config import Config, ConfigError, NetworkConfig
from acktr.policies import (
    ActorCritic,
    SeparateActorCritic,
    SharedActorCritic,
    action_head,
    as_outputs,
    build_network,
    mode,
    network_name,
)
from acktr.policies.contract import with_network
from acktr.policies.networks import Actor, Critic
from acktr.policies.own import MemoryWarning

VECTORS = spaces.Box(-np.inf, np.inf, (5,), np.float64)
PICTURES = spaces.Box(0, 255, (12, 12, 3), np.uint8)
CHOICES, MOVES = spaces.Discrete(4), spaces.Box(-1, 1, (2, 3), np.float32)

CPU = torch.device("cpu")
Answer = Callable[[Tensor, Tensor, Tensor], Any]


class Net(nn.Module):
    """Two layers, whose logits, means and values ``answer`` puts together."""

    def __init__(self, answer: Answer, inputs: int = 5, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, 8), nn.Linear(8, width)
        self.score = nn.Linear(8, 1)
        self.log_std = nn.Parameter(torch.full((width,), -0.5))
        self.answer = answer

    def forward(self, observations: Tensor) -> Any:
        hidden = self.first(observations.flatten(1)).tanh()
        return self.answer(self.second(hidden), self.score(hidden), self.log_std)


def built(network: Any, space: Space = VECTORS, actions: Space = CHOICES, **more: Any) -> Any:
    torch.manual_seed(0)
    head = action_head(actions)
    given: dict[str, Any] = {"action_space": actions, "device": CPU, **more}
    return build_network(space, head, NetworkConfig(), network, **given)


FORMS: dict[str, Answer] = {
    "dict": lambda p, v, _: {"policy": p, "value": v},
    "flat values": lambda p, v, _: {"policy": p, "value": v[:, 0], "attention": v},
    "tuple": lambda p, v, _: (p, v),
    "list": lambda p, v, _: [p, v[:, 0]],
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_shared_network_may_return(form: str) -> None:
    net = built(Net(FORMS[form]))
    assert net.shared
    assert net.own
    observations = torch.randn(7, 5, dtype=torch.float64)
    policy, value = net(observations)
    expected, values, _ = Net.forward(with_answer(net.network), observations.float())
    assert torch.equal(policy, expected)
    assert torch.equal(value, values[:, 0])
    assert not net.training


def with_answer(network: Net) -> Net:
    network.answer = lambda *parts: parts
    return network


@pytest.mark.parametrize(
    "answer",
    [
        lambda m, v, s: (torch.cat([m, s.expand_as(m)], 1), v),
        lambda m, v, s: ((m, s), v),
        lambda m, v, s: {"policy": [m.reshape(-1, 2, 3), s.reshape(2, 3)], "value": v},
        lambda m, v, s: ((m.reshape(-1, 2, 3), s.expand_as(m).reshape(-1, 2, 3)), v),
    ],
)
def test_gaussians_may_be_pairs(answer: Answer) -> None:
    net = built(Net(answer, width=6), actions=MOVES)
    policy, _ = net(torch.randn(7, 5))
    assert policy.shape == (7, 12)
    assert torch.equal(policy[:, 6:], torch.full((7, 6), -0.5))


def test_separate_networks_and_their_names() -> None:
    def actor(space: Space, actions: Space) -> nn.Module:
        assert (space, actions) == (VECTORS, CHOICES)
        return Net(lambda p, v, s: p)

    net = built((actor, Net(lambda p, v, s: v)))
    assert not net.shared
    policy, value = net(torch.randn(3, 5))
    assert (policy.shape, value.shape) == ((3, 4), (3,))
    assert torch.equal(net.actor(torch.ones(3, 5)), net(torch.ones(3, 5))[0])
    assert network_name(Net) == "tests.policies.test_contract:Net"
    assert network_name((Net, net.actor.network)) == ",".join(2 * [network_name(Net)])


def test_auxiliary_outputs_follow_policy_and_value() -> None:
    more = FORMS["flat values"]
    _, value, found = built(Net(more), auxiliary=("attention",))(torch.randn(3, 5))
    assert torch.equal(value, found[:, 0])
    critic = Net(lambda p, v, s: v)
    actor = Net(lambda p, v, s: {"policy": p, "attention": v})
    assert built((actor, critic), auxiliary=("attention",))(torch.randn(3, 5))[2].shape == (3, 1)
    with pytest.raises(ConfigError, match="returns 'policy', 'value', without 'attention'"):
        built(Net(FORMS["dict"]), auxiliary=("attention",))
    with pytest.raises(ConfigError, match=r"'attention' for 3 .* \(3, \.\.\., D\), got \(3,\)"):
        built(Net(lambda p, v, s: {"policy": p, "value": v, "attention": v[:, 0]}),
              auxiliary=("attention",))  # fmt: skip
    with pytest.raises(ConfigError, match="give one by network="):
        built(None, auxiliary=("attention",))


@pytest.mark.parametrize("raw", [True, False])
def test_pictures_come_channels_first_in_the_unit_range(raw: bool) -> None:
    seen: list[Tensor] = []

    class Look(Net):
        def forward(self, observations: Tensor) -> Any:
            seen.append(observations)
            return super().forward(observations)

    net = built(Look(FORMS["tuple"], inputs=432), PICTURES)
    pictures = torch.randint(0, 255, (2, 12, 12, 3), dtype=torch.uint8)
    expected = pictures.permute(0, 3, 1, 2) / 255
    net(pictures if raw else expected)
    torch.testing.assert_close(seen[-1], expected)


def test_discrete_observations_come_as_they_are() -> None:
    class Rooms(nn.Module):
        def __init__(self, space: Any, actions: Any) -> None:
            super().__init__()
            self.rooms = nn.Embedding(space.n, 5)

        def forward(self, observations: Tensor) -> Any:
            hidden = self.rooms(observations)
            return hidden[:, :4], hidden[:, 4]

    assert built(Rooms, spaces.Discrete(9))(torch.tensor([3, 8]))[0].shape == (2, 4)


def test_parts_come_as_the_space_has_them() -> None:
    class Look(Net):
        def forward(self, observations: Any) -> Any:
            view, (place, room) = observations["view"], observations["rest"]
            assert view.shape[1:] == (3, 12, 12)
            assert room.dtype == torch.int64
            return super().forward(torch.cat([view.flatten(1), place, room[:, None] / 4], 1))

    rest = spaces.Tuple([spaces.Box(-1, 1, (2,), np.float64), spaces.Discrete(4)])
    space = spaces.Dict(view=PICTURES, rest=rest)
    net = built(Look(FORMS["dict"], inputs=435), space)
    shown = {
        "view": torch.zeros(5, 12, 12, 3, dtype=torch.uint8),
        "rest/0": torch.zeros(5, 2, dtype=torch.float64),
        "rest/1": torch.zeros(5, dtype=torch.int64),
    }
    assert net(shown)[0].shape == (5, 4)
    with pytest.raises(ConfigError, match=r"dict of view: .* AttributeError: 'dict' object"):
        built(Net(lambda p, v, s: p["nowhere"]), space)


class Uses(nn.Module):
    """Values and logits that are some function of the hidden layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.function = function

    def forward(self, observations: Tensor) -> Any:
        hidden = self.function(self.layer(observations))
        return hidden[:, :4], hidden[:, 4]


BAD: dict[str, tuple[Any, str]] = {
    "logits": (
        Net(FORMS["tuple"], width=3),
        r"policy for 3 observations must have the shape \(3, 4\), logits of Discrete\(4\), got"
        r" \(3, 3\)",
    ),
    "one row": (Net(lambda p, v, s: (p[:1], v)), r"shape \(3, 4\), .*, got \(1, 4\)"),
    "scalar": (Net(lambda p, v, s: (p, v.mean())), r"value for 3 .* \(3,\) or \(3, 1\), got \(\)"),
    "squeezed": (Net(lambda p, v, s: (p, v.squeeze())), r"value for 1 observations .*, got \(\)"),
    "integers": (Net(lambda p, v, s: (p.long(), v)), r"got \(3, 4\) of int64"),
    "tensor": (Net(lambda p, v, s: p), r'must return \{"policy".* or \(policy, value\), got \(3, '),
    "three": (Net(lambda p, v, s: (p, v, s)), r"or \(policy, value\), got tuple of \(3, 4\), "),
    "names": (Net(lambda p, v, s: {"pi": p, "value": v}), "returns 'pi', 'value', without 'polic"),
    "infinite": (Net(lambda p, v, s: (p / 0, v)), "not finite .masks belong to the environment"),
    "infinite alone": (Net(lambda p, v, s: (p / (len(p) - 1), v)), "outputs are not finite"),
    "mixes": (Uses(lambda h: h - h.mean(0)), "observation 0 depends on the other observations"),
    "first row": (Uses(lambda h: h[:1].expand_as(h)), "observation 1 depends on the other"),
    "ignores": (Uses(lambda h: torch.zeros_like(h)), "same for different observations"),
    "raises": (Net(FORMS["tuple"], inputs=7), r"cannot take observations \(3, 5\): RuntimeError"),
    "words": ("MlpPolicy", r"must be a torch\.nn\.Module, a class or function .*'MlpPolicy'"),
    "three of them": ((Net, Net, Net), r"or \(actor, critic\), got"),
    "function": (lambda s, a: 3, r"must give a torch\.nn\.Module, got int"),
    "constructor": (Uses, r"Uses\(Box\(-inf, inf, \(5,\), float64\), Discrete\(4\)\): TypeError: "),
    "detached": (
        Net(lambda p, v, s: (p.detach(), v)),
        "policy has no gradient: forward.. must nei",
    ),
    "frozen": (Net(FORMS["tuple"]).requires_grad_(False), "policy has no gradient"),
    "nothing": (nn.Flatten(), "has no parameters to learn"),
    "critic": ((Net(lambda p, v, s: p), Net(lambda p, v, s: p)), r"\(3, 1\), got \(3, 4\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_one_line(kind: str) -> None:
    network, message = BAD[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        built(network)
    assert "\n" not in str(caught.value)


def test_a_mean_alone_is_no_gaussian() -> None:
    message = r"\(3, 12\), means and log-stds .* or a pair \(mean, log_std\) .*, got \(3, 6\)"
    with pytest.raises(ConfigError, match=message):
        built(Net(FORMS["tuple"], width=6), actions=MOVES)


def test_shared_parameters_are_no_actor_and_critic() -> None:
    actor, critic = Net(lambda p, v, s: p), Net(lambda p, v, s: v)
    critic.first = actor.first
    with pytest.raises(ConfigError, match="share parameters: give one network"):
        built((actor, critic))


class Forgetful(nn.Module):
    """A GRU over one step, which SB3's users would write."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(5, 8), nn.Linear(8, 5)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.core(observations[None])[0][0]
        outputs = self.head(hidden)
        return outputs[:, :4], outputs[:, 4]


def test_recurrent_layers_without_a_state_are_told_once() -> None:
    with pytest.warns(
        UserWarning, match=r"GRU core begins anew .* write initial_state\(n\)"
    ) as told:
        built(Forgetful())
    assert len(told) == 1


def test_heads_of_zero_and_saturated_layers_are_no_fault() -> None:
    net = Net(FORMS["tuple"])
    for layer in (net.second, net.score):
        nn.init.zeros_(layer.weight)
    built(net)
    built(Uses(lambda hidden: (1e9 * hidden.square() + 9).tanh()))  # 1 everywhere


def test_the_look_leaves_everything_as_it_was() -> None:
    norm = nn.BatchNorm1d(5)
    net = nn.Sequential(norm, nn.Dropout(), Uses(torch.tanh))
    weights = [p.clone() for p in net.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    own = build_network(
        VECTORS, action_head(CHOICES), NetworkConfig(), net, action_space=CHOICES, device=CPU
    )
    assert torch.equal(torch.rand(1), expected)
    assert all(map(torch.equal, net.parameters(), weights))
    assert not norm.running_mean.any()  # type: ignore[union-attr, operator]
    assert norm.num_batches_tracked == 0
    assert own.modal


def test_modes() -> None:
    net = built(nn.Sequential(nn.Dropout(), Uses(torch.tanh)))
    plain = built(Net(FORMS["tuple"]))
    assert net.modal
    assert not plain.modal
    rows = torch.randn(9, 5)
    with mode(net, training=True), mode(plain, training=True):
        assert not torch.equal(net(rows)[0], net(rows)[0])
        assert plain.training  # a look cannot tell for certain that it makes no difference
        with mode(net, training=False):
            assert torch.equal(net(rows)[0], net(rows)[0])
        assert net.training
    assert not net.training


def test_built_in_networks_keep_the_contract() -> None:
    for shared in (True, False):
        head = action_head(MOVES)
        net = build_network(VECTORS, head, NetworkConfig(shared=shared), device=CPU)
        assert isinstance(net, ActorCritic)
        assert (net.shared, net.own, net.modal, net.auxiliary) == (shared, False, False, ())
        policy, value = net(torch.randn(3, 5))
        assert (policy.shape, value.shape) == ((3, 12), (3,))
        assert len(as_outputs(policy)) == 1


class Ours(SharedActorCritic):
    """One of one's own that is built on a built-in one."""

    def __init__(self, space: Space = VECTORS, actions: Space = CHOICES) -> None:
        super().__init__(space, action_head(actions), NetworkConfig())


class OursForgetful(Ours):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 4)


def test_a_network_on_a_built_in_one_is_one_of_ones_own() -> None:
    head, config = action_head(CHOICES), NetworkConfig()
    actor = type("Mine", (Actor,), {})(VECTORS, head, config)
    mine: dict[str, Any] = {
        "module": Ours(),
        "class": Ours,
        "function": lambda space, actions: Ours(space, actions),
        "actor": SeparateActorCritic(actor, Critic(VECTORS, config)),
    }
    assert {name: built(network).own for name, network in mine.items()} == dict.fromkeys(mine, True)
    assert not built(SharedActorCritic(VECTORS, head, config)).own
    ours = SeparateActorCritic(Actor(VECTORS, head, config), Critic(VECTORS, config))
    assert not built(ours).own
    with pytest.warns(MemoryWarning, match="LSTM memory begins anew at every step"):
        built(OursForgetful())


def test_the_configuration_holds_the_name() -> None:
    config = Config(env="none", algo="a2c")
    own = with_network(config, Net)
    assert own.network.custom == "tests.policies.test_contract:Net"
    assert own.network.shared
    assert not with_network(config, (Net, Net)).network.shared
    for part in (NetworkConfig(shared=True), NetworkConfig(shared=False)):
        known = build_network(VECTORS, action_head(CHOICES), part)
        assert with_network(config, known).network.shared == part.shared
    assert with_network(config, None) is config
    with pytest.raises(ConfigError, match=r"the network is tests.*:Net: give it by network="):
        build_network(VECTORS, action_head(CHOICES), own.network)
    trpo = Config(env="none", algo="trpo", network=NetworkConfig(shared=False))
    with pytest.raises(ConfigError, match=r"needs a critic of its own: network=\(Actor, Critic\)"):
        with_network(trpo, Net)
