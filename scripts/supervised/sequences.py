"""Compare torch's recurrent and attention modules with the same cells made of linear layers.

K-FAC (and Adam) trains small sequence models on two tasks made from a seed: to recall the first of
up to 20 tokens behind a mask, and to name the bracket that must close next. Every model of one cell
starts from the same weights. Every run has a file, which a later command reads; a CSV of all runs
that were asked for and a table are written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, CategoricalLoss, KFACConfig, UnsupportedParameterWarning
from acktr.report.tables import as_csv
from scripts import campaign
from scripts.campaign import Part, Rows, Tell
from scripts.common import (
    check_folder,
    command_line,
    given_once,
    integer,
    parsed,
    run,
    save,
)

WIDTH = 32
BATCH = 64
LENGTH = 20
SYMBOLS = 8
NOISE = 8
TEST = 2000
EVERY = 50
TASKS = ("memory", "brackets")
CELLS = ("gru", "lstm", "attention")
FIELDS = ("task", "cell", "made_of", "seed", "update", "accuracy", "cpu_ms")
_PADDING = 0


@dataclass(frozen=True)
class Batch:
    """Token sequences and what is asked of them."""

    tokens: Tensor
    """int64, (N, T), 0 behind the end of a sequence."""
    lengths: Tensor
    """int64, (N,)."""
    targets: Tensor
    """int64: (N,), one for each sequence, or (N, T)."""


def memory(count: int, generator: torch.Generator) -> Batch:
    """One of 8 symbols, then noise from 8 others: recall the symbol at the end of 10 to 20."""
    first = torch.randint(SYMBOLS, (count,), generator=generator)
    tokens = torch.randint(NOISE, (count, LENGTH), generator=generator) + 1 + SYMBOLS
    tokens[:, 0] = first + 1
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count,), generator=generator)
    tokens[torch.arange(LENGTH) >= lengths[:, None]] = _PADDING
    return Batch(tokens, lengths, first)


def brackets(count: int, generator: torch.Generator) -> Batch:
    """Two kinds of brackets, at most three deep: which one must close next, or none, everywhere."""
    tokens = torch.zeros(count, LENGTH, dtype=torch.int64)
    targets = torch.zeros_like(tokens)
    chances = torch.rand(count, LENGTH, 2, generator=generator).tolist()
    for row in range(count):
        open_ones: list[int] = []
        for place, (close, kind) in enumerate(chances[row]):
            if open_ones and (len(open_ones) == 3 or close < 0.5):
                tokens[row, place] = 3 + open_ones.pop()
            else:
                open_ones.append(int(kind < 0.5))
                tokens[row, place] = 1 + open_ones[-1]
            targets[row, place] = 1 + open_ones[-1] if open_ones else 0
    return Batch(tokens, torch.full((count,), LENGTH), targets)


MAKERS: dict[str, Callable[[int, torch.Generator], Batch]] = {
    "memory": memory,
    "brackets": brackets,
}
SIZES = {"memory": (1 + SYMBOLS + NOISE, SYMBOLS), "brackets": (5, 3)}
"""Tokens and classes."""


# --- cells ----------------------------------------------------------------------------------------


class LinearGRU(nn.Module):
    """nn.GRU (one layer, batch first) made of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, T, width), and the last one."""
        state, states = inputs.new_zeros(len(inputs), WIDTH), []
        for x in inputs.unbind(1):
            (xr, xz, xn), (hr, hz, hn) = self.x(x).chunk(3, -1), self.h(state).chunk(3, -1)
            update = (xz + hz).sigmoid()
            new = (xn + (xr + hr).sigmoid() * hn).tanh()
            state = (1 - update) * new + update * state
            states.append(state)
        return torch.stack(states, 1), state


class LinearLSTM(nn.Module):
    """nn.LSTM (one layer, batch first) made of two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, T, width), and the last one."""
        state = cell = inputs.new_zeros(len(inputs), WIDTH)
        states = []
        for x in inputs.unbind(1):
            i, f, g, o = (self.x(x) + self.h(state)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            states.append(state)
        return torch.stack(states, 1), state


class LinearAttention(nn.Module):
    """nn.MultiheadAttention with four heads (batch first) made of four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, need_weights: bool
    ) -> tuple[Tensor, None]:
        """The attended values (N, T, width)."""
        q, k, v = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=~attn_mask)
        return self.out(found.transpose(1, 2).flatten(2)), None


