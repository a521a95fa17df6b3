"""Inputs of any structure, random modules, attention, and inputs that K-FAC refuses."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    LMConfig,
    Preconditioner,
    dense_fisher,
    fisher_gram,
    kfac_error,
)
from tests.tools.kfac import (
    build,
    observe,
    parameters,
    plain_config,
    randn,
    same,
    seeded,
    set_gradients,
)
from tests.tools.product_cases import close, directions, filled

Call = Callable[[nn.Module, Tensor, Tensor], Any]
LOSS = CategoricalLoss()


class Asymmetric(nn.Module):
    """Two inputs of one shape that must not be swapped, a layer, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.zeros(3))

    def forward(
        self, a: Tensor | None = None, b: Tensor | None = None, pair: Any = None, times: float = 1.0
    ) -> Tensor:
        if pair is not None:
            a, b = pair["a"], pair["rest"][0]
        assert a is not None
        assert b is not None
        hidden: Tensor = self.layer(a).tanh() * self.scale * times + b
        return hidden.square()


CALLS: dict[str, Call] = {
    "position": lambda model, a, b: model(a, b),
    "one keyword": lambda model, a, b: model(a, b=b, times=1.0),
    "keywords": lambda model, a, b: model(a=a, b=b),
    "swapped keywords": lambda model, a, b: model(b=b, a=a),
    "nested": lambda model, a, b: model({"rest": [b], "a": a}),
    "nested keyword": lambda model, a, b: model(pair={"rest": [b], "a": a}),
}


class Nested(Asymmetric):
    """The same with a dict as first input."""

    def forward(self, pair: Any, b: Any = None, times: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(pair=pair)


def a_model(call: str) -> Asymmetric:
    model = Nested() if call == "nested" else Asymmetric()
    filled(model)
    return model


def truth(vectors: list[dict[str, Tensor]], a: Tensor, b: Tensor) -> Tensor:
    return fisher_gram(a_model("position"), (a, b), LOSS, vectors)


@pytest.mark.parametrize("call", CALLS)
def test_small_parameters_are_exact_for_inputs_in_any_place(call: str) -> None:
    model, a, b = a_model(call), randn(5, 3, seed=1), randn(5, 3, seed=2)
    curvature = Preconditioner(model, plain_config(small_parameters="dense"))
    with curvature.capture() as captured:
        output = CALLS[call](model, a, b)
    curvature.observe(captured, output, LOSS, source=Exact())
    exact = dense_fisher(a_model("position"), (a, b), LOSS, ["scale"])
    found = curvature.stats["small_parameters"].moment.mean()  # type: ignore[union-attr]
    close(found, exact)


def test_inputs_without_a_row_for_each_sample_are_shared() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))

        def forward(self, x: Tensor, mask: Tensor, offset: Tensor, *, power: int) -> Tensor:
            return ((x * mask) @ self.weight + offset) ** power

    model, x = filled(Masked()), randn(4, 3)
    mask, offset = randn(3, seed=5), torch.tensor(0.3).double()
    config = plain_config(small_parameters="dense")
    curvature = Preconditioner(model, config)
    with curvature.capture() as captured:
        output = model(x, mask, power=3, offset=offset)
    curvature.observe(captured, output, LOSS, source=Exact())
    exact = dense_fisher(model, (x, mask, offset), LOSS, kwargs={"power": 3})
    close(curvature.stats["small_parameters"].moment.mean(), exact)  # type: ignore[union-attr]


@pytest.mark.parametrize("call", CALLS)
def test_the_exact_quadratic_form_knows_inputs_in_any_place(call: str) -> None:
    model, a, b = a_model(call), randn(5, 3, seed=1), randn(5, 3, seed=2)
    optimizer = KFAC(model, plain_config(quadratic="exact", small_parameters="dense"))
    with optimizer.capture() as captured:
        output = CALLS[call](model, a, b)
    optimizer.observe(captured, output, LOSS)
    _, (step,) = directions(model, 1)
    close(optimizer.curvature.region.quadratic(step), truth([step], a, b)[0, 0])
    assert kfac_error(optimizer).blocks == pytest.approx(
        kfac_error(optimizer, (a, b), LOSS).blocks
        if call != "nested"
        else kfac_error(optimizer, ({"a": a, "rest": (b,)},), LOSS).blocks
    )


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_the_quadratic_model_knows_inputs_in_any_place(call: str, adaptive: bool) -> None:
    model, a, b = a_model(call), randn(5, 3, seed=1), randn(5, 3, seed=2)
    optimizer = KFAC(
        model,
        plain_config(small_parameters="dense"),
        step_rule="quadratic_model",
        adaptive=LMConfig(interval=1) if adaptive else None,
    )
    with optimizer.capture() as captured:
        output = CALLS[call](model, a, b)
    optimizer.observe(captured, output, LOSS)
    set_gradients(model)
    optimizer.refresh()
    fisher = truth([optimizer.direction()], a, b)
    optimizer.step(objective=lambda: CALLS[call](model, a, b).sum())
    info = optimizer.last_step
    assert info is not None
    assert info.coefficients is not None
    close(info.quadratic * info.scale**2, info.coefficients @ fisher @ info.coefficients)


