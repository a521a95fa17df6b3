"""Limits in which the noisy optimizers are others."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    KFACConfig,
    LargeFactorWarning,
    NoisyKFAC,
    OutputLoss,
    Sampled,
)
from tests.kfac.test_noisy_exact import after_a_batch, close
from tests.tools.kfac import build, mlp, parameters, randn
from tests.tools.noisy import (
    ETA,
    LAMBDA,
    TAU,
    by_rows,
    context,
    covariance,
    expected,
    gaussian,
    linear_data,
    noisy,
    refreshed,
)


@pytest.mark.parametrize(
    "structure, form, plain",
    [
        ("mvg", "exact", "kfac"),
        ("mvg", "factored", "kfac_factored"),
        ("ffg", "exact", "diagonal"),
        ("emvg", "exact", "kfac"),  # with a refresh at every step variances are the products
    ],
)
def test_without_the_divergence_the_trajectory_is_that_of_kfac(
    structure: str, form: str, plain: str
) -> None:
    first, second = mlp(), mlp()
    settings = {"structure": structure, "damping_form": form, "kl_weight": 0.0}
    optimizer = noisy(first, 99, external_damping=0.1, lr=0.1, seed=3, **settings)
    loss = CategoricalLoss()
    reference = plain_kfac(second, plain, 0.1)
    for turn in range(5):
        both_step(optimizer, reference, randn(8, 4, seed=turn), torch.arange(8) % 3, loss)
    for name, weight in parameters(first).items():
        close(weight, parameters(second)[name], 1e-12)


def plain_kfac(model: nn.Module, structure: str, damping: float, decay: float = 0.0) -> KFAC:
    config = KFACConfig(
        lr=0.1,
        kl_clip=None,
        damping=damping,
        weight_decay=decay,
        factor_rows=None,
        structure=structure,  # type: ignore[arg-type]
        stat_decay=0.99,
        stat_interval=1,
        momentum=0.0,
        refresh_interval=1,
        quadratic="kronecker",
    )
    return KFAC(model, config, seed=3)


def both_step(
    optimizer: NoisyKFAC, reference: KFAC, inputs: Tensor, targets: Tensor, loss: OutputLoss[Any]
) -> None:
    context(optimizer, inputs, targets, loss, Sampled())
    optimizer.step()
    with reference.capture() as captured:
        output = reference.curvature.module(inputs)
    reference.observe(captured, output, loss)
    reference.zero_grad()
    loss(output, targets).backward()  # type: ignore[no-untyped-call]
    reference.step()


@pytest.mark.parametrize(
    "structure, form, plain",
    [
        ("mvg", "exact", "kfac"),
        ("emvg", "exact", "kfac"),
        ("ffg", "exact", "diagonal"),
        ("tridiagonal", "factored", "tridiagonal"),
    ],
)
def test_with_any_number_of_data_the_trajectory_is_that_of_kfac(
    structure: str, form: str, plain: str
) -> None:
    """N of 9e18: noise of the size 1e-10, and a damping that is nothing beside the factors."""
    first, second = mlp(), mlp()
    size = 9 * 10**18
    settings = {"structure": structure, "damping_form": form, "lr": 0.1, "seed": 3}
    external = 0.0 if structure == "tridiagonal" else 0.1
    optimizer = noisy(first, size, external_damping=external, **settings)
    reference = plain_kfac(second, plain, external or LAMBDA / size / ETA)
    for turn in range(3):
        rows = randn(60, 4, seed=turn), randn(60, 3, seed=turn + 9)
        both_step(optimizer, reference, *rows, gaussian())
    for name, weight in parameters(first).items():
        close(weight, parameters(second)[name], 1e-7)


def test_without_the_divergence_a_chain_is_that_of_kfac_with_weight_decay() -> None:
    """Lambda and eta vanish together, so that gamma_in = lambda / (N eta) stays; no biases."""
    first, second = (
        build(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)) for _ in "ab"
    )
    settings = {"structure": "tridiagonal", "damping_form": "factored", "lr": 0.1, "seed": 3}
    weight = 1e-28
    optimizer = noisy(first, 10, kl_weight=weight, prior_variance=weight, **settings)
    reference = plain_kfac(second, "tridiagonal", 1e-18, decay=0.1)
    for turn in range(5):
        rows = randn(8, 4, seed=turn), randn(8, 3, seed=turn + 9)
        both_step(optimizer, reference, *rows, gaussian())
    for name, parameter in parameters(first).items():
        close(parameter, parameters(second)[name], 1e-11)


def test_in_every_new_basis_measured_variances_begin_anew_as_products() -> None:
    """Carried from basis to basis, or kept at the start, they would be others than those of mvg."""
    found: list[list[Tensor]] = []
    for structure in ("mvg", "emvg"):
        optimizer = noisy(mlp(), 40, structure=structure, lr=1e-3, initial_curvature=0.3)
        steps = [covariance(optimizer)]
        for seed in range(3):
            context(optimizer, randn(40, 4, seed=seed), randn(40, 3), gaussian())
            optimizer.step()
            steps.append(covariance(optimizer))
        found.append(steps)
    for measured, products in zip(*found, strict=True):
        close(measured, products, 1e-12)


def test_a_wide_prior_leaves_the_fisher_alone() -> None:
    _, _, rows = linear_data()
    found = by_rows(covariance(after_a_batch(prior_variance=1e16)), 2, 6)[:7, :7]
    close(found, torch.linalg.inv(TAU * rows.mT @ rows / LAMBDA), 1e-12)


def test_measured_variances_that_are_products_are_those_of_mvg() -> None:
    found = []
    for structure in ("mvg", "emvg"):
        optimizer = noisy(mlp(), 40, structure=structure)
        context(optimizer, randn(40, 4), randn(40, 3), gaussian())
        refreshed(optimizer)
        found.append(covariance(optimizer))
    close(found[1], found[0], 1e-12)
    close(found[0], expected(optimizer), 1e-10)


def test_measured_variances_in_the_identity_basis_are_those_of_ffg() -> None:
    found = []
    for settings in ({"structure": "ffg"}, {"structure": "emvg", "max_factor_size": 1}):
        told = "max_factor_size" in settings
        with pytest.warns(LargeFactorWarning) if told else nullcontext():
            optimizer = noisy(mlp(), 40, initial_curvature=0.3, **settings)
        context(optimizer, randn(40, 4), randn(40, 3), gaussian())
        refreshed(optimizer)
        found.append(covariance(optimizer))
    close(found[1], found[0], 1e-12)
