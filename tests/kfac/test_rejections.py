"""What is refused leaves no trace: batches, steps, states, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, Exact, GaussianLoss, Preconditioner
from acktr.kfac.losses.likelihoods import Reduction
from acktr.kfac.noisy import NoisyKFAC
from tests.tools.kfac import (
    build,
    mlp,
    parameters,
    plain_config,
    randn,
    same,
    set_gradients,
    snapshot,
)
from tests.tools.product_cases import filled


class Shared(nn.Module):
    """The second layer is used twice, the second time for the sum of two samples if asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)

    def forward(self, x: Tensor, uneven: bool = False) -> Tensor:
        hidden = self.first(x)
        again = self.second(hidden[:2] if uneven else hidden)
        output: Tensor = self.second(hidden) + (again.sum(0) if uneven else again)
        return output


def observe(
    optimizer: KFAC, inputs: Tensor, loss: GaussianLoss, *, last: bool = True, uneven: bool = False
) -> None:
    with optimizer.capture() as captured:
        output = optimizer.curvature.module(inputs, uneven)
    optimizer.observe(captured, output, loss, source=Exact(), last=last)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parts_before", [0, 1])
def test_a_batch_that_is_refused_leaves_no_trace(reduction: Reduction, parts_before: int) -> None:
    config = plain_config(structure="ekfac", stat_decay=0.0, quadratic="exact")
    loss = GaussianLoss(reduction=reduction)
    states, forms = [], []
    for rejected in (False, True):
        optimizer = KFAC(filled(Shared()), config)
        observe(optimizer, randn(5, 3), loss)
        optimizer.refresh()
        if rejected:
            for part in range(parts_before):
                observe(optimizer, randn(4, 3, seed=8 + part), loss, last=False)
            with pytest.raises(ValueError, match="samples meet"):
                observe(optimizer, randn(6, 3, seed=7), loss, uneven=True)
        observe(optimizer, randn(5, 3, seed=9), loss)
        states.append(snapshot(optimizer))
        step = {n: torch.ones_like(p) for n, p in optimizer.curvature.named.items()}
        forms.append(optimizer.curvature.region.quadratic(step))
    assert same(states[0], states[1])
    assert torch.equal(forms[0], forms[1])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"quadratic": "kronecker"}, "trust_region"),
        ({"quadratic": "corrected", "kl_clip": (0.1, None)}, "trust_region"),
        ({"quadratic": "corrected", "kl_clip": None}, "trust_region"),
        ({"quadratic": "exact"}, "quadratic_model"),
    ],
    ids=str,
)
def test_exact_forms_that_would_not_be_used_are_refused(settings: Any, rule: Any) -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(**settings), step_rule=rule)
    set_gradients(model)
    before = parameters(model)
    with pytest.raises(ValueError, match="fisher_quadratic is of no use"):
        optimizer.step(fisher_quadratic=lambda step: sum(u.square().sum() for u in step.values()))
    assert same(before, parameters(model)) and optimizer.steps == 0


def test_a_step_that_is_refused_does_not_pass_over_the_refresh() -> None:
    model = mlp()
    optimizer = KFAC(model, plain_config(quadratic="exact", refresh_interval=10))
    set_gradients(model)
    with optimizer.capture() as captured:
        output = model(randn(6, 4))
    optimizer.update_curvature(captured, output.sum())
    with pytest.raises(ValueError, match="needs fisher_quadratic in step"):
        optimizer.step()
    with optimizer.capture() as captured:
        output = model(randn(6, 4))
    optimizer.observe(captured, output, GaussianLoss())
    optimizer.curvature.stats["0"].history.ready = False
    assert optimizer.steps == 0 and optimizer.needs_refresh
    optimizer.step()
    assert optimizer.curvature.stats["0"].history.ready


SETTINGS: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"structure": "ekfac"},
    "cholesky": {"structure": "cholesky"},
}


@pytest.mark.parametrize(("old", "new"), [("kfac", "ekfac"), ("ekfac", "cholesky")])
def test_a_state_of_other_settings_is_refused_as_a_whole(old: str, new: str) -> None:
    optimizers = []
    for name in (old, new):
        optimizer = KFAC(mlp(), plain_config(**SETTINGS[name]))
        observe_mlp(optimizer.curvature)
        optimizer.refresh()
        optimizers.append(optimizer)
    before = snapshot(optimizers[1])
    with pytest.raises(ValueError, match="layers: 0 does not fit: it lacks"):
        optimizers[1].load_state_dict(snapshot(optimizers[0]))
    assert same(snapshot(optimizers[1]), before)


