"""Networks, and what they compute once more with every layer as rows times a matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from acktr.kfac import BernoulliLoss, CategoricalLoss, GaussianLoss, OutputLoss, SumLoss
from tests.tools.kfac import randn, seeded
from tests.tools.rows import Hessian, Reference, Taps, bernoulli, gaussian, softmax

Named = Mapping[str, Tensor]


def one_hot(tokens: Tensor, count: int) -> Tensor:
    return nn.functional.one_hot(tokens, count).double()


class Upsampling(nn.Module):
    """A transposed convolution of two groups, slopes, and a term for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2)
        self.slopes = nn.PReLU(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.slopes(self.up(x)).mT)
        return output


def upsampling(p: Named, x: Tensor, tap: Taps) -> tuple[Tensor, ...]:
    """Tap k of output y sees pixel (y + 1 - k) / 2; the taps of a row are mirrored."""
    rows = torch.zeros(len(x), 5, 4, 3, dtype=x.dtype)
    for y in range(5):
        for k in range(3):
            pixel, odd = divmod(y + 1 - k, 2)
            if not odd and 0 <= pixel < 3:
                rows[:, y, :, 2 - k] = x[:, :, pixel]
    parts = []
    for g, channels in enumerate((slice(0, 2), slice(2, 4))):
        weight = p["up.weight"][channels].transpose(0, 1).flip(-1).flatten(1)
        bias = p["up.bias"][3 * g : 3 * g + 3]
        parts.append(tap("up", rows[:, :, channels].flatten(2), weight, bias, g))
    hidden = torch.cat(parts, -1)
    hidden = hidden.clamp(min=0) + p["slopes.weight"] * hidden.clamp(max=0)
    return (tap("head", hidden, p["head.weight"], p["head.bias"]),)