_KINDS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "gru": (nn.GRU, LinearGRU),
    "lstm": (nn.LSTM, LinearLSTM),
    "attention": (nn.MultiheadAttention, LinearAttention),
}


def unknown(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that does the same by a forward pass of its own, which K-FAC cannot know."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return kind.forward(self, *args, **kwargs)

    return type(f"Unknown{kind.__name__}", (kind,), {"forward": forward})


def make_cell(cell: str, made_of: str) -> nn.Module:
    """A cell of torch's module, of an unknown subclass, or of linear layers; all start alike."""
    known, linear = _KINDS[cell]
    sizes = (WIDTH, 4) if cell == "attention" else (WIDTH, WIDTH)
    original = known(*sizes, batch_first=True)
    if isinstance(original, nn.LSTM):  # gates of forgetting that begin open, as is usual
        with torch.no_grad():
            original.get_parameter("bias_ih_l0")[WIDTH : 2 * WIDTH] = 1
    if made_of == "module":
        return original
    if made_of == "unknown":
        other = unknown(known)(*sizes, batch_first=True)
        other.load_state_dict(original.state_dict())
        return other
    made, weights = linear(), list(original.state_dict().values())
    if cell == "attention":  # in_proj (3 d, d) and its bias, then the output's
        parts = zip(weights[0].chunk(3), weights[1].chunk(3), strict=True)
        pairs = [*parts, (weights[2], weights[3])]
    else:  # W_ih, W_hh, b_ih, b_hh
        pairs = [(weights[0], weights[2]), (weights[1], weights[3])]
    with torch.no_grad():
        for layer, (weight, bias) in zip(made.children(), pairs, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return made


class Model(nn.Module):
    """Embedding, cell and logits at the last token of a sequence, or at all of them."""

    def __init__(self, task: str, cell: str, made_of: str) -> None:
        super().__init__()
        tokens, classes = SIZES[task]
        self.everywhere = task == "brackets"
        self.table = nn.Embedding(tokens, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH) if cell == "attention" else None
        self.norm = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        self.cell = make_cell(cell, made_of)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (N, classes) or (N, T, classes)."""
        states = self.table(tokens)
        if self.place is None:
            states = self.cell(states)[0]
        else:
            x = states + self.place(torch.arange(LENGTH).expand(len(tokens), -1))
            later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
            states = x + self.cell(x, x, x, attn_mask=later, need_weights=False)[0]
        if not self.everywhere:
            states = states[torch.arange(len(tokens)), lengths - 1]
        states = states + self.hidden(self.norm(states)).relu()
        logits: Tensor = self.head(states)
        return logits


# --- training -------------------------------------------------------------------------------------

ROWS: dict[str, tuple[str, str]] = {
    "linear": ("linear", "diagonal"),
    "module": ("module", "diagonal"),
    "unknown, diagonal": ("unknown", "diagonal"),
    "unknown, gradient": ("unknown", "gradient"),
    "linear, Adam": ("linear", "adam"),
    "module, Adam": ("module", "adam"),
}
"""What a cell is made of, and the curvature of parameters outside of layers, or Adam."""
KFAC_CONFIG = KFACConfig()
ADAM_LR = 0.003


@dataclass(frozen=True)
class Spec:
    """One run."""

    task: str
    cell: str
    row: str
    seed: int
    updates: int


def train(spec: Spec, tell: Tell = lambda much: None) -> Rows:
    """Train one model: updates, accuracy on sequences that it has not seen and CPU ms per update.

    It is measured every 50 updates and at the end.
    """
    torch.manual_seed(spec.seed)
    made_of, curvature = ROWS[spec.row]
    model = Model(spec.task, spec.cell, made_of)
    make = MAKERS[spec.task]
    test = make(TEST, torch.Generator().manual_seed(10**6))
    step = _adam(model) if curvature == "adam" else _kfac(model, curvature, spec.seed)
    generator, spent, rows = torch.Generator().manual_seed(spec.seed), 0.0, []
    for update in range(1, spec.updates + 1):
        batch = make(BATCH, generator)
        started = time.process_time()
        step(batch)
        spent += time.process_time() - started
        if update % EVERY == 0 or update == spec.updates:
            with torch.no_grad():
                right = model(test.tokens, test.lengths).argmax(-1) == test.targets
            rows.append([update, float(right.double().mean()), 1000 * spent / update])
        tell(update)
    return rows


def _adam(model: Model) -> Callable[[Batch], None]:
    optimizer, loss = torch.optim.Adam(model.parameters(), lr=ADAM_LR), CategoricalLoss()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(batch.tokens, batch.lengths), batch.targets))
        optimizer.step()

    return step


def _kfac(model: Model, curvature: str, seed: int) -> Callable[[Batch], None]:
    small: Any = curvature
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsupportedParameterWarning)  # the rows with gradients
        optimizer = KFAC(model, replace(KFAC_CONFIG, small_parameters=small), seed=seed)
    loss = CategoricalLoss()

    def step(batch: Batch) -> None:
        with optimizer.capture() as captured:
            output = model(batch.tokens, batch.lengths)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        torch.autograd.backward(loss(output, batch.targets))
        optimizer.step()

    return step


# --- results --------------------------------------------------------------------------------------


def table(lines: Sequence[Mapping[str, str]]) -> str:
    """Accuracy of every model by updates, mean and worst seed, and CPU time."""
    marks = sorted({int(line["update"]) for line in lines})
    shown = sorted({marks[(len(marks) - 1) // 2], marks[-1]})
    head = "".join(f" {mark} updates: mean (least) |" for mark in shown)
    rule = "|---|---|---|" + "---:|" * (len(shown) + 1)
    text = [f"| task | cell | made of |{head} CPU ms per update |", rule]
    for task, cell, row in itertools.product(TASKS, CELLS, ROWS):
        key = (task, cell, row)
        mine = [line for line in lines if (line["task"], line["cell"], line["made_of"]) == key]
        columns = []
        for mark in shown:
            values = [float(line["accuracy"]) for line in mine if int(line["update"]) == mark]
            columns.append(f"{mean(values):.3f} ({min(values):.3f})" if values else "")
        costs = [float(line["cpu_ms"]) for line in mine if int(line["update"]) == shown[-1]]
        if costs:
            text.append("| " + " | ".join((*key, *columns, f"{min(costs):.1f}")) + " |")
    return "\n".join(text) + "\n"


def _part(spec: Spec, out: Path) -> Part:
    def make(tell: Tell) -> tuple[Rows, str]:
        rows = train(spec, tell)
        return rows, f"accuracy {rows[-1][1]:.3f}"

    kfac = {"kfac": asdict(KFAC_CONFIG)} if ROWS[spec.row][1] != "adam" else {"lr": ADAM_LR}
    sizes = {"width": WIDTH, "batch": BATCH, "test": TEST, "every": EVERY}
    return Part(
        label=f"{spec.task} {spec.cell} {spec.row} seed {spec.seed}",
        path=out / "runs" / spec.task / spec.cell / spec.row / f"seed{spec.seed}.csv",
        identity=json.dumps({**asdict(spec), **sizes, **kfac}),
        columns=FIELDS[4:],
        size=spec.updates,
        make=make,
    )


def _lines(spec: Spec, rows: Rows) -> list[dict[str, str]]:
    """The rows of a run as they are in the CSV of all."""
    place = (spec.task, spec.cell, spec.row, str(spec.seed))
    cells = [(f"{update:.0f}", f"{right:.4f}", f"{cost:.2f}") for update, right, cost in rows]
    return [dict(zip(FIELDS, (*place, *found), strict=True)) for found in cells]


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.supervised.sequences", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME")
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="NAME")
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="NAME")
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2], metavar="SEED")
    add("--updates", type=integer(1), default=300)
    asked = parsed(parser, argv)
    given_once(asked, "tasks", "cells", "rows", "seeds")
    check_folder(asked.out)
    torch.set_num_threads(1)
    keys = itertools.product(asked.tasks, asked.cells, asked.rows, asked.seeds)
    specs = [Spec(*key, asked.updates) for key in keys]
    found = campaign.run("supervised.sequences", [_part(spec, asked.out) for spec in specs])
    lines = [line for pair in zip(specs, found, strict=True) for line in _lines(*pair)]
    whole = as_csv(FIELDS, [list(line.values()) for line in lines])
    text = f"`{command_line('supervised.sequences', argv)}`\n\n{table(lines)}"
    save(asked.out, {"runs.csv": whole, "summary.md": text.encode()})
    sys.stdout.write(text)
    return 0


def main(argv: Sequence[str]) -> int:
    """Run a command line and return the exit code: 0, 2 bad input, 130 Ctrl-C, 75 SIGTERM."""
    note = "finished runs are kept, the same command continues"
    return run("supervised.sequences", lambda _: _compare(argv), note)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
