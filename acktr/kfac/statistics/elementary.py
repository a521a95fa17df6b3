"""Attention and recurrence computed from elementary operations, for what fused code hides.

nn.MultiheadAttention, nn.LSTM, nn.GRU, nn.RNN and their cells hand their weights to fused
functions, in which neither the inputs of a projection nor the gradients of its output can be seen;
and the recurrent ones have no forward-mode derivative. :class:`Elementary` puts functions of the
same result (to rounding) in place of those calls while it is active: the module's own forward pass
still checks the inputs, sorts packed sequences and shapes the results, and every linear map in it
is reported with its input and output, samples first.

Dropout draws as many numbers as torch's own code without fused kernels, in the same order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

State = tuple[Tensor, ...]
"""Hidden state (N, H), and the cell state of an LSTM."""
Step = Callable[[Tensor, Tensor, State], State]
"""The next state, from input-to-hidden and hidden-to-hidden outputs (N, gates H) and the state."""


class Report(Protocol):
    """Takes notice of linear maps."""

    def __call__(
        self,
        key: str,
        given: Tensor,
        outputs: Sequence[Tensor],
        *,
        first: int = 0,
        valid: Tensor | None = None,
    ) -> None:
        """Take notice of maps of one input.

        Args:
            key: Name of the weight in its module.
            given: The input (N, ..., in).
            outputs: The outputs (N, ..., out) of maps that are stacked in the weight, or of one.
            first: Place of the first of them among those of the module's input.
            valid: Positions (N, ...) that are not padding; None for all.
        """


def _silent(
    key: str,
    given: Tensor,
    outputs: Sequence[Tensor],
    *,
    first: int = 0,
    valid: Tensor | None = None,
) -> None:
    pass


# --- recurrence -----------------------------------------------------------------------------------


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
        self.report(f"weight_ih_{self.suffix}", inputs.transpose(0, 1), [given], valid=valid)
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
                self.report(f"weight_hh_{self.suffix}", before[t], [hidden], valid=mask)
            new = self.step(steps[t], hidden, state)
            if w_hr is not None:
                projected = functional.linear(new[0], w_hr)
                self.report(f"weight_hr_{self.suffix}", new[0], [projected], valid=mask)
                new = (projected, *new[1:])
            if mask is not None:  # behind the end of a sequence its state stays
                pairs = zip(new, state, strict=True)
                new = tuple(torch.where(mask[:, None], n, old) for n, old in pairs)
            state = new
            outputs[t] = state[0]
        if added:
            self.report(f"weight_hh_{self.suffix}", torch.stack(before, 1), [given], valid=valid)
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


def _pad_packed(
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
    report("weight_ih", inputs, [given])
    hidden = functional.linear(start[0], w_hh, b_hh)
    report("weight_hh", start[0], [hidden])
    new = step(given, hidden, _lowered(start, given, fused=False))
    return new[0] if alone else new


# --- attention ------------------------------------------------------------------------------------

_ATTENTION = functional.multi_head_attention_forward
_SIGNATURE = inspect.signature(_ATTENTION)


def _projected(given: SimpleNamespace, report: Report) -> list[Tensor]:
    """Queries, keys and values (N, length, E); inputs that are one tensor take one product."""
    inputs = given.query, given.key, given.value
    bias, separate = given.in_proj_bias, given.use_separate_proj_weight
    spans = [(0, 1), (1, 2), (2, 3)]
    if not separate and inputs[1] is inputs[2]:
        spans = [(0, 3)] if inputs[0] is inputs[1] else [(0, 1), (1, 3)]
    found: list[Tensor] = []
    for first, end in spans:
        rows = slice(first * given.embed_dim_to_check, end * given.embed_dim_to_check)
        key = f"{'qkv'[first]}_proj_weight" if separate else "in_proj_weight"
        weight = getattr(given, key) if separate else given.in_proj_weight[rows]
        x = inputs[first].transpose(0, 1)
        output = functional.linear(x, weight, None if bias is None else bias[rows])
        outputs = output.chunk(end - first, -1) if end - first > 1 else [output]
        report(key, x, outputs, first=first)
        found.extend(outputs)
    return found


def _mask(given: SimpleNamespace, batch: int, extra: int) -> Tensor | None:
    """What is added to the scores (N, heads, L, S), in a shape that broadcasts to theirs."""
    mask: Tensor | None = given.attn_mask
    padding = given.key_padding_mask
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.reshape(batch, given.num_heads, *mask.shape[1:])
        mask = functional.pad(mask, (0, extra))
    if padding is not None:
        padding = functional.pad(padding, (0, extra)).view(batch, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    return mask


def _usual(given: SimpleNamespace) -> bool:
    """Whether the arguments fit one another, and no keys or values are given ready-made.

    All else is left to torch's function, which also has the errors.
    """
    query, key, value = given.query, given.key, given.value
    mask, padding = given.attn_mask, given.key_padding_mask
    batch, scores = query.shape[1:-1], (len(query), len(key))
    stacked = (given.num_heads * batch.numel(), *scores)
    return (
        given.static_k is None
        and given.static_v is None
        and (given.bias_k is None) is (given.bias_v is None)
        and query.dim() in (2, 3)
        and query.shape[-1] == given.embed_dim_to_check
        and key.shape[:-1] == value.shape[:-1] == (len(key), *batch)
        and (mask is not None or not given.is_causal)
        and (mask is None or (mask.is_floating_point() and mask.shape in (scores, stacked)))
        and (padding is None or padding.is_floating_point())
        and (padding is None or padding.shape == (*batch, len(key)))
    )


def _attention(report: Report, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Multi-head attention, with the arguments of torch's function; inputs (length, N, ...)."""
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = SimpleNamespace(**bound.arguments)
    if not _usual(given):
        result: tuple[Tensor, Tensor | None] = _ATTENTION(*args, **kwargs)
        return result
    if given.query.dim() == 3:
        return _batched_attention(given, report)
    inputs = {id(x): x.unsqueeze(1) for x in (given.query, given.key, given.value)}
    for name in ("query", "key", "value"):  # what was one tensor still is
        setattr(given, name, inputs[id(getattr(given, name))])
    output, weights = _batched_attention(given, report)
    return output.squeeze(1), None if weights is None else weights.squeeze(0)


