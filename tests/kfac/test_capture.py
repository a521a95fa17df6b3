"""Capture of inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from acktr.kfac import KFAC, Empirical, Exact, GaussianLoss, Preconditioner, Sampled
from acktr.kfac.statistics.capture import capture
from tests.tools.kfac import (
    EXACT,
    OpRecorder,
    block,
    build,
    factors,
    kfac,
    kronecker,
    observe,
    parameters,
    randn,
)


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def net() -> nn.Sequential:
    return build(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))


# --- scope ----------------------------------------------------------------------------------------


def test_hooks_exist_inside_the_context_only() -> None:
    model = net()
    optimizer = kfac(model)
    assert hooks(model) == 0
    model(randn(3, 2, 4, 4))
    with optimizer.capture() as captured:
        assert hooks(model) == 5  # three layers, and the module itself before and after
        model(randn(3, 2, 4, 4))
    assert hooks(model) == 0
    model(randn(3, 2, 4, 4))
    assert {name: len(r.calls) for name, r in captured.layers.items()} == {"0": 1, "3": 1, "4": 1}


def test_hooks_go_when_the_forward_pass_fails() -> None:
    model = net()
    with pytest.raises(RuntimeError), kfac(model).capture():
        model(randn(3, 5, 4, 4))
    assert hooks(model) == 0


def test_the_module_is_not_changed() -> None:
    model = net()
    before = (list(model.state_dict()), [type(m) for m in model.modules()])
    values = parameters(model)
    optimizer = kfac(model)
    observe(optimizer, model, randn(3, 2, 4, 4))
    assert before == (list(model.state_dict()), [type(m) for m in model.modules()])
    assert all(torch.equal(values[n], p) for n, p in parameters(model).items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_without_gradients_records_nothing(mode: Callable[[], object]) -> None:
    model = net()
    optimizer = kfac(model)
    with optimizer.capture() as captured, mode():  # type: ignore[attr-defined]
        model(randn(3, 2, 4, 4))
    assert all(not r.calls for r in captured.layers.values())
    with optimizer.capture() as mixed:
        with torch.no_grad():
            model(randn(9, 2, 4, 4))
        model(randn(3, 2, 4, 4))
    assert [tuple(call.inputs.args[0].shape) for call in mixed.layers["0"].calls] == [(3, 2, 4, 4)]


def test_an_empty_capture_is_refused_and_leaves_the_statistics() -> None:
    model = net()
    optimizer = kfac(model)
    with optimizer.capture() as captured:
        pass
    output, match = model(randn(3, 2, 4, 4)), r"nothing was recorded: run the forward pass inside"
    with pytest.raises(ValueError, match=match):
        optimizer.update_curvature(captured, output.sum())
    for source in (Sampled(), Exact(), Empirical(torch.zeros_like(output))):
        with pytest.raises(ValueError, match=match):
            optimizer.observe(captured, output, GaussianLoss(), source=source)
    assert all(block(optimizer, name).a.weight == 0 for name in ("0", "3", "4"))


# --- what the Fisher pass costs and touches -------------------------------------------------------


def test_the_fisher_pass_computes_no_weight_gradient() -> None:
    model = build(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 7))
    optimizer = kfac(model)
    inputs = randn(11, 2, 6, 6)
    aten = torch.ops.aten
    with OpRecorder() as fisher:
        observe(optimizer, model, inputs)
    masks = [list(args[-1]) for args in fisher.of(aten.convolution_backward.default)]
    # The first convolution's backward is not run at all; the second passes on its input's only.
    assert masks == [[True, False, False]]
    assert (7, 18) not in fisher.products()
    assert (18, 7) not in fisher.products()
    assert all(p.grad is None for p in model.parameters())

    # The same recorder sees weight gradients where there are some.
    with OpRecorder() as ordinary:
        model(inputs).square().sum().backward()
    masks = [list(args[-1]) for args in ordinary.of(aten.convolution_backward.default)]
    assert masks == [[True, True, True], [False, True, True]]
    assert {(7, 18), (18, 7)} & set(ordinary.products())


def test_the_fisher_pass_leaves_gradients_alone() -> None:
    model = net()
    optimizer = kfac(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    kept = [p.grad for p in model.parameters()]
    observe(optimizer, model, randn(3, 2, 4, 4))
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        assert parameter.grad is grad
        assert (grad == 3.0).all()


def test_one_forward_pass_serves_the_fisher_pass_and_the_loss() -> None:
    model = net()
    optimizer = kfac(model)
    inputs = randn(3, 2, 4, 4)
    output = observe(optimizer, model, inputs)
    observed = factors(optimizer, "3")
    output.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, **EXACT)
    fresh = kfac(model)
    observe(fresh, model, inputs)
    torch.testing.assert_close(observed, factors(fresh, "3"), **EXACT)


def test_several_fisher_passes_over_one_forward_pass() -> None:
    model = net()
    optimizer = kfac(model, stat_decay=0.0)
    with optimizer.capture() as captured:
        output = model(randn(3, 2, 4, 4))
    optimizer.update_curvature(captured, output.sum())
    _, first = factors(optimizer, "3")
    optimizer.update_curvature(captured, 2 * output.sum())
    _, second = factors(optimizer, "3")
    torch.testing.assert_close(second, 4 * first, **EXACT)


# --- unusual networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["linear", "linear-no-bias", "positions", "positions-no-bias", "conv"]
)
def test_an_in_place_activation_right_after_a_layer_changes_nothing(kind: str) -> None:
    first, inputs = {
        "linear": (nn.Linear(4, 5), randn(6, 4)),
        "linear-no-bias": (nn.Linear(4, 5, bias=False), randn(6, 4)),
        "positions": (nn.Linear(4, 5), randn(6, 3, 4)),
        "positions-no-bias": (nn.Linear(4, 5, bias=False), randn(6, 3, 4)),
        "conv": (nn.Conv2d(4, 5, 2), randn(6, 4, 3, 3)),
    }[kind]
    second = nn.Conv2d(5, 3, 2) if kind == "conv" else nn.Linear(5, 3)
    found = []
    for in_place in (False, True):
        model = build(first, nn.ReLU(inplace=in_place), second, nn.ReLU(inplace=in_place))
        optimizer = kfac(model)
        output = observe(optimizer, model, inputs)
        output.square().sum().backward()
        assert block(optimizer, "0").a.weight > 0
        found.append([*factors(optimizer, "0"), *factors(optimizer, "2")])
    for plain, in_place_factor in zip(*found, strict=True):
        assert plain.abs().max() > 1e-3
        torch.testing.assert_close(in_place_factor, plain, **EXACT)


class Twice(nn.Module):
    """Uses one layer twice, one layer for an unused output, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 3)
        self.bypassed = nn.Linear(4, 3)
        self.kept: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.shared(inputs)
        second = self.shared(first.tanh())
        self.unused(second)
        self.kept = [inputs, first, first.tanh(), second]
        return second


