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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from acktr.kfac.statistics.recurrence import RECURRENT, pad_packed
from acktr.kfac.statistics.uses import LinearMap, Report

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
        report(LinearMap(key, x, outputs, first))
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
    report(LinearMap("out_proj.weight", mixed, [output]))
    return output.transpose(0, 1).contiguous(), weights  # laid out in memory as torch's


# --- in place of torch's own ----------------------------------------------------------------------


def _silent(_map: LinearMap) -> None:
    pass


_PRODUCTS = functional.scaled_dot_product_attention
_PADDING = torch._pad_packed_sequence
_POINTER = torch.Tensor.data_ptr
_FUSED = {*RECURRENT, _ATTENTION, _PRODUCTS, _PADDING, _POINTER}


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
        if func in RECURRENT:
            return RECURRENT[func](self.report or _silent, *args, **kwargs)
        if func is _POINTER and torch._C._functorch.is_functorch_wrapped_tensor(*args):
            return 0  # so that recurrent modules do not lay out in memory what has none
        if func is _PADDING:  # which reads memory that a derivative has not
            return pad_packed(*args, **kwargs)
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


@contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Have passes make graphs with second derivatives, which fused code lacks.

    A pass of nn.TransformerEncoder without gradients is torch's own: its nested tensors give other
    values at padded positions, and are not made while a mode is active.
    """
    left: list[Any] = []

    def leave(*_: object) -> None:
        left.append(nullcontext() if torch.is_grad_enabled() else torch._C.DisableTorchFunction())
        left[-1].__enter__()

    def back(*_: object) -> None:
        left.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        stack.enter_context(Elementary(plain=True))
        for part in module.modules():
            if isinstance(part, nn.TransformerEncoder):
                stack.callback(part.register_forward_pre_hook(leave).remove)
                stack.callback(part.register_forward_hook(back, always_call=True).remove)
        yield