def _batched_attention(given: SimpleNamespace, report: Report) -> tuple[Tensor, Tensor | None]:
    heads, batch = given.num_heads, given.query.shape[1]
    q, k, v = _projected(given, report)
    if given.bias_k is not None:
        k = torch.cat([k, given.bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, given.bias_v.expand(batch, 1, -1)], 1)
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    if given.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :, :1])], 2) for x in (k, v))
    causal = given.is_causal and given.key_padding_mask is None and not given.need_weights
    given.attn_mask = None if causal else given.attn_mask
    mask = _mask(given, batch, k.shape[2] - len(given.key))
    dropout = given.dropout_p if given.training else 0.0
    weights = None
    if given.need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = functional.dropout(
            (scores if mask is None else scores + mask).softmax(-1), dropout
        )
        mixed = weights @ v
        weights = weights.mean(1) if given.average_attn_weights else weights
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
    mixed = mixed.transpose(1, 2).flatten(2)
    output = functional.linear(mixed, given.out_proj_weight, given.out_proj_bias)
    report("out_proj.weight", mixed, [output])
    return output.transpose(0, 1).contiguous(), weights  # laid out in memory as torch's


# --- in place of torch's own ----------------------------------------------------------------------

_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.lstm: partial(_recurrent, _lstm),
    torch.gru: partial(_recurrent, _gru),
    torch.rnn_tanh: partial(_recurrent, _tanh),
    torch.rnn_relu: partial(_recurrent, _relu),
    torch.lstm_cell: partial(_cell, _lstm),
    torch.gru_cell: partial(_cell, _gru),
    torch.rnn_tanh_cell: partial(_cell, _tanh),
    torch.rnn_relu_cell: partial(_cell, _relu),
}
_PRODUCTS = functional.scaled_dot_product_attention
_PADDING = torch._pad_packed_sequence
_POINTER = torch.Tensor.data_ptr
_FUSED = {*_REPLACED, _ATTENTION, _PRODUCTS, _PADDING, _POINTER}


def checkpointed() -> bool:
    """Whether torch.utils.checkpoint keeps what is needed to compute this pass again.

    A forward-mode derivative is not computed again.
    """
    if forward_ad._current_level >= 0:
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


class Elementary(TorchFunctionMode):
    """While it is active, recurrence and attention consist of elementary operations.

    A checkpoint is left alone: it computes its part again without this mode, and would take the
    tensors that it finds then for those of other operations.

    Args:
        report: What takes notice of their linear maps; without it attention is left as it is.
        plain: Whether the products of attention are to have derivatives in every mode.
    """

    def __init__(self, report: Report | None = None, *, plain: bool = False) -> None:
        super().__init__()
        self.report = report
        self.plain = plain

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, or what stands for it."""
        if func in _FUSED and not checkpointed():
            return self._instead(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _instead(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _REPLACED:
            return _REPLACED[func](self.report or _silent, *args, **kwargs)
        if func is _POINTER and torch._C._functorch.is_functorch_wrapped_tensor(*args):
            return 0  # so that recurrent modules do not lay out in memory what has none
        if func is _PADDING:  # which reads memory that a derivative has not
            return _pad_packed(*args, **kwargs)
        if func is _ATTENTION and self.report is not None:
            return _attention(self.report, *args, **kwargs)
        if func in (_ATTENTION, _PRODUCTS) and self.plain:
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def elementary_operations() -> Iterator[None]:
    """Compute attention and recurrence from operations that have derivatives in every mode.

    The fused kernels have no forward-mode derivative.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with Elementary(plain=True):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
