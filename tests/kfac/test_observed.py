"""Products with the exact Fisher of the pass that was observed, not of another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import KFAC, CategoricalLoss, GaussianLoss, SumLoss, fisher_gram
from acktr.kfac.fisher.extent import stride
from acktr.kfac.fisher.observed import Observed
from tests.tools.exact import Apply
from tests.tools.kfac import build, plain_config, randn, same, set_gradients
from tests.tools.product_cases import close, directions

LOSS = CategoricalLoss()
Named = dict[str, Tensor]


class Attention(nn.Module):
    """Torch's fused attention with dropout, over (N, T, D)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(4, 12), nn.Linear(4, 3), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        return self.out(functional.dropout(mixed[:, 0], 0.3))


class Recurrent(nn.Module):
    """A cell over time whose hidden state keeps one mask."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = functional.dropout(torch.ones(len(x), 5, dtype=x.dtype), 0.4)
        hidden = torch.zeros_like(mask)
        for step in x.unbind(1):
            hidden = self.cell(step, hidden) * mask
        return self.head(hidden)


def flat() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    )


def layers() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 3))


def normed() -> nn.Module:
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6))
    return nn.Sequential(spectral, nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def jacobian(output: Tensor, parameters: Named) -> Tensor:
    """dz / dtheta row by row, (entries, P)."""
    rows = []
    for entry in output.flatten():
        row = torch.autograd.grad(
            entry, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        pairs = zip(row, parameters.values(), strict=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        )
    return torch.stack(rows)


def dense_gram(output: Tensor, parameters: Named, vectors: list[Named]) -> Tensor:
    """V^T J^T H J V / terms for a softmax, with everything written out."""
    flat = torch.stack([torch.cat([v[n].flatten() for n in parameters]) for v in vectors], 1)
    tangents = (jacobian(output, parameters) @ flat).reshape(-1, output.shape[-1], len(vectors))
    p = output.detach().softmax(-1).reshape(-1, output.shape[-1])
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("tci,tcd,tdj->ij", tangents, h, tangents) / len(p)


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[Tensor], Tensor]]] = {
    "dropout and batch statistics": (flat, randn(7, 4), lambda z: z),
    "rows left out": (flat, randn(7, 4), lambda z: z[torch.arange(7) != 2]),
    "padded tokens": (layers, randn(3, 4, 4), lambda z: z[torch.arange(12).reshape(3, 4) % 3 > 0]),
    "fused attention": (lambda: Attention(0.3), randn(3, 5, 4), lambda z: z),
    "fused attention without dropout": (lambda: Attention(0.0), randn(3, 5, 4), lambda z: z),
    "recurrent, classes second": (Recurrent, randn(5, 3, 4), lambda z: 2 * z.flip(1)),
    "spectral norm": (normed, randn(7, 4), lambda z: z),
}


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("name", CASES)
def test_exact_forms_are_those_of_the_observed_pass(name: str, rule: Any) -> None:
    make, inputs, used = CASES[name]
    torch.manual_seed(3)
    model = build(make())
    config = plain_config(quadratic="exact", momentum=0.0, kl_clip=1e-3)
    optimizer = KFAC(model, config, step_rule=rule)
    parameters = dict(model.named_parameters())
    state = torch.get_rng_state()
    with optimizer.capture() as captured:
        output = used(model(inputs))
    optimizer.observe(captured, output, LOSS)
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        again = used(model(inputs)) if name != "spectral norm" else output
    torch.testing.assert_close(again, output, rtol=1e-12, atol=1e-12)
    target = torch.zeros(output.shape[:-1], dtype=torch.int64)
    _, vectors = directions(model, 2)
    wanted = dense_gram(again, parameters, vectors)
    torch.autograd.backward(LOSS(output, target))  # which frees the graph of the pass
    observed = optimizer.curvature.observed
    assert observed is not None
    close(observed.grams(model, vectors)[0], wanted)
    close(optimizer.curvature.region.quadratic(vectors[0]), wanted[0, 0])
    optimizer.step()
    assert optimizer.last_step is not None
    assert observed.followed is None


class Once(torch.autograd.Function):
    """A sine with no second derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        made: Tensor = x.sin()
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        product: Tensor = gradient * ctx.saved_tensors[0].cos()
        return product

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        product: Tensor = tangent * ctx.saved_tensors[0].cos()
        return product


def test_without_a_second_derivative_the_pass_runs_again_with_its_mask() -> None:
    middle = [Apply(lambda x: Once.apply(x)), nn.Dropout(0.5)]  # type: ignore[no-untyped-call]
    model = build(nn.Linear(4, 6), *middle, nn.Linear(6, 3))
    plain = build(nn.Linear(4, 6), Apply(torch.sin), nn.Dropout(0.5), nn.Linear(6, 3))
    inputs, forms = randn(7, 4), []
    for net in (model, plain):
        torch.manual_seed(1)
        optimizer = KFAC(net, plain_config(quadratic="exact"))
        with optimizer.capture() as captured:
            output = net(inputs)
        optimizer.observe(captured, output, LOSS)
        torch.rand(3)
        forms.append(optimizer.curvature.region.quadratic(directions(plain, 1)[1][0]))
    close(forms[0], forms[1])


