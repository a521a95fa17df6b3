"""What would be wrong in silence is right, or says so once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import functional as F

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KFACConfig,
    NoStatisticsWarning,
    Preconditioner,
    SumLoss,
)
from tests.tools.kfac import (
    block,
    build,
    mlp,
    plain_config,
    randn,
    softmax_fisher,
)

LOSS = CategoricalLoss()


def observed(model: nn.Module, inputs: Tensor, **settings: Any) -> KFAC:
    optimizer = KFAC(model, plain_config(**settings))
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, LOSS, source=Exact())
    return optimizer


def step(model: nn.Module, optimizer: KFAC, inputs: Tensor) -> None:
    with optimizer.capture() as captured:
        output = model(inputs)
    optimizer.observe(captured, output, LOSS)
    optimizer.zero_grad()
    output.square().mean().backward()
    optimizer.step()


# --- hooks of the user ----------------------------------------------------------------------------

# --- inputs that change in place ------------------------------------------------------------------


class Residual(nn.Module):
    """H += layer(h), which autograd allows where the layer keeps a copy of h, or no h."""

    def __init__(self, start: nn.Module, body: nn.Module) -> None:
        super().__init__()
        self.start, self.body, self.end = start, body, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.start(x)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32)).clone()
        hidden += self.body(hidden)
        return self.end(hidden).float() if x.dtype == torch.float32 else self.end(hidden)


def residuals() -> list[tuple[Residual, Tensor]]:
    return [
        (Residual(nn.Linear(6, 4), nn.Linear(4, 4)), torch.randn(8, 6)),
        (Residual(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 1)), torch.randn(8, 2, 6)),
        (Residual(nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), torch.randn(8, 6)),
    ]


@pytest.mark.parametrize("place", range(3))
def test_an_input_that_was_changed_in_place_is_an_error(place: int) -> None:
    model, inputs = residuals()[place]
    optimizer = KFAC(model)
    with optimizer.capture() as captured, torch.autocast("cpu", torch.bfloat16):
        output = model(inputs)
    output.float().sum().backward(retain_graph=True)  # autograd has nothing against it
    with pytest.raises(ValueError, match=r"'body.*' was changed in place .* write h = h \+ layer"):
        optimizer.observe(captured, output.float(), LOSS)


@pytest.mark.parametrize("place", [0, 2])
def test_a_lone_bias_needs_no_input_and_has_its_exact_block(place: int) -> None:
    model, inputs = residuals()[place]
    model, inputs = model.double(), inputs.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("body") and name.endswith("bias"))
    optimizer = observed(model, inputs)
    fisher = softmax_fisher(model(inputs))
    [found] = optimizer.curvature.stats.values()
    outputs = model(inputs)
    [bias] = [p for p in model.parameters() if p.requires_grad]
    rows = torch.stack(
        [
            torch.stack([torch.autograd.grad(z, bias, retain_graph=True)[0] for z in out])
            for out in outputs
        ]
    )
    right = torch.einsum("nci,ncd,ndj->ij", rows, fisher, rows) / len(rows)
    torch.testing.assert_close(found.averages[0].mean(), right, rtol=1e-9, atol=1e-12)


def test_inputs_of_the_module_that_change_before_it_runs_again_are_an_error() -> None:
    model, inputs = mlp(), randn(6, 4)
    optimizer = observed(model, inputs, quadratic="exact")
    model(inputs).square().mean().backward()
    inputs.mul_(2)
    assert optimizer.curvature.observed is not None
    optimizer.curvature.observed.followed = None  # as if an operation had no second derivative
    with pytest.raises(ValueError, match="the input of the module was changed in place"):
        optimizer.step()


# --- no statistics --------------------------------------------------------------------------------


class Bypassed(nn.Module):
    """One layer that runs as a module, one whose weight is used by itself, one without a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bare, self.side = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(x).relu()
        return F.linear(hidden, self.bare.weight, self.bare.bias), self.side(hidden)


