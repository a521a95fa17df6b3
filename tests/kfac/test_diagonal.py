"""Parameters that no layer claims: the diagonal of their Fisher from the gradient of batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    Sampled,
    SumLoss,
    dense_fisher,
)
from acktr.kfac.blocks.diagonal import DiagonalBlock
from acktr.kfac.guard import NoStatisticsWarning
from acktr.kfac.losses import sources
from acktr.kfac.losses.terms import Reduction
from tests.tools.kfac import plain_config, randn, same, seeded
from tests.tools.product_cases import filled


class Pooling(nn.Module):
    """Attention of learnt queries over positions, made of raw parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(2, 3))
        self.key = nn.Parameter(torch.zeros(3, 3))
        self.temperature = nn.Parameter(torch.zeros(()))
        self.head = nn.Parameter(torch.zeros(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query @ (x @ self.key).mT * self.temperature.exp()
        return (scores.softmax(-1) @ x).flatten(1) @ self.head


class OwnGRU(nn.GRU):
    """A forward pass of its own, which no block knows."""

    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class OwnLSTM(nn.LSTM):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = OwnGRU(3, 2, batch_first=True)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.cells(x)[0][:, -1])
        return output


class Decoder(nn.Module):
    """A transposed convolution that is not a layer of its own, behind a normed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(3, 4))
        self.kernel = nn.Parameter(torch.zeros(2, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        up = nn.functional.conv_transpose1d(hidden.reshape(-1, 2, 2), self.kernel, stride=2)
        return up.reshape(*x.shape[:-1], 4)


class Mixing(nn.Module):
    """Samples meet in a normalisation over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 4))
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.last = nn.Parameter(torch.zeros(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(x @ self.first).tanh() @ self.last
        return output


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pooling": (Pooling, (4, 3, 3)),
    "gru": (Recurrent, (4, 3, 3)),
    "decoder": (Decoder, (4, 3)),
    "batch norm": (Mixing, (5, 3)),
}
every_net = pytest.mark.parametrize("name", NETS)


def observed(
    model: nn.Module, inputs: Tensor, loss: OutputLoss[Any], source: Any = None, **settings: Any
) -> Preconditioner:
    curvature = Preconditioner(model, plain_config(**settings))
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, loss, source=source)
    return curvature


def rest(curvature: Preconditioner) -> dict[str, DiagonalBlock]:
    return {b.name: b for b in curvature.blocks if isinstance(b, DiagonalBlock)}


def moments(curvature: Preconditioner) -> Tensor:
    return torch.cat([block.moment.mean().flatten() for block in rest(curvature).values()])


def truth(curvature: Preconditioner, inputs: Tensor, loss: OutputLoss[Any]) -> Tensor:
    names = list(rest(curvature))
    return dense_fisher(curvature.module, (inputs,), loss, names).diagonal()


@every_net
def test_sampled_squares_have_the_diagonal_of_the_fisher_as_mean(name: str) -> None:
    make, shape = NETS[name]
    reduction: Reduction = "sum" if name in ("gru", "decoder") else "mean"
    model, inputs = filled(make()), randn(*shape)
    loss = GaussianLoss(std=0.7, reduction=reduction)
    curvature = observed(model, inputs, loss, stat_decay=0.0)
    draws = []
    for _ in range(400):
        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss, source=Sampled(2))
        draws.append(moments(curvature))
    found, exact = torch.stack(draws), truth(curvature, inputs, loss)
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all())
    assert float(error.max()) < 0.15 * float(exact.max())  # the test has the power to fail


def every_sign(monkeypatch: pytest.MonkeyPatch, count: int) -> Any:
    """Yield once for every pattern of signs, which the next observation has in all scalars."""
    for pattern in itertools.product((0.0, 1.0), repeat=count):
        drawn = torch.tensor(pattern, dtype=torch.float64)
        monkeypatch.setattr(sources.torch, "rand", lambda *_, drawn=drawn, **__: drawn.clone())
        yield


