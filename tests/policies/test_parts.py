"""Networks and normalisers of observations with parts, large numbers of states, and sizes."""

from __future__ import annotations

import dataclasses
import resource
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces.utils import flatten
from torch import nn

from acktr import tree
from acktr.config import Config, ConfigError, NetworkConfig, SampledKFACConfig
from acktr.envs import batched, parts, picture
from acktr.policies import (
    ChannelsWarning,
    Given,
    ObservationNormalizer,
    PartNormalizer,
    build_network,
    observation_normalizer,
    prepared,
    require_size,
    stored_pictures,
)
from acktr.policies.distributions import action_head
from acktr.policies.networks import Features

HEAD = action_head(spaces.Discrete(3))
CPU = torch.device("cpu")
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
PICTURE = spaces.Box(0, 255, (12, 10, 3), np.uint8)
NUMBERS = spaces.Dict(
    {
        "a": spaces.Discrete(3, start=-1),
        "b": spaces.MultiBinary(4),
        "c": spaces.Tuple((spaces.MultiDiscrete([2, 3], start=[1, -4]), VECTOR)),
        "d": spaces.Box(0, 9, (2, 2), np.int64),
    }
)
ROBOT = spaces.Dict({"camera": PICTURE, "arm": VECTOR, "mode": spaces.Discrete(2)})


def network(space: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_network(space, HEAD, NetworkConfig(**settings))


def samples(space: Any, count: int) -> list[Any]:
    space.seed(0)
    return [space.sample() for _ in range(count)]


def tensors(space: Any, observations: list[Any]) -> Any:
    """Samples as one batch of tensors."""
    each = [prepared(space, batched(space, one)[0], None, CPU) for one in observations]
    return tree.concatenate(each)


@pytest.mark.parametrize("shared", [True, False])
def test_numbers_are_flattened_as_gymnasium_flattens_them(shared: bool) -> None:
    seen = samples(NUMBERS, 5)
    flat = np.stack([flatten(NUMBERS, one) for one in seen])
    plain = network(spaces.Box(-np.inf, np.inf, flat.shape[1:]), shared=shared)
    joined = network(NUMBERS, shared=shared)
    assert plain.state_dict().keys() == joined.state_dict().keys()
    expected = plain(torch.from_numpy(flat.astype(np.float32)))
    for one, other in zip(joined(tensors(NUMBERS, seen)), expected, strict=True):
        assert torch.equal(one, other)


def test_a_picture_goes_through_its_own_layers_and_all_through_those_above() -> None:
    net = network(ROBOT, hidden=(16,))
    below, first = net.trunk[0], net.trunk[1]
    assert [type(part.picture).__name__ for part in below.features] == [
        "NoneType",
        "Picture",
        "NoneType",
    ]
    assert below.layers[1][0].in_channels == 3
    assert (first.in_features, first.out_features) == (3 + 256 + 2, 16)
    data = tensors(ROBOT, samples(ROBOT, 4))
    logits, values = net(data)
    assert logits.shape == (4, 3) and values.shape == (4,)
    seen = below(data)
    torch.testing.assert_close(seen[:, :3], data["arm"])
    image = (data["camera"].permute(0, 3, 1, 2) / 255).contiguous()
    torch.testing.assert_close(seen[:, 3:259], below.layers[1](image))
    (logits.sum() + values.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_part_alone_has_the_network_of_its_space() -> None:
    for space in (PICTURE, VECTOR):
        seen = samples(space, 3)
        alone, plain = network(spaces.Tuple((space,))), network(space)
        expected = plain(tensors(space, seen))
        found = alone(tensors(spaces.Tuple((space,)), [(one,) for one in seen]))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        (spaces.Box(0, 1, (9, 8, 2), np.float32), lambda x: x.transpose(0, 3, 1, 2)),
        (spaces.Box(-3, 5, (2, 9, 8), np.float32), lambda x: (x + 3) / 8),
        (spaces.Box(0, 1, (8, 8, 12), np.uint8), lambda x: x.transpose(0, 3, 1, 2)),
        (spaces.Box(0, 255, (20, 18), np.uint8), lambda x: x[:, None] / 255),
        (spaces.Box(0, 4, (9, 9, 3), np.int64), lambda x: x.transpose(0, 3, 1, 2) / 4),
    ],
)
def test_pictures_are_scaled_and_ordered(space: Any, expected: Any) -> None:
    raw = np.stack(samples(space, 2))
    before = raw.copy()
    features = Features(space)
    found = features(torch.from_numpy(raw))
    np.testing.assert_allclose(found.numpy(), expected(raw.astype(np.float64)), rtol=1e-6)
    assert features.shape == found.shape[1:]
    np.testing.assert_array_equal(raw, before)  # the environment's own numbers stay
    assert network(space)(torch.from_numpy(raw))[0].shape == (2, 3)


