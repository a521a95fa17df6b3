"""The KL that steps really cost over the KL that the trust region promised, on seven networks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, CategoricalLoss, GaussianLoss, KFACConfig, SumLoss
from acktr.report.figures import picture
from acktr.report.tables import as_csv, markdown
from scripts.common import command_line, integer, machine, parsed, run, save
from scripts.race.problems import make

_SHORT = replace(KFACConfig.for_rl(), small_parameters="diagonal", quadratic="corrected")
SETTINGS = {
    "default": KFACConfig(),
    "short steps": _SHORT,
    "short steps, kronecker": replace(_SHORT, quadratic="kronecker"),
}
"""Those of supervised learning; those of ACKTR with a region that is measured, and without."""
_FIELDS = ("network", "settings", "step", "loss", "scale", "measured", "promised", "spent")
_HEADINGS = (
    "network",
    "settings",
    "steps that bind",
    "5 %",
    "median",
    "95 %",
    "in [0.5, 2]",
    "measured",
)
_VERSIONS = ("python", "torch", "platform", "torch_threads", "git_commit")


class Row(NamedTuple):
    """One step."""

    network: str
    settings: str
    step: int
    loss: float
    scale: float
    measured: bool
    promised: float
    spent: float


class GraphAttention(nn.Module):
    """Two rounds of masked attention over the nodes, their mean, and two heads."""

    def __init__(self, size: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.embed = heads, nn.Linear(6, size)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.policy, self.value = nn.Linear(size, 5), nn.Linear(size, 1)

    def forward(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and value of graphs (N, V, 6) with edges (N, V, V)."""
        x = self.embed(nodes)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            parts = (t.unflatten(-1, (self.heads, -1)).mT.mT for t in qkv(x).chunk(3, -1))
            q, k, v = (t.transpose(1, 2) for t in parts)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=edges[:, None])
            x = x + functional.elu(out(mixed.transpose(1, 2).flatten(2)))
        pooled = x.mean(1)
        return self.policy(pooled), self.value(pooled)


class ActorCritic(nn.Module):
    """A trunk and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 4), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and value."""
        hidden = self.trunk(x)
        return self.policy(hidden), self.value(hidden)


Batch = tuple[tuple[Tensor, ...], Any]
Problem = tuple[nn.Module, Any, Callable[[], Batch]]


def _mlp() -> Problem:
    teacher = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 10))
    hidden = (nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())

    def batch() -> Batch:
        x = torch.randn(128, 20)
        return (x,), teacher(x).argmax(-1)

    return nn.Sequential(*hidden, nn.Linear(64, 10)), CategoricalLoss(), batch


def _conv() -> Problem:
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(392, 10)
    )
    first = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
    head = (nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))

    def batch() -> Batch:
        x = torch.randn(64, 3, 16, 16)
        return (x,), teacher(x).argmax(-1)

    return nn.Sequential(*first, *second, *head), CategoricalLoss(), batch


def _graph() -> Problem:
    def batch() -> Batch:
        nodes, edges = torch.randn(64, 12, 6), torch.rand(64, 12, 12) < 0.4
        kind = nodes[..., :5].mean(1).argmax(-1)
        value = nodes.square().sum((1, 2))[:, None] / 10
        return (nodes, edges | torch.eye(12, dtype=torch.bool)), (kind, value)

    return GraphAttention(), SumLoss(parts=(CategoricalLoss(), GaussianLoss())), batch


def _transformer() -> Problem:
    layers = (nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True) for _ in range(2))
    model = nn.Sequential(nn.Embedding(20, 32), *layers, nn.Linear(32, 20))

    def batch() -> Batch:
        x = torch.randint(20, (32, 16))
        return (x,), (x + x[:, :1]) % 20

    return model, CategoricalLoss(), batch


def _actor_critic() -> Problem:
    def batch() -> Batch:
        x = torch.randn(256, 8)
        return (x,), (x[:, :4].argmax(-1), x.square().sum(1, keepdim=True))

    return ActorCritic(), SumLoss(parts=(CategoricalLoss(), GaussianLoss())), batch


