"""Bayes by Backprop: its objective, its samples, and local reparameterisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from acktr.kfac import BayesByBackprop, Replicas
from tests.tools.kfac import build, mlp, parameters, randn
from tests.tools.noisy import ETA, LAMBDA, TAU, gaussian, linear_data, linear_model

SIZE = 50


def made(model: nn.Module, **settings: object) -> BayesByBackprop:
    plain: dict[str, object] = {"prior_variance": ETA, "kl_weight": LAMBDA}
    return BayesByBackprop(model, data_size=SIZE, **plain | settings)  # type: ignore[arg-type]


def test_the_divergence_is_that_of_torch() -> None:
    posterior = made(mlp())
    total = 0.0
    for name, deviation in posterior.posterior_std().items():
        q = Normal(posterior.module.get_parameter(name), deviation)
        prior = Normal(torch.zeros_like(deviation), ETA**0.5)
        total += float(kl_divergence(q, prior).detach().sum())
    assert float(posterior.kl()) == pytest.approx(total, rel=1e-10)
    assert float(posterior.penalty()) == pytest.approx(LAMBDA / SIZE * total, rel=1e-10)


def test_gradients_are_those_of_the_elbo() -> None:
    """Linear regression: X^T (y - X mu) tau - lambda mu / eta, and that by sigma, on average."""
    inputs, targets, rows = linear_data(outputs=1)
    posterior = made(linear_model(outputs=1), initial_rho=-1.0)
    mean = posterior.module.get_parameter("0.weight")
    (sigma, _), loss = posterior.posterior_std().values(), gaussian()
    weight = torch.cat([mean, posterior.module.get_parameter("0.bias")[:, None]], dim=1).detach()
    gradients = []
    for _ in range(300):
        objective = loss(posterior(inputs), targets) + posterior.penalty()
        found = torch.autograd.grad(objective, [mean, posterior.rho[0]])
        gradients.append(-SIZE * torch.cat(found))
    drawn = torch.stack(gradients)
    residual = TAU * (targets - rows @ weight.mT).mT @ inputs
    by_mean = residual - LAMBDA * mean.detach() / ETA
    curvature = TAU * inputs.square().sum(0)
    by_sigma = -curvature * sigma - LAMBDA * (sigma / ETA - 1 / sigma)
    by_rho = by_sigma * torch.sigmoid(posterior.rho[0].detach())
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - torch.cat([by_mean, by_rho])).abs() < 4.5 * error).all())


def shared(posterior: BayesByBackprop, inputs: Tensor, count: int) -> Tensor:
    return torch.stack([posterior(inputs).detach().flatten() for _ in range(count)])


@pytest.mark.parametrize("kind", ["linear", "convolution", "replicas"])
def test_local_draws_have_the_same_mean_and_variance_for_one_input(kind: str) -> None:
    """N(M a, sum_j sigma_ij^2 a_j^2); a weight correlates two inputs, and the trick does not."""
    makers = {
        "linear": lambda: build(nn.Linear(3, 2)),
        "convolution": lambda: build(nn.Conv1d(3, 2, 1)),
        "replicas": lambda: build(Replicas(2, 3, 1)),
    }
    one = randn(1, 2, 3) if kind == "replicas" else randn(1, 3)
    inputs = torch.cat([one, one])
    inputs = inputs[..., None] if kind == "convolution" else inputs
    count, found = 600, []
    for local in (False, True):
        posterior = made(makers[kind](), local=local, initial_rho=0.0)
        draws = shared(posterior, inputs, count)
        exact = posterior.module(inputs).detach().flatten()
        variance = 0.6931471805599453**2 * (1 + one.square().sum(-1)).expand(2, -1)
        variance = variance.flatten() if kind == "replicas" else variance.repeat_interleave(2)
        assert bool(((draws.mean(0) - exact).abs() < 4.5 * (variance / count).sqrt()).all())
        assert bool(((draws.var(0) / variance - 1).abs() < 4.5 * (2 / count) ** 0.5).all())
        found.append(float(torch.corrcoef(draws[:, [0, 2]].mT)[0, 1]))
    assert found[0] > 0.999
    assert abs(found[1]) < 4.5 / count**0.5


def test_it_reaches_the_mean_field_optimum() -> None:
    inputs, targets, rows = linear_data(outputs=1)
    posterior = made(linear_model(outputs=1), local=True)
    optimizer, loss = torch.optim.Adam(posterior.parameters(), lr=0.1), gaussian()
    for turn in range(250):
        optimizer.param_groups[0]["lr"] = 0.1 if turn < 150 else 0.01
        optimizer.zero_grad()
        (loss(posterior(inputs), targets) + posterior.penalty()).backward()
        optimizer.step()
    precision = TAU * rows.square().sum(0) / LAMBDA + 1 / ETA
    ratio = posterior.posterior_std()["0.weight"][0].square() * precision[:6]
    assert bool(((ratio - 1).abs() < 0.15).all())


def test_the_module_holds_the_mean_and_own_generators_draw() -> None:
    posterior = made(mlp(), local=True)
    before, state = parameters(posterior.module), torch.get_rng_state()
    posterior(randn(2, 4))
    assert posterior.predict(randn(2, 4), 3).shape == (3, 2, 3)
    assert posterior.sample(2)["0.weight"].shape == (2, 5, 4)
    assert all(torch.equal(p, before[n]) for n, p in parameters(posterior.module).items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data_size": 0}, "data_size"),
        ({"data_size": 5, "prior_variance": 0.0}, "prior_variance must be a finite number > 0"),
        ({"data_size": 5, "kl_weight": -1.0}, "kl_weight must be"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BayesByBackprop(mlp(), **settings)  # type: ignore[arg-type]


# --- what local draws leave out -------------------------------------------------------------------


class Attending(nn.Module):
    """Attention, which uses its last projection without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.attention(inputs, inputs, inputs, need_weights=False)[0]
        return output