LOSSES: dict[str, OutputLoss[Any]] = {
    "categorical": CategoricalLoss(),
    "batchmean": GaussianLoss(std=0.5, reduction="batchmean"),
}


@every_net
@pytest.mark.parametrize("kind", LOSSES)
def test_exact_squares_average_to_the_diagonal_over_all_signs(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NETS[name]
    model, inputs, loss = filled(make()), randn(*shape), LOSSES[kind]
    curvature = observed(model, inputs, loss)
    found = []
    with monkeypatch.context() as patch:
        for _ in every_sign(patch, len(inputs)):
            found.append(moments(observed(model, inputs, loss, Exact(), stat_decay=0.0)))
    exact = truth(curvature, inputs, loss)
    torch.testing.assert_close(torch.stack(found).mean(0), exact, rtol=1e-10, atol=1e-14)
    assert float(torch.stack(found).std(0).max()) > 1e-3 * float(exact.max())


def test_empirical_squares_average_to_those_of_every_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs, target = filled(Pooling()), randn(4, 3, 3), randn(4, 3, seed=5)
    loss, found = GaussianLoss(), []
    with monkeypatch.context() as patch:
        for _ in every_sign(patch, 4):
            found.append(moments(observed(model, inputs, loss, Empirical(target))))
    wanted = torch.zeros_like(found[0])
    for x, y in zip(inputs, target, strict=True):
        gradients = torch.autograd.grad(loss(model(x[None]), y[None]), [*model.parameters()])
        wanted += torch.cat([g.flatten() for g in gradients]).square() / 4
    torch.testing.assert_close(torch.stack(found).mean(0), wanted, rtol=1e-10, atol=1e-14)


def test_two_heads_whose_outputs_lead_to_one_another_are_right_on_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.zeros(3, 2))
            self.last = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = (x @ self.first).tanh()
            return hidden, hidden @ self.last

    model, inputs = filled(Heads()), randn(4, 3)
    loss = SumLoss(parts=(GaussianLoss(), CategoricalLoss()), weights=(0.5, 2.0))
    with monkeypatch.context() as patch:
        signs = every_sign(patch, 4)
        found = [moments(observed(model, inputs, loss, Exact())) for _ in signs]
    exact = dense_fisher(model, (inputs,), loss).diagonal()
    torch.testing.assert_close(torch.stack(found).mean(0), exact, rtol=1e-10, atol=1e-14)


def test_signs_leave_the_blocks_of_layers_as_they_are() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layer(x) * self.scale
            return output

    model, inputs = filled(Scaled()), randn(5, 3)
    for source in (Exact(), Empirical(randn(5, 2, seed=3))):
        states = []
        for setting in ("diagonal", "dense"):
            curvature = observed(model, inputs, GaussianLoss(), source, small_parameters=setting)
            states.append(curvature.stats["layer"].state_dict())
        assert same(*states)


# --- parts, own losses, what is unused ------------------------------------------------------------


def test_parts_of_a_batch_add_their_own_squares() -> None:
    model, loss = filled(Recurrent()), GaussianLoss(reduction="mean")
    curvature = Preconditioner(model, plain_config(stat_decay=0.0))
    inputs, wanted = randn(7, 3, 3), torch.zeros(())
    twin = seeded(0)
    for part in (inputs[:4], inputs[4:6], inputs[6:]):
        with curvature.capture() as captured:
            output = model(part)
        curvature.observe(captured, output, loss, last=part is not None and len(part) == 1)
        scalar = loss.sampled(output, twin)
        gradients = torch.autograd.grad(scalar, list(model.cells.parameters()))
        wanted = wanted + torch.cat([g.flatten() for g in gradients]).square()
    torch.testing.assert_close(moments(curvature), wanted / 7, rtol=1e-12, atol=0)


