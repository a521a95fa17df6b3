"""The look at networks of one's own: what it refuses, and what it says of training mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._decomp.decompositions_for_jvp  # seconds, that Adam and forward differentiation
import torch._dynamo  # would take in the case that is their first
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from acktr import A2C, ACKTR, TRPO, A2CUpdate, ACKTRUpdate, TRPOUpdate
from acktr.config import ConfigError, NetworkConfig
from acktr.policies import action_head, build_network
from tests.policies.test_contract import Uses

VECTORS, CHOICES = spaces.Box(-np.inf, np.inf, (5,), np.float32), spaces.Discrete(4)
Change = Callable[[Tensor], Tensor]


def same(values: Tensor) -> Tensor:
    return values


def built(network: nn.Module, space: spaces.Space[Any] = VECTORS) -> Any:
    head, cpu = action_head(CHOICES), torch.device("cpu")
    given: dict[str, Any] = {"action_space": CHOICES, "device": cpu}
    return build_network(space, head, NetworkConfig(), network, **given)


def refused(network: nn.Module, message: str, space: spaces.Space[Any] = VECTORS) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        built(network, space)
    assert "\n" not in str(caught.value)


class Steps(nn.Module):
    """A recurrent network; what a test changes of it is a function."""

    def __init__(
        self, zero: bool, *, shown: Change = same, hidden: Change = same, policy: Change = same
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.GRUCell(5, 8), nn.Linear(8, 5)
        self.changes = shown, hidden, policy
        if zero:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def initial_state(self, n: int) -> Tensor:
        return torch.zeros(n, 8)

    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        shown, hidden, policy = self.changes
        states = []
        for now, start in zip(shown(observations), starts, strict=True):
            state = self.cell(now, state.masked_fill(start[:, None], 0.0))
            states.append(state)
        outputs = self.head(hidden(torch.stack(states)))
        return (policy(outputs[..., :4]), outputs[..., 4]), state


class Lasting(Steps):
    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        return super().forward(observations, state, torch.zeros_like(starts))


class OutputsInPlace(Steps):
    """What it forgets in place is the output of the step before."""

    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        states = []
        for now, start in zip(observations, starts, strict=True):
            state[start] = 0.0
            state = self.cell(now, state)
            states.append(state)
        outputs = self.head(torch.stack(states))
        return (outputs[..., :4], outputs[..., 4]), state


class FirstStarts(Steps):
    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        later = torch.zeros_like(starts[1:])
        return super().forward(observations, state, torch.cat([starts[:1], later]))


class StartsInPlace(Steps):
    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        starts[0] |= False
        return super().forward(observations, state, starts)


SEQUENCES: dict[str, tuple[Callable[[bool], nn.Module], str]] = {
    "mixes environments": (
        lambda zero: Steps(zero, shown=lambda x: x - x.mean(1, keepdim=True)),
        "environment 0 depends on the other environments of the batch: .* take each sequence",
    ),
    "first environment": (
        lambda zero: Steps(zero, hidden=lambda h: h[:, :1].expand_as(h)),
        "environment 1 depends on the other environments",
    ),
    "detached": (lambda zero: Steps(zero, policy=Tensor.detach), "policy has no gradient: forw"),
    "infinite": (lambda zero: Steps(zero, policy=lambda p: p / 0), "outputs are not finite"),
    "ignores": (lambda zero: Steps(zero, shown=torch.zeros_like), "same for different observat"),
    "future": (lambda zero: Steps(zero, hidden=lambda h: h.flip(0)), "not those of its steps one"),
    "lasting": (Lasting, "does not forget its state where starts is true"),
    "outputs in place": (OutputsInPlace, "others where a sequence goes on with a new episode"),
    "first starts": (FirstStarts, "must forget at every step where starts is true, and change no"),
    "observations in place": (
        lambda zero: Steps(zero, shown=lambda x: x.mul_(0.5)),
        r"forward\(\) changes its observations in place, which rollouts record: compute new",
    ),
    "starts in place": (StartsInPlace, r"forward\(\) changes its starts in place"),
    "random": (
        lambda zero: Steps(zero, hidden=functional.dropout),
        "for the same observations differ from call to call in evaluation mode",
    ),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_recurrent_networks_are_looked_at_as_others_are(kind: str, zero: bool) -> None:
    """Also where heads begin at zero, so that no output tells anything at first."""
    make, message = SEQUENCES[kind]
    refused(make(zero), message)


@pytest.mark.parametrize("zero", [False, True])
def test_recurrent_networks_that_fit_are_taken(zero: bool) -> None:
    assert not built(Steps(zero)).modal
    parts = spaces.Dict(a=VECTORS, b=spaces.Discrete(3))

    class Both(Steps):
        def forward(self, observations: Any, state: Tensor, starts: Tensor) -> Any:
            rest = observations["b"].float()[..., None]
            return super().forward(observations["a"] + rest, state, starts)

    built(Both(zero), parts)


class Forgetting(Steps):
    """It forgets in place, which the state that rollouts record is not to show."""

    def forward(self, observations: Tensor, state: Tensor, starts: Tensor) -> Any:
        state[starts[0]] = 0.0
        state *= (~starts[0]).float()[:, None]
        return super().forward(observations, state, starts)


def test_states_may_be_forgotten_in_place() -> None:
    state, starts = (torch.ones(3, 8),), torch.tensor([True, False, True])
    networks = built(Steps(False)), built(Forgetting(False))
    (one, (after,)), (other, (again,)) = (n.step(torch.ones(3, 5), state, starts) for n in networks)
    assert torch.equal(one[0], other[0]) and torch.equal(after, again)
    assert torch.equal(state[0], torch.ones(3, 8))


@pytest.mark.parametrize("recurrent", [False, True])
def test_the_dict_of_a_call_is_the_networks_own(recurrent: bool) -> None:
    parts = spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Box(-1, 1, (3,)))

    def joined(shown: Any) -> Tensor:
        shown["more"] = torch.ones(1)
        return torch.cat([shown.pop("a"), shown.pop("b")], -1)

    class Popping(Steps):
        def forward(self, observations: Any, state: Tensor, starts: Tensor) -> Any:
            return super().forward(joined(observations), state, starts)

    class Rows(Uses):
        def forward(self, observations: Any) -> Any:
            return super().forward(joined(observations))

    built(Popping(False) if recurrent else Rows(torch.tanh), parts)


COPIED: dict[str, spaces.Space[Any]] = {
    "pictures": spaces.Box(0, 255, (1, 8, 8), np.uint8),
    "integers": spaces.Box(-9, 9, (5,), np.int64),
    "float64": spaces.Box(-9, 9, (5,), np.float64),
}


@pytest.mark.parametrize("kind", COPIED)
def test_copies_may_be_changed_in_place(kind: str) -> None:
    class Shifting(Uses):
        def forward(self, rows: Tensor) -> Any:
            rows -= 0.5
            return super().forward(rows.flatten(1)[:, :5])

    network = built(Shifting(torch.tanh), COPIED[kind])
    if kind != "pictures":  # and where a normaliser has made them float32
        rows = torch.ones(3, 5)
        network(rows)
        assert torch.equal(rows, torch.ones(3, 5))


IN_PLACE: dict[str, Change] = {
    "other numbers": lambda x: x.mul_(0.5),
    "the same numbers": lambda x: x.clamp_(-1e6, 1e6),
    "a part": lambda x: x[:, :2].zero_(),
    "a module": nn.ReLU(inplace=True).forward,
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_observations_stay_as_they_are(kind: str) -> None:
    class Changing(Uses):
        def forward(self, observations: Any) -> Any:
            shown = observations["a"] if isinstance(observations, dict) else observations
            IN_PLACE[kind](shown)
            return super().forward(shown)

    message = r"forward\(\) changes its observations in place, which rollouts record"
    refused(Changing(torch.tanh), message)
    refused(Changing(torch.tanh), message, spaces.Dict(a=VECTORS, b=spaces.Discrete(3)))
    actor, critic = Changing(torch.tanh), nn.Linear(5, 1)
    actor.forward = lambda x: Changing.forward(actor, x)[0]  # type: ignore[method-assign]
    rows, numbers = torch.ones(8, 5), torch.zeros(8)
    updates: list[Any] = [kind((actor, critic), CHOICES) for kind in (A2CUpdate, TRPOUpdate)]
    updates.append(ACKTRUpdate(Changing(torch.tanh), CHOICES))
    for update in updates:
        with pytest.raises(ConfigError, match=message):
            update(rows, numbers.long(), numbers, numbers)
    assert torch.equal(rows, torch.ones(8, 5))  # of which the caller has one copy only


def test_outputs_are_a_function_of_the_observations() -> None:
    message = r"differ from call to call in evaluation mode: .* training=self\.training\)"
    refused(Uses(lambda h: functional.dropout(h.tanh())), message)
    refused(Uses(lambda h: h + 0.1 * torch.randn_like(h)), message)
    noise = torch.randn(5)  # a noisy layer that draws it now and then
    built(Uses(lambda h: h + noise))


class Counting(nn.Module):
    """A buffer that training mode alone changes, and no output shows."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.in_place = in_place

    def forward(self, rows: Tensor) -> Tensor:
        if self.training and self.in_place:
            self.seen += 1
        elif self.training:
            self.seen = self.seen + 1
        return rows


