"""Equal ways to the same curvature: resumed runs, another capture."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from acktr.kfac import KFAC, CategoricalLoss, LMConfig
from acktr.kfac.blocks.kronecker import Corrected
from acktr.kfac.statistics.averages import RunningAverage
from acktr.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.tools.kfac import (
    basis,
    block,
    build,
    factors,
    mlp,
    parameters,
    plain_config,
    randn,
    same,
    scales,
    seeded,
    snapshot,
)

# --- resumed runs ---------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "background": {"refresh_delay": 2},
    "ekfac in the background": {"refresh_delay": 2, "structure": "ekfac"},
    "ekfac": {"structure": "ekfac"},
    "cholesky": {"structure": "cholesky", "refresh_delay": 2},
    "chain": {"structure": "tridiagonal"},
    "chain in the background": {"structure": "tridiagonal", "refresh_delay": 1},
}


def chain_net(seed: int) -> nn.Sequential:
    layers = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    return build(*layers, seed=seed)


def run(optimizer: KFAC, model: nn.Module, steps: range) -> None:
    loss = CategoricalLoss()
    for index in steps:
        inputs = randn(9, 4, seed=index)
        targets = torch.randint(3, (9,), generator=seeded(index))
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, targets).backward()
        optimizer.step(objective=lambda x=inputs, y=targets: loss(model(x), y))


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_a_run_resumes_bit_for_bit_from_a_checkpoint(
    settings: dict[str, Any], rule: Any, tmp_path: Path
) -> None:
    def made(seed: int) -> tuple[nn.Sequential, KFAC]:
        model = chain_net(seed)
        config = plain_config(refresh_interval=4, stat_decay=0.9, damping=0.1, **settings)
        lm = LMConfig(interval=2)
        return model, KFAC(model, config, step_rule=rule, adaptive=lm, seed=seed)

    for saved_at in (5, 6, 7):
        model, optimizer = made(1)
        run(optimizer, model, range(saved_at))
        state = {"optimizer": optimizer.state_by_name(), "model": model.state_dict()}
        if saved_at == 5 and settings.get("refresh_delay"):
            assert state["optimizer"]["curvature"]["pending"] is not None
        save_checkpoint(tmp_path / "saved", state, {})
        run(optimizer, model, range(saved_at, 14))

        stored, _ = load_checkpoint(tmp_path / "saved")
        other, resumed = made(2)
        other.load_state_dict(stored["model"])
        resumed.load_state_dict(stored["optimizer"])
        assert same(resumed.state_by_name(), stored["optimizer"])
        run(resumed, other, range(saved_at, 14))
        assert same(parameters(other), parameters(model))
        assert same(snapshot(resumed), snapshot(optimizer))
        assert optimizer.damping != 0.1
        optimizer.close()
        resumed.close()


def test_the_generator_matters_to_a_resumed_run() -> None:
    """The test above has power: another generator gives another run."""
    model = chain_net(1)
    optimizer = KFAC(model)
    run(optimizer, model, range(3))
    other = chain_net(2)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = KFAC(other)
    state = snapshot(optimizer)
    state["curvature"]["generator"] = torch.Generator().manual_seed(99).get_state()
    resumed.load_state_dict(state)
    run(optimizer, model, range(3, 14))
    run(resumed, other, range(3, 14))
    assert not same(parameters(other), parameters(model))


# --- another capture ------------------------------------------------------------------------------


def perturbed_mlp(p: dict[str, Tensor], e: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = functional.linear(x, p["0.weight"], p["0.bias"]) + e["0"]
    return functional.linear(hidden.tanh(), p["2.weight"], p["2.bias"]) + e["2"]


def perturbed_conv(p: dict[str, Tensor], e: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = functional.conv2d(x[None], p["0.weight"], p["0.bias"], padding=1)[0] + e["0"]
    return functional.linear(hidden.tanh().flatten(), p["3.weight"], p["3.bias"]) + e["3"]


def rows_of(x: Tensor) -> Tensor:
    """(N, T, d + 1) from (N, d) vectors, or the patches of (N, C, H, W) under a 3x3 kernel."""
    rows = x[:, None] if x.dim() == 2 else functional.unfold(x, 3, padding=1).mT
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_hooks_capture_what_a_functional_capture_does(kind: str) -> None:
    if kind == "mlp":
        model, inputs, function = mlp(), randn(6, 4), perturbed_mlp
        shapes: dict[str, tuple[int, ...]] = {"0": (5,), "2": (3,)}
    else:
        model = build(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
        inputs, function = randn(6, 2, 2, 2), perturbed_conv
        shapes = {"0": (3, 2, 2), "3": (3,)}
    noise = randn(6, 3, seed=4)
    optimizer = KFAC(model, plain_config(structure="ekfac"))
    weights = parameters(model)
    zero = {name: torch.zeros(6, *shape).double() for name, shape in shapes.items()}

    def scalar(e: dict[str, Tensor], x: Tensor, n: Tensor) -> Tensor:
        return (n * function(weights, e, x)).sum()

    explicit = vmap(grad(scalar))(zero, inputs, noise)
    hidden = model[0](inputs).detach().tanh().flatten(1)
    second = list(shapes)[1]
    seen = {"0": inputs, second: hidden}

    def observe() -> dict[str, list[Tensor | None]]:
        with optimizer.capture() as captured:
            output = model(inputs)
        value = (noise * output).sum()
        gradients = captured.output_gradients(value)
        optimizer.update_curvature(captured, value)
        return gradients

    gradients = observe()
    optimizer.refresh()
    for name in ("0", second):  # what follows is the next batch alone
        inverse = block(optimizer, name).inverse
        assert isinstance(inverse, Corrected)
        inverse.scales = RunningAverage(torch.zeros_like(inverse.scales.value))
    observe()
    for name, shape in shapes.items():
        (found,) = gradients[name]
        assert found is not None
        torch.testing.assert_close(found, explicit[name], rtol=1e-12, atol=1e-14)
        rows = rows_of(seen[name])
        g = explicit[name].reshape(6, shape[0], -1).mT
        a_factor, g_factor = factors(optimizer, name)
        positions = rows.shape[1]
        expected = torch.einsum("nti,ntj->ij", rows, rows) / (6 * positions)
        torch.testing.assert_close(a_factor, expected, rtol=1e-11, atol=1e-13)
        expected = torch.einsum("nti,ntj->ij", g, g) / 6
        torch.testing.assert_close(g_factor, expected, rtol=1e-11, atol=1e-13)
        layer = block(optimizer, name)
        _, q_a, _, q_g = basis(layer)
        assert q_a is not None
        whole = torch.einsum("nto,nti->noi", g, rows)
        expected = (q_g.mT @ whole @ q_a).square().mean(0)
        torch.testing.assert_close(scales(layer), expected, rtol=1e-10, atol=1e-13)
