"""Memory: layers whose state goes from step to step, over sequences in which episodes begin.

Sequences are time-major: inputs are (T, N, ...), and starts (T, N) say which steps are the first of
an episode. A state is a tuple of tensors (N, ...), that before the first step. Where an episode
begins, the state of the episode before it is forgotten.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from acktr.config import NetworkConfig

State = tuple[Tensor, ...]
"""Tensors (N, ...), one row for each environment."""


class Recurrent(nn.Module):
    """An LSTM or a GRU whose state is zero at the first step of an episode.

    Hidden-to-hidden weights are orthogonal, biases zero, but for the gates that say how much is
    kept, the LSTM's forget gates (Jozefowicz et al. 2015) and the GRU's update gates: they begin at
    1, so that after k steps 0.73^k of a state is left, and not 0.5^k.

    Args:
        kind: lstm or gru.
        inputs: Numbers that a step gets.
        width: Numbers that it gives.
    """

    def __init__(self, kind: Literal["lstm", "gru"], inputs: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.core: nn.LSTM | nn.GRU = (nn.LSTM if kind == "lstm" else nn.GRU)(inputs, width)
        named = dict(self.core.named_parameters())
        with torch.no_grad():
            for gate in named["weight_hh_l0"].view(-1, width, width):
                nn.init.orthogonal_(gate)
            nn.init.zeros_(named["bias_ih_l0"])
            nn.init.zeros_(named["bias_hh_l0"])
            named["bias_ih_l0"][width : 2 * width] = 1.0  # the second gate of both kinds

    def initial_state(self, n: int) -> State:
        """Zeros: the hidden state (n, width), and the cell state of an LSTM."""
        zeros = next(self.core.parameters()).new_zeros(n, self.width)
        return (zeros, zeros.clone()) if isinstance(self.core, nn.LSTM) else (zeros,)

    def forward(self, inputs: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Outputs (T, N, width) and the last state, of inputs (T, N, inputs).

        Where episodes begin within the sequences, these are cut there, so that torch's own pass
        over all of them can be used.
        """
        state = tuple(part.masked_fill(starts[0, :, None], 0.0) for part in state)
        if len(inputs) == 1 or not bool(starts[1:].any()):
            return self._run(inputs, state)
        steps, num = starts.shape
        first = starts.T.clone()  # an environment's steps follow one another
        first[:, 0] = True
        begin = first.flatten().nonzero()[:, 0]
        lengths = torch.cat([begin, begin.new_tensor([steps * num])]).diff()
        # A packed sequence has the first steps of all pieces, the longest first, then the second...
        order = lengths.argsort(descending=True, stable=True)
        place = torch.arange(int(lengths.max()), device=begin.device)[:, None]
        alive = place < lengths[order]
        index = (begin[order] + place)[alive]
        rows = inputs.transpose(0, 1).flatten(0, 1)[index]
        packed = PackedSequence(rows, alive.sum(1).cpu(), order, order.argsort())
        fresh = (begin % steps != 0)[:, None]  # pieces that an episode begins
        state = tuple(part[begin // steps].masked_fill(fresh, 0.0) for part in state)
        output, last = self._run(packed, state)
        outputs = output.data[index.argsort()].view(num, steps, -1).transpose(0, 1)
        final = first.flatten().cumsum(0).view(num, steps)[:, -1] - 1
        return outputs, tuple(part[final] for part in last)

    def _run(self, inputs: Any, state: State) -> tuple[Any, State]:
        given = [part[None] for part in state]
        if isinstance(self.core, nn.LSTM):
            outputs, (hidden, cell) = self.core(inputs, (given[0], given[1]))
            return outputs, (hidden[0], cell[0])
        outputs, hidden = self.core(inputs, given[0])
        return outputs, (hidden[0],)


class Window(nn.Module):
    """Attention of every step to itself and the steps before it in its episode.

    The state is the last inputs (N, window - 1, inputs), and whether each of them belongs to the
    episode (N, window - 1). Every head adds a number of its own for each distance in time.

    Args:
        inputs: Numbers that a step gets.
        width: Numbers that it gives.
        window: Steps that it sees, its own included.
        heads: Heads, which divide the width.
    """

    def __init__(self, inputs: int, width: int, window: int, heads: int = 4) -> None:
        super().__init__()
        self.inputs, self.window, self.heads = inputs, window, heads
        self.query, self.key = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.value, self.out = nn.Linear(inputs, width), nn.Linear(width, width)
        self.own = nn.Linear(inputs, width)
        self.distance = nn.Embedding(window, heads)
        nn.init.zeros_(self.distance.weight)

    def initial_state(self, n: int) -> State:
        """Nothing seen yet."""
        before = self.distance.weight.new_zeros(n, self.window - 1, self.inputs)
        return before, before.new_zeros(n, self.window - 1)

    def forward(self, inputs: Tensor, state: State, starts: Tensor) -> tuple[Tensor, State]:
        """Outputs (T, N, width) and the last state, of inputs (T, N, inputs)."""
        steps, earlier = len(inputs), self.window - 1
        seen = torch.cat([state[0].to(inputs.dtype), inputs.transpose(0, 1)], 1)
        # Episodes are numbered: 0 was under way, and what is before it has -1.
        number = starts.T.long().cumsum(1)
        numbers = torch.cat([state[1].long() - 1, number], 1)
        place = torch.arange(earlier + steps, device=inputs.device)
        distance = place[earlier:, None] - place
        near = (distance >= 0) & (distance < self.window)
        visible = near & (number[:, :, None] == numbers[:, None])
        mine = inputs.transpose(0, 1)
        parts = ((self.query, mine), (self.key, seen), (self.value, seen))
        query, key, value = (
            layer(rows).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, rows in parts
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        scores = scores + self.distance(distance.clamp(0, earlier)).movedim(-1, 0)
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        found = self.out((weights @ value).transpose(1, 2).flatten(2)).transpose(0, 1)
        outputs = torch.tanh(self.own(inputs) + found)
        same = numbers[:, steps:] == number[:, -1:]
        return outputs, (seen[:, steps:].detach(), same.to(seen.dtype))


def memory_of(config: NetworkConfig, inputs: int) -> Recurrent | Window:
    """The memory that the configuration asks for."""
    if config.memory == "attention":
        return Window(inputs, config.memory_width, config.memory_window)
    assert config.memory != "none"
    return Recurrent(config.memory, inputs, config.memory_width)