def _raced(name: str) -> Problem:
    """A problem of scripts.race with its built-in data."""
    problem = make(name, None)
    stream = problem.stream(0)

    def batch() -> Batch:
        x, y = next(stream)
        return (x,), y

    return problem.network(), problem.loss, batch


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "MLP": _mlp,
    "conv net, BatchNorm": _conv,
    "graph attention, pooled": _graph,
    "transformer, dropout": _transformer,
    "actor-critic, two heads": _actor_critic,
    "conv net, pictures": partial(_raced, "convnet"),
    "transformer, characters": partial(_raced, "transformer"),
}


def steps(network: str, settings: str, count: int) -> list[Row]:
    """Train one network, and measure every step."""
    torch.manual_seed(0)
    model, loss, batch = PROBLEMS[network]()
    optimizer = KFAC(model, SETTINGS[settings])
    rows = []
    for step in range(count):
        inputs, targets = batch()
        measured = optimizer.curvature.measuring
        with optimizer.capture() as captured:
            output = model(*inputs)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        objective = loss(output, targets)
        objective.backward()
        optimizer.step(outputs=lambda inputs=inputs: model(*inputs))  # type: ignore[misc]
        info = optimizer.last_step
        assert info is not None
        assert info.spent_kl is not None
        numbers = (
            float(info.scale),
            measured,
            float(info.predicted_kl),
            float(info.spent_kl.sum()),
        )
        rows.append(Row(network, settings, step, float(objective.detach()), *numbers))
    return rows


def ratios(rows: Sequence[Row]) -> Tensor:
    """Spent over promised in the steps that the trust region shortened."""
    return torch.tensor([row.spent / row.promised for row in rows if row.scale < 1])


def _summary(rows: Sequence[Row]) -> tuple[str, ...]:
    found = ratios(rows)
    low, middle, high = torch.quantile(found, torch.tensor([0.05, 0.5, 0.95])).tolist()
    inside = float(((found >= 0.5) & (found <= 2)).float().mean())
    numbers = (f"{low:.2g}", f"{middle:.2g}", f"{high:.2g}", f"{100 * inside:.0f} %")
    counts = f"{len(found)}/{len(rows)}", str(sum(row.measured for row in rows))
    return rows[0].network, rows[0].settings, counts[0], *numbers, counts[1]


def _draw(groups: Sequence[list[Row]]) -> bytes:
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(2, 4, sharey=True, sharex=True).flatten()
    for axis, network in zip(axes, PROBLEMS, strict=False):
        for rows in (group for group in groups if group[0].network == network):
            shown = [row for row in rows if row.scale < 1]
            values = [row.spent / row.promised for row in shown]
            axis.plot([row.step for row in shown], values, ".", ms=3, label=rows[0].settings)
        axis.axhspan(0.5, 2, color="0.9", zorder=0)
        axis.set_yscale("log")
        axis.set_title(network, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("real KL / promised KL")
    axes[4].set_ylabel("real KL / promised KL")
    axes[5].set_xlabel("step")
    axes[-1].set_axis_off()
    return picture(figure, "png")


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "no results were written; the same command starts anew"
    return run("trust_region", lambda _: _study(argv), note)


def _study(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.trust_region", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="results folder")
    parser.add_argument("--steps", type=integer(1, 100_000), default=200)
    asked = parsed(parser, argv)
    torch.set_num_threads(1)
    groups = [steps(network, s, asked.steps) for network in PROBLEMS for s in SETTINGS]
    made_on = machine()
    lines = [
        "# Real KL over promised KL",
        "",
        f"Command: `{command_line('trust_region', argv)}`",
        "",
        markdown(_HEADINGS, map(_summary, groups)),
        f"Default: KFACConfig(), kl_clip {KFACConfig().kl_clip:g}. Short steps: ACKTR's numbers,"
        " kl_clip 0.001, with q corrected or by the Kronecker factors alone. New batches at every"
        " step, seed 0, float32. Only steps that the trust region shortens count."
        " Measured: steps with an exact form.",
        "",
        ", ".join(f"{name} {made_on[name]}" for name in _VERSIONS if name in made_on),
        "",
    ]
    rows = [row for group in groups for row in group]
    files = {
        "figure.png": _draw(groups),
        "table.csv": as_csv(_FIELDS, rows),
        "table.md": "\n".join(lines).encode(),
    }
    save(asked.out, files)
    print(f"{asked.out}: {', '.join(files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