def test_layers_with_gradients_and_no_statistics_are_named_once() -> None:
    model = Bypassed().double()
    optimizer = KFAC(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            with optimizer.capture() as captured:
                output, side = model(randn(6, 4))
            optimizer.observe(captured, output, LOSS)
            optimizer.zero_grad()
            (output.square().mean() + side.square().mean()).backward()
            optimizer.step()
    [warning] = [w for w in said if w.category is not DeprecationWarning]  # torch's own imports
    assert issubclass(warning.category, NoStatisticsWarning) and warning.filename == __file__
    names = "bare.weight, bare.bias, side.weight, side.bias"
    assert str(warning.message).startswith(f"no statistics of {names}: plain gradient steps")


@pytest.mark.parametrize("structure", ["kfac", "cholesky", "ekfac", "tridiagonal"])
def test_a_step_before_any_batch_is_told(structure: Any) -> None:
    model = mlp()
    curvature = Preconditioner(model, plain_config(structure=structure))
    model(randn(6, 4)).square().mean().backward()
    with pytest.warns(NoStatisticsWarning, match=r"0\.weight, 0\.bias, 2\.weight, 2\.bias"):
        curvature.precondition(lr=0.1)
    other = KFAC(mlp(), plain_config(structure=structure))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.step()  # no gradients, nothing to tell


def test_a_layer_whose_first_batch_comes_late_is_refreshed_at_once() -> None:
    model = Bypassed().double()
    optimizer = KFAC(model, plain_config(refresh_interval=50))
    for turn in range(3):
        with optimizer.capture() as captured:
            output, side = model(randn(6, 4))
        whole = (output, side) if turn else output
        loss = SumLoss(parts=(LOSS, GaussianLoss())) if turn else LOSS
        optimizer.observe(captured, whole, loss)
        optimizer.zero_grad()
        (side.square().mean() if turn else output.square().mean()).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert block(optimizer, "side").history.ready == (turn > 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_block_compiled_and_called_before_is_told() -> None:
    torch._dynamo.reset()
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(4, 3).double())
    model(randn(5, 4))
    optimizer = KFAC(model, plain_config(quadratic="kronecker"))  # others compile the block anew
    with pytest.warns(NoStatisticsWarning, match="0.*weight.*compiled"):
        step(model, optimizer, randn(5, 4))


def test_two_outputs_observed_one_by_one_are_told_to_be_averaged() -> None:
    model = Bypassed().double()
    optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output, side = model(randn(6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.observe(captured, side, GaussianLoss(), last=False)
        optimizer.observe(captured, output, LOSS)
        optimizer.observe(captured, output, LOSS)
    with pytest.warns(UserWarning, match="averaged: .* with SumLoss"):
        optimizer.observe(captured, side, GaussianLoss())


# --- another module -------------------------------------------------------------------------------


def replaced(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 3).double()


def appended(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3).double())


def thawed(model: nn.Sequential) -> None:
    model[1].requires_grad_()


CHANGES: list[tuple[Callable[[nn.Sequential], object], str]] = [
    (replaced, r"'2\.weight' was replaced or removed after K-FAC was constructed"),
    (appended, r"'3\.weight' became trainable after"),
    (thawed, r"'1\.weight' became trainable after"),
    (nn.Module.float, r"was torch.float64 on cpu .* is torch.float32 on cpu now: move the module"),
    (lambda m: m.to("meta"), "was replaced or removed|is torch.float64 on meta now"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_a_module_that_changes_after_construction_is_an_error(change: Any, match: str) -> None:
    model = build(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    optimizer = KFAC(model)
    step(model, optimizer, randn(6, 4))
    change(model)
    with pytest.raises(ValueError, match=match):
        step(model, optimizer, randn(6, 4))


def test_freezing_a_part_for_a_while_is_no_error() -> None:
    model = mlp()
    optimizer = KFAC(model)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        before = model[0].weight.detach().clone()
        step(model, optimizer, randn(6, 4))
        assert torch.equal(before, model[0].weight) == frozen


def complex_layer() -> nn.Module:
    return nn.Linear(3, 2, dtype=torch.complex64)


class Sharded(FullyShardedDataParallel):
    """Its kind alone, without a group of processes."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = nn.Linear(3, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Sequential(mlp(), Sharded()), "'1' is FullyShardedDataParallel, of whose wei"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "'0.weight' has no shape yet: run the lazy"),
        (lambda: torch.jit.script(mlp()), "a module of Python, not of torch.jit"),
        (lambda: nn.DataParallel(mlp()), "cannot try steps out on DataParallel: give and call"),
        (complex_layer, "'weight' is complex"),
    ],
)
@pytest.mark.parametrize("kind", [KFAC, Preconditioner])
def test_modules_that_cannot_have_blocks_are_one_line(make: Any, match: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=match):
        kind(make())


def test_several_ranks_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    optimizer, curvature = KFAC(model), Preconditioner(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    step(model, optimizer, randn(6, 4))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    match = "of this rank's samples alone, so that the 2 ranks"
    for act in (optimizer.step, lambda: curvature.precondition(lr=0.1), lambda: KFAC(model)):
        with pytest.raises(ValueError, match=match):
            act()


@pytest.mark.parametrize("damping, told", [(0.001, True), (0.1, False)])
def test_half_precision_with_a_small_damping_is_told_once(damping: float, told: bool) -> None:
    model = mlp().float()
    optimizer = KFAC(model, KFACConfig(damping=damping))
    found = []
    for autocast in (True, True):
        with optimizer.capture() as captured, torch.autocast("cpu", torch.bfloat16, autocast):
            output = model(randn(6, 4).float())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.observe(captured, output.float(), LOSS)
        found.append(["half precision" in str(w.message) for w in caught])
    assert found == [[True] if told else [], []]
    plain = KFAC(mlp())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(plain.curvature.module, plain, randn(6, 4))  # type: ignore[arg-type]


# --- messages -------------------------------------------------------------------------------------


def test_what_observe_cannot_take_is_one_line() -> None:
    module = build(nn.Linear(3, 2))
    optimizer, loss = KFAC(module), CategoricalLoss()
    with optimizer.capture() as captured:
        output = module(randn(4, 3))
    with pytest.raises(ValueError, match=r"the output has no graph: .* not detached"):
        optimizer.observe(captured, output.detach(), loss)
    with pytest.raises(ValueError, match="captured must be the record of a forward pass"):
        optimizer.observe(optimizer.capture(), output, loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="K-FAC takes the module itself, not its parameters"):
        KFAC(module.parameters())  # type: ignore[arg-type]


def test_observing_after_the_backward_pass_is_one_line() -> None:
    model = mlp()
    optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output = model(randn(6, 4))
    output.square().mean().backward()
    with pytest.raises(ValueError, match=r"the graph .* is gone: observe\(\) before backward"):
        optimizer.observe(captured, output, LOSS)


class Half:
    reduction = "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return output.sum()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (Half(), "which lacks normalizer, sampled, empirical, roots, hessian_product"),
        (nn.CrossEntropyLoss(), r"got CrossEntropyLoss\(\), which lacks normalizer"),
        (CategoricalLoss, "which lacks reduction, "),
    ],
)
def test_a_loss_that_is_none_is_told_what_it_lacks(loss: Any, match: str) -> None:
    model = mlp()
    optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output = model(randn(6, 4))
    with pytest.raises(ValueError, match=match):
        optimizer.observe(captured, output, loss)


class Crossed(nn.Module):
    """The layer that runs last is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


def test_a_chain_registered_in_another_order_than_it_runs_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"in the order of the forward pass: body, head"):
        observed(Crossed().double(), randn(6, 4), structure="tridiagonal")
    observed(mlp(), randn(6, 4), structure="tridiagonal")


def test_a_layer_may_know_the_module_that_it_is_in() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model[0].add_module("parent", model)
    optimizer = KFAC(model)
    with optimizer.capture():
        model[0].bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match="was replaced or removed"), optimizer.capture():
        pass
