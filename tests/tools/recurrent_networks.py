"""Networks of attention and recurrence, and the same functions of linear layers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from acktr.kfac.statistics.projections import projections
from tests.tools.kfac import randn


def filled(module: nn.Module) -> nn.Module:
    """The module in float64 with weights that are not too small."""
    module = module.double()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(0.6 * randn(*parameter.shape, seed=place))
    return module


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class Attention(nn.Module):
    """nn.MultiheadAttention of four linear layers; batch first, masks where keys are hidden."""

    def __init__(self, own: nn.MultiheadAttention) -> None:
        super().__init__()
        biases = [None] * 3 if own.in_proj_bias is None else own.in_proj_bias.chunk(3)
        if own.in_proj_weight is None:
            weights = own.q_proj_weight, own.k_proj_weight, own.v_proj_weight
        else:
            weights = own.in_proj_weight.chunk(3)
        self.q, self.k, self.v = (linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.o = linear(own.out_proj.weight, own.out_proj.bias)
        self.heads, self.first = own.num_heads, own.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if not self.first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self.q(query), self.k(key), self.v(value)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = (
                scores.masked_fill(attn_mask, -math.inf)
                if attn_mask.dtype == torch.bool
                else scores + attn_mask
            )
        if key_padding_mask is not None:
            scores = scores.masked_fill(key_padding_mask[:, None, None], -math.inf)
        mixed: Tensor = self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return mixed if self.first else mixed.transpose(0, 1), None


class Cell(nn.Module):
    """One step of a recurrent cell of two linear layers."""

    def __init__(self, kind: str, own: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.kind = kind
        self.ih = linear(own["weight_ih"], own["bias_ih"])  # type: ignore[arg-type]
        self.hh = linear(own["weight_hh"], own["bias_hh"])  # type: ignore[arg-type]

    def forward(self, x: Tensor, state: Any) -> Any:
        if self.kind == "LSTM":
            h, c = state
            i, f, g, o = (self.ih(x) + self.hh(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            return o.sigmoid() * c.tanh(), c
        if self.kind == "GRU":
            (r, z, n), (s, y, m) = self.ih(x).chunk(3, -1), self.hh(state).chunk(3, -1)
            gate = (z + y).sigmoid()
            return (1 - gate) * (n + (r + s).sigmoid() * m).tanh() + gate * state
        return (self.ih(x) + self.hh(state)).tanh()


class Sequence(nn.Module):
    """nn.LSTM, nn.GRU or nn.RNN, batch first, of such cells; lengths end some sequences early."""

    def __init__(self, own: nn.RNNBase) -> None:
        super().__init__()
        self.kind, self.layers, self.both = (
            own.mode.split("_")[0],
            own.num_layers,
            own.bidirectional,
        )
        self.cells = nn.ModuleDict()
        for suffix in self.suffixes():
            keys = [f"{what}_{which}" for what in ("weight", "bias") for which in ("ih", "hh")]
            weights = {key: getattr(own, f"{key}_{suffix}", None) for key in keys}
            self.cells[suffix] = Cell(self.kind, weights)
        self.hidden = own.hidden_size

    def suffixes(self) -> list[str]:
        ends = ["", "_reverse"][: 1 + self.both]
        return [f"l{layer}{end}" for layer in range(self.layers) for end in ends]

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> tuple[Tensor, None]:
        groups = [(x[i : i + 1], n) for i, n in enumerate(lengths or [])] or [(x, x.shape[1])]
        return torch.cat([self.run(part, length) for part, length in groups]), None

    def run(self, x: Tensor, length: int) -> Tensor:
        """The outputs of sequences of one length, zero behind it."""
        size = x.shape[1]
        for layer in range(self.layers):
            ways = []
            for end in ["", "_reverse"][: 1 + self.both]:
                state: Any = x.new_zeros(len(x), self.hidden)
                state = (state, state) if self.kind == "LSTM" else state
                outputs = [x.new_zeros(len(x), self.hidden)] * size
                for t in range(length - 1, -1, -1) if end else range(length):
                    state = self.cells[f"l{layer}{end}"](x[:, t], state)
                    outputs[t] = state[0] if self.kind == "LSTM" else state
                ways.append(torch.stack(outputs, 1))
            x = torch.cat(ways, -1)
        return x


class Tagger(nn.Module):
    """A class for every token, by a recurrent network over both directions."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.cells = kind(3, 2, batch_first=True, **settings)
        self.head = nn.Linear(2 * (1 + self.cells.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(x)[0])
        return output


class Packed(Tagger):
    """The same of sequences that end early, packed."""

    lengths = (4, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), True, enforce_sorted=False)
        if isinstance(self.cells, Sequence):
            found = self.cells(x, list(self.lengths))[0]
        else:
            found = pad_packed_sequence(self.cells(packed)[0], True)[0]
        output: Tensor = self.head(found)
        return output