def test_products_take_inputs_by_keyword() -> None:
    model, a, b = a_model("keywords"), randn(5, 3, seed=1), randn(5, 3, seed=2)
    _, vectors = directions(model, 2)
    close(fisher_gram(model, (), LOSS, vectors, kwargs={"b": b, "a": a}), truth(vectors, a, b))
    close(dense_fisher(model, (a,), LOSS, kwargs={"b": b}), dense_fisher(model, (a, b), LOSS))


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
def test_submodules_alone_give_the_exact_fisher_until_the_step(rule: Any) -> None:
    model = build(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    config = plain_config(quadratic="exact", momentum=0.0)
    optimizer = KFAC(model, config, step_rule=rule)
    x = randn(6, 4)
    with optimizer.capture() as captured:
        output = model[2](model[1](model[0](x)))
    optimizer.observe(captured, output, LOSS)
    set_gradients(model)
    step = optimizer.direction()
    exact = fisher_gram(model, (x,), LOSS, [step])[0, 0]
    close(optimizer.curvature.region.quadratic(step), exact)
    optimizer.step()
    before = parameters(model)
    with pytest.raises(ValueError, match="only submodules were called inside capture"):
        optimizer.step()
    assert same(parameters(model), before)


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.Dropout(0.5), "dropout"), (nn.BatchNorm1d(3), "BatchNorm")]
)
def test_modules_that_mix_samples_or_draw_are_refused_for_small_parameters(
    layer: nn.Module, name: str
) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.layer = layer.double()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x * self.scale.double())
            return found

    model, x = Own(), randn(5, 3)
    curvature = Preconditioner(model, plain_config(small_parameters="dense"))
    with curvature.capture() as captured:
        output = model(x)
    with pytest.raises(ValueError, match=f"{name} must be in eval mode"):
        curvature.observe(captured, output, LOSS)


def test_inputs_with_samples_elsewhere_are_refused_for_small_parameters() -> None:
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sum(0)

    model, x = TimeFirst(), randn(7, 5, 3)
    curvature = Preconditioner(model, plain_config(small_parameters="dense"))
    with curvature.capture() as captured:
        output = model(x)
    with pytest.raises(ValueError, match="the samples as leading dimension"):
        curvature.observe(captured, output, LOSS)


# --- attention ------------------------------------------------------------------------------------
# --- adaptation of the damping --------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["trust_region", "quadratic_model"])
def test_an_adaptation_sees_one_dropout_mask_and_leaves_no_trace(rule: Any) -> None:
    model = build(nn.Linear(4, 60), nn.BatchNorm1d(60), nn.Dropout(0.5), nn.Linear(60, 3))
    x, y = randn(6, 4), torch.randint(3, (6,), generator=seeded(0))
    optimizer = KFAC(model, plain_config(), step_rule=rule, adaptive=LMConfig(interval=1))
    with optimizer.capture() as captured:
        output = model(x)
    optimizer.observe(captured, output, LOSS)
    torch.autograd.backward(LOSS(output, y))
    values: list[float] = []

    def objective() -> Tensor:
        for name, parameter in model.named_parameters():  # no step: only the mask could differ
            parameter.copy_(start[name])
        found = LOSS(model(x), y)
        values.append(float(found))
        return found

    start = parameters(model)
    buffers = {name: (b, b.clone()) for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    optimizer.step(objective=objective)
    assert len(values) == 2
    assert values[0] == values[1] == float(LOSS(output, y))  # the observed pass's mask
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    optimizer.step(objective=objective)
    assert values[2] == values[0]
    with optimizer.capture() as captured:
        output = model(x)
    optimizer.observe(captured, output, LOSS)
    optimizer.step(objective=objective)
    assert values[3] != values[4]
    assert values[4] == values[5]


# --- refused inputs -------------------------------------------------------------------------------


class Held:
    """Lives as long as the graph."""


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Held) -> Tensor:
        ctx.held = held
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return 2 * gradient, None


def test_kept_inputs_hold_no_graph() -> None:
    source = randn(5, 4).requires_grad_()
    held = Held()
    graph = weakref.ref(held)
    made = Doubled.apply(source, held)  # type: ignore[no-untyped-call]
    del held
    model = build(nn.Linear(4, 3))
    optimizer = KFAC(model, plain_config(quadratic="kronecker"))
    with optimizer.capture() as captured:
        output = model(made)
    optimizer.observe(captured, output, LOSS)
    del captured, output, made
    gc.collect()
    assert graph() is None
    observed = optimizer.curvature.observed
    assert observed is not None
    assert torch.equal(observed.inputs.args[0], source * 2)


def test_a_module_without_parameters_is_refused() -> None:
    for made in (KFAC, Preconditioner):
        with pytest.raises(ValueError, match="needs a module with parameters"):
            made(nn.ReLU())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(4, 3), (4,)), (nn.LayerNorm(4), (4,)), (nn.Conv2d(4, 3, 1), (4, 3, 3))],
)
def test_an_input_without_a_batch_is_refused_by_name(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    model = build(nn.Identity(), layer)
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match=rf"layer '1' \({type(layer).__name__}\) must be called"):
        observe(optimizer, model, randn(*shape))


class Siamese(nn.Module):
    """One layer for two batches of different sizes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.shared = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.shared(x), self.shared(x[:2])


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.LayerNorm(4), {}),
        (nn.Linear(4, 4), {"structure": "ekfac"}),
        (nn.Linear(4, 4), {"linear_sharing": "reduce"}),
    ],
)
def test_two_batch_sizes_in_one_pass_are_refused_by_name(
    layer: nn.Module, settings: dict[str, Any]
) -> None:
    model = filled(Siamese(layer))
    curvature = Preconditioner(model, plain_config(**settings))
    with curvature.capture() as captured:
        output = model(randn(5, 4))
    with pytest.raises(ValueError, match=r"'shared' was used with different batch sizes .*5, 2"):
        curvature.update_curvature(captured, output[0].sum() + output[1].sum())