def twice() -> tuple[Twice, KFAC]:
    model = Twice().double()
    return model, kfac(model)


def test_a_layer_used_twice_sums_its_uses() -> None:
    model, optimizer = twice()
    inputs, noise = randn(6, 4), randn(6, 4, seed=1)
    with optimizer.capture() as captured:
        output = model(inputs)
    loss = (noise * output).sum()
    optimizer.update_curvature(captured, loss)

    early, first, late, second = model.kept
    signals = torch.autograd.grad(loss, [first, second])
    rows = torch.cat([torch.cat([early, late]), torch.ones(12, 1).double()], dim=1)
    a, g = factors(optimizer, "shared")
    torch.testing.assert_close(a, (rows.mT @ rows / 12).detach(), **EXACT)
    torch.testing.assert_close(g, sum(s.mT @ s for s in signals) / 6, **EXACT)


def test_unused_and_bypassed_layers_have_no_statistics_and_step_by_the_gradient() -> None:
    model, optimizer = twice()
    output = observe(optimizer, model, randn(6, 4))
    for name in ("unused", "bypassed"):
        assert block(optimizer, name).a.weight == 0
        assert block(optimizer, name).g.weight == 0
    output.square().sum().backward()
    grad = torch.ones_like(model.bypassed.weight)
    model.bypassed.weight.grad = grad.clone()
    before = parameters(model)
    optimizer.step()
    after = parameters(model)
    assert optimizer.failures == 0
    assert torch.equal(before["unused.weight"], after["unused.weight"])
    moved = before["bypassed.weight"] - after["bypassed.weight"]
    assert optimizer.last_step is not None
    rate = optimizer.lr * (1 - optimizer.config.momentum) * optimizer.last_step.scale
    torch.testing.assert_close(moved, rate * grad, rtol=1e-9, atol=1e-15)
    assert not torch.equal(before["shared.weight"], after["shared.weight"])


def test_a_use_that_the_loss_ignores_is_left_out_of_both_factors() -> None:
    model = build(nn.Linear(3, 2))
    optimizer = kfac(model)
    with optimizer.capture() as captured:
        used = model(randn(5, 3))
        model(100 * randn(5, 3, seed=1))
    optimizer.update_curvature(captured, (randn(5, 2, seed=2) * used).sum())
    reference = kfac(model)
    with reference.capture() as single:
        used = model(randn(5, 3))
    reference.update_curvature(single, (randn(5, 2, seed=2) * used).sum())
    torch.testing.assert_close(kronecker(optimizer, "0"), kronecker(reference, "0"), **EXACT)


def test_an_input_given_by_keyword_is_captured() -> None:
    layer = nn.Linear(3, 2).double()
    inputs = randn(5, 3)
    with capture({"layer": layer}) as captured:
        layer(input=inputs)
    assert torch.equal(captured.layers["layer"].calls[0].inputs.kwargs["input"], inputs)


@pytest.mark.parametrize("attention", [False, True])
def test_a_checkpoint_that_is_computed_again_is_recorded_once(attention: bool) -> None:
    """Also where the backward pass, which computes it again, runs inside of the context."""
    middle = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True) if attention else nn.Tanh()
    model = nn.Sequential(nn.Linear(3, 4), middle, nn.LayerNorm(4), nn.Linear(4, 2)).double()
    skip, results = [nn.MultiheadAttention] if attention else [], []
    for inside in (False, True):
        curvature = Preconditioner(model, skip=skip)
        inputs = randn(3, 5, 3)
        with curvature.capture() as captured:
            output = checkpoint(model, inputs, use_reentrant=False) if inside else model(inputs)
            curvature.observe(captured, output, GaussianLoss())
        results.append([a.mean() for b in curvature.stats.values() for a in b.averages])
    torch.testing.assert_close(*results)
