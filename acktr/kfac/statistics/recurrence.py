"""LSTM, GRU and RNN from elementary operations, called and answering as torch's functions.

Every linear map is reported with its input and output, samples first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from acktr.kfac.statistics.uses import LinearMap, Report

State = tuple[Tensor, ...]
"""Hidden state (N, H), and the cell state of an LSTM."""
Step = Callable[[Tensor, Tensor, State], State]
"""The next state, from input-to-hidden and hidden-to-hidden outputs (N, gates H) and the state."""


def _lstm(given: Tensor, hidden: Tensor, state: State) -> State:
    i, f, g, o = (given + hidden).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(given: Tensor, hidden: Tensor, state: State) -> State:
    (r_i, z_i, n_i), (r_h, z_h, n_h) = given.chunk(3, -1), hidden.chunk(3, -1)
    new = (n_i + (r_i + r_h).sigmoid() * n_h).tanh()
    return (new + (z_i + z_h).sigmoid() * (state[0] - new),)


def _tanh(given: Tensor, hidden: Tensor, state: State) -> State:
    return ((given + hidden).tanh(),)


def _relu(given: Tensor, hidden: Tensor, state: State) -> State:
    return ((given + hidden).relu(),)


@dataclass(frozen=True)
class _Direction:
    """One pass over time of one layer, forwards or backwards."""

    step: Step
    report: Report
    suffix: str
    """End of its weights' names."""
    weights: Sequence[Tensor]
    """Input-to-hidden and hidden-to-hidden weight, their biases, and hidden-to-output weight, of
    which the last three may be missing."""
    backwards: bool

    def run(self, inputs: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        """Outputs (T, N, H) and last state, of inputs (T, N, in)."""
        w_ih, w_hh, *rest = self.weights
        b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
        w_hr = rest[-1] if len(rest) % 2 else None
        given = functional.linear(inputs, w_ih, b_ih).transpose(0, 1)
        swapped = inputs.transpose(0, 1)
        self.report(LinearMap(f"weight_ih_{self.suffix}", swapped, [given], valid=valid))
        state = _lowered(state, given, fused=len(state) > 1)
        # Where both outputs are added they have one gradient, so that it is asked for once.
        added = self.step is not _gru and given.requires_grad
        steps = given.unbind(1)
        outputs, before = list(steps), list(steps)
        for t in range(len(steps) - 1, -1, -1) if self.backwards else range(len(steps)):
            mask = None if valid is None else valid[:, t]
            before[t] = state[0].detach()
            hidden = functional.linear(state[0], w_hh, b_hh)
            if not added:
                self.report(LinearMap(f"weight_hh_{self.suffix}", before[t], [hidden], valid=mask))
            new = self.step(steps[t], hidden, state)
            if w_hr is not None:
                projected = functional.linear(new[0], w_hr)
                self.report(LinearMap(f"weight_hr_{self.suffix}", new[0], [projected], valid=mask))
                new = (projected, *new[1:])
            if mask is not None:  # behind the end of a sequence its state stays
                pairs = zip(new, state, strict=True)
                new = tuple(torch.where(mask[:, None], n, old) for n, old in pairs)
            state = new
            outputs[t] = state[0]
        if added:
            states = torch.stack(before, 1)
            self.report(LinearMap(f"weight_hh_{self.suffix}", states, [given], valid=valid))
        return torch.stack(outputs), state


def _lowered(state: State, given: Tensor, *, fused: bool) -> State:
    """Under autocast, the state in the type that it has in torch's own pass.

    Args:
        state: The state before any step.
        given: An output of a linear map.
        fused: Whether torch's pass on the CPU is fused code too; on other devices all are.
    """
    device = given.device.type
    if not torch.is_autocast_enabled(device) or (device == "cpu" and not fused):
        return state
    return tuple(part.to(given.dtype) for part in state)


def _alive(sizes: Tensor) -> Tensor:
    """Positions of a packed sequence that are not padding (T, N), for the N of every time."""
    return torch.arange(int(sizes[0])) < sizes[:, None].cpu()


def _spread(data: Tensor, alive: Tensor, padding: float = 0.0) -> Tensor:
    """Packed rows (M, ...) at their positions (T, N, ...)."""
    index = alive.flatten().nonzero()[:, 0].to(data.device)
    blank = data.new_full((alive.numel(), *data.shape[1:]), padding)
    return blank.index_copy(0, index, data).reshape(*alive.shape, *data.shape[1:])


def pad_packed(
    data: Tensor, sizes: Tensor, batch_first: bool, padding: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """A packed sequence as one with padding, and the lengths, as torch's function."""
    alive = _alive(sizes)
    lengths = alive.sum(0)
    alive = functional.pad(alive, (0, 0, 0, max(0, total_length - len(alive))))
    padded = _spread(data, alive, padding)
    return padded.transpose(0, 1) if batch_first else padded, lengths


def _recurrent(step: Step, report: Report, *args: Any) -> tuple[Tensor, ...]:
    """A recurrent network of all layers and directions, with the arguments of torch's functions."""
    packed = not isinstance(args[3], bool)
    rows = None
    if packed:
        data, sizes, state, weights, _, layers, dropout, training, both = args
        alive = _alive(sizes)
        inputs, rows = _spread(data, alive), alive.mT.to(data.device)
    else:
        inputs, state, weights, _, layers, dropout, training, both, batch_first = args
        inputs = inputs.transpose(0, 1) if batch_first else inputs
    start: State = (state,) if isinstance(state, Tensor) else tuple(state)
    each = len(weights) // (layers * (1 + both))
    last: list[State] = []
    for layer in range(layers):
        if layer and dropout and training:
            inputs = functional.dropout(inputs, dropout)
        ways = []
        for way in range(1 + both):
            place = len(last)
            suffix = f"l{layer}{'_reverse' * way}"
            mine = weights[place * each : (place + 1) * each]
            direction = _Direction(step, report, suffix, mine, bool(way))
            outputs, end = direction.run(inputs, tuple(part[place] for part in start), rows)
            ways.append(outputs)
            last.append(end)
        inputs = torch.cat(ways, -1) if both else ways[0]
    ends = (torch.stack(parts) for parts in zip(*last, strict=True))
    if packed:
        index = alive.flatten().nonzero()[:, 0].to(data.device)
        return inputs.flatten(0, 1).index_select(0, index), *ends
    return inputs.transpose(0, 1) if batch_first else inputs, *ends


def _cell(
    step: Step,
    report: Report,
    inputs: Tensor,
    state: Tensor | Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor | State:
    """One step, with the arguments of torch's functions."""
    alone = isinstance(state, Tensor)
    start: State = (state,) if isinstance(state, Tensor) else tuple(state)
    given = functional.linear(inputs, w_ih, b_ih)
    report(LinearMap("weight_ih", inputs, [given]))
    hidden = functional.linear(start[0], w_hh, b_hh)
    report(LinearMap("weight_hh", start[0], [hidden]))
    new = step(given, hidden, _lowered(start, given, fused=False))
    return new[0] if alone else new


RECURRENT: dict[Any, Callable[..., Any]] = {
    torch.lstm: partial(_recurrent, _lstm),
    torch.gru: partial(_recurrent, _gru),
    torch.rnn_tanh: partial(_recurrent, _tanh),
    torch.rnn_relu: partial(_recurrent, _relu),
    torch.lstm_cell: partial(_cell, _lstm),
    torch.gru_cell: partial(_cell, _gru),
    torch.rnn_tanh_cell: partial(_cell, _tanh),
    torch.rnn_relu_cell: partial(_cell, _relu),
}
"""What stands for a function of torch, with a report as its first argument."""
