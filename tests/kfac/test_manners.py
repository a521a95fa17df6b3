"""Options and habits of torch's optimizers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    LMConfig,
    Preconditioner,
    SumLoss,
)
from tests.tools.kfac import build, mlp, parameters, plain_config, randn, same

LOSS = CategoricalLoss()


def convolutional(seed: int = 0) -> nn.Sequential:
    return build(nn.Conv1d(2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(9, 3), seed=seed)


NETS: Any = pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (convolutional, (2, 4))])


def differentiated(model: nn.Module, optimizer: Any, shape: Any, sign: float = 1.0) -> Tensor:
    with optimizer.capture() as captured:
        output = model(randn(6, *shape))
    optimizer.observe(captured, output, LOSS, source=Exact())
    model.zero_grad()
    loss: Tensor = sign * LOSS(output, torch.arange(6) % 3)
    loss.backward()
    return loss


# --- options --------------------------------------------------------------------------------------


@NETS
@pytest.mark.parametrize("settings", [{}, {"cold_steps": 2}, {"quadratic": "exact"}])
def test_maximizing_is_minimizing_the_negative(make: Any, shape: Any, settings: Any) -> None:
    models = make(), make()
    optimizers = [
        KFAC(model, plain_config(weight_decay=0.1, **settings), maximize=up)
        for model, up in zip(models, (True, False), strict=True)
    ]
    for _ in range(3):
        for model, optimizer, sign in zip(models, optimizers, (1.0, -1.0), strict=True):
            differentiated(model, optimizer, shape, sign)
            optimizer.step()
    assert same(parameters(models[0]), parameters(models[1]))


def test_maximizing_adapts_the_damping_to_the_negative_objective() -> None:
    dampings = []
    for sign in (1.0, -1.0):
        model, config = mlp(), plain_config(kl_clip=None, damping=1.0)
        rule = LMConfig(interval=1)
        optimizer = KFAC(
            model, config, step_rule="quadratic_model", adaptive=rule, maximize=sign < 0
        )
        for _ in range(3):
            differentiated(model, optimizer, (4,), sign)

            def objective(net: nn.Module = model, sign: float = sign) -> Tensor:
                return sign * LOSS(net(randn(6, 4)), torch.arange(6) % 3)

            optimizer.step(objective=objective)
        dampings.append(optimizer.damping)
    assert dampings[0] == dampings[1] != 1.0


@NETS
@pytest.mark.parametrize("cold", [0, 2])
def test_decoupled_weight_decay_shrinks_weights_outside_of_the_step(
    make: Any, shape: Any, cold: int
) -> None:
    """Each step is that without decay, from weights that were shrunk by 1 - lr weight_decay."""
    model, free = make(), make(1)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.3, "weight_decay": 0.2},
        {"params": list(model[-1].parameters()), "lr": 0.1, "weight_decay": 0.5},
    ]
    config = plain_config(momentum=0.0, cold_steps=cold, cold_lr=0.05)
    optimizer = KFAC(model, config, param_groups=groups, decoupled_weight_decay=True)
    bare = [{"params": list(free[i].parameters()), "lr": lr} for i, lr in ((0, 0.3), (-1, 0.1))]
    plain = KFAC(free, config, param_groups=bare)
    for turn in range(3):
        free.load_state_dict(model.state_dict())
        before = parameters(model)
        differentiated(model, optimizer, shape)
        differentiated(free, plain, shape)
        optimizer.step()
        plain.step()
        after = parameters(free)
        for name, now in parameters(model).items():
            first = name.startswith("0")
            rate = (0.3 if first else 0.1) if turn >= cold else 0.05 * (1 if first else 0.1 / 0.3)
            decay = (0.2 if first else 0.5) * ("weight" in name)
            expected = after[name] - rate * decay * before[name]
            torch.testing.assert_close(now, expected, rtol=1e-12, atol=1e-14)


def test_a_skipped_step_shrinks_nothing() -> None:
    model = mlp()
    config = plain_config(weight_decay=0.1, momentum=0.0)
    optimizer = KFAC(model, config, decoupled_weight_decay=True)
    differentiated(model, optimizer, (4,))
    model[0].weight.grad[0, 0] = torch.inf
    before = parameters(model)
    optimizer.step()
    assert same(parameters(model), before)


@pytest.mark.parametrize("rule", [{"step_rule": "quadratic_model"}, {"adaptive": LMConfig()}])
def test_decoupled_weight_decay_has_no_quadratic_model(rule: Any) -> None:
    with pytest.raises(ValueError, match="decoupled_weight_decay is not part of the quadratic"):
        KFAC(mlp(), decoupled_weight_decay=True, **rule)


# --- parameters of another optimizer --------------------------------------------------------------


class Mixed(nn.Module):
    """Layers, and a parameter without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) * self.gain).tanh())