MODAL: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(),
    "rare dropout": lambda: nn.Dropout(1e-6),
    "batch normalisation": lambda: nn.BatchNorm1d(5),
    "instance normalisation": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    ),
    "spectral norm": lambda: spectral_norm(nn.Linear(5, 5)),
    "counting in place": lambda: Counting(True),
    "counting anew": lambda: Counting(False),
}
ALIKE: dict[str, Callable[[], nn.Module]] = {
    "no dropout": lambda: nn.Dropout(0.0),
    "weight norm": lambda: weight_norm(nn.Linear(5, 5)),
    "layer norm": lambda: nn.LayerNorm(5),
}


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("kind", [*MODAL, *ALIKE])
def test_whether_modes_differ_is_found_under_heads_of_zero(kind: str, recurrent: bool) -> None:
    layer = (MODAL | ALIKE)[kind]()
    network: nn.Module
    if recurrent:
        network = Steps(True, shown=lambda x: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        network.layer = layer
    else:
        head = Uses(torch.tanh)
        nn.init.zeros_(head.layer.weight)
        nn.init.zeros_(head.layer.bias)
        network = nn.Sequential(layer, head)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    buffers = list(network.buffers())
    assert built(network).modal == (kind in MODAL)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(one is other for one, other in zip(network.buffers(), buffers, strict=True))
    assert not network.training


class Watched(nn.Module):
    """It notes its modes, which make no difference to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.modes = nn.Linear(4, width), set[tuple[bool, bool]]()

    def forward(self, rows: Tensor) -> Tensor:
        self.modes.add((self.training, torch.is_grad_enabled()))
        found: Tensor = self.layer(rows)
        return found


@pytest.mark.parametrize("algo", [ACKTR, A2C, TRPO])
def test_losses_are_in_training_mode_whatever_the_look_says(algo: Any) -> None:
    actor, critic = Watched(2), Watched(1)
    agent = algo("CartPole-v1", network=(actor, critic), seed=0, num_envs=2, num_steps=8)
    assert not agent.trainer.network.modal
    actor.modes.clear()
    critic.modes.clear()
    agent.learn(16)
    policy_losses = {(True, True)} if algo is not TRPO else {(False, True)}  # a ratio is no loss
    assert actor.modes == {(False, False), *policy_losses}
    assert critic.modes == {(False, False), (True, True)}
    agent.close()


def test_statistics_are_those_of_the_batches() -> None:
    """Where they once stayed: under heads of zero, of which no output shows the normalisation."""
    norm, head = nn.BatchNorm1d(5), Uses(torch.tanh)
    nn.init.zeros_(head.layer.weight)
    draw = torch.Generator().manual_seed(0)
    rows, actions = torch.randn(64, 5, generator=draw) + 3, torch.zeros(64, dtype=torch.long)
    A2CUpdate(nn.Sequential(norm, head), CHOICES)(rows, actions, rows[:, 0], rows[:, 1])
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * rows.var(0))


def test_the_norm_of_a_spectral_norm_stays_one() -> None:
    torch.manual_seed(0)
    layer, head = spectral_norm(nn.Linear(5, 16)), nn.Linear(16, 5)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, head

        def forward(self, rows: Tensor) -> Any:
            found = self.head(self.layer(rows).tanh())
            return found[:, :4], found[:, 4]

    update, draw = ACKTRUpdate(Normed(), CHOICES), torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randn(64, 5, generator=draw)
        update(rows, (rows[:, 0] > 0).long(), rows[:, 1], 9 * rows[:, 2].square())
    largest = float(torch.linalg.matrix_norm(layer.weight.detach(), 2))
    assert largest == pytest.approx(1, abs=0.01)
