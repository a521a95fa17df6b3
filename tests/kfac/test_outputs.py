"""Outputs that are parts of what a module returns, for products with the exact Fisher."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    LMConfig,
    SumLoss,
    dense_fisher,
)
from acktr.kfac.losses.base import with_weights
from tests.tools.exact import close
from tests.tools.kfac import plain_config, randn, seeded
from tests.tools.product_cases import filled

Pair = namedtuple("Pair", ["logits", "value"])


@dataclass
class Fields:
    logits: Tensor
    value: Tensor


class Heads(nn.Module):
    """A policy and a value in whatever is asked for."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.policy, self.value = nn.Linear(4, 3), nn.Linear(4, 1)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.norm(self.trunk(x)))
        logits, value = self.policy(hidden), self.value(hidden)
        if self.kind in (dict, OrderedDict):
            return self.kind(logits=logits, more={"value": [value]})
        return self.kind((logits, value)) if self.kind is list else self.kind(logits, value)


class Both(nn.Module):
    """The same outputs as a tuple."""

    def __init__(self, inner: Heads) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return chosen(self.inner(x), self.inner.kind)


def chosen(returned: Any, kind: Any) -> tuple[Tensor, Tensor]:
    if kind in (dict, OrderedDict):
        return returned["logits"], returned["more"]["value"][0]
    return (returned[0], returned[1]) if kind is list else (returned.logits, returned.value)


def quadratic(model: nn.Module, inputs: Tensor, loss: Any, take: Any, **observed: Any) -> float:
    """Exact q of a fixed direction, as the optimizer has it."""
    optimizer = KFAC(model, plain_config(quadratic="exact"))
    with optimizer.capture() as captured:
        returned = model(inputs)
    optimizer.observe(captured, take(returned), loss, **observed)
    step = {n: randn(*p.shape, seed=3) for n, p in model.named_parameters()}
    return float(optimizer.curvature.region.quadratic(step))


@pytest.mark.parametrize("kind", [dict, OrderedDict, list, Pair, Fields])
def test_the_exact_form_takes_its_output_from_what_is_returned(kind: Any) -> None:
    model, inputs = filled(Heads(kind)), randn(5, 3)
    flat = torch.cat([randn(*p.shape, seed=3).flatten() for p in model.parameters()])
    both = SumLoss(parts=(CategoricalLoss(), GaussianLoss()), weights=(1.0, 0.5))
    fisher = dense_fisher(Both(model), (inputs,), both)  # type: ignore[arg-type]
    found = quadratic(model, inputs, both, lambda r: chosen(r, kind))
    assert found == pytest.approx(float(flat @ fisher @ flat), rel=1e-11)
    value = quadratic(model, inputs, GaussianLoss(), lambda r: chosen(r, kind)[1])
    again = quadratic(model, inputs, GaussianLoss(), lambda r: chosen(r, kind)[1].clone())
    assert value == again > 0


@pytest.mark.parametrize("step_rule", ["trust_region", "quadratic_model"])
def test_a_mask_of_terms_is_in_the_exact_form_too(step_rule: Any) -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    inputs, mask = randn(5, 4, 3), torch.rand(5, 4, generator=seeded(2)) < 0.5
    found = quadratic(model, inputs, CategoricalLoss(), lambda r: r, weights=mask)
    alone = quadratic(model, inputs[mask], CategoricalLoss(), lambda r: r)
    assert found == pytest.approx(alone, rel=1e-12)
    output = model(inputs)
    fisher = dense_fisher(model, (inputs,), with_weights(CategoricalLoss(), output, mask))
    close(fisher, dense_fisher(model, (inputs[mask],), CategoricalLoss()))
    loss, target = CategoricalLoss(), torch.zeros(5, 4, dtype=torch.int64)
    steps = []
    for given, kept, weights in ((inputs, target, mask), (inputs[mask], target[mask], None)):
        net = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
        config = plain_config(quadratic="exact")
        adaptive = LMConfig() if step_rule == "quadratic_model" else None
        optimizer = KFAC(net, config, step_rule=step_rule, adaptive=adaptive)
        with optimizer.capture() as captured:
            output = net(given)
        optimizer.observe(captured, output, loss, weights=weights, source=Exact())
        loss(output, kept, weights=weights).backward()
        optimizer.step(objective=lambda n=net, g=given, k=kept, w=weights: loss(n(g), k, weights=w))
        steps.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    close(steps[0], steps[1])


@pytest.mark.parametrize(
    ("take", "message"),
    [
        (lambda model, x: model(x)[:3], r"weights=mask"),
        (lambda model, x: model(x).flatten(0, 1), r"weights=mask"),
        (lambda model, x: torch.cat([model(x[:2]), model(x[2:])]), "were 2: join their inputs"),
    ],
)
def test_another_output_than_the_modules_is_refused_when_it_runs_again(
    take: Any, message: str
) -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)))
    optimizer = KFAC(model, plain_config(quadratic="exact"))
    with optimizer.capture() as captured:
        output = take(model, randn(5, 2, 3))
    optimizer.observe(captured, output, CategoricalLoss())
    output.square().sum().backward()
    observed = optimizer.curvature.observed
    assert observed is not None and observed.followed is not None
    observed.followed = None  # as for an operation without a second derivative
    with pytest.raises(ValueError, match=message):
        optimizer.step()
