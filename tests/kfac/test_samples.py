"""Layers that do not see the samples first, see several of them in a row, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    Preconditioner,
    Sampled,
    SumLoss,
)
from acktr.kfac.blocks.kronecker import Corrected, KroneckerBlock
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.losses.sources import Source
from tests.tools.exact import Seen, close, observed, stored, within_four_standard_errors
from tests.tools.kfac import basis, plain_config, randn, seeded
from tests.tools.product_cases import filled

SIZES = torch.tensor([2, 1, 4, 3])
"""Points of each set."""


class TimeFirst(nn.Module):
    """Layers that see (T, N, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x.transpose(0, 1))))
        mixed = hidden + hidden.roll(1, 0) * hidden
        output: Tensor = self.out(mixed.mean(0))
        return output


class Strided(nn.Module):
    """Layers that see windows (2 N, T, D) of every second position, window by window."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.RMSNorm(4)
        self.mlp, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = torch.cat([x[:, ::2], x[:, 1::2]])
        hidden = self.first(windows)
        hidden = hidden + torch.tanh(self.mlp(self.norm(hidden))) * hidden.mean(1, keepdim=True)
        output: Tensor = self.out(sum(hidden.chunk(2)).mean(1))  # type: ignore[union-attr]
        return output


class Frames(nn.Module):
    """Convolutions of the pictures of a sample, (3 N, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(x.flatten(0, 1))))
        pooled = hidden.reshape(len(x), -1, *hidden.shape[1:]).mean((1, 3, 4))
        output: Tensor = self.out(pooled)
        return output


