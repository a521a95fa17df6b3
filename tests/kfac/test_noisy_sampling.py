"""Noise has the covariance of the posterior: exactly by its root, and drawn within its errors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import GaussianLoss, NoisyKFAC, Replicas, dense_kfac, flattened
from acktr.kfac.noisy.posterior import standard_normal
from tests.tools.exact import Apply
from tests.tools.kfac import NoHostSync, build, mlp, parameters, randn
from tests.tools.noisy import (
    ETA,
    LAMBDA,
    STRUCTURES,
    context,
    covariance,
    expected,
    gaussian,
    names_of,
    noisy,
    refreshed,
    within,
)

SIZE = 40


def grouped() -> nn.Module:
    last: Any = Apply(lambda y: y.flatten(1))
    return build(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 2), last)


def split() -> nn.Module:
    last: Any = Apply(lambda y: y.flatten(1))
    return build(Replicas(2, 2, 3), nn.Tanh(), Replicas(2, 3, 1), last)


def normed() -> nn.Module:
    return build(nn.Linear(4, 3, bias=False), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 2))


MODELS = {
    "mlp": (mlp, (4,), 3),
    "grouped": (grouped, (4, 3), 2),
    "replicas": (split, (2, 2), 2),
    "norm": (normed, (4,), 2),
}


def observed(kind: str, **settings: Any) -> NoisyKFAC:
    """A network after two batches, the second of which finds the basis of the first."""
    make, shape, outputs = MODELS[kind]
    optimizer = noisy(make(), SIZE, **settings)
    for seed in (1, 2):
        inputs = randn(20, *shape, seed=seed)
        context(optimizer, inputs, randn(20, outputs, seed=seed + 5), gaussian())
        refreshed(optimizer)
    return optimizer


@pytest.mark.parametrize("structure, form", STRUCTURES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_root_of_the_noise_gives_the_covariance(kind: str, structure: str, form: str) -> None:
    """Unit vectors in place of normal numbers: R R^T = (lambda / N) (F + gamma_in I)^-1."""
    if structure == "tridiagonal" and kind in ("grouped", "replicas"):
        pytest.skip("a chain is one of linear layers")
    settings = {"structure": structure, "damping_form": form, "sample_norms": True}
    optimizer = observed(kind, **settings)
    found = covariance(optimizer)
    if form == "factored":  # dense_kfac splits the damping of the next refresh
        exact = LAMBDA / SIZE * torch.linalg.inv(dense_kfac(optimizer.curvature, damped=True))
    else:
        exact = expected(optimizer)
    assert len(found) == sum(p.numel() for p in optimizer.module.parameters())
    assert float((found - exact).abs().max()) < 1e-12 * float(exact.abs().max())
    deviations = flattened(optimizer.posterior_std(), names_of(optimizer))
    torch.testing.assert_close(deviations.square(), exact.diagonal(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("structure, form", STRUCTURES[:4])
def test_noise_of_an_output_is_that_of_the_basis(structure: str, form: str) -> None:
    """W a has the covariance Q_G diag(v (Q_A^T a)^2) Q_G^T; factored (a^T Sigma_A a) Sigma_G."""
    optimizer = observed("mlp", structure=structure, damping_form=form)
    scale, row = LAMBDA / SIZE, torch.cat([randn(4), torch.ones(1).double()])
    gamma = scale / ETA
    block: Any = next(b for b in optimizer.curvature.blocks if b.names[0] == "0.weight")
    out = len(optimizer.module.get_parameter("0.bias"))
    turn = torch.cat(
        [torch.arange(out * 4).reshape(out, 4), out * 4 + torch.arange(out)[:, None]], 1
    )
    sigma = covariance(optimizer, ["0.weight", "0.bias"])[turn.flatten()][:, turn.flatten()]
    found = torch.einsum("ipjq,p,q->ij", sigma.reshape(out, 5, out, 5), row, row)
    if form == "factored":
        a, g = block.a.mean(), block.g.mean()
        pi = (a.trace() / len(a) / (g.trace() / len(g))).sqrt()
        inner = torch.linalg.inv(a + pi * gamma**0.5 * torch.eye(5).double())
        outer = torch.linalg.inv(g + gamma**0.5 / pi * torch.eye(out).double())
        exact = scale * (row @ inner @ row) * outer
    elif structure == "ffg":
        exact = (scale / block.damped(gamma) * row.square()).sum(1).diag()
    else:
        (_, left), (_, right) = (torch.linalg.eigh(m.mean()) for m in (block.g, block.a))
        v = scale / block.damped(gamma)
        exact = left @ (v @ (right.mT @ row).square()).diag() @ left.mT
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure, form", STRUCTURES)
def test_drawn_noise_has_the_covariance(structure: str, form: str) -> None:
    optimizer = observed("mlp", structure=structure, damping_form=form)
    normal = partial(standard_normal, optimizer.curvature.noise)
    names = names_of(optimizer)
    draws = torch.stack([flattened(optimizer.posterior.draw(normal), names) for _ in range(2000)])
    exact = covariance(optimizer)
    within(draws, exact)
    mean = draws.mean(0)
    assert bool((mean.abs() < 5 * (exact.diagonal() / len(draws)).sqrt()).all())


def test_samples_are_around_the_mean_with_those_deviations() -> None:
    optimizer = observed("mlp")
    sampled = optimizer.sample(300)
    for name, deviation in optimizer.posterior_std().items():
        mean = optimizer.module.get_parameter(name).detach()
        assert sampled[name].shape == (300, *mean.shape)
        errors = (sampled[name] - mean) / deviation
        assert float(errors.mean().abs()) < 0.15
        assert abs(float(errors.std()) - 1) < 0.1


def test_external_damping_is_not_in_the_noise() -> None:
    with_it = observed("mlp", external_damping=0.3)
    without = observed("mlp")
    torch.testing.assert_close(covariance(with_it), covariance(without), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        dense_kfac(with_it.curvature, damped=True),
        dense_kfac(without.curvature) + (LAMBDA / SIZE / ETA + 0.3) * torch.eye(43).double(),
    )


def test_predictions_of_a_linear_model_have_the_exact_mean_and_variance() -> None:
    """x^T mu and x^T Sigma x, one sample of the weights for all inputs of a call."""
    inputs = randn(30, 4)
    optimizer = noisy(build(nn.Linear(4, 1)), 30)
    context(optimizer, inputs, randn(30, 1), GaussianLoss())
    optimizer.step()
    ahead = torch.cat([randn(3, 4, seed=8), torch.ones(3, 1).double()], dim=1)
    found = optimizer.predict(ahead[:, :4], 1000)
    assert found.shape == (1000, 3, 1)
    mean = optimizer.module(ahead[:, :4]).detach()
    within((found - mean)[..., 0], ahead @ covariance(optimizer) @ ahead.mT)


def test_sampling_waits_for_nothing() -> None:
    optimizer = observed("mlp", structure="emvg")
    normal = partial(standard_normal, optimizer.curvature.noise)
    with NoHostSync(), torch.no_grad():
        optimizer.posterior.draw(normal)


def test_prediction_and_samples_leave_the_module_alone() -> None:
    optimizer = observed("norm")
    before = parameters(optimizer.module)
    first = optimizer.predict(randn(2, 4), 3, torch.Generator().manual_seed(1))
    again = optimizer.predict(randn(2, 4), 3, torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert all(torch.equal(p, before[n]) for n, p in parameters(optimizer.module).items())
    module: Tensor = optimizer.module(randn(2, 4))
    assert module.grad_fn is not None


# --- modules that have changed --------------------------------------------------------------------


def assigned(model: nn.Sequential) -> None:
    state = {name: 3 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))


def narrowed(model: nn.Sequential) -> None:
    model.float()


@pytest.mark.parametrize("change", [assigned, replaced, narrowed])
def test_a_module_with_other_parameters_is_not_taken_for_the_mean(change: Any) -> None:
    """Noise would go to the parameters of before, and the divergence would be theirs."""
    optimizer = observed("mlp")
    module: Any = optimizer.module
    change(module)
    inputs = randn(3, 4).to(next(module.parameters()).dtype)

    def inside() -> None:
        with optimizer.sampled_params():
            pass

    for act in (
        inside,
        optimizer.draw,
        optimizer.sample,
        optimizer.posterior_std,
        optimizer.kl,
        lambda: optimizer.predict(inputs),
        lambda: optimizer.elbo(inputs, inputs, lambda output, target: output),
    ):
        with pytest.raises(ValueError, match="K-FAC was constructed"):
            act()
