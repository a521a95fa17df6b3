"""Parameter groups with settings of their own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, Exact, GaussianLoss, dense_fisher
from tests.tools.kfac import (
    build,
    flat,
    kronecker,
    mlp,
    moved,
    observe,
    parameters,
    plain_config,
    randn,
    same,
    set_gradients,
    snapshot,
)

RATES, MOMENTA, DECAYS = (0.5, 0.1), (0.0, 0.8), (0.0, 0.7)


def two_groups(model: nn.Sequential, **third: Any) -> list[dict[str, Any]]:
    return [
        {
            "params": list(model[place].parameters()),
            "lr": RATES[index],
            "momentum": MOMENTA[index],
            "weight_decay": DECAYS[index],
        }
        for index, place in enumerate((0, 2))
    ]


def group_of(name: str) -> int:
    return 0 if name.startswith("0") else 1


def decayed(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with the weight decay of each group, on weights only."""
    here = parameters(model)
    return {
        n: g + DECAYS[group_of(n)] * here[n] if n.endswith("weight") else g
        for n, g in gradients.items()
    }


def solved(optimizer: KFAC, gradients: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """(A (x) G + lambda + decay)^-1 g by dense solves."""
    step: dict[str, Tensor] = {}
    for layer in optimizer.blocks:
        matrix = kronecker(optimizer, layer.name)
        shift = damping + DECAYS[group_of(layer.name)]
        vector = torch.linalg.solve(
            matrix + shift * torch.eye(len(matrix)).double(), flat(gradients, layer)
        )
        shape = layer.layer.matrix(gradients).shape
        step.update(layer.layer.split(vector.reshape(shape)))
    return step


@pytest.mark.parametrize("clip", [1e-4, None])
def test_every_group_steps_by_its_own_settings(clip: float | None) -> None:
    model = mlp()
    config = plain_config(kl_clip=clip, damping=0.2, refresh_interval=1)
    optimizer = KFAC(model, config, param_groups=two_groups(model))
    velocity = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
    for index in range(4):
        observe(optimizer, model, randn(6, 4, seed=index), seed=index)
        full = decayed(model, set_gradients(model, seed=index))
        step = solved(optimizer, full, 0.2)
        rates = {n: RATES[group_of(n)] for n in step}
        # D^T (F + lambda) D for D = lr_g U: block-diagonal, and (F + lambda) U = g
        length = sum(rates[n] ** 2 * float((full[n] * step[n]).sum()) for n in step)
        nu = 1.0 if clip is None else min(1.0, math.sqrt(clip / length))
        before = parameters(model)
        optimizer.step()
        assert optimizer.last_step is not None
        assert float(optimizer.last_step.scale) == pytest.approx(nu, rel=1e-9)
        for name, change in moved(before, model).items():
            momentum = MOMENTA[group_of(name)]
            velocity[name] = momentum * velocity[name] + nu * step[name]
            expected = rates[name] * (1 - momentum) * velocity[name]
            torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("quadratic", ["kronecker", "exact"])
def test_the_trust_region_holds_for_the_whole_step(quadratic: Any) -> None:
    model = mlp()
    inputs = randn(8, 4)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.9},
        {"params": list(model[2].parameters()), "lr": 0.05},
    ]
    config = plain_config(kl_clip=1e-5, momentum=0.0, quadratic=quadratic)
    optimizer = KFAC(model, config, param_groups=groups)
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, GaussianLoss(), source=Exact())
    set_gradients(model)
    fisher = dense_fisher(model, (inputs,), GaussianLoss())
    before = parameters(model)
    optimizer.step()
    change = moved(before, model)
    if quadratic == "exact":
        vector = torch.cat([change[n].flatten() for n in before])
        length = float(vector @ fisher @ vector)
    else:
        length = 0.0
        for layer in optimizer.blocks:
            matrix = kronecker(optimizer, layer.name)
            matrix = matrix + 0.01 * torch.eye(len(matrix)).double()
            length += float(flat(change, layer) @ matrix @ flat(change, layer))
    assert length == pytest.approx(1e-5, rel=1e-9)


