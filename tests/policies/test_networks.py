"""Networks: shapes of the paper, inputs as environments give them, initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from acktr.config import NetworkConfig
from acktr.policies.build import build_network
from acktr.policies.distributions import action_head
from acktr.policies.networks import Actor, Critic, Features, SharedActorCritic, Tanh, strided_trunk

ATARI = spaces.Box(0, 255, (4, 84, 84), np.uint8)


def network(
    observations: gymnasium.Space, actions: gymnasium.Space | None = None, **settings: Any
) -> Any:
    torch.manual_seed(0)
    head = action_head(actions or spaces.Discrete(6))
    return build_network(observations, head, NetworkConfig(**settings))


def test_atari_network_is_the_papers() -> None:
    net = network(ATARI, shared=True)
    assert isinstance(net, SharedActorCritic)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}
    assert list(shapes.values()) == [
        (32, 4, 8, 8),
        (64, 32, 4, 4),
        (32, 64, 3, 3),
        (512, 32 * 7 * 7),
        (6, 512),
        (1, 512),
    ]
    logits, values = net(torch.zeros(2, 4, 84, 84, dtype=torch.uint8))
    assert logits.shape == (2, 6)
    assert values.shape == (2,)


def test_weights_are_orthogonal_with_the_stated_gains() -> None:
    net = network(spaces.Box(-1, 1, (5,)), shared=False, hidden=(16,), policy_gain=0.01)
    first = net.actor.trunk[1].weight
    torch.testing.assert_close(first.mT @ first, 2 * torch.eye(5), atol=1e-5, rtol=0)
    head = net.actor.head.linear.weight
    torch.testing.assert_close(head @ head.mT, 1e-4 * torch.eye(6), atol=1e-8, rtol=0)
    value = net.critic.head.weight
    torch.testing.assert_close(value @ value.mT, torch.eye(1))
    assert all(not p.any() for n, p in net.named_parameters() if n.endswith("bias"))


def test_tanh_is_tanh() -> None:
    ends = torch.tensor([-torch.inf, torch.inf])
    small = torch.linspace(-1e-3, 1e-3, 10_001)
    inputs = torch.cat([torch.linspace(-30, 30, 100_001), small, ends])
    difference = (Tanh()(inputs) - inputs.tanh()).abs().max()
    assert 0 < difference <= 2e-7
    assert Tanh()(torch.full((10_000,), torch.nan)).isnan().all()
    few = inputs[:100]
    assert torch.equal(Tanh()(few), few.tanh())
    narrow = small.bfloat16()
    assert torch.equal(Tanh()(narrow), narrow.tanh())


def test_tanh_has_the_derivatives_of_tanh() -> None:
    inputs = torch.linspace(-30, 30, 100_001, dtype=torch.float64, requires_grad=True)

    def derivatives(activation: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        value = activation(inputs)
        (slope,) = torch.autograd.grad(value.sum(), inputs, create_graph=True)
        return value, slope, *torch.autograd.grad(slope.sum(), inputs)

    torch.testing.assert_close(derivatives(Tanh()), derivatives(torch.tanh), rtol=0, atol=4e-15)


def test_images_channels_last_give_what_channels_first_give() -> None:
    image = torch.randint(0, 255, (2, 40, 48, 3), dtype=torch.uint8)
    last = Features(spaces.Box(0, 255, (40, 48, 3), np.uint8))
    first = Features(spaces.Box(0, 255, (3, 40, 48), np.uint8))
    assert last.shape == first.shape == (3, 40, 48)
    torch.testing.assert_close(last(image), first(image.permute(0, 3, 1, 2)))
    torch.testing.assert_close(last(image), image.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize("shape", [(10, 10, 3), (1, 16, 16), (3, 36, 50)])
def test_small_images_have_a_network(shape: tuple[int, ...]) -> None:
    space = spaces.Box(0, 255, shape, np.uint8)
    logits, _ = network(space)(torch.from_numpy(np.stack([space.sample()] * 2)))
    assert logits.shape == (2, 6)


def test_strided_trunk_is_that_of_the_authors_for_pixels() -> None:
    """42 -> 21 -> 11 places, 3873 inputs of the dense layer with the bias's; ELU for the critic."""
    space = spaces.Box(0, 255, (42, 42, 6), np.uint8)
    config = NetworkConfig(
        shared=False, trunk="strided", activation="relu", critic_activation="elu"
    )
    actor = Actor(space, action_head(spaces.Box(-1, 1, (2,))), config)
    critic = Critic(space, config)
    for network, kind in ((actor, nn.ReLU), (critic, nn.ELU)):
        layers = list(network.trunk)[1:]
        assert [type(each) for each in layers] == [
            *(nn.Conv2d, kind, nn.Conv2d, kind, nn.Flatten, nn.Linear, kind),
        ]
        weights = [tuple(each.weight.shape) for each in layers if hasattr(each, "weight")]
        assert weights == [(32, 6, 3, 3), (32, 32, 3, 3), (256, 3872)]
    odd = strided_trunk((6, 43, 30), "relu")
    assert odd(torch.zeros(1, 6, 43, 30)).shape == (1, 256)
    shape = (torch.zeros(2, 42, 42, 6, dtype=torch.uint8),)
    assert critic(*shape).shape == (2,)


def test_discrete_observations_are_one_hot() -> None:
    features = Features(spaces.Discrete(3, start=2))
    expected = torch.tensor([[0.0, 0, 1], [1, 0, 0]])
    torch.testing.assert_close(features(torch.tensor([4, 2])), expected)


def test_gaussian_head_has_a_free_log_std() -> None:
    net = network(spaces.Box(-1, 1, (5,)), spaces.Box(-1, 1, (2,)), shared=False, log_std_init=-0.5)
    parameters, _ = net(torch.randn(3, 5))
    assert parameters.shape == (3, 4)
    torch.testing.assert_close(parameters[:, 2:], torch.full((3, 2), -0.5))
    assert net.actor.head.log_std.shape == (2,)


def test_actor_and_critic_share_nothing() -> None:
    net = network(spaces.Box(-1, 1, (5,)), shared=False, critic_activation="elu")
    net(torch.randn(3, 5))[1].sum().backward()
    assert all(p.grad is None for p in net.actor.parameters())
    assert any(isinstance(layer, nn.ELU) for layer in net.critic.trunk)
    assert not any(isinstance(layer, nn.ELU) for layer in net.actor.trunk)


def test_heads_stay_in_full_precision_under_autocast() -> None:
    net = network(ATARI, shared=True)
    frames = torch.randint(0, 255, (4, 4, 84, 84), dtype=torch.uint8)
    exact, exact_values = net(frames)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, values = net(frames)
    assert logits.dtype == values.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=3e-4, rtol=0)
    torch.testing.assert_close(values, exact_values, atol=3e-2, rtol=0)
