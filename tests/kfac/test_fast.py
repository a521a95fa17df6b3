"""Faster products: the numbers stay what they are, and the settings are put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from acktr.kfac import linalg
from acktr.kfac.linalg import float32_products, narrow_products
from acktr.kfac.statistics import factors

CPU = torch.device("cpu")


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_products_of_bfloat16_numbers_keep_float32_precision() -> None:
    rows = draw(3000, 96).bfloat16()
    exact = rows.double().mT @ rows.double()
    wide = rows.float()
    with narrow_products(rows.dtype, CPU):
        found = wide.mT @ wide
    assert found.dtype == torch.float32
    assert error(found, exact) < 1e-5


def test_factors_of_bfloat16_inputs_are_those_of_the_same_float64_numbers() -> None:
    conv = torch.nn.Conv2d(4, 8, 4, stride=2)
    images = draw(16, 4, 20, 20).bfloat16()
    found, count = factors.conv_input_factor([images], conv, True, "expand")
    exact, same = factors.conv_input_factor([images.double()], conv.double(), True, "expand")
    assert found.dtype == torch.float32
    assert count == same
    assert error(found, exact) < 1e-5


def test_chosen_products_are_computed_in_float32() -> None:
    left, right = draw(300, 500), draw(500, 400)
    with float32_products(CPU):
        found = left @ right
    assert error(found, left.double() @ right.double()) < 1e-5


@pytest.mark.parametrize(
    "context",
    [
        lambda: narrow_products(torch.bfloat16, CPU),
        lambda: narrow_products(torch.float32, CPU),
        lambda: float32_products(CPU),
    ],
)
def test_the_setting_is_put_back_also_after_an_error(context: Callable[[], Any]) -> None:
    before = linalg._MKLDNN.matmul.fp32_precision
    with pytest.raises(KeyError), context():
        raise KeyError
    assert linalg._MKLDNN.matmul.fp32_precision == before


def test_wider_types_change_nothing() -> None:
    before = linalg._MKLDNN.matmul.fp32_precision
    with narrow_products(torch.float32, CPU):
        assert linalg._MKLDNN.matmul.fp32_precision == before


def test_a_processor_that_rounds_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    linalg._stays_float32.cache_clear()
    try:
        before = linalg._MKLDNN.matmul.fp32_precision
        with float32_products(CPU):
            assert linalg._MKLDNN.matmul.fp32_precision == before
    finally:
        linalg._stays_float32.cache_clear()


def test_threads_that_overlap_leave_the_setting_as_it_was() -> None:
    matmul: Any = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    first, second = (narrow_products(torch.bfloat16, CPU) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    second.__exit__(None, None, None)
    assert matmul.fp32_precision == before


def test_an_inherited_setting_stays_inherited() -> None:
    backends: Any = torch.backends
    before = backends.fp32_precision
    backends.fp32_precision = "ieee"
    try:
        with narrow_products(torch.bfloat16, CPU):
            pass
    finally:
        backends.fp32_precision = before
    assert backends.mkldnn.matmul.fp32_precision == before


def test_the_probe_is_of_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.float64)
    linalg._stays_float32.cache_clear()
    try:
        found = linalg._stays_float32()
    finally:
        torch.set_default_dtype(torch.float32)
        linalg._stays_float32.cache_clear()
    assert found == linalg._stays_float32()
