"""Bayes by Backprop: its objective, its samples, and local reparameterisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from acktr.kfac import BayesByBackprop, Replicas
from acktr.kfac.noisy.mean_field import _moved
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


# --- checkpoints ----------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A layer inside of a checkpoint, called or by its weight alone, and one outside."""

    def __init__(self, reentrant: bool, called: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant, self.called = reentrant, called

    def inner(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.second(hidden) if self.called else hidden @ self.second.weight
        return output.tanh()

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.first(inputs)
        return hidden + checkpoint(self.inner, hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_is_refused(reentrant: bool, called: bool, local: bool) -> None:
    """It would be computed again at the mean, and the gradients be wrong in silence."""
    posterior = made(Checkpointed(reentrant, called).double(), local=local)
    inputs = randn(3, 4)
    with pytest.raises(ValueError, match="needs a module without it"):
        posterior(inputs)
    with torch.no_grad():
        assert posterior(inputs).shape == posterior.predict(inputs, 2)[0].shape


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it_is_refused(reentrant: bool) -> None:
    posterior = made(mlp())
    with pytest.raises(ValueError, match="needs a module without it"):
        inputs = randn(3, 4).requires_grad_()
        output: Any = checkpoint(posterior, inputs, use_reentrant=reentrant)
        output.sum().backward()


def test_a_checkpoint_without_weights_gives_the_gradients_of_a_pass_without_it() -> None:
    """And so do passes of trained layers where no graph is made."""

    class Harmless(nn.Module):
        def __init__(self, plain: bool) -> None:
            super().__init__()
            self.layer, self.plain = nn.Linear(4, 4), plain

        def forward(self, inputs: Tensor) -> Any:
            with torch.no_grad():
                fixed = self.layer(inputs)
            hidden = self.layer(inputs) + fixed
            if self.plain:
                return hidden.tanh().square()
            return checkpoint(lambda h: h.tanh().square(), hidden, use_reentrant=False)

    found = []
    for plain in (True, False):
        torch.manual_seed(0)
        posterior = made(Harmless(plain).double(), initial_rho=0.0)
        output = posterior(randn(3, 4))
        found.append(torch.autograd.grad(output.sum(), list(posterior.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# --- hooks, types and generators ------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["before", "after"])
def test_layers_with_hooks_have_the_variance_of_their_weights(hook: str) -> None:
    """Those of (2 W) a and 2 (W a + b): four times sigma^2 |a|^2, and sigma^2 or four times it."""
    model = build(nn.Linear(3, 2))
    if hook == "before":
        handle = model[0].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    else:
        handle = model[0].register_forward_hook(lambda layer, args, output: 2 * output)
    posterior = made(model, local=True, initial_rho=0.0)
    inputs, count = randn(1, 3), 600
    for factor in (4.0, 1.0):
        weights = factor * inputs.square().sum()
        exact = 0.6931471805599453**2 * (weights + (factor if hook == "after" else 1.0))
        ratio = shared(posterior, inputs, count).var(0) / exact
        assert bool(((ratio - 1).abs() < 4.5 * (2 / count) ** 0.5).all())
        handle.remove()  # from the next pass on its outputs are drawn
    assert set(posterior._layers) == posterior._looked == {"0"}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_rows_of_zeros_have_gradients_in_half_precision(kind: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).to(kind)
    posterior = made(model, local=True)
    output = posterior(torch.cat([torch.zeros(1, 3), torch.ones(2, 3)]).to(kind))
    assert output.dtype == kind and float(output[0].detach().abs().max()) < 1e-14
    output.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in posterior.parameters())


def after(posterior: BayesByBackprop, steps: int) -> Tensor:
    optimizer = torch.optim.SGD(posterior.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (posterior(randn(5, 4)).square().mean() + posterior.penalty()).backward()
        optimizer.step()
    return torch.cat([*(p.detach().flatten() for p in posterior.parameters()), *draws(posterior)])


def draws(posterior: BayesByBackprop) -> list[Tensor]:
    return [weight.flatten() for weight in posterior.draw().values()]


def test_a_run_goes_on_from_a_state_bit_for_bit() -> None:
    posterior, other = made(mlp()), made(mlp(), seed=7)
    after(posterior, 2)
    other.load_state_dict(posterior.state_dict())
    assert torch.equal(after(posterior, 2), after(other, 2))


def test_states_with_other_generators_or_none_leave_ones_own() -> None:
    own = made(mlp(), seed=7)
    before, old = own.get_extra_state(), made(mlp()).state_dict()
    del old["_extra_state"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"_extra_state"'):
        own.load_state_dict(old)
    assert torch.equal(own.get_extra_state(), before)
    own.set_extra_state(torch.zeros(2, 16, dtype=torch.uint8))  # of CUDA
    assert torch.equal(own.get_extra_state(), before)
    for wrong in (torch.zeros(2, 3, dtype=torch.uint8), torch.tensor(1), None, before[:1]):
        with pytest.raises(ValueError, match="BayesByBackprop generators"):
            own.set_extra_state(wrong)


def test_generators_of_another_device_begin_with_a_number_of_the_former() -> None:
    """So that a module which is moved to and fro does not draw the same noise again."""
    former, place = torch.Generator().manual_seed(3), torch.device("cpu")
    first, second = _moved(former, place), _moved(former, place)
    assert first.initial_seed() != second.initial_seed() != former.initial_seed()
    again = _moved(torch.Generator().manual_seed(3), place)
    assert again.initial_seed() == first.initial_seed()


@pytest.mark.gpu
def test_a_posterior_that_is_moved_draws_there() -> None:
    posterior = made(mlp(), local=True)
    posterior.to("cuda")
    assert posterior(randn(2, 4).cuda()).is_cuda and posterior.draw()["0.weight"].is_cuda