class Loop(nn.Module):
    """A cell called step by step, its weights also used for another start."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        lstm = "LSTM" in (type(self.cell).__name__, getattr(self.cell, "kind", ""))
        lstm = lstm or isinstance(self.cell, nn.LSTMCell)
        state: Any = torch.full((len(x), 4), 0.3, dtype=x.dtype)
        state = (state, state) if lstm else state
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        output: Tensor = self.head(state[0] if lstm else state)
        return output


class Pooled(nn.Module):
    """Attention over part of the inputs, with keys and values of other widths."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = (
            self.attention.k.in_features
            if isinstance(self.attention, Attention)
            else self.attention.kdim
        )
        padding = torch.arange(x.shape[1]) >= torch.tensor([5, 3, 4])[: len(x), None]
        key, value = x[..., :wide], torch.tanh(x)
        value = value if wide != 4 else key
        output: Tensor = self.head(
            self.attention(
                x[:, :2, :4], key, value[..., :6] if wide != 4 else key, padding, need_weights=False
            )[0]
        )
        return output.mean(1)


class Decoder(nn.Module):
    """torch's decoder layer over its own encoder layer, positions first as is torch's default."""

    def __init__(self) -> None:
        super().__init__()
        settings = {"dim_feedforward": 5, "dropout": 0.0}
        self.encoder = nn.TransformerEncoderLayer(4, 2, **settings, norm_first=True)
        self.decoder = nn.TransformerDecoderLayer(4, 2, **settings)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype)
        output: Tensor = self.head(self.decoder(x[:2], self.encoder(x), tgt_mask=mask))
        return output.transpose(0, 1).mean(1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tagger lstm": (lambda: Tagger(nn.LSTM, num_layers=2, bidirectional=True), (3, 4, 3)),
    "tagger gru": (lambda: Tagger(nn.GRU, num_layers=2, bidirectional=True), (3, 4, 3)),
    "tagger rnn": (lambda: Tagger(nn.RNN, bias=False), (3, 4, 3)),
    "packed gru": (lambda: Packed(nn.GRU, bidirectional=True), (3, 4, 3)),
    "packed lstm": (lambda: Packed(nn.LSTM, num_layers=2), (3, 4, 3)),
    "loop gru": (lambda: Loop(nn.GRUCell), (3, 4, 3)),
    "loop lstm": (lambda: Loop(nn.LSTMCell), (3, 4, 3)),
    "loop rnn": (lambda: Loop(nn.RNNCell), (3, 4, 3)),
    "pooled": (lambda: Pooled(), (3, 5, 4)),
    "widths": (lambda: Pooled(kdim=3, vdim=6, bias=False), (3, 5, 6)),
    "decoder": (Decoder, (3, 4, 4)),
}


def of_linears(model: nn.Module) -> nn.Module:
    """A copy with every fused module replaced by the same function of nn.Linear."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, Attention(child))
            elif isinstance(child, nn.RNNBase):
                setattr(module, name, Sequence(child))
            elif isinstance(child, nn.RNNCellBase):
                kind = type(child).__name__.removesuffix("Cell")
                setattr(module, name, Cell(kind, dict(child.named_parameters())))
    return model


def twins(fused: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of :func:`of_linears` for each projection."""
    found = {}
    for path, module in fused.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            parts = [f"{path}.{name}" for name in "qkv"]
            if module.in_proj_weight is None:
                found.update({f"{part}_proj": [part] for part in parts})
            else:
                found[f"{path}.in_proj"] = parts
            found[f"{path}.out_proj"] = [f"{path}.o"]
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for part in projections(module):
                which, _, suffix = part.key.removeprefix("weight_").partition("_")
                inner = f"{path}.cells.{suffix}.{which}" if suffix else f"{path}.{which}"
                found[f"{path}.{part.name}"] = [inner]
    return found