class Sets(nn.Module):
    """Points of all sets in one dimension, of which one has the most."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm = nn.Linear(3, 5), nn.LayerNorm(5)
        self.kind, self.out = nn.Embedding(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        points, kinds = x[0], torch.arange(len(x[0])) % 4
        owner = torch.arange(len(SIZES)).repeat_interleave(SIZES)[
            torch.randperm(10, generator=seeded(4))
        ]
        hidden = torch.tanh(self.norm(self.point(points) + self.kind(kinds)))
        output: Tensor = self.out(hidden.new_zeros(len(SIZES), 5).index_add(0, owner, hidden))
        return output


class Halves(nn.Module):
    """One encoder called for two halves of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.out = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def encode(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(torch.tanh(self.norm(self.first(x))))
        return output

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.encode(x[: len(x) // 2]), self.encode(x[len(x) // 2 :])])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "time first": (TimeFirst, (4, 5, 3)),
    "time first, as many times as samples": (TimeFirst, (4, 4, 3)),
    "windows": (Strided, (3, 6, 3)),
    "frames": (Frames, (3, 3, 2, 4, 3)),
    "sets": (Sets, (1, 10, 3)),
    "halves": (Halves, (6, 3)),
}


def scales_and_moments(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """EKFAC's scales and the moments of vectors, each beside the truth."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, block in seen.curvature.stats.items():
        if isinstance(block, VectorBlock):
            found[name] = stored(block), seen.truth(name)
        elif isinstance(block, KroneckerBlock) and isinstance(block.inverse, Corrected):
            a, q_a, _, q_g = basis(block)
            q = torch.kron(q_g.contiguous(), torch.eye(len(a)).to(a) if q_a is None else q_a)
            right = (q.mT @ seen.truth(name) @ q).diagonal()
            found[name] = block.inverse.scales.mean().flatten(), right
    return found


def ekfac(name: str, source: Source) -> Seen:
    make, shape = NETS[name]
    seen = observed(
        filled(make()), randn(*shape), CategoricalLoss(), structure="ekfac", stat_decay=0.0
    )
    seen.curvature.refresh()
    seen.again(source)
    return seen


@pytest.mark.parametrize("name", NETS)
def test_rows_find_their_samples(name: str) -> None:
    for found, right in scales_and_moments(ekfac(name, Exact())).values():
        close(found, right)


@pytest.mark.parametrize("name", ["time first", "windows", "frames"])
def test_sampled_rows_find_their_samples(name: str) -> None:
    """As many as samples cannot be seen without the two backward passes of the exact source."""
    seen = ekfac(name, Sampled())
    draws = []
    for _ in range(60):
        seen.again(Sampled(8))
        draws.append(sampled_means(seen))
    for layer, (_, right) in scales_and_moments(seen).items():
        mine = f"{layer} scales" if f"{layer} scales" in draws[0] else layer
        found = torch.stack([draw[mine].flatten() for draw in draws])
        within_four_standard_errors(found, right.flatten())


@pytest.mark.parametrize("name", ["time first", "windows"])
def test_sums_over_positions_find_their_samples(name: str) -> None:
    """Of "reduce": G is the block of the bias, sum_t g."""
    make, shape = NETS[name]
    seen = observed(filled(make()), randn(*shape), CategoricalLoss(), linear_sharing="reduce")
    for layer in seen.curvature.stats:
        if isinstance(seen.block(layer), KroneckerBlock):
            rows = seen.truth(layer)
            width = rows.shape[0] // seen.layer(layer).g.value.shape[0]
            last = torch.arange(width - 1, len(rows), width)
            close(seen.layer(layer).g.mean(), rows[last][:, last])
    mean = seen.inputs.mean(1)
    ones = torch.cat([mean, torch.ones_like(mean[:, :1])], 1)
    close(seen.layer("first").a.mean(), ones.mT @ ones / len(ones))


def test_pictures_of_one_sample_cannot_be_reduced() -> None:
    make, shape = NETS["frames"]
    with pytest.raises(ValueError, match=r"'conv'.*needs: use \"expand\""):
        observed(filled(make()), randn(*shape), CategoricalLoss(), conv_sharing="reduce")


# --- samples that meet ----------------------------------------------------------------------------


class Places(nn.Module):
    """Positions are embedded and normalised for all samples at once, or for each."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.place, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(3).expand(len(x), 3) if self.apart else torch.arange(3)
        hidden = torch.tanh(self.first(x) + self.norm(self.place(places)))
        output: Tensor = self.head(hidden + (hidden @ hidden.mT).softmax(-1) @ hidden)
        return output


class Queries(nn.Module):
    """Learnt queries go through a layer without the batch."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart
        self.register_buffer("given", torch.zeros(2, 3))
        self.query, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.key, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        given = self.given.expand(len(x), 2, 3) if self.apart else self.given
        queries, keys = self.norm(self.query(given)), torch.tanh(self.key(x))
        output: Tensor = self.out(((queries @ keys.mT).softmax(-1) @ keys).mean(1))
        return output


def batch_norm(_apart: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


def unnormalised(_apart: bool) -> nn.Module:
    """Statistics of the batch in eval mode as well."""
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 3)).eval()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("make", "shape", "layer"),
    [
        (Places, (5, 3, 3), "place"),
        (Queries, (5, 3, 3), "query"),
        (Queries, (2, 3, 3), "query"),
        (batch_norm, (5, 3), "0"),
        (unnormalised, (5, 3), "0"),
    ],
)
def test_what_takes_samples_apart_is_refused_where_they_meet(
    make: Any, shape: tuple[int, ...], layer: str, exact: bool
) -> None:
    model, inputs = filled(make(False)), randn(*shape)
    output = model(inputs)
    source = Exact() if exact else Empirical(torch.zeros(output.shape[:-1], dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"'{layer}'.*samples meet.*Sampled\(\) is right"):
        observed(model, inputs, CategoricalLoss(), source)


@pytest.mark.parametrize("make", [Places, Queries])
def test_sampled_targets_are_right_on_average_where_samples_meet(make: Any) -> None:
    inputs, loss = randn(5, 3, 3), CategoricalLoss()
    settings: dict[str, Any] = {"structure": "ekfac", "stat_decay": 0.0}
    right = observed(filled(make(True)), inputs, loss, **settings)
    right.curvature.refresh()
    right.again()
    found = observed(filled(make(False)), inputs, loss, Sampled(), **settings)
    found.curvature.load_state_dict(right.curvature.state_dict())
    draws = []
    for _ in range(80):
        found.again(Sampled(15))
        draws.append(sampled_means(found))
    for name, exact in sampled_means(right).items():
        within_four_standard_errors(torch.stack([draw[name] for draw in draws]), exact)
    for name, block in right.curvature.stats.items():
        if isinstance(block, KroneckerBlock):
            close(found.layer(name).a.mean(), block.a.mean(), 1e-6)


def sampled_means(seen: Seen) -> dict[str, Tensor]:
    """What sampled targets decide on: moments of vectors, G, and EKFAC's scales."""
    means: dict[str, Tensor] = {}
    for name, block in seen.curvature.stats.items():
        if isinstance(block, VectorBlock):
            means[name] = stored(block)
        elif isinstance(block, KroneckerBlock) and isinstance(block.inverse, Corrected):
            means[name], means[f"{name} scales"] = block.g.mean(), block.inverse.scales.mean()
    return means


def test_outputs_of_two_lengths_are_not_taken_apart() -> None:
    curvature = Preconditioner(filled(nn.Sequential(nn.Linear(3, 3))))
    with curvature.capture() as captured:
        output = curvature.module(randn(4, 3))
    loss = SumLoss(parts=(GaussianLoss(), GaussianLoss()))
    with pytest.raises(ValueError, match=r"lengths \[2, 4\]"):
        curvature.observe(captured, (output, output[:2]), loss, source=Exact())


def test_masked_selections_have_terms_as_samples() -> None:
    """Positions that nothing mixes are taken apart by Exact(), also after output[mask]."""
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    inputs, mask = randn(4, 3, 3), torch.rand(4, 3, generator=seeded(1)) < 0.6
    curvature = Preconditioner(model, plain_config(stat_decay=0.0))
    with curvature.capture() as captured:
        output = model(inputs)[mask]
    curvature.observe(captured, output, CategoricalLoss(), source=Exact())
    right = observed(model, inputs[mask], CategoricalLoss())
    close(curvature.stats["1"].moment.mean(), right.vector("1").moment.mean())  # type: ignore[union-attr]
    close(curvature.stats["2"].g.mean(), right.layer("2").g.mean())  # type: ignore[union-attr]


@pytest.mark.parametrize("inside", [True, False])
def test_an_own_likelihood_is_a_mean_over_the_modules_samples(inside: bool) -> None:
    """A module that returns flattened rows has as many samples as rows."""
    layers = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
    model = filled(nn.Sequential(*layers, *([nn.Flatten(0, 1)] if inside else [])))
    curvature = Preconditioner(model, plain_config(stat_decay=0.0))
    numbers = randn(4 * 5, 2, seed=3)
    with curvature.capture() as captured:
        output = model(randn(4, 5, 3)).reshape(20, 2)
    curvature.update_curvature(captured, (numbers * output).sum(), samples=None if inside else 20)
    close(curvature.stats["2"].g.mean(), numbers.mT @ numbers / 20)  # type: ignore[union-attr]


class Pixels(nn.Module):
    """A map of values, and its features, which no objective has."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = torch.tanh(self.features(x))
        return {"values": self.head(features.movedim(1, -1)), "features": features}


@pytest.mark.parametrize("picture", [False, True])
def test_a_sum_over_positions_asks_once_what_the_objective_is_a_mean_over(picture: bool) -> None:
    layers = nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)
    model = filled(Pixels() if picture else nn.Sequential(*layers))
    inputs = randn(4, 2, 2, 3) if picture else randn(4, 6, 2)
    curvature = Preconditioner(model, plain_config(stat_decay=0.0))

    def seen(samples: int | None) -> Tensor:
        with curvature.capture() as captured:
            output = model(inputs)
            output = output["values"] if picture else output
        curvature.update_curvature(captured, output.flatten(0, -2).square().sum(), samples=samples)
        return curvature.stats["head" if picture else "2"].g.mean()  # type: ignore[union-attr]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = seen(24)
    with pytest.warns(UserWarning, match="all positions.* give samples=24"):
        close(seen(None), 6 * right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen(None)


def test_a_value_for_every_sample_is_a_sum_over_samples() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)))
    curvature = Preconditioner(model, plain_config(stat_decay=0.0))
    with curvature.capture() as captured, warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(randn(4, 3))
        curvature.update_curvature(captured, (randn(4, seed=2) * output).sum())
    right = randn(4, seed=2).square().mean()
    close(curvature.stats["0"].g.mean(), right[None, None])  # type: ignore[union-attr]