class BothWays(nn.Module):
    """A bidirectional nn.GRU behind a temperature, and RMSNorm, with a term for every time."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))
        self.cells = nn.GRU(3, 2, batch_first=True, bidirectional=True)
        self.norm = nn.RMSNorm(4, eps=1e-3)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.cells(x * self.temperature.exp())[0]))
        return output


def both_ways(p: Named, x: Tensor, tap: Taps) -> tuple[Tensor, ...]:
    x = x * p["temperature"].exp()
    ways = []
    for way, times in (("l0", [0, 1, 2]), ("l0_reverse", [2, 1, 0])):
        h, seen = x.new_zeros(len(x), 1, 2), {}
        for t in times:
            given = [(f"ih_{way}", x[:, t : t + 1]), (f"hh_{way}", h)]
            (r, z, n), (hr, hz, hn) = (
                tap(f"cells.{k}", rows, p[f"cells.weight_{k}"], p[f"cells.bias_{k}"]).chunk(3, -1)
                for k, rows in given
            )
            z = (z + hz).sigmoid()
            h = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h
            seen[t] = h
        ways.append(torch.cat([seen[t] for t in range(3)], 1))
    hidden = torch.cat(ways, -1)
    hidden = hidden * (hidden.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * p["norm.weight"]
    return (tap("head", hidden, p["head.weight"]),)


class Reading(nn.Module):
    """Learnt queries that attend to words of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 6)
        self.queries = nn.Parameter(torch.zeros(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        words, queries = self.words(tokens), self.queries.expand(len(tokens), 2, 4)
        output: Tensor = self.head(self.attention(queries, words, words)[0].flatten(1))
        return output


def reading(p: Named, tokens: Tensor, tap: Taps) -> tuple[Tensor, ...]:
    words = tap("words", one_hot(tokens, 5), p["words.weight"].mT)
    maps = []
    for name, rows, bias in zip(
        "qkv",
        (p["queries"].expand(len(tokens), 2, 4), words, words),
        p["attention.in_proj_bias"].chunk(3),
        strict=True,
    ):
        key = f"attention.{name}_proj"
        maps.append((tap(key, rows, p[f"{key}_weight"]) + bias).unflatten(-1, (2, 2)))
    q, k, v = (m.transpose(1, 2) for m in maps)
    hidden = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    out = [p[f"attention.out_proj.{kind}"] for kind in ("weight", "bias")]
    hidden = tap("attention.out_proj", hidden, *out).flatten(1)[:, None]
    return (tap("head", hidden, p["head.weight"], p["head.bias"])[:, 0],)


class Speaking(nn.Module):
    """An nn.RNN between an embedding and a head with the same table, and a term for every word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.cells = nn.RNN(3, 3, batch_first=True)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(self.words(tokens))[0])
        return output


def speaking(p: Named, tokens: Tensor, tap: Taps) -> tuple[Tensor, ...]:
    words = tap("words", one_hot(tokens, 5), p["words.weight"].mT)
    h, seen = words.new_zeros(len(words), 1, 3), []
    for t in range(tokens.shape[1]):
        pairs = (("ih_l0", words[:, t : t + 1]), ("hh_l0", h))
        sums = [
            tap(f"cells.{key}", rows, p[f"cells.weight_{key}"], p[f"cells.bias_{key}"])
            for key, rows in pairs
        ]
        h = (sums[0] + sums[1]).tanh()
        seen.append(h)
    return (tap("words", torch.cat(seen, 1), p["words.weight"], part=1) + p["head.bias"],)


class Mine(nn.Linear):
    """A subclass that keeps the forward pass."""


class Judging(nn.Module):
    """A layer at two depths, GroupNorm, a bilinear map that no block knows, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.pair = Mine(4, 4), nn.GroupNorm(2, 4), nn.Bilinear(4, 3, 4)
        self.policy, self.value = nn.Linear(4, 3), Mine(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.body(self.body(x).tanh()))
        hidden = self.pair(hidden, hidden[:, :3].sin()).tanh()
        return self.policy(hidden), self.value(hidden)


def judging(p: Named, x: Tensor, tap: Taps) -> tuple[Tensor, ...]:
    body = p["body.weight"], p["body.bias"]
    hidden = tap("body", tap("body", x[:, None], *body).tanh(), *body)[:, 0].reshape(-1, 2, 2)
    centred = hidden - hidden.mean(-1, keepdim=True)
    hidden = (centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(1)
    hidden = hidden * p["norm.weight"] + p["norm.bias"]
    paired = torch.einsum("ni,oij,nj->no", hidden, p["pair.weight"], hidden[:, :3].sin())
    hidden = (paired + p["pair.bias"]).tanh()[:, None]
    heads = (
        tap(name, hidden, p[f"{name}.weight"], p[f"{name}.bias"]) for name in ("policy", "value")
    )
    return tuple(head[:, 0] for head in heads)


@dataclass(frozen=True)
class Written:
    """A network with its reference, a batch, a loss, and the Fisher of its outputs."""

    make: Callable[[], nn.Module]
    reference: Reference
    inputs: Tensor
    loss: OutputLoss[Any]
    hessians: tuple[Hessian, ...]
    target: Any
    weights: tuple[float, ...] = (1.0,)
    parts: Mapping[str, int] = field(default_factory=dict)
    """Number of matrices in a weight, where it is not one."""


def draw(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=seeded(3))


WRITTEN: dict[str, Written] = {
    "transposed": Written(
        Upsampling,
        upsampling,
        randn(3, 4, 3),
        BernoulliLoss(),
        (bernoulli,),
        draw(2, 3, 5, 2).double(),
        parts={"up": 2},
    ),
    "recurrent": Written(
        BothWays,
        both_ways,
        randn(3, 3, 3),
        GaussianLoss(std=0.6),
        (gaussian(0.6),),
        randn(3, 3, 2, seed=1),
    ),
    "attention": Written(
        Reading, reading, draw(5, 4, 3), CategoricalLoss(), (softmax,), draw(3, 4)
    ),
    "tied": Written(
        Speaking, speaking, draw(5, 3, 3), CategoricalLoss(), (softmax,), draw(5, 3, 3)
    ),
    "two heads": Written(
        Judging,
        judging,
        randn(4, 4),
        SumLoss(CategoricalLoss(), GaussianLoss(std=2.0), weights=(1.0, 0.5)),
        (softmax, gaussian(2.0)),
        (draw(3, 4), randn(4, 1, seed=1)),
        weights=(1.0, 0.5),
    ),
}
