"""Which parameters have noise: layers of all kinds and their biases, or explicitly not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import CategoricalLoss, GaussianLoss, NoisyKFAC, Sampled, dense_fisher, dense_kfac
from tests.tools.exact import Apply
from tests.tools.kfac import build, parameters, randn
from tests.tools.noisy import context, covariance, names_of, noisy

SIZE = 30


def sampled_names(optimizer: NoisyKFAC) -> set[str]:
    """Names of the parameters that differ inside of a context, after two steps."""
    before = parameters(optimizer.module)
    with optimizer.sampled_params():
        inside = parameters(optimizer.module)
    return {name for name, p in before.items() if not torch.equal(inside[name], p)}


def trained(model: nn.Module, inputs: Tensor, **settings: Any) -> NoisyKFAC:
    plain = {"lr": 0.01, "initial_curvature": 0.3}
    optimizer = noisy(model, SIZE, **plain | settings)
    loss = GaussianLoss()
    for _ in range(2):
        targets = torch.zeros_like(model(inputs).detach())
        context(optimizer, inputs, targets, loss, Sampled())
        optimizer.step()
    return optimizer


class Tied(nn.Module):
    """An embedding with a padding index, and a head that shares its table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=None if tied else 0)
        self.head = nn.Linear(4, 6, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(tokens).tanh())
        return output


def convolutional(norm: nn.Module) -> nn.Sequential:
    last: Any = Apply(lambda y: y.flatten(1))
    return build(nn.Conv2d(2, 4, 2, groups=2), norm, nn.Tanh(), nn.Conv2d(4, 2, 2), last)


@pytest.mark.parametrize("structure", ["mvg", "emvg", "ffg"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=str
)
@pytest.mark.parametrize("sample_norms", [False, True])
def test_normalisations_are_deterministic_unless_asked(
    norm: nn.Module, structure: str, sample_norms: bool
) -> None:
    model = convolutional(norm)
    model.eval() if isinstance(norm, nn.BatchNorm2d) else None
    images = randn(5, 2, 4, 4)
    optimizer = trained(model, images, structure=structure, sample_norms=sample_norms)
    everything = {name for name, _ in model.named_parameters()}
    fixed = set() if sample_norms else {"1.weight", "1.bias"}
    assert sampled_names(optimizer) == everything - fixed
    assert set(optimizer.posterior_std()) == everything - fixed
    assert torch.isfinite(optimizer.kl())


@pytest.mark.parametrize("structure", ["mvg", "emvg", "ffg"])
@pytest.mark.parametrize("tied", [False, True])
def test_tables_have_noise_but_for_the_row_of_padding(structure: str, tied: bool) -> None:
    model = Tied(tied).double()
    optimizer = noisy(model, SIZE, structure=structure, lr=0.01, initial_curvature=0.3)
    tokens, loss = torch.arange(12).reshape(4, 3) % 6, CategoricalLoss()
    for _ in range(2):
        context(optimizer, tokens, tokens, loss, Sampled())
        optimizer.step()
    names = {"table.weight"} if tied else {"table.weight", "head.weight"}
    assert sampled_names(optimizer) == names
    table = optimizer.sample(2)["table.weight"]
    assert torch.equal(table[0, 0], table[1, 0]) != tied
    assert not torch.equal(table[0, 1], table[1, 1])


class Padded(nn.Module):
    """A table with a row of padding that is not zero, whose head may have it too, or its bags."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 6, bias=False)
        self.table = (nn.EmbeddingBag if kind == "bag" else nn.Embedding)(6, 4, padding_idx=2)
        if kind == "tied":
            self.table.weight = self.head.weight
        nn.init.normal_(self.table.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(tokens).tanh())
        return output


@pytest.mark.parametrize("kind", ["table", "tied", "bag"])
@pytest.mark.parametrize(
    "structure, form",
    [("mvg", "exact"), ("mvg", "factored"), ("emvg", "exact"), ("ffg", "exact")],
)
def test_the_row_of_padding_has_no_deviation_and_no_divergence(
    structure: str, form: str, kind: str
) -> None:
    """The others have the covariance of their draws, and the divergence of that dense Gaussian."""
    settings = {"structure": structure, "damping_form": form, "initial_curvature": 0.3}
    model, loss = Padded(kind).double(), CategoricalLoss()
    optimizer = noisy(model, SIZE, lr=0.01, **settings)
    tokens = torch.arange(12).reshape(4, 3) % 6
    targets = tokens[:, 0] if kind == "bag" else tokens
    before = parameters(model)
    for _ in range(2):
        context(optimizer, tokens, targets, loss, Sampled())
        optimizer.step()
    name = "head.weight" if kind == "tied" else "table.weight"
    assert torch.equal(model.table.weight[2], before[name][2]) == (kind != "tied")
    deviations, names = optimizer.posterior_std(), names_of(optimizer)
    found = covariance(optimizer, names)
    std = torch.cat([deviations[n].flatten() for n in names])
    assert not deviations[name][2].any() and deviations[name][[0, 1, 3, 4, 5]].all()
    torch.testing.assert_close(std.square(), found.diagonal(), rtol=1e-10, atol=1e-14)
    rest = std > 0
    mean = torch.cat([model.get_parameter(n).detach().flatten() for n in names])[rest]
    sigma, eta = found[rest][:, rest], 0.7
    exact = (sigma.trace() + mean.square().sum()) / eta - len(sigma) * (1 - math.log(eta))
    exact = 0.5 * (exact - torch.logdet(sigma))
    assert float(optimizer.kl()) == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("deterministic", [("0",), ("0.weight", "0.bias")])
def test_deterministic_names_have_no_noise_and_no_prior(deterministic: tuple[str, ...]) -> None:
    model = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = noisy(model, SIZE, deterministic=deterministic, external_damping=0.1)
    with optimizer.sampled_params(train=True) as captured:
        output = model(randn(9, 4))
        optimizer.observe(captured, output, GaussianLoss())
        (0.0 * output).sum().backward()  # nothing but the prior moves anything
    before = parameters(model)
    optimizer.step()
    moved = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert moved == {"2.weight", "2.bias"} == sampled_names(optimizer)


def test_every_part_has_the_variance_of_its_prior() -> None:
    """Where the data say nothing: the longest name counts, and "" is the rest."""
    model = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = noisy(model, SIZE, prior_variance={"": 0.3, "2": 0.9})
    with optimizer.sampled_params(train=True) as captured:
        output = 0.0 * model(randn(9, 4))
        optimizer.observe(captured, output, GaussianLoss())
        output.sum().backward()
    optimizer.step()
    deviations = optimizer.posterior_std()
    for name, variance in {"0.weight": 0.3, "0.bias": 0.3, "2.weight": 0.9, "2.bias": 0.9}.items():
        torch.testing.assert_close(
            deviations[name].square(), torch.full_like(deviations[name], variance)
        )
    assert float(optimizer.kl()) == pytest.approx(
        sum(
            float(p.square().sum()) / (2 * (0.9 if name.startswith("2") else 0.3))
            for name, p in parameters(model).items()
        )
    )


class Raw(nn.Module):
    """A parameter outside of layers, and a lone bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layer.weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs) * self.scale
        return output


