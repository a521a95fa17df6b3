"""Blocks inside of attention and recurrent modules are those of the same function of nn.Linear."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from acktr.kfac import CategoricalLoss
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.kronecker import Corrected
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.fisher.products import output_tangents
from acktr.kfac.statistics.projections import projections
from tests.tools.exact import Seen, close, observed, pairs, stored, within_groups
from tests.tools.kfac import basis, randn

CLOSE = 1e-11


def filled(module: nn.Module) -> nn.Module:
    """The module in float64 with weights that are not too small."""
    module = module.double()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(0.6 * randn(*parameter.shape, seed=place))
    return module


# --- the same functions of nn.Linear --------------------------------------------------------------


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


# --- networks -------------------------------------------------------------------------------------


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


STRUCTURES = "kfac", "cholesky", "ekfac"


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


@pytest.mark.parametrize("name", NETWORKS)
def test_factors_and_steps_are_those_of_linear_layers(name: str) -> None:
    make, shape = NETWORKS[name]
    model, inputs = filled(make()), randn(*shape)
    other = of_linears(model)
    torch.testing.assert_close(other(inputs), model(inputs), rtol=1e-12, atol=1e-12)
    loss = CategoricalLoss()
    for structure in STRUCTURES[: 2 if "packed" in name else 3]:  # there, one sample at a time
        first, second = (observed(net, inputs, loss, structure=structure) for net in (model, other))
        for seen in (first, second):
            seen.curvature.refresh()
            seen.again()
        names = twins(model)
        assert names and set(names) <= set(first.curvature.stats)
        steps = []
        for seen in (first, second):
            named = dict(seen.model.named_parameters())
            gradients = {n: torch.sin(3 * p.detach() + 1) for n, p in named.items()}
            steps.append(seen.curvature.direction(gradients))
        for key, parts in names.items():
            found = pairs(first.layer(key))
            expected = [pair for part in parts for pair in pairs(second.layer(part))]
            for (a, g), (b, h) in zip(found, expected, strict=True):
                close(a, b, CLOSE)
                close(g, h, CLOSE)
            step = torch.cat([steps[1][f"{part}.weight"] for part in parts])
            close(steps[0][first.layer(key).layer.weight_name], step, 1e-8)


@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_factors_and_steps_are_those_of_linear_layers(name: str) -> None:
    """But for G of keys: their gradients sum to zero, as scores may move together."""
    make, shape = NETWORKS[name]
    if "packed" in name:  # the linear layers see one sample at a time there
        return
    model, inputs = filled(make()), randn(*shape)
    other = of_linears(model)
    nets = (model, other)
    first, second = (observed(n, inputs, CategoricalLoss(), linear_sharing="reduce") for n in nets)
    steps = []
    for seen in (first, second):
        seen.curvature.refresh()
        named = dict(seen.model.named_parameters())
        steps.append(
            seen.curvature.direction({n: (3 * p.detach()).sin() for n, p in named.items()})
        )
    for key, parts in twins(model).items():
        found = pairs(first.layer(key))
        for part, (a, g) in zip(parts, found, strict=True):
            ((b, h),) = pairs(second.layer(part))
            close(a, b, CLOSE)
            if part.endswith(".k"):
                assert float(g.abs().max()) < 1e-25 and float(h.abs().max()) < 1e-25
            else:
                close(g, h, CLOSE)
        step = torch.cat([steps[1][f"{part}.weight"] for part in parts])
        close(steps[0][first.layer(key).layer.weight_name], step, 1e-8)


def test_one_position_is_exact() -> None:
    """With one step, or one query, A (x) G is the block of the Fisher matrix itself."""
    for kind in (nn.LSTM, nn.GRU, nn.RNN):
        seen = observed(filled(Tagger(kind)), randn(1, 1, 3), CategoricalLoss())
        close(stored(seen.layer("cells.ih_l0")), seen.truth("cells.ih_l0"))

    class First(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.head(self.attention(x[:, :1], x, x)[0])
            return output

    seen = observed(filled(First()), randn(1, 5, 4), CategoricalLoss())
    name = "attention.in_proj"
    truth, block = within_groups(seen.truth(name), 3), stored(seen.layer(name))
    close(block[:20, :20], truth[:20, :20])  # queries are of one position
    close(stored(seen.layer("attention.out_proj")), seen.truth("attention.out_proj"))


def test_biases_alone_have_their_exact_block() -> None:
    """That of separate projections, and those of frozen weights."""
    model = filled(Pooled(kdim=3, vdim=6))
    seen = observed(model, randn(3, 5, 6), CategoricalLoss())
    close(stored(seen.block("attention.in_proj_bias")), seen.truth("attention.in_proj_bias"))

    tagger = filled(Tagger(nn.GRU))
    attention = filled(Pooled())
    for net in (tagger, attention):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("bias" in name)
    for net, inputs in ((tagger, randn(3, 4, 3)), (attention, randn(3, 5, 4))):
        seen = observed(net, inputs, CategoricalLoss())
        names = [name for name, p in net.named_parameters() if p.requires_grad]
        assert sorted(seen.curvature.stats) == sorted(names)
        for name in names:
            assert isinstance(seen.block(name), VectorBlock)
            close(stored(seen.block(name)), seen.truth(name))


def test_stacked_weights_above_the_cap_are_among_the_rest() -> None:
    """Their name is not that of what is recorded for their bias."""
    model = filled(Pooled())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"max_factor_size": 3, "small_parameters": "diagonal"}
        seen = observed(model, randn(3, 5, 4), CategoricalLoss(), **settings)
    rest = seen.curvature.stats["attention.in_proj_weight"]
    assert isinstance(rest, DiagonalBlock)
    name = "attention.in_proj_bias"
    moment = seen.vector(name).moment.mean()
    close(moment if moment.dim() == 1 else moment.diag(), seen.truth(name).diag())


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_gates_whose_factor_is_above_the_cap_are_apart(kind: type[nn.RNNBase], gates: int) -> None:
    """Each has its part of G, and the scales and the step are those of such a block."""
    model, inputs, loss = filled(Tagger(kind)), randn(3, 4, 3), CategoricalLoss()
    with pytest.warns(UserWarning, match=f"cells.ih_l0 .G {2 * gates}, {gates} blocks of it"):
        cut = observed(model, inputs, loss, max_factor_size=4)
    whole = observed(model, inputs, loss)
    cut.curvature.refresh()
    gradients = {n: torch.sin(3 * p.detach() + 1) for n, p in model.named_parameters()}
    step = cut.curvature.direction(gradients)
    for name in ("cells.ih_l0", "cells.hh_l0"):
        layer, full = cut.layer(name), whole.layer(name)
        blocks = [full.g.mean()[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] for i in range(gates)]
        close(layer.g.mean(), torch.stack(blocks))
        close(layer.a.mean(), full.a.mean().expand(gates, -1, -1))
        system = stored(layer)
        system = system + cut.curvature.damping * torch.eye(len(system), dtype=system.dtype)
        expected = torch.linalg.solve(system, layer.layer.matrix(gradients).flatten())
        close(layer.layer.matrix(step).flatten(), expected, 1e-8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ekfac = observed(model, inputs, loss, structure="ekfac", max_factor_size=4)
        assert_scales_are_exact(ekfac, name)


# --- products with the Jacobian, and passes of many kinds -----------------------------------------


def own_jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """dz / dtheta by reverse mode through torch's own fused code, row by row, (entries, P)."""
    parameters = list(model.parameters())
    rows = []
    for entry in model(inputs).flatten():
        gradients = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in pairs]
        rows.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "name", ["tagger lstm", "packed lstm", "packed gru", "loop lstm", "decoder"]
)
def test_forward_mode_is_the_jacobian_of_torchs_own_pass(name: str) -> None:
    make, shape = NETWORKS[name]
    model, inputs = filled(make()), randn(*shape)
    vector = {n: randn(*p.shape, seed=9) for n, p in model.named_parameters()}
    output, (tangent,) = output_tangents(model, (inputs,), [vector])
    torch.testing.assert_close(output, model(inputs).detach(), rtol=1e-12, atol=1e-12)
    flat = torch.cat([v.flatten() for v in vector.values()])
    close(tangent.flatten(), own_jacobian(model, inputs) @ flat, 1e-10)