def observe_mlp(curvature: Preconditioner, loss: Any = None, source: Any = None) -> None:
    with curvature.capture() as captured:
        output = curvature.module(randn(6, 4))
    loss = CategoricalLoss() if loss is None else loss
    curvature.observe(captured, output, loss, source=source)


def update_mlp(curvature: Preconditioner, samples: int) -> None:
    with curvature.capture() as captured:
        output = curvature.module(randn(6, 4))
    curvature.update_curvature(captured, output.sum(), samples=samples)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: observe_mlp(c, source=Exact), "source must be Sampled"),
        (lambda c: observe_mlp(c, source="exact"), "source must be Sampled"),
        (lambda c: observe_mlp(c, loss=nn.CrossEntropyLoss()), "loss must be an OutputLoss"),
        (lambda c: update_mlp(c, samples=0), "samples must be an integer >= 1, got 0"),
        (lambda c: update_mlp(c, samples=-8), "samples must be an integer >= 1, got -8"),
        (lambda c: c.precondition(lr=float("nan")), "lr must be >= 0"),
        (lambda c: c.precondition(lr=-1.0), "lr must be >= 0"),
        (lambda c: c.precondition(lr=0.1, momentum=1.0), r"momentum in \[0, 1\)"),
    ],
)
def test_a_bad_argument_gets_one_clear_line(
    act: Callable[[Preconditioner], None], message: str
) -> None:
    curvature = Preconditioner(mlp())
    observe_mlp(curvature)
    set_gradients(curvature.module)
    before = snapshot(curvature)
    with pytest.raises(ValueError, match=message) as caught:
        act(curvature)
    assert "\n" not in str(caught.value)
    assert same(snapshot(curvature), before)


@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
@pytest.mark.parametrize("cold_steps", [0, 2])
def test_a_sparse_embedding_steps_as_a_dense_one_without_a_block(cold_steps: int) -> None:
    ends = []
    for sparse in (True, False):
        odd = {"sparse": True} if sparse else {"scale_grad_by_freq": False, "max_norm": 1e9}
        model = build(nn.Embedding(6, 3, **odd), nn.Linear(3, 2))
        optimizer = KFAC(model, plain_config(cold_steps=cold_steps, weight_decay=0.1))
        for _ in range(3):
            with optimizer.capture() as captured:
                output = model(torch.tensor([0, 2, 2, 5]))
            optimizer.observe(captured, output, GaussianLoss())
            optimizer.zero_grad()
            GaussianLoss()(output, torch.ones_like(output)).backward()
            optimizer.step()
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-12, atol=1e-14)
        assert not value.is_sparse


@pytest.mark.filterwarnings("ignore::acktr.kfac.UnsupportedParameterWarning")
def test_a_sparse_gradient_is_preconditioned_for_another_optimizer() -> None:
    model = build(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2))
    curvature = Preconditioner(model, plain_config(small_parameters="gradient"))
    with curvature.capture() as captured:
        output = model(torch.tensor([0, 2, 2, 5]))
    curvature.observe(captured, output, GaussianLoss())
    GaussianLoss()(output, torch.ones_like(output)).backward()
    table = model[0].weight
    plain = table.grad.to_dense()
    info = curvature.precondition(lr=0.1)
    assert info is not None and 0 < float(info.scale) <= 1
    torch.testing.assert_close(table.grad, float(info.scale) * plain, rtol=1e-12, atol=1e-14)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    ("kind", "arguments", "config", "name"),
    [
        (KFAC, {}, "KFACConfig", "lr"),
        (Preconditioner, {}, "KFACConfig", "damping"),
        (NoisyKFAC, {"data_size": 9}, "NoisyConfig", "lr"),
    ],
)
def test_settings_as_arguments_are_told_where_they_belong(
    kind: Any, arguments: dict[str, Any], config: str, name: str
) -> None:
    with pytest.raises(TypeError) as caught:
        kind(mlp(), **arguments, **{name: 0.1})
    own = kind.__name__
    assert str(caught.value) == (
        f"{own} has no argument {name}: settings are those of {config}, as in"
        f" {own}(model, {config}({name}=...))"
    )
    with pytest.raises(TypeError, match=f"^{own} has no argument rate$"):
        kind(mlp(), **arguments, rate=0.1)