class TwoWays(nn.Module):
    """A layer that is called, and whose weight is used beside."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(input=inputs) @ self.layer.weight
        return output


def shared_head() -> nn.Module:
    model = build(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    return model


def reparametrised() -> nn.Module:
    layer: Any = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    return build(layer)


class Doubled(nn.Linear):
    """A layer whose output is no linear function of its input."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).square()


@pytest.mark.parametrize(
    "make, left",
    [
        (Attending, set()),
        (TwoWays, set()),
        (shared_head, set()),
        (reparametrised, set()),
        (lambda: build(nn.Linear(4, 4), Doubled(4, 4)), {"0"}),
        (lambda: build(nn.Linear(4, 4), nn.Linear(4, 3).requires_grad_(False)), {"0"}),
        (mlp, {"0", "2"}),
    ],
)
def test_only_layers_that_are_surely_called_draw_their_outputs(make: Any, left: set[str]) -> None:
    """The weights of all others are drawn as they are."""
    posterior = made(make().double(), local=True, initial_rho=0.0)
    inputs = randn(2, 3, 4)
    for _ in range(2):
        posterior(inputs)
    assert set(posterior._layers) == left


@pytest.mark.parametrize("make", [Attending, TwoWays, shared_head])
def test_weights_outside_of_called_layers_have_noise_and_a_gradient(make: Any) -> None:
    """A first pass as any other: the deviation of every weight is in the graph of the output."""
    torch.manual_seed(1)
    posterior = made(make().double(), local=True, initial_rho=0.0)
    output = posterior(randn(2, 3, 4))
    found = torch.autograd.grad(output.square().sum(), list(posterior.rho))
    assert all(bool(gradient.any()) for gradient in found)


def test_the_last_projection_of_attention_has_the_variance_of_its_weights() -> None:
    """With all other deviations at zero, each output is N(., sigma^2 (1 + |a|^2))."""
    model = Attending().double()
    posterior = made(model, local=True, initial_rho=-60.0)
    rho = dict(zip(posterior._names, posterior.rho, strict=True))
    with torch.no_grad():
        rho["attention.out_proj.bias"].fill_(0.0)
        model.attention.out_proj.weight.zero_()
        model.attention.out_proj.bias.zero_()
    inputs = randn(1, 2, 4)
    draws = torch.stack([posterior(inputs).detach().flatten() for _ in range(400)])
    ratio = draws.var(0) / 0.6931471805599453**2
    assert bool(((ratio - 1).abs() < 4.5 * (2 / 400) ** 0.5).all())


def test_layers_that_are_called_by_keyword_draw_their_outputs() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.layer(input=inputs)
            return output

    named, plain = Keyword().double(), build(nn.Linear(4, 3))
    plain[0].load_state_dict(named.layer.state_dict())
    inputs = randn(5, 4)
    found = [made(model, local=True, initial_rho=0.0)(inputs) for model in (named, plain)]
    assert torch.equal(*found)
