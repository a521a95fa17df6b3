"""Eigendecomposition under failure, and the trust region."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from acktr.kfac import FactorError, symmetric_eigen, trust_scale
from acktr.kfac.trust import clipped, rescale
from tests.tools.kfac import HostSyncError, NoHostSync, randn


def psd(size: int, rank: int | None = None, seed: int = 0) -> Tensor:
    rows = randn(rank or 3 * size, size, seed=seed)
    return rows.mT @ rows / len(rows)


def rebuilt(pair: tuple[Tensor, Tensor]) -> Tensor:
    values, vectors = pair
    return vectors @ values.diag() @ vectors.mT


# --- trust region ---------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    q=st.floats(0, 1e150, allow_subnormal=True),
    lr=st.floats(1e-6, 1e3),
    clip=st.floats(1e-9, 1e3),
)
@example(q=5e-324, lr=1e-6, clip=1e3)
@example(q=1e150, lr=1e3, clip=1e-9)
def test_the_scaled_step_meets_the_radius(q: float, lr: float, clip: float) -> None:
    scale = float(trust_scale(torch.tensor(q, dtype=torch.float64), lr, clip))
    length = lr**2 * scale**2 * q
    assert 0 < scale <= 1
    assert length <= clip * (1 + 1e-12)
    if scale < 1:
        assert length == pytest.approx(clip, rel=1e-9)
    else:
        assert lr**2 * q <= clip * (1 + 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("q", "expected"),
    [(0.0, 1.0), (-1.0, 1.0), (-1e-30, 1.0), (math.inf, 0.0), (-math.inf, 0.0), (math.nan, 0.0)],
)
def test_degenerate_quadratic_forms(q: float, expected: float, dtype: torch.dtype) -> None:
    assert float(trust_scale(torch.tensor(q, dtype=dtype), 0.25, 1e-3)) == expected


def test_a_known_scale() -> None:
    # lr^2 q = 0.25 * 16 = 4, c = 1: nu = 1/2.
    assert float(trust_scale(torch.tensor(16.0), 0.5, 1.0)) == 0.5


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_sums_of_half_precision_that_are_beyond_it_scale_a_step(quadratic: str) -> None:
    """g . U = 4 * 300^2 = 360,000, where float16 ends at 65,504."""
    gradients = {name: torch.full((2,), 300.0, dtype=torch.float16) for name in "ab"}
    form = (lambda _: torch.tensor(360_000.0)) if quadratic == "exact" else None
    fit = rescale(gradients, dict(gradients), 1.0, 0.1, form)
    assert float(fit.info.quadratic) == pytest.approx(360_000)
    assert float(fit.info.scale) == pytest.approx(1 / 60, rel=1e-6)
    for update in fit.updates().values():
        assert update.dtype == torch.float16
        assert update.tolist() == pytest.approx([5.0, 5.0], rel=1e-3)
    clips, norm = clipped(gradients, 60.0)
    assert float(norm) == pytest.approx(600.0)
    assert clips["a"].tolist() == pytest.approx([30.0, 30.0], rel=1e-3)


def test_trust_scale_does_not_wait_for_the_device() -> None:
    q = torch.tensor(3.0)
    with NoHostSync():
        trust_scale(q, 0.25, 1e-3)
        with pytest.raises(HostSyncError):
            bool(q > 0)


# --- eigendecomposition ---------------------------------------------------------------------------


def test_decomposition_of_the_symmetric_part() -> None:
    matrix = psd(5) + 0.1 * (randn(5, 5) - randn(5, 5).mT)
    values, vectors = symmetric_eigen(matrix)
    torch.testing.assert_close(rebuilt((values, vectors)), (matrix + matrix.mT) / 2)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(5).double())
    assert (values.diff() >= 0).all()


def test_negative_eigenvalues_become_zero() -> None:
    values, _ = symmetric_eigen(torch.diag(torch.tensor([2.0, -1e-7, 1.0])))
    torch.testing.assert_close(values, torch.tensor([0.0, 1.0, 2.0]), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 2), (2, 0), (1, 1)])
def test_a_factor_that_is_not_finite_is_refused(bad: float, place: tuple[int, int]) -> None:
    matrix = psd(3)
    matrix[place] = bad
    with pytest.raises(FactorError, match="NaN or Inf"):
        symmetric_eigen(matrix)


def failing(monkeypatch: pytest.MonkeyPatch, mode: str, good_after: int | None, only: Any) -> None:
    """Make eigh raise or return NaN for one dtype (or all) until a number of calls."""
    real = torch.linalg.eigh
    calls = [0]

    def eigh(matrix: Tensor) -> Any:
        calls[0] += 1
        fails = (only is None or matrix.dtype == only) and (
            good_after is None or calls[0] <= good_after
        )
        if not fails:
            return real(matrix)
        if mode == "raise":
            raise torch.linalg.LinAlgError("injected")
        values, vectors = real(matrix)
        return (values * math.nan, vectors) if mode == "values" else (values, vectors * math.nan)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("mode", ["raise", "values", "vectors"])
class TestInjectedFailure:
    def test_float32_falls_back_to_float64(
        self, monkeypatch: pytest.MonkeyPatch, mode: str
    ) -> None:
        matrix = psd(4).float()
        failing(monkeypatch, mode, None, torch.float32)
        values, vectors = symmetric_eigen(matrix)
        assert values.dtype == vectors.dtype == torch.float32
        torch.testing.assert_close(rebuilt((values, vectors)), matrix, rtol=1e-5, atol=1e-5)

    def test_jitter_is_the_last_resort(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        matrix = psd(4)
        failing(monkeypatch, mode, 2, None)
        expected = matrix + 1e-6 * matrix.diagonal().mean() * torch.eye(4)
        torch.testing.assert_close(
            rebuilt(symmetric_eigen(matrix)), expected, rtol=1e-9, atol=1e-12
        )

    def test_failure_of_every_attempt(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        failing(monkeypatch, mode, None, None)
        with pytest.raises(FactorError, match="did not converge"):
            symmetric_eigen(psd(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", ["zero", "rank-one", "identity", "full"])
def test_extreme_factors_keep_an_orthonormal_basis(
    kind: str, scale: float, dtype: torch.dtype
) -> None:
    base = {
        "zero": torch.zeros(6, 6).double(),
        "rank-one": psd(6, rank=1),
        "identity": torch.eye(6).double(),
        "full": psd(6),
    }[kind]
    matrix = (scale * base).to(dtype)
    values, vectors = symmetric_eigen(matrix)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(
        vectors.mT @ vectors, torch.eye(6, dtype=dtype), rtol=0, atol=tolerance
    )
    torch.testing.assert_close(
        rebuilt((values, vectors)), matrix, rtol=tolerance, atol=tolerance * scale * 10
    )
    assert (values >= 0).all()