@pytest.mark.parametrize("structure", ["cholesky", "tridiagonal"])
def test_the_decay_of_a_group_reaches_inverses_that_hold_their_damping(structure: Any) -> None:
    def direction(decay: float, grouped: bool) -> dict[str, Tensor]:
        model = mlp()
        config = plain_config(
            structure=structure,
            weight_decay=0.0 if grouped else decay,
        )
        groups = [{"params": list(model.parameters()), "weight_decay": decay}] if grouped else None
        optimizer = KFAC(model, config, param_groups=groups)
        observe(optimizer, model, randn(6, 4))
        set_gradients(model)
        optimizer.refresh()
        return optimizer.direction()

    assert same(direction(0.9, True), direction(0.9, False))
    assert not same(direction(0.9, True), direction(0.1, True))


def test_equal_groups_are_one_group() -> None:
    states = []
    for split in (False, True):
        model = mlp()
        groups = None
        if split:
            groups = [{"params": list(model[2].parameters())}, {"params": model[0].parameters()}]
        optimizer = KFAC(model, plain_config(weight_decay=0.1), param_groups=groups)
        for index in range(3):
            observe(optimizer, model, randn(6, 4, seed=index), seed=index)
            set_gradients(model, seed=index)
            optimizer.step()
        states.append(parameters(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-12, atol=1e-14)


def test_schedulers_set_every_group() -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(kl_clip=None, damping=0.2), param_groups=two_groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda n: 0.5**n, lambda n: 1.0 / (1 + n)]
    )
    velocity = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
    observe(optimizer, model, randn(6, 4))
    for index in range(3):
        full = decayed(model, set_gradients(model, seed=index))
        step = solved(optimizer, full, 0.2)
        before = parameters(model)
        optimizer.step()
        rates = (RATES[0] * 0.5**index, RATES[1] / (1 + index))
        for name in ("0.weight", "0.bias"):  # no momentum
            change = moved(before, model)[name]
            torch.testing.assert_close(change, rates[0] * step[name], rtol=1e-8, atol=1e-13)
        top = max(rates)
        for name in ("2.weight", "2.bias"):
            velocity[name] = 0.8 * velocity[name] + rates[1] / top * step[name]
            change = moved(before, model)[name]
            expected = top * 0.2 * velocity[name]
            torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-13)
        schedule.step()


@pytest.mark.parametrize("held", [0, 1])
def test_a_rate_of_zero_holds_a_group(held: int) -> None:
    model = mlp()
    groups = two_groups(model)
    groups[held]["lr"] = 0.0
    optimizer = KFAC(model, param_groups=groups)
    observe(optimizer, model, randn(6, 4))
    set_gradients(model)
    before = parameters(model)
    optimizer.step()
    changed = {name for name, change in moved(before, model).items() if bool(change.any())}
    assert changed == {name for name in before if group_of(name) != held}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = parameters(model)
    optimizer.step()
    assert same(parameters(model), before)


def test_cold_steps_keep_the_ratio_of_the_rates_and_the_momenta() -> None:
    model = mlp()
    optimizer = KFAC(
        model,
        plain_config(cold_steps=3, cold_lr=0.02, cold_max_grad_norm=1e9),
        param_groups=[
            {"params": list(model[0].parameters()), "lr": 0.4, "momentum": 0.5},
            {"params": list(model[2].parameters()), "lr": 0.1, "momentum": 0.8},
        ],
    )
    velocity = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
    for index in range(3):
        gradients = set_gradients(model, seed=index)
        before = parameters(model)
        optimizer.step()
        for name, change in moved(before, model).items():
            first = group_of(name) == 0
            velocity[name] = (0.5 if first else 0.8) * velocity[name] + gradients[name]
            expected = 0.02 * (1 if first else 0.25) * velocity[name]
            torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_and_unlisted_parameters_do_not_move(rule: Any, frozen: bool) -> None:
    model = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LayerNorm(3))
    if frozen:
        model[0].requires_grad_(False)
    listed = [{"params": [*model[2].parameters(), *model[3].parameters()], "weight_decay": 0.1}]
    optimizer = KFAC(model, param_groups=None if frozen else listed, step_rule=rule)
    before = parameters(model)
    for index in range(3):
        with optimizer.capture() as captured:
            output = model(randn(6, 4, seed=index))
        optimizer.observe(captured, output, GaussianLoss())
        optimizer.zero_grad()
        GaussianLoss()(output, randn(6, 3, seed=50 + index)).backward()
        optimizer.step()
    still = {n for n, p in parameters(model).items() if torch.equal(p, before[n])}
    assert still == {"0.weight", "0.bias"}
    assert set(snapshot(optimizer)["momentum"]) == set(before) - still