@pytest.mark.parametrize("small", ["gradient", "diagonal", "dense"])
def test_parameters_of_another_optimizer_have_no_block_and_no_warning(small: Any) -> None:
    model = Mixed().double()
    layers = [{"params": model.body.parameters()}, {"params": list(model.head.parameters())}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = KFAC(model, plain_config(small_parameters=small), param_groups=layers)
    assert [block.name for block in optimizer.blocks] == ["body", "head"]
    adam = torch.optim.Adam([model.gain])
    before = model.gain.detach().clone()
    differentiated(model, optimizer, (4,))
    optimizer.step()
    assert torch.equal(model.gain, before)
    adam.step()
    assert not torch.equal(model.gain, before)


def test_a_preconditioner_of_some_parameters_leaves_the_other_gradients() -> None:
    model = Mixed().double()
    curvature = Preconditioner(model, parameters=model.head.parameters())
    differentiated(model, curvature, (4,))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    curvature.precondition(lr=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before[name]) == (not name.startswith("head"))
    with pytest.raises(ValueError, match=r"body\.weight and body\.bias share a curvature block"):
        Preconditioner(model, parameters=[model.body.weight])


def test_a_layer_added_later_can_have_a_second_optimizer() -> None:
    model = mlp()
    first = KFAC(model, param_groups=[{"params": list(model.parameters())}])
    model.append(nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="or, for the new parameters alone, to a second one"):
        first.add_param_group({"params": list(model[3].parameters())})
    second = KFAC(model, param_groups=[{"params": list(model[3].parameters())}])
    before = parameters(model)
    with first.capture() as captured, second.capture() as again:
        output = model(randn(6, 4))
    first.observe(captured, output, LOSS)
    second.observe(again, output, LOSS)
    LOSS(output, torch.arange(6) % 3).backward()
    first.step()
    second.step()
    assert all(not torch.equal(now, before[name]) for name, now in parameters(model).items())


# --- gradient scalers -----------------------------------------------------------------------------


@NETS
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"quadratic": "exact"}])
def test_scaled_gradients_take_the_same_steps(make: Any, shape: Any, settings: Any) -> None:
    models = make(), make()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    curvatures = [Preconditioner(model, plain_config(**settings)) for model in models]
    steppers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for _ in range(3):
        differentiated(models[0], curvatures[0], shape)
        curvatures[0].precondition(lr=0.1)
        steppers[0].step()
        differentiated(models[1], curvatures[1], shape, 2.0**10)
        curvatures[1].precondition(lr=0.1, grad_scaler=scaler)
        scaler.scale(torch.ones(()))  # what makes the scaler begin
        scaler.step(steppers[1])
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        scaler.update()


def test_an_infinite_scaled_gradient_makes_the_scaler_skip_and_scale_less() -> None:
    model = mlp()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    curvature, sgd = Preconditioner(model), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(torch.ones(()))
    differentiated(model, curvature, (4,), 2.0**10)
    model[2].weight.grad[0, 0] = torch.inf
    before = parameters(model)
    curvature.precondition(lr=0.1, grad_scaler=scaler)
    scaler.step(sgd)
    scaler.update()
    assert same(parameters(model), before) and scaler.get_scale() == 2.0**9


