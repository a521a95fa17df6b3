"""Parameters that no layer claims: the diagonal of their Fisher from the gradient of batches."""

from __future__ import annotations

import itertools
import warnings
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
    FactorError,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    Sampled,
    SumLoss,
    curved_names,
    dense_fisher,
    dense_inverse,
    dense_kfac,
)
from acktr.kfac.blocks import diagonal
from acktr.kfac.blocks.diagonal import PRIOR, DiagonalBlock
from acktr.kfac.guard import NoStatisticsWarning
from acktr.kfac.losses import sources
from acktr.kfac.losses.terms import Reduction
from tests.tools.kfac import plain_config, randn, same, seeded, snapshot
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


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_entries_are_drawn_to_their_mean_by_the_batches_seen(decay: float) -> None:
    model = filled(Pooling())
    curvature = observed(model, randn(4, 3, 3), GaussianLoss(), stat_decay=decay)
    for turn in range(4):
        if turn:
            with curvature.capture() as captured:
                output = model(randn(4, 3, 3, seed=turn))
            curvature.observe(captured, output, GaussianLoss())
        weights = decay ** torch.arange(turn + 1, dtype=torch.float64)
        batches = float(weights.sum().square() / weights.square().sum())
        for block in rest(curvature).values():
            moment = block.moment.mean()
            wanted = (batches * moment + PRIOR * moment.mean()) / (batches + PRIOR)
            torch.testing.assert_close(block.fisher(), wanted, rtol=1e-12, atol=0)
            assert float(block.fisher().mean()) == pytest.approx(float(moment.mean()), rel=1e-12)


def first_step(seed: int) -> float:
    """Length of a step after one batch, over that with the exact diagonal of its Fisher."""
    torch.manual_seed(seed)
    model, inputs = nn.Bilinear(6, 6, 8).double(), randn(32, 6, seed=seed)
    curvature = Preconditioner(model, plain_config(damping=1e-8), seed=seed)
    with curvature.capture() as captured:
        output = model(inputs, inputs)
    curvature.observe(captured, output, GaussianLoss())
    GaussianLoss()(output, randn(32, 8, seed=seed + 50)).backward()
    gradients = curvature.gradients()
    fisher = (inputs[:, :, None] * inputs[:, None]).square().mean(0)
    step = curvature.direction(gradients)["weight"].detach()
    return float(step.norm() / (gradients["weight"] / fisher).detach().norm())


def test_the_first_step_is_not_wild(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one batch's squares many are near zero: by themselves they would make steps of any length.

    Without a prior the median is 2000 times the right length.
    """
    lengths = [first_step(seed) for seed in range(20)]
    assert max(lengths) < 1.5 and min(lengths) > 0.5
    monkeypatch.setattr(diagonal, "PRIOR", 1e-6)
    assert max(first_step(seed) for seed in range(3)) > 100


@every_net
def test_dense_views_and_directions_agree(name: str) -> None:
    make, shape = NETS[name]
    model, inputs = filled(make()), randn(*shape)
    curvature = observed(model, inputs, GaussianLoss(), damping=0.07)
    curvature.refresh()
    assert curved_names(curvature) == [n for n, _ in model.named_parameters()]
    product = dense_kfac(curvature, damped=True) @ dense_inverse(curvature)
    torch.testing.assert_close(product, torch.eye(len(product)).double(), rtol=0, atol=1e-9)


def test_there_is_no_warning_and_a_step_of_the_right_length() -> None:
    model = filled(Pooling())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, plain_config(kl_clip=None, lr=1.0, momentum=0.0))
    with optimizer.capture() as captured:
        output = model(randn(4, 3, 3))
    optimizer.observe(captured, output, GaussianLoss())
    GaussianLoss()(output, torch.ones_like(output)).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    for name, block in rest(optimizer.curvature).items():
        parameter = dict(model.named_parameters())[name]
        wanted = before[name] - parameter.grad / (block.fisher() + 0.01)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("delay", [None, 1])
def test_training_resumes_bit_exactly(delay: int | None) -> None:
    def run(optimizer: KFAC, model: nn.Module, steps: range) -> None:
        for step in steps:
            inputs = randn(4, 3, 3, seed=step)
            with optimizer.capture() as captured:
                output = model(inputs)
            optimizer.observe(captured, output, CategoricalLoss(), source=Exact())
            optimizer.zero_grad()
            CategoricalLoss()(output, torch.arange(4) % 3).backward()
            optimizer.step()

    settings = plain_config(refresh_interval=2, refresh_delay=delay)
    model = filled(Recurrent())
    optimizer = KFAC(model, settings)
    run(optimizer, model, range(5))
    other = Recurrent().double()
    other.load_state_dict(model.state_dict())
    resumed = KFAC(other, settings, seed=9)
    resumed.load_state_dict(snapshot(optimizer))
    run(optimizer, model, range(5, 9))
    run(resumed, other, range(5, 9))
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    optimizer.close()
    resumed.close()


def test_a_state_of_another_setting_is_refused() -> None:
    model = filled(Recurrent())
    for setting in ("gradient", "dense"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = Preconditioner(model, plain_config(small_parameters=setting))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"no statistics of .*made with another small_param"):
            Preconditioner(model).load_state_dict(other.state_dict())


def test_batches_of_nan_are_counted_and_are_an_error_in_the_end() -> None:
    model = filled(Pooling())
    curvature = Preconditioner(model, plain_config(max_failures=3))
    for turn in range(4):
        with curvature.capture() as captured:
            output = model(randn(4, 3, 3) * (1.0 if turn == 0 else torch.nan))
        curvature.observe(captured, output, GaussianLoss())
        if turn < 3:
            curvature.refresh()
            assert bool(torch.isfinite(moments(curvature)).all())
    with pytest.raises(FactorError, match="parameter 'query': the statistics of 3 batches"):
        curvature.refresh()


def test_a_first_batch_of_nan_leaves_the_plain_gradient() -> None:
    model = filled(Pooling())
    curvature = observed(model, randn(4, 3, 3) * torch.nan, GaussianLoss())
    model(randn(4, 3, 3)).sum().backward()
    gradients = curvature.gradients()
    assert same(curvature.direction(gradients), gradients)