def assert_scales_are_exact(seen: Seen, name: str) -> None:
    """The scales of EKFAC are the diagonal of the exact block in its basis."""
    seen.curvature.refresh()
    block = seen.layer(name)
    corrected, (_, a, _, g) = block.inverse, basis(block)
    assert isinstance(corrected, Corrected) and a is not None
    before = corrected.scales.value.clone()
    seen.again()
    decay = seen.curvature.config.stat_decay
    new = (corrected.scales.value - decay * before) / (1 - decay)
    bases = zip(g.reshape(-1, *g.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)
    rotation = torch.block_diag(*(torch.kron(*pair) for pair in bases))
    close(new.flatten(), (rotation.mT @ seen.truth(name) @ rotation).diagonal())


def test_ekfac_of_packed_sequences_has_the_diagonal_of_the_exact_block() -> None:
    model = filled(Packed(nn.LSTM, bidirectional=True))
    seen = observed(model, randn(3, 4, 3), CategoricalLoss(), structure="ekfac")
    assert_scales_are_exact(seen, "cells.hh_l0_reverse")


def test_ekfac_of_attention_has_the_diagonal_of_the_exact_block() -> None:
    seen = observed(filled(Decoder()), randn(3, 4, 4), CategoricalLoss(), structure="ekfac")
    assert_scales_are_exact(seen, "decoder.multihead_attn.in_proj")