def test_a_scaler_that_divides_after_the_preconditioner_is_told() -> None:
    model = mlp()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    curvature, sgd = Preconditioner(model), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(torch.ones(()))
    differentiated(model, curvature, (4,), 2.0**10)
    curvature.precondition(lr=0.1)
    scaler.step(sgd)
    sgd.zero_grad()
    with pytest.raises(ValueError, match=r"divided by 1024 after .* call scaler.unscale_"):
        curvature.capture()


def test_a_preconditioner_whose_steps_nobody_takes_leaves_no_hook_in_the_process() -> None:
    for _ in range(3):
        model = mlp()
        curvature = Preconditioner(model)
        differentiated(model, curvature, (4,))
        curvature.precondition(lr=0.1)
    assert not _global_optimizer_pre_hooks


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_is_preconditioned_once(scaled: bool) -> None:
    model = mlp()
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    curvature, sgd = Preconditioner(model), torch.optim.SGD(model.parameters(), lr=0.1)
    if scaled:
        scaler.scale(torch.ones(()))
    differentiated(model, curvature, (4,))
    curvature.precondition(lr=0.1, grad_scaler=scaler)
    with pytest.raises(ValueError, match=r"twice on one gradient, that of '2.bias': call it once"):
        curvature.precondition(lr=0.1, grad_scaler=scaler)
    sgd.step()
    with curvature.capture():  # and a pass without backward()
        model(randn(6, 4))
    with pytest.raises(ValueError, match="twice on one gradient"):
        curvature.precondition(lr=0.1, grad_scaler=scaler)
    differentiated(model, curvature, (4,))
    curvature.precondition(lr=0.1, grad_scaler=scaler)
    model.zero_grad(set_to_none=False)
    curvature.precondition(lr=0.1, grad_scaler=scaler)  # zeros are another gradient


@pytest.mark.parametrize("to_none", [True, False])
def test_clipping_and_zeroing_after_the_preconditioner_is_no_error(to_none: bool) -> None:
    model = mlp()
    curvature, sgd = Preconditioner(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for limit in (1e-3, 10.0):
        differentiated(model, curvature, (4,))
        curvature.precondition(lr=0.1)
        nn.utils.clip_grad_norm_(model.parameters(), limit)
        sgd.step()
        sgd.zero_grad(set_to_none=to_none)


# --- losses, names --------------------------------------------------------------------------------


def test_a_sum_takes_its_losses_as_arguments_or_as_a_tuple() -> None:
    parts = (CategoricalLoss(), GaussianLoss(std=2.0))
    assert SumLoss(*parts) == SumLoss(parts) == SumLoss(parts=parts)
    assert SumLoss(*parts, weights=(1.0, 0.5)) == SumLoss(parts=parts, weights=(1.0, 0.5))
    assert hash(SumLoss(*parts)) == hash(SumLoss(parts))
    for wrong in (lambda: SumLoss(), lambda: SumLoss(list(parts)), lambda: SumLoss(parts=())):
        with pytest.raises(ValueError, match="SumLoss: parts must be"):
            wrong()
    with pytest.raises(ValueError, match="as arguments or as parts, not both"):
        SumLoss(*parts, parts=parts)


@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
@pytest.mark.parametrize("small", ["gradient", "diagonal", "dense"])
def test_every_block_has_a_name(small: Any) -> None:
    model = Mixed().double()
    model.register_parameter("known", nn.Parameter(torch.ones(2).double()))
    optimizer = KFAC(model, plain_config(small_parameters=small), known_fisher={"known": 2.0})
    names = [block.name for block in optimizer.blocks]
    assert len(set(names)) == len(names) and {"body", "head", "known"} <= set(names)


def test_habits_of_torchs_optimizers() -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(lr=0.2))
    assert optimizer.defaults["lr"] == 0.2
    assert repr(optimizer).startswith("KFAC (\nParameter Group 0\n    full_lr: 0.2\n    lr: 0.2")
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    differentiated(model, optimizer, (4,))
    optimizer.step()
    scheduler.step()
    assert seen == ["before", "after"] and optimizer.lr == 0.1
    assert set(optimizer.state) == set(model.parameters())