def test_parameters_outside_of_layers_have_noise_too() -> None:
    optimizer = trained(Raw().double(), randn(9, 4))
    assert sampled_names(optimizer) == {"layer.bias", "scale"}
    found, scale = covariance(optimizer), optimizer.kl_weight / SIZE
    fisher = dense_kfac(optimizer.curvature)
    eye = torch.eye(len(fisher), dtype=fisher.dtype)
    torch.testing.assert_close(found, scale * torch.linalg.inv(fisher + scale / 0.7 * eye))


@pytest.mark.parametrize("kind", ["linear", "convolution", "recurrence"])
def test_the_diagonal_of_layers_is_that_of_the_fisher(kind: str) -> None:
    """Sample by sample, for any number of samples and positions."""
    last: Any = Apply(lambda y: y.flatten(1))
    if kind == "linear":
        model, inputs = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), randn(7, 4)
    elif kind == "convolution":
        model = build(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 2), last)
        inputs = randn(7, 4, 4)
    else:
        end: Any = Apply(lambda y: y[0][:, -1])
        model = build(nn.Linear(4, 4), nn.LSTM(4, 3, batch_first=True), end)
        inputs = randn(7, 3, 4)
    optimizer = noisy(model, SIZE, structure="ffg", sample_norms=True)
    targets = torch.zeros_like(model(inputs).detach())
    context(optimizer, inputs, targets, GaussianLoss(std=0.6))
    optimizer.curvature.fold()
    exact = dense_fisher(model, (inputs,), GaussianLoss(std=0.6)).diagonal()
    found = dense_kfac(optimizer.curvature)
    if kind == "recurrence":  # biases of its gates are blocks of their own
        torch.testing.assert_close(found.diagonal(), exact)
        return
    torch.testing.assert_close(found, exact.diag())
