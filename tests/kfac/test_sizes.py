"""Factors above max_factor_size, of which the diagonal is kept, and layers that are left out."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KFACConfig,
    KroneckerBlock,
    LargeFactorWarning,
    Preconditioner,
    dense_inverse,
    dense_kfac,
)
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.blocks.rows import token_factor
from acktr.kfac.blocks.vectors import VectorBlock
from acktr.kfac.statistics.inputs import Inputs
from acktr.kfac.statistics.uses import Use
from tests.tools.exact import Seen, close, observed
from tests.tools.kfac import basis, build, eigen, plain_config, randn, scales, seeded

LARGE = pytest.mark.filterwarnings("ignore::acktr.kfac.LargeFactorWarning")
LIMIT = 6


class Pooled(nn.Module):
    """The mean over positions."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2).mean(2)


NETS: dict[str, tuple[nn.Module, Tensor]] = {
    "positions": (
        build(
            nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 7), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)
        ),
        randn(6, 3, 8),
    ),
    "convolutions": (
        build(
            nn.Conv2d(2, 8, 2, padding=1, stride=2),
            nn.Tanh(),
            nn.Conv2d(8, 3, 3, bias=False),
            Pooled(),
        ),
        randn(6, 2, 5, 5),
    ),
    "transposed": (
        build(nn.ConvTranspose1d(3, 4, 3, stride=2), nn.Tanh(), Pooled(), nn.Linear(4, 3)),
        randn(6, 3, 4),
    ),
    "tokens": (
        build(nn.Embedding(9, 7), nn.Tanh(), nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 3)),
        torch.randint(9, (6, 2), generator=seeded(0)),
    ),
}
every_net = pytest.mark.parametrize("net", NETS)


def both(net: str, **settings: Any) -> tuple[Seen, Seen]:
    """Curvatures of one batch, without and with a limit."""
    model, inputs = NETS[net]
    loss = CategoricalLoss()
    found = [
        observed(model, inputs, loss, max_factor_size=limit, **settings) for limit in (None, LIMIT)
    ]
    return found[0], found[1]


def whole(factor: Tensor) -> Tensor:
    return factor.diag() if factor.dim() == 1 else factor


def expected(factor: Tensor) -> Tensor:
    """The factor as the limit leaves it."""
    large = factor.dim() == 2 and len(factor) > LIMIT
    return factor.diagonal().diag() if large else whole(factor)


@LARGE
@every_net
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_large_factor_is_the_diagonal_of_the_whole_one(net: str, sharing: Any) -> None:
    seen, capped = both(net, conv_sharing=sharing, linear_sharing=sharing)
    cut = 0
    for name in seen.curvature.stats:
        for full, own in zip(seen.layer(name).factors, capped.layer(name).factors, strict=True):
            close(whole(own.mean()), expected(full.mean()))
            large = full.value.dim() == 2 and len(full.value) > LIMIT
            assert own.value.dim() == (1 if large else full.value.dim())
            cut += large
    assert cut


@LARGE
@every_net
@pytest.mark.parametrize("structure", ["kfac", "kfac_factored", "cholesky", "ekfac"])
def test_the_direction_is_that_of_the_dense_matrix(net: str, structure: Any) -> None:
    """Written out from the whole factors, and as the views say."""
    seen, capped = both(net, structure=structure, damping=0.03, stat_decay=0.0)
    for curvature in (seen.curvature, capped.curvature):
        curvature.refresh()
    capped.again()
    inverse = dense_inverse(capped.curvature)
    close(inverse @ dense_kfac(capped.curvature, damped=True), torch.eye(len(inverse)).double())
    model = capped.model
    gradients = {n: randn(*p.shape, seed=i) for i, (n, p) in enumerate(model.named_parameters())}
    step = capped.curvature.direction(gradients)
    for name in capped.curvature.stats:
        a, g = (expected(factor.mean()) for factor in seen.layer(name).factors)
        eye = torch.eye(len(a) * len(g)).double()
        if structure == "kfac":
            matrix = torch.kron(g, a) + 0.03 * eye
        elif structure == "ekfac":
            block = capped.layer(name)
            q_a, q_g = eigen(block).a.vectors, eigen(block).g.vectors
            eyes = torch.eye(len(a)).double(), torch.eye(len(g)).double()
            q = torch.kron(eyes[1] if q_g is None else q_g, eyes[0] if q_a is None else q_a)
            truth = (q.mT @ capped.truth(name) @ q).diagonal()
            close(scales(block).flatten(), truth)
            matrix = q @ truth.diag() @ q.mT + 0.03 * eye
        else:
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            a = a + 0.03**0.5 * pi * torch.eye(len(a)).double()
            g = g + 0.03**0.5 / pi * torch.eye(len(g)).double()
            matrix = torch.kron(g, a)
        layer = capped.layer(name).layer
        wanted = torch.linalg.solve(matrix, layer.matrix(gradients).flatten())
        close(layer.matrix(step).flatten(), wanted)


@LARGE
def test_a_refresh_carries_scales_along_whole_factors_alone() -> None:
    model, inputs = NETS["positions"]
    seen = observed(model, inputs, CategoricalLoss(), structure="ekfac", max_factor_size=LIMIT)
    seen.curvature.refresh()
    block = seen.layer("0")
    seen.inputs = randn(6, 3, 8, seed=3)
    seen.again()
    before, (_, _, _, old) = scales(block), basis(block)
    seen.curvature.refresh()
    _, a_vectors, _, new = basis(block)
    assert a_vectors is None and old is not None and new is not None
    close(scales(block), (new.mT @ old).square() @ before)


