"""The optimizer's state in torch's form, and what torch's tools do with it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from acktr.kfac import KFAC, CategoricalLoss
from tests.tools.kfac import build, mlp, parameters, plain_config, randn, same, snapshot

LOSS = CategoricalLoss()


def convolutional(seed: int = 0) -> nn.Sequential:
    layers = (nn.Conv1d(2, 3, 2), nn.GELU(), nn.Flatten(), nn.LayerNorm(9), nn.Linear(9, 3))
    return build(*layers, seed=seed)


def made(model: nn.Sequential, **settings: Any) -> KFAC:
    halves = [list(model[:2].parameters()), list(model[2:].parameters())]
    groups = [{"params": halves[0], "lr": 0.2}, {"params": halves[1], "momentum": 0.5}]
    return KFAC(model, plain_config(refresh_interval=4, **settings), param_groups=groups)


def train(model: nn.Module, optimizer: KFAC, turns: range) -> None:
    shape = (2, 4) if any(isinstance(m, nn.Conv1d) for m in model.modules()) else (4,)
    kind = next(model.parameters()).dtype
    for turn in turns:
        inputs = randn(6, *shape, seed=turn).to(kind)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, LOSS)
        optimizer.zero_grad()
        LOSS(output, torch.arange(6) % 3).backward()
        optimizer.step()


CASES: Any = pytest.mark.parametrize("make", [mlp, convolutional])


@CASES
@pytest.mark.parametrize("structure", ["kfac", "cholesky", "ekfac"])
def test_a_run_resumes_bit_for_bit_through_torch_save(make: Any, structure: Any) -> None:
    model, other = make(0), make(1)
    optimizer, resumed = made(model, structure=structure), made(other, structure=structure)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True)
    other.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    assert same(snapshot(resumed), snapshot(optimizer))
    for net, its in ((model, optimizer), (other, resumed)):
        train(net, its, range(5, 10))
    assert same(parameters(other), parameters(model))


@CASES
def test_the_form_is_that_of_torch(make: Any) -> None:
    model = make(0)
    optimizer = made(model)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    theirs = torch.optim.SGD(
        [{"params": g["params"]} for g in optimizer.param_groups], momentum=0.9
    )
    assert set(state) == set(theirs.state_dict()) == {"state", "param_groups"}
    numbers = [group["params"] for group in state["param_groups"]]
    assert numbers == [group["params"] for group in theirs.state_dict()["param_groups"]]
    for number, parameter in enumerate(model.parameters()):
        assert torch.equal(
            state["state"][number]["momentum"], optimizer.state[parameter]["momentum"]
        )


@CASES
def test_a_run_resumes_bit_for_bit_through_a_distributed_checkpoint(
    make: Any, tmp_path: Path
) -> None:
    model, other = make(0), make(1)
    optimizer, resumed = made(model), made(other)
    train(model, optimizer, range(5))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "saved")
    weights, state = get_state_dict(other, resumed)  # of a fresh optimizer: the places to fill
    stored = {"model": weights, "optimizer": state}
    dcp.load(stored, checkpoint_id=tmp_path / "saved")
    set_state_dict(
        other,
        resumed,
        model_state_dict=stored["model"],
        optim_state_dict=stored["optimizer"],
    )
    assert same(snapshot(resumed), snapshot(optimizer))
    for net, its in ((model, optimizer), (other, resumed)):
        train(net, its, range(5, 10))
    assert same(parameters(other), parameters(model))


def test_reading_a_fresh_state_by_torchs_tools_does_not_count_as_a_step() -> None:
    model, other = mlp(0), mlp(0)
    optimizer, untouched = made(model, cold_steps=1), made(other, cold_steps=1)
    get_state_dict(model, optimizer)
    assert optimizer.steps == 0
    for net, its in ((model, optimizer), (other, untouched)):
        train(net, its, range(6))
    assert same(parameters(model), parameters(other))


def test_hooks_of_the_state_are_called_and_may_change_it() -> None:
    model = mlp()
    optimizer = made(model)
    called: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: called.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    state = optimizer.state_dict()
    assert called == ["before"] and state["note"] == 1

    def without(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert given is state
        return {key: value for key, value in given.items() if key != "note"}

    optimizer.register_load_state_dict_pre_hook(without)
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("after"))
    optimizer.load_state_dict(state)
    assert called == ["before", "after"]


def test_a_former_state_is_the_one_by_name() -> None:
    model, other = convolutional(), convolutional(1)
    optimizer, resumed = made(model), made(other)
    train(model, optimizer, range(3))
    former = snapshot(optimizer)
    assert set(former) == {"groups", "steps", "momentum", "curvature"}
    resumed.load_state_dict(former)
    assert same(resumed.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("structure", ["kfac", "cholesky", "ekfac"])
def test_a_state_is_cast_to_the_type_of_the_model(kind: torch.dtype, structure: Any) -> None:
    model, other = convolutional().float(), convolutional().to(kind)
    optimizer, resumed = made(model, structure=structure), made(other, structure=structure)
    train(model, optimizer, range(3))
    resumed.load_state_dict(optimizer.state_dict())
    for one, cast in zip(model.parameters(), other.parameters(), strict=True):
        expected = optimizer.state[one]["momentum"].to(kind)
        assert torch.equal(resumed.state[cast]["momentum"], expected)
        assert resumed.state[cast]["momentum"].dtype == kind
    gradients = {n: randn(*p.shape).to(kind) for n, p in other.named_parameters()}
    for net in (model, other):
        for name, parameter in net.named_parameters():
            parameter.grad = gradients[name].to(parameter.dtype)
    theirs = resumed.direction()
    for name, step in optimizer.direction().items():
        close: dict[str, float] = {"rtol": 0.05, "atol": 0.02}
        torch.testing.assert_close(theirs[name].float(), step, **close)
    train(other, resumed, range(3, 5))


@pytest.mark.parametrize("structure", ["kfac", "tridiagonal"])
def test_compiled_and_plain_modules_read_each_others_state(structure: Any) -> None:
    torch._dynamo.reset()
    plain = mlp()
    wrapped: Any = torch.compile(copy.deepcopy(plain), backend="eager")
    settings = plain_config(structure=structure, refresh_interval=2, refresh_delay=1)
    states = []
    for model, other in ((plain, wrapped), (wrapped, plain)):
        optimizer, resumed = KFAC(model, settings), KFAC(other, settings)
        train(model, optimizer, range(3))
        assert optimizer.state_by_name()["curvature"]["pending"] is not None
        resumed.load_state_dict(optimizer.state_dict())
        assert same(snapshot(resumed), snapshot(optimizer))
        states.append(snapshot(optimizer))
    assert all("_orig_mod" not in name for name in states[1]["momentum"])


def changed(state: dict[str, Any], group: int, **entries: Any) -> dict[str, Any]:
    groups = [dict(g) for g in state["param_groups"]]
    groups[group].update(entries)
    return {**state, "param_groups": groups}


def without_curvature(state: dict[str, Any]) -> dict[str, Any]:
    first, *rest = state["param_groups"]
    kept = {key: value for key, value in first.items() if key != "curvature"}
    return {**state, "param_groups": [kept, *rest]}


REFUSED: list[tuple[Any, str]] = [
    (lambda s: {"state": {}, "param_groups": []}, "a state, and 2 param_groups"),
    (lambda s: {**s, "state": [1]}, "a state, and 2 param_groups"),
    (lambda s: changed(s, 1, params=[2]), "group 1 has the parameters 2.weight, 2.bias"),
    (
        lambda s: changed(s, 0, param_names=["body.0.weight", "body.0.bias"]),
        "group 0 has the parameters 0.weight, 0.bias, the state body.0.weight, body.0.bias",
    ),
    (without_curvature, "this is no K-FAC state: it has no curvature"),
    (lambda s: {**s, "state": {9: {"momentum": torch.ones(2)}}}, "it has a state for 9"),
    (lambda s: {**s, "state": {0: {"exp_avg": torch.ones(2)}}}, "0.weight must have the entry"),
    (
        lambda s: {**s, "state": {0: {"momentum": torch.ones(2)}}},
        r"momentum: 0.weight does not fit",
    ),
    (lambda s: changed(s, 0, lr=-1.0), "K-FAC group 0: lr must be a finite number"),
]


@pytest.mark.parametrize(("change", "match"), REFUSED)
def test_a_state_that_does_not_fit_is_refused_as_a_whole(change: Any, match: str) -> None:
    model, other = mlp(), mlp(1)
    optimizer, theirs = made(model), made(other)
    train(model, optimizer, range(3))
    train(other, theirs, range(4))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(change(theirs.state_dict()))
    assert same(snapshot(optimizer), before)


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = mlp()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="this is no K-FAC state"):
        KFAC(model).load_state_dict(adam.state_dict())