def test_ambiguous_channels_are_said_aloud_once() -> None:
    cube = spaces.Box(0, 255, (8, 8, 8), np.uint8)
    for space, name in ((cube, "the observation is"), (spaces.Dict({"x": cube}), "part 'x'")):
        with pytest.warns(ChannelsWarning, match="set network.channels to 'last'") as told:
            network(space, shared=False)
        assert len(told) == 1 and name in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(cube, channels="last")
        network(spaces.Box(0, 1, (8, 8, 12), np.uint8))
    flat = network(cube, channels="none")
    assert flat.trunk[1].in_features == 512


def test_stacked_pictures_are_said_to_be_learned_as_a_vector() -> None:
    stack = spaces.Box(0, 255, (2, 9, 9, 1), np.uint8)
    for space, name in ((stack, "observation \\(2,"), (spaces.Dict({"x": stack}), "part 'x' ")):
        with pytest.warns(ChannelsWarning, match=f"{name}.* join stacked frames in the channels"):
            network(space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(stack, channels="none")
        network(spaces.Box(0, 1, (2, 9, 9, 1), np.float32))


def test_many_states_have_an_embedding() -> None:
    net = network(spaces.Discrete(100_000, start=5), shared=True)
    assert isinstance(net.trunk[1], nn.Embedding)
    logits, _ = net(torch.tensor([5, 100_004]))
    assert logits.shape == (2, 3)
    norms = net.trunk[1].weight.detach().norm(dim=1)
    assert abs(float(norms.mean()) - 2**0.5) < 0.01  # as the columns of an orthogonal layer
    assert network(spaces.Discrete(2048), shared=True).trunk[1].in_features == 2048


def config(**settings: Any) -> Config:
    return Config(env="none", **settings)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (128, 64, 4), np.float32), "32,768 inputs.* takes 4 GiB"),
        (spaces.MultiDiscrete([40_000, 40_000]), "80,000 inputs"),
        (spaces.Box(-np.inf, np.inf, (30_000_000,), np.float32), "weights would take"),
        (spaces.Discrete(100_000_000), "weights would take"),
    ],
)
def test_absurd_sizes_are_one_line_before_memory_is_taken(space: Any, message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=message) as caught:
        require_size(space, HEAD, config(), 8)
    assert "\n" not in str(caught.value) and "wrapper" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_sizes_that_can_be_meant_pass() -> None:
    for space in (
        spaces.Box(0, 1, (128, 64, 4), np.float32),
        spaces.Discrete(100_000),
        spaces.Box(0, 255, (4, 84, 84), np.uint8),
        spaces.Box(0, 255, (3, 480, 640), np.uint8),
        spaces.Box(-np.inf, np.inf, (4000,), np.float32),
    ):
        require_size(space, HEAD, config(), 8)
    for shape, hint in (((2, 84, 84, 3), r"\), or join stacked"), ((42_336,), r"\)$")):
        with pytest.raises(ConfigError, match=f"wrappers.ResizeObservation{hint}"):
            require_size(spaces.Box(0, 255, shape, np.uint8), HEAD, config(), 8)
    wide = spaces.Box(-np.inf, np.inf, (20_000,), np.float32)
    require_size(wide, HEAD, config(algo="a2c"), 8)  # without K-FAC there is no factor
    acktr = dataclasses.replace(config().acktr, actor=SampledKFACConfig(max_factor_size=2048))
    require_size(wide, HEAD, config(acktr=acktr), 8)
    with pytest.raises(ConfigError, match="observations of 1,000,000,000 samples would take"):
        require_size(wide, HEAD, config(algo="a2c", num_steps=125_000_000), 8)


