"""Blocks inside of attention and recurrent modules are those of the same function of nn.Linear."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.kronecker import Corrected
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.fisher.products import output_tangents
from tests.tools.exact import Seen, close, observed, pairs, stored, within_groups
from tests.tools.kfac import basis, randn
from tests.tools.recurrent_networks import (
    NETWORKS,
    Decoder,
    Packed,
    Pooled,
    Tagger,
    filled,
    of_linears,
    twins,
)

CLOSE = 1e-11

STRUCTURES = "kfac", "cholesky", "ekfac"


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


# The linear layers see packed sequences one sample at a time.
@pytest.mark.parametrize("name", [name for name in NETWORKS if "packed" not in name])
def test_reduced_factors_and_steps_are_those_of_linear_layers(name: str) -> None:
    """But for G of keys: their gradients sum to zero, as scores may move together."""
    make, shape = NETWORKS[name]
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