@pytest.mark.parametrize("middle", [Apply(torch.sin), Apply(lambda x: Once.apply(x))])  # type: ignore[no-untyped-call]
def test_under_autocast_forms_are_those_of_the_lower_precision(middle: nn.Module) -> None:
    """The graph is followed, or the module runs again; either way within bfloat16's rounding."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), middle, nn.Flatten(), nn.Linear(72, 5)).float()
    inputs = torch.randn(256, 2, 5, 5)
    for seed in range(4):  # u . (J v) can agree by luck
        found = directions(model, 2, seed=seed)[1]
        vectors = [{name: v.float() for name, v in vector.items()} for vector in found]
        optimizer = KFAC(model, plain_config(quadratic="exact"))
        with optimizer.capture() as captured, torch.autocast("cpu", torch.bfloat16):
            output = model(inputs).float()
        optimizer.observe(captured, output, LOSS)
        observed = optimizer.curvature.observed
        assert observed is not None
        wanted = fisher_gram(model, (inputs,), LOSS, vectors)
        forms = observed.grams(model, vectors)[0]
        assert (observed.followed is not None) == (middle.function is torch.sin)
        assert float((forms - wanted).norm() / wanted.norm()) < 0.02
        assert observed.extent is not None and stride(*observed.extent) > 1
        few = observed.estimated_grams(model, vectors, 0, 8)
        assert few is not None and float((few.grams[0] - wanted).norm() / wanted.norm()) < 0.5
        moved = {name: 1e-2 * v for name, v in vectors[0].items()}
        kl = observed.estimated_kl(model, moved, 0, 8)
        assert kl is not None and float(kl / wanted[0, 0]) == pytest.approx(5e-5, rel=0.5)


class Heads(nn.Module):
    """Shared trunk, a policy and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = functional.dropout(self.trunk(x).tanh(), 0.2)
        return self.policy(hidden), self.value(hidden)


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_the_parts_of_a_sum_add_up_to_the_whole(reduction: Any) -> None:
    model, inputs = build(Heads()), randn(6, 4)
    parts = (CategoricalLoss(reduction=reduction), GaussianLoss(std=0.7, reduction=reduction))
    loss = SumLoss(parts=parts, weights=(1.0, 0.3))
    optimizer = KFAC(model, plain_config(quadratic="exact"))
    state = torch.get_rng_state()
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, loss)
    _, vectors = directions(model, 2)
    observed = optimizer.curvature.observed
    assert isinstance(observed, Observed)
    grams = observed.grams(model, vectors)
    assert grams.shape == (2, 2, 2)
    torch.set_rng_state(state)
    close(grams.sum(0), fisher_gram(model, (inputs,), loss, vectors))
    for index, (part, weight) in enumerate(zip(parts, (1.0, 0.3), strict=True)):
        with torch.random.fork_rng():
            torch.set_rng_state(state)
            again = model(inputs)[index]
        tangents = (
            jacobian(again, dict(model.named_parameters()))
            @ torch.cat([vectors[0][n].flatten() for n, _ in model.named_parameters()])
        ).reshape(again.shape)
        form = (tangents * part.hessian_product(again, tangents)).sum() / (
            part.normalizer(again) or 1
        )
        close(grams[index, 0, 0], weight * form)


def test_a_quadratic_model_with_dropout_predicts_the_observed_pass() -> None:
    """Squared error and a layer that is linear: the model is exact, for the observed mask alone."""
    model, inputs = build(nn.Dropout(0.5), nn.Linear(6, 2)), randn(8, 6)
    loss, target = GaussianLoss(), randn(8, 2, seed=5)
    optimizer = KFAC(model, plain_config(kl_clip=None), step_rule="quadratic_model")
    state = torch.get_rng_state()
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, loss)
    set_gradients(model)
    model.zero_grad()
    before = loss(output, target)
    torch.autograd.backward(before)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    moved = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    torch.set_rng_state(state)
    after = loss(model(inputs), target)
    slope = sum(float((gradients[n] * moved[n]).sum()) for n in moved)
    assert optimizer.last_step is not None
    curved = float(optimizer.last_step.quadratic) / 2
    assert float((after - before).detach()) == pytest.approx(slope + curved, rel=1e-9)


@pytest.mark.parametrize("quadratic", ["exact", "corrected", "kronecker"])
def test_passes_without_gradients_are_torchs_own(quadratic: Any) -> None:
    """The fast path of transformers fills padded positions with zeros."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    model = nn.Sequential(nn.GRU(3, 8, batch_first=True), encoder)
    optimizer = KFAC(model, plain_config(quadratic=quadratic), skip=["0"])
    x = torch.randn(4, 5, 8)
    padding = torch.arange(5).repeat(4, 1) > torch.tensor([[4], [2], [3], [1]])
    steps = torch.randn(4, 5, 3)
    with torch.no_grad():
        wanted, hidden = encoder(x, src_key_padding_mask=padding), model[0](steps)[0]
        with optimizer.capture():
            assert same(encoder(x, src_key_padding_mask=padding), wanted)
            torch.testing.assert_close(model[0](steps)[0], hidden)
    assert bool((wanted[padding] == 0).all())