def test_one_warning_names_layers_and_sizes() -> None:
    model = nn.Sequential(nn.Linear(3000, 4), nn.Linear(4, 2500), nn.Linear(2500, 2))
    with pytest.warns(LargeFactorWarning) as caught:
        KFAC(model)
    (warning,) = caught
    names = r"0 (A 3001), 1 (G 2500), 2 (A 2501)"
    assert f"max_factor_size 2048: {names}" in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KFAC(model, plain_config(max_factor_size=3001))
        KFAC(model[:1], KFACConfig.for_rl())  # as before there was a limit


def test_a_factor_without_memory_is_one_line() -> None:
    """It would be larger than what a process can address."""
    model = nn.Linear(5_000_000, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layer '': no memory for a factor .* max_factor_size"):
        KFAC(model, plain_config(max_factor_size=None))


def test_a_chain_refuses_diagonals() -> None:
    with pytest.raises(ValueError, match=r"above max_factor_size 4: 0 \(A 9\)"):
        KFAC(
            build(nn.Linear(8, 3), nn.Linear(3, 2)),
            plain_config(structure="tridiagonal", max_factor_size=4),
        )


def test_groups_with_large_factors_have_the_curvature_of_what_has_no_block() -> None:
    model = build(nn.Conv1d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(8, 3))
    with pytest.warns(LargeFactorWarning, match=r"0 \(A 13, no block\)"):
        optimizer = KFAC(model, plain_config(max_factor_size=10))
    assert [type(block) for block in optimizer.blocks] == [
        KroneckerBlock,
        VectorBlock,
        DiagonalBlock,
    ]


class Largest(TorchDispatchMode):
    """The most entries that a new tensor had."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self.entries = max(self.entries, storage.nbytes() // tensor.element_size())
        return result


@LARGE
@pytest.mark.parametrize("structure", ["kfac", "cholesky", "ekfac"])
def test_a_head_of_fifty_thousand_classes_trains(structure: Any) -> None:
    """Nothing is larger than parameters, logits, and the chunks of squared gradients."""
    model = nn.Sequential(nn.Embedding(50257, 4), nn.Linear(4, 50257, bias=False))
    tokens = torch.randint(50257, (6, 2), generator=seeded(0))
    loss, losses = CategoricalLoss(), []
    with Largest() as largest:
        optimizer = KFAC(model, plain_config(structure=structure, refresh_interval=2, kl_clip=0.1))
        for _ in range(3):
            with optimizer.capture() as captured:
                output = model(tokens)
            optimizer.observe(captured, output, loss)
            optimizer.zero_grad()
            value = loss(output, tokens)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
    assert losses[2] < losses[0] - 0.01
    assert largest.entries <= 2**22  # a factor would have 2.5e9


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
def test_frequencies_of_tokens_copy_no_gradient(kind: torch.dtype, weighted: bool) -> None:
    table, tokens = nn.Embedding(7, 50, padding_idx=2), torch.arange(12).reshape(4, 3) % 7
    weights = torch.linspace(0, 2, 4) if weighted else None
    uses = [
        Use(table, Inputs.of((tokens,)), (randn(4, 3, 50).to(dtype),), None, None, weights=weights)
        for dtype in (kind, torch.float64)
    ]
    with Largest() as largest:
        counts, divisor = token_factor(table, uses[:1])
    wanted, of_all = token_factor(table, uses[1:])
    assert counts.dtype == torch.float32 and divisor == pytest.approx(of_all)
    close(counts.double(), wanted, rtol=1e-6)
    assert largest.entries <= 12


# --- layers that are left out ---------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.body = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(2)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for part in self.body:
            hidden = hidden + part(hidden)
        output: Tensor = self.head(hidden)
        return output


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("head",), "head.weight head.bias"),
        (
            ("body",),
            "body.0.0.weight body.0.0.bias body.0.1.weight body.0.1.bias "
            "body.1.0.weight body.1.0.bias body.1.1.weight body.1.1.bias",
        ),
        (
            ("body.*.1", "table"),
            "table.weight body.0.1.weight body.0.1.bias body.1.1.weight body.1.1.bias",
        ),
        (
            (nn.Embedding, nn.LayerNorm),
            "table.weight body.0.0.weight body.0.0.bias body.1.0.weight body.1.0.bias",
        ),
    ],
)
def test_skipped_layers_get_what_parameters_outside_of_layers_get(skip: Any, left: str) -> None:
    model = Nested().double()
    curvature = Preconditioner(model, skip=skip)
    rest = [block for block in curvature.blocks if isinstance(block, DiagonalBlock)]
    assert [name for block in rest for name in block.names] == left.split()
    covered = [name for block in curvature.blocks for name in block.names]
    assert sorted(covered) == sorted(name for name, _ in model.named_parameters())
    tokens = torch.randint(5, (7, 2), generator=seeded(1))
    optimizer = KFAC(model, skip=skip)
    for source in (None, Exact()):
        with optimizer.capture() as captured:
            output = model(tokens)
        optimizer.observe(captured, output, GaussianLoss(), source=source)
        optimizer.zero_grad()
        GaussianLoss()(output, torch.ones_like(output)).backward()
        optimizer.step()


def test_a_tied_weight_is_left_out_with_any_of_its_layers() -> None:
    model = build(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    curvature = Preconditioner(model, skip=("2",))
    rest = [name for b in curvature.blocks if isinstance(b, DiagonalBlock) for name in b.names]
    assert rest == ["0.weight", "2.bias"]


@pytest.mark.parametrize("skip", [("haed",), (nn.Conv2d,), ("body.3",), ("",)])
def test_an_entry_that_matches_nothing_is_refused(skip: Any) -> None:
    with pytest.raises(ValueError, match="skip names no layer of the module: "):
        KFAC(Nested(), skip=skip)
