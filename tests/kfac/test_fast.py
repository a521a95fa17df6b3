"""Faster products: the numbers stay what they are, and the settings are put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from acktr.kfac import KFAC, CategoricalLoss, KFACConfig, linalg
from acktr.kfac.blocks import kronecker
from acktr.kfac.linalg import factored_tikhonov, float32_products, narrow_products
from acktr.kfac.statistics import factors
from acktr.kfac.trust import Fit, StepInfo
from tests.tools.kfac import build, layers

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


# --- fast_products --------------------------------------------------------------------------------


def observed(fast: bool) -> tuple[KFAC, dict[str, torch.Tensor]]:
    """K-FAC of a wide layer after one batch and a refresh, and its direction."""
    model = build(torch.nn.Linear(300, 260), torch.nn.Tanh(), torch.nn.Linear(260, 4)).float()
    optimizer = KFAC(model, replace(KFACConfig.for_supervised(), fast_products=fast))
    loss = CategoricalLoss()
    with optimizer.capture() as captured:
        output = model(draw(200, 300) + 1)
    optimizer.observe(captured, output, loss)
    loss(output, torch.arange(200) % 4).backward()
    optimizer.refresh()
    return optimizer, optimizer.direction()


@pytest.mark.parametrize("narrow", [False, True])
def test_fast_products_give_the_direction_up_to_the_rounding_of_bfloat16(
    monkeypatch: pytest.MonkeyPatch, narrow: bool
) -> None:
    monkeypatch.setattr(kronecker, "fast_bfloat16", lambda device: narrow)
    optimizer, step = observed(fast=True)
    plain = observed(fast=False)[1]
    for layer in layers(optimizer):
        shifted = factored_tikhonov(layer.a.mean().double(), layer.g.mean().double(), 0.001)
        a, g = (torch.linalg.inv(factor) for factor in shifted)
        grads = {name: optimizer.curvature.named[name].grad.double() for name in layer.names}  # type: ignore[union-attr]
        exact, wide = g @ layer.matrix(grads) @ a, layer.name == "0"  # the other one is small
        assert all(step[name].dtype == torch.float32 for name in layer.names)
        assert error(layer.matrix(plain), exact) < 1e-4
        assert error(layer.matrix(step), exact) < (0.01 if narrow and wide else 1e-4)
        assert not (narrow and wide) or error(layer.matrix(step), exact) > 1e-4


def test_plain_settings_leave_the_precision_of_products_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []
    monkeypatch.setattr(linalg, "_stays_float32", lambda: True)
    real = factors.second_moment

    def spy(*args: Any) -> torch.Tensor:
        seen.append(linalg._MKLDNN.matmul.fp32_precision)
        return real(*args)

    monkeypatch.setattr(factors, "second_moment", spy)
    observed(fast=False)
    assert "bf16" not in seen
    seen.clear()
    observed(fast=True)
    assert set(seen) == {"bf16"}


@pytest.mark.parametrize("skipped", [False, True])
def test_velocities_are_accelerated_in_place(skipped: bool) -> None:
    names = ["a", "b", "c"]
    step = {name: draw(3, 2) + place for place, name in enumerate(names)}
    scales = dict(zip(names, torch.tensor([0.5, 0.5, 0.25]), strict=True))
    factors = dict(zip(names, torch.tensor([0.9, 0.5, 0.25]), strict=True))
    if skipped:
        step["a"][0, 0], scales["a"] = torch.nan, torch.zeros(())
    before = {name: draw(3, 2) - 1 for name in names}
    found = {name: velocity.clone() for name, velocity in before.items()}
    zero = torch.zeros(())
    Fit(step, scales, factors, StepInfo(zero, zero, zero)).accelerate(found, {})
    for name in names:
        nu = float(scales[name])
        update = torch.zeros(3, 2) if nu == 0 else nu * step[name]
        torch.testing.assert_close(found[name], factors[name] * before[name] + update)