def test_vectors_are_normalised_and_nothing_else() -> None:
    space = spaces.Dict(
        {
            "camera": PICTURE,
            "mask": spaces.Box(0, 1, (4,), np.int8),
            "mode": spaces.Discrete(2),
            "ticks": spaces.Box(0, 9, (2,), np.int64),
            "x": VECTOR,
        }
    )
    found = observation_normalizer(space, config(normalize_observation=True))
    assert isinstance(found, PartNormalizer) and set(found.parts) == {"ticks", "x"}
    rng = np.random.default_rng(0)
    data = {
        name: rng.integers(0, 2, (50, *(part.shape or ()))).astype(part.dtype)
        for name, part in parts(space).items()
    }
    found.update(data)
    scaled = found(data)
    assert list(scaled) == list(data)
    for name in data:
        if name in found.parts:
            alone = ObservationNormalizer(data[name].shape[1:])
            alone.update(data[name])
            np.testing.assert_array_equal(scaled[name], alone(data[name]))
        else:
            assert scaled[name] is data[name]
    again = observation_normalizer(space, config(normalize_observation=True))
    assert again is not None
    again.load_state_dict(found.state_dict())
    np.testing.assert_array_equal(again(data)["x"], scaled["x"])
    with pytest.raises(ValueError, match="other parts"):
        PartNormalizer({"x": (3,)}).load_state_dict(found.state_dict())


def test_parts_to_normalise_can_be_named() -> None:
    def made(space: Any, *names: str) -> Any:
        settings = config(normalize_observation=True, normalize_parts=names)
        return observation_normalizer(space, settings)

    assert set(made(NUMBERS, "d").parts) == {"d"}
    assert made(NUMBERS) is None
    with pytest.raises(ConfigError, match=r"'camera' is no vector .*\(arm, camera, mode\)"):
        made(ROBOT, "arm", "camera")
    with pytest.raises(ConfigError, match="Dict and Tuple observations only"):
        made(VECTOR, "x")
    assert observation_normalizer(ROBOT, config()) is None
    found = observation_normalizer(VECTOR, config(normalize_observation=True))
    assert isinstance(found, ObservationNormalizer)


def test_a_module_of_the_users_takes_pictures_and_numbers() -> None:
    wide = spaces.Dict(
        {"x": spaces.Box(0, 9, (2,), np.int64), "y": spaces.Tuple((PICTURE, spaces.Discrete(3)))}
    )
    data = tensors(wide, samples(wide, 3))
    found = Given(wide)(data, torch.float64)
    assert found["x"].dtype == torch.float64
    assert isinstance(found["y"], tuple)
    torch.testing.assert_close(found["y"][0], data["y/0"].permute(0, 3, 1, 2) / 255)
    again = Given(wide)({**data, "y/0": found["y"][0]}, torch.float64)
    assert again["y"][0] is found["y"][0]  # what acting has converted stays
    assert found["y"][1] is data["y/1"]
    plain = torch.zeros(2, 3)
    assert Given(VECTOR)(plain, torch.float32) is plain


def test_networks_say_which_pictures_they_take_converted() -> None:
    assert stored_pictures(nn.Linear(2, 2)) == {}
    assert stored_pictures(network(ROBOT)) == {"camera": picture(PICTURE)}
    assert list(stored_pictures(network(PICTURE))) == [""]
    assert stored_pictures(network(spaces.Box(0, 1, (9, 9, 3), np.float32))) == {}


@pytest.mark.parametrize(
    ("shape", "convolutions", "inputs"),
    [
        ((4, 84, 84), [32, 64, 32], 1568),
        ((3, 96, 96), [32, 64, 32], 2048),
        ((3, 7, 7), [16, 32], 1568),
        ((1, 8, 8), [16, 32], 2048),
    ],
)
def test_pictures_of_usual_size_have_no_further_layers(
    shape: tuple[int, ...], convolutions: list[int], inputs: int
) -> None:
    trunk = network(spaces.Box(0, 255, shape, np.uint8)).trunk
    assert [m.out_channels for m in trunk if isinstance(m, nn.Conv2d)] == convolutions
    assert [m.in_features for m in trunk if isinstance(m, nn.Linear)] == [inputs]


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 35, 300), (3, 210, 160), (2, 9, 9)])
def test_other_pictures_become_small_before_the_dense_layer(shape: tuple[int, ...]) -> None:
    """K-FAC decomposes a factor of as many rows as the dense layer has inputs."""
    space = spaces.Box(0, 255, shape, np.uint8)
    first, *_ = [m for m in network(space).trunk if isinstance(m, nn.Linear)]
    assert first.in_features <= 2048
    assert network(space)(torch.zeros(2, *shape, dtype=torch.uint8))[0].shape == (2, 3)
