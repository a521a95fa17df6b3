"""Refreshes that leave alone what has not changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, KFACConfig
from tests.tools.kfac import (
    block,
    build,
    counted_eigh,
    mlp,
    observe,
    randn,
    same,
    set_gradients,
    snapshot,
)


def observe_noise(optimizer: KFAC, model: nn.Module, noise: Tensor, scale: float = 1.0) -> None:
    """The same inputs, so that only the gradients' factors depend on the noise."""
    with optimizer.capture() as captured:
        output = model(scale * randn(len(noise), 4))
    optimizer.update_curvature(captured, (noise * output).sum())


def sizes_of_refresh(optimizer: KFAC, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    with counted_eigh(monkeypatch) as sizes:
        optimizer.refresh()
    return sorted(sizes)


def test_unchanged_factors_are_not_decomposed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A of the two layers is 5 and 6 wide, G is 5 and 3."""
    model = mlp()
    optimizer = KFAC(model, KFACConfig(refresh_staleness=1e-9))
    every = KFAC(model, KFACConfig())
    for each in (optimizer, every):
        observe_noise(each, model, randn(6, 3, seed=1))
    assert sizes_of_refresh(optimizer, monkeypatch) == [3, 5, 5, 6]
    assert sizes_of_refresh(optimizer, monkeypatch) == []
    kept = block(optimizer, "2").basis
    for each in (optimizer, every):
        observe_noise(each, model, randn(6, 3, seed=2))
    assert sizes_of_refresh(optimizer, monkeypatch) == [3, 5]  # G alone
    found = block(optimizer, "2").basis
    assert kept is not None
    assert found is not None
    assert found[0] is kept[0]
    assert found[1] is kept[1]
    assert not torch.equal(found[2], kept[2])
    every.refresh()
    set_gradients(model)
    for name, step in every.direction().items():
        torch.testing.assert_close(optimizer.direction()[name], step, rtol=1e-7, atol=1e-10)
    observe_noise(optimizer, model, randn(6, 3, seed=2), scale=2.0)
    assert sizes_of_refresh(optimizer, monkeypatch) == [3, 5, 5, 6]


def test_slow_changes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A change counts from the last decomposition, not from the last look at it."""
    model = build(nn.Linear(4, 3, bias=False))
    optimizer = KFAC(model, KFACConfig(refresh_staleness=0.1, stat_decay=0.0))
    counts = []
    for index in range(7):
        observe_noise(optimizer, model, torch.ones(6, 3).double(), scale=(1.04**index) ** 0.5)
        counts.append(len(sizes_of_refresh(optimizer, monkeypatch)))
    assert counts == [2, 0, 0, 1, 0, 0, 1]  # 1.04^2 < 1.1 < 1.04^3, of A alone


def test_zero_means_any_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = KFAC(model, KFACConfig(refresh_staleness=0.0))
    reference = KFAC(mlp(), KFACConfig())
    for index in range(3):
        observe(optimizer, model, randn(6, 4, seed=index), seed=index)
        observe(reference, reference.curvature.module, randn(6, 4, seed=index), seed=index)
        assert sizes_of_refresh(optimizer, monkeypatch) == [3, 5, 5, 6]
        reference.refresh()
        assert sizes_of_refresh(optimizer, monkeypatch) == []
    for name in ("0", "2"):
        assert same(block(optimizer, name).basis, block(reference, name).basis)


@pytest.mark.parametrize("settings", [{}, {"inverse": "cholesky", "factored_damping": True}])
def test_every_kind_of_block_is_spared(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = (nn.Embedding(6, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    model = build(*layers)
    optimizer = KFAC(model, KFACConfig(refresh_staleness=0.01, **settings))
    for index in range(2):
        with optimizer.capture() as captured:
            output = model(torch.arange(6).reshape(6, 1).roll(index, 0))  # the same batch
        optimizer.update_curvature(captured, (randn(6, 1, 3).roll(index, 0) * output).sum())
        kept = [(getattr(b, "basis", None), getattr(b, "inverses", None)) for b in optimizer.blocks]
        optimizer.refresh()
        now = [(getattr(b, "basis", None), getattr(b, "inverses", None)) for b in optimizer.blocks]
        assert all(
            (a[0] is b[0] and a[1] is b[1]) == bool(index) for a, b in zip(kept, now, strict=True)
        )


def test_a_change_of_the_damping_renews_cholesky_inverses() -> None:
    model = mlp()
    config = KFACConfig(refresh_staleness=1e-3, inverse="cholesky", factored_damping=True)
    optimizer = KFAC(model, config)
    observe(optimizer, model, randn(6, 4))
    optimizer.refresh()
    kept = block(optimizer, "0").inverses
    optimizer.curvature.damping = 0.5
    optimizer.refresh()
    found = block(optimizer, "0").inverses
    fresh = KFAC(mlp(), KFACConfig(damping=0.5, inverse="cholesky", factored_damping=True))
    observe(fresh, fresh.curvature.module, randn(6, 4))
    fresh.refresh()
    assert not same(found, kept)
    assert same(found, block(fresh, "0").inverses)


def test_the_references_are_part_of_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = mlp(), mlp()
    config = KFACConfig(refresh_staleness=0.1)
    optimizer, resumed = KFAC(model, config), KFAC(other, config)
    observe(optimizer, model, randn(6, 4))
    optimizer.refresh()
    observe(optimizer, model, randn(6, 4))  # hardly any change
    resumed.load_state_dict(snapshot(optimizer))
    assert same(snapshot(resumed), snapshot(optimizer))
    assert sizes_of_refresh(resumed, monkeypatch) == sizes_of_refresh(optimizer, monkeypatch) == []
    forgetful = snapshot(optimizer)
    for layer in forgetful["curvature"]["layers"].values():
        layer["a_reference"] = layer["g_reference"] = None
    resumed.load_state_dict(forgetful)
    assert sizes_of_refresh(resumed, monkeypatch) == [3, 5, 5, 6]


def test_a_failed_factor_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer = KFAC(model, KFACConfig(refresh_staleness=0.1))
    observe(optimizer, model, randn(6, 4))

    def broken(_: Tensor) -> Any:
        raise torch.linalg.LinAlgError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", broken)
        optimizer.refresh()
    assert optimizer.failures == 2
    assert sizes_of_refresh(optimizer, monkeypatch) == [3, 5, 5, 6]