def test_an_own_likelihood_counts_its_samples() -> None:
    model, noise = filled(Recurrent()), randn(4, 3, seed=2)
    for samples in (None, 8):
        curvature = Preconditioner(model)
        with curvature.capture() as captured:
            output = model(randn(4, 3, 3))
        scalar = (noise * output).sum()
        curvature.update_curvature(captured, scalar, samples=samples)
        gradients = torch.autograd.grad(scalar, list(model.cells.parameters()))
        wanted = torch.cat([g.flatten() for g in gradients]).square() / (samples or 4)
        torch.testing.assert_close(moments(curvature), wanted, rtol=1e-12, atol=0)


def test_an_own_likelihood_without_layers_needs_the_number_of_samples() -> None:
    curvature = Preconditioner(filled(Pooling()))
    with curvature.capture() as captured:
        output = curvature.module.forward(randn(4, 3, 3))  # whose result no hook sees
    with pytest.raises(ValueError, match="give update_curvature samples=N"):
        curvature.update_curvature(captured, output.sum())
    curvature.update_curvature(captured, output.sum(), samples=4)
    assert bool(torch.isfinite(moments(curvature)).all())


def test_frozen_parameters_rest_and_submodules_may_be_called() -> None:
    model = filled(Recurrent())
    optimizer = KFAC(model, plain_config(stat_decay=0.0))
    inputs = randn(4, 3, 3)
    bias = model.cells.bias_ih_l0
    kept = bias.detach().clone()
    for step in range(3):
        bias.requires_grad_(step == 0)
        with optimizer.capture() as captured:  # the module itself is not called
            output = model.head(model.cells(inputs)[0][:, -1])
        optimizer.observe(captured, output, GaussianLoss())
        optimizer.zero_grad()
        GaussianLoss()(output, torch.ones_like(output)).backward()
        optimizer.step()
        assert torch.equal(bias, kept) == (step > 0)
        kept = bias.detach().clone()


class Experts(nn.Module):
    """Raw parameters by turns, and one that is in no observed loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.outside = (nn.Parameter(torch.zeros(3, 2)) for _ in range(3))

    def forward(self, x: Tensor, turn: int) -> Tensor:
        return x @ (self.second if turn else self.first)


def test_a_parameter_that_a_batch_passes_by_counts_as_zero_once_it_was_seen() -> None:
    model = filled(Experts())
    curvature = Preconditioner(model, plain_config(stat_decay=0.5, damping=0.1))
    inputs, seen = randn(4, 3), []
    for turn in (0, 1):
        with curvature.capture() as captured:
            output = model(inputs, turn)
        curvature.observe(captured, output, GaussianLoss())
        seen.append(rest(curvature)["first"].moment.mean())
    torch.testing.assert_close(seen[1], seen[0] / 3, rtol=1e-12, atol=0)  # weights 1/3 and 2/3
    assert bool((rest(curvature)["second"].moment.mean() > 0).all())
    (model(inputs, 0) + inputs @ model.outside).sum().backward()
    gradients = curvature.gradients()
    with pytest.warns(NoStatisticsWarning, match="no statistics of outside: plain gradient steps"):
        step = curvature.direction(gradients)
    assert torch.equal(step["outside"], gradients["outside"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_nets_of_every_type_train(dtype: torch.dtype) -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = OwnLSTM(3, 4, num_layers=2, dropout=0.2, batch_first=True)
            self.norm = nn.BatchNorm1d(4)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"output": self.head(self.norm(self.cells(x)[0][:, -1]))}

    model = Several().to(dtype)
    optimizer = KFAC(model)
    before = [p.detach().clone() for p in model.cells.parameters()]
    for _ in range(3):
        with optimizer.capture() as captured:
            output = model(randn(8, 5, 3).to(dtype))["output"]
        optimizer.observe(captured, output, GaussianLoss())
        optimizer.zero_grad()
        GaussianLoss()(output, torch.ones_like(output)).backward()
        optimizer.step()
    for old, new in zip(before, model.cells.parameters(), strict=True):
        assert not torch.equal(old, new) and bool(torch.isfinite(new).all())
    kinds = {block.moment.value.dtype for block in rest(optimizer.curvature).values()}
    assert kinds == {torch.float32}


# --- the step -------------------------------------------------------------------------------------