BAD: list[tuple[Any, str]] = [
    (lambda m: 7, "param_groups must be a list of dicts, got int"),
    (lambda m: [], "empty parameter list"),
    (lambda m: [list(m.parameters())], "parameter group 0 must be a dict, got list"),
    (lambda m: [{}], "got no params"),
    (lambda m: [{"params": 3}], "parameter group 0: params must be parameters, got 3"),
    (lambda m: [{"params": [3]}], "has a parameter that is not trainable in the module"),
    (lambda m: [{"params": list(mlp().parameters())}], "not trainable in the module"),
    (lambda m: [{"params": m.parameters(), "betas": 1, "eps": 2}], "got betas, eps"),
    (lambda m: [{"params": list(m.parameters())}] * 2, "'0.weight' is in two groups"),
    (lambda m: [{"params": [m[0].weight, m[0].weight]}], "'0.weight' is in two groups"),
    (lambda m: [{"params": m.parameters(), "lr": -1.0}], "group 0: lr must be a finite number >="),
    (lambda m: [{"params": m.parameters(), "lr": math.nan}], "lr must be a finite number >= 0"),
    (lambda m: [{"params": m.parameters(), "lr": True}], "lr must be a finite number >= 0"),
    (lambda m: [{"params": m.parameters(), "lr": "1"}], "lr must be a finite number >= 0"),
    (lambda m: [{"params": m.parameters(), "momentum": 1.0}], r"momentum .* number in \[0, 1\)"),
    (lambda m: [{"params": m.parameters(), "weight_decay": math.inf}], "weight_decay must be"),
    (
        lambda m: [{"params": [m[0].weight]}, {"params": [m[0].bias, *m[2].parameters()]}],
        "0.weight and 0.bias share a curvature block: give them one group",
    ),
    (lambda m: [{"params": m[0].weight}], "0.weight and 0.bias share a curvature block"),
]


@pytest.mark.parametrize(("groups", "message"), BAD, ids=[f"group {n}" for n in range(len(BAD))])
def test_a_bad_group_gets_one_clear_line(groups: Any, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message) as caught:
        KFAC(model, param_groups=groups(model))
    assert "\n" not in str(caught.value)


def test_a_single_parameter_is_a_group_as_for_torch() -> None:
    model = build(nn.Linear(3, 2, bias=False))
    optimizer = KFAC(model, param_groups=[{"params": model[0].weight, "lr": 0.3}])
    assert optimizer.lr == 0.3
    assert optimizer.param_groups[0]["params"] == [model[0].weight]


def test_a_chain_is_one_block_and_needs_one_group() -> None:
    model = mlp()
    config = plain_config(structure="tridiagonal")
    for groups in ([{"params": list(model[0].parameters())}], two_groups(model)):
        with pytest.raises(ValueError, match=r"2.weight and 2.bias share a curvature block"):
            KFAC(model, config, param_groups=groups)


def test_the_state_keeps_the_settings_of_the_groups() -> None:
    model, other = mlp(), mlp()
    optimizer = KFAC(model, param_groups=two_groups(model))
    optimizer.param_groups[1]["lr"] = 0.0123
    resumed = KFAC(other, param_groups=two_groups(other))
    resumed.load_state_dict(snapshot(optimizer))
    for mine, theirs in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        for key in ("lr", "momentum", "weight_decay"):
            assert mine[key] == theirs[key]
    with pytest.raises(ValueError, match="2 parameter groups"):
        resumed.load_state_dict(snapshot(KFAC(mlp())))


def test_groups_are_fixed_at_construction() -> None:
    model = mlp()
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match="at construction: pass param_groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 1
