"""Limits in which the noisy optimizers are others."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    KFACConfig,
    LargeFactorWarning,
    Sampled,
)
from tests.kfac.test_noisy_exact import after_a_batch, close
from tests.tools.kfac import mlp, parameters, randn
from tests.tools.noisy import (
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
    ],
)
def test_without_the_divergence_the_trajectory_is_that_of_kfac(
    structure: str, form: str, plain: str
) -> None:
    first, second = mlp(), mlp()
    settings = {"structure": structure, "damping_form": form, "kl_weight": 0.0}
    optimizer = noisy(first, 99, external_damping=0.1, lr=0.1, seed=3, **settings)
    config = KFACConfig(
        lr=0.1,
        kl_clip=None,
        damping=0.1,
        structure=plain,  # type: ignore[arg-type]
        stat_decay=0.99,
        stat_interval=1,
        momentum=0.0,
        refresh_interval=1,
        quadratic="kronecker",
    )
    reference, loss = KFAC(second, config, seed=3), CategoricalLoss()
    for turn in range(5):
        inputs, labels = randn(8, 4, seed=turn), torch.arange(8) % 3
        context(optimizer, inputs, labels, loss, Sampled())
        optimizer.step()
        with reference.capture() as captured:
            output = second(inputs)
        reference.observe(captured, output, loss)
        reference.zero_grad()
        loss(output, labels).backward()  # type: ignore[no-untyped-call]
        reference.step()
    for name, weight in parameters(first).items():
        close(weight, parameters(second)[name], 1e-12)


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
