"""Many small layers of one shape, whose products are made together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC, CategoricalLoss, Exact, Preconditioner
from acktr.kfac.blocks import alike
from acktr.kfac.statistics.averages import History, RunningAverage, fold_together
from tests.tools.exact import close
from tests.tools.kfac import build, plain_config, randn, same, snapshot


class Residual(nn.Module):
    """Layers of one shape with and without bias, one of another shape, a norm between."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=bias) for _ in range(9))
        self.norm = nn.LayerNorm(5)
        self.leave = nn.Linear(5, 3)
        self.used = 9

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.enter(inputs)
        for layer in self.layers[: self.used]:
            hidden = hidden + layer(hidden).tanh()
        output: Tensor = self.leave(self.norm(hidden))
        return output


def residual(bias: bool = True) -> Residual:
    torch.manual_seed(0)
    return Residual(bias).double()


def deep() -> nn.Sequential:
    layers = [part for _ in range(10) for part in (nn.Linear(4, 4), nn.Tanh())]
    return build(*layers, nn.Linear(4, 3), seed=3)


def run(model: nn.Module, width: int, structure: Any, **settings: Any) -> tuple[KFAC, list[Any]]:
    config = plain_config(structure=structure, lr=0.1, kl_clip=0.1, refresh_interval=2, **settings)
    optimizer = KFAC(model, config)
    losses = []
    for turn in range(6):
        inputs = randn(7, width, seed=turn)
        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, CategoricalLoss(), source=Exact())
        optimizer.zero_grad()
        value = CategoricalLoss()(output, inputs[:, :3].argmax(1))
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return optimizer, losses


def nearly(found: Any, wanted: Any, rtol: float = 1e-7) -> None:
    """Nested states agree up to rounding, and up to the signs of eigenvectors."""
    if isinstance(wanted, dict):
        for key in wanted:
            if key not in ("basis", "generator"):
                nearly(found[key], wanted[key], rtol)
    elif isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            nearly(one, other, rtol)
    elif isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("structure", ["kfac", "kfac_factored", "cholesky", "ekfac"])
@pytest.mark.parametrize("kind", ["residual", "residual without bias", "deep"])
def test_a_run_is_that_of_the_blocks_one_by_one(
    kind: str, structure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> nn.Module:
        return deep() if kind == "deep" else residual("without" not in kind)

    width = 4 if kind == "deep" else 3
    calls = []
    real = alike.Alike.observe
    monkeypatch.setattr(
        alike.Alike, "observe", lambda self, seen: calls.append(real(self, seen)) or calls[-1]
    )
    together, losses = run(made(), width, structure)
    assert calls == [True] * 6
    monkeypatch.setattr(alike, "LEAST", 100)
    alone, wanted = run(made(), width, structure)
    assert len(calls) == 6
    close(torch.stack(losses), torch.stack(wanted))
    # EKFAC's scales belong to eigenvectors, which rounding turns where two eigenvalues are close:
    # a gap of 1e-10 gave 1e-6 on one processor. A block taken for another gives 0.1.
    nearly(snapshot(together), snapshot(alone), 1e-4 if structure == "ekfac" else 1e-7)


def test_layers_that_a_pass_leaves_out_are_observed_one_by_one() -> None:
    model = residual()
    curvature = Preconditioner(model, plain_config())
    for used in (9, 4):
        model.used = used
        with curvature.capture() as captured:
            output = model(randn(6, 3))
        curvature.observe(captured, output, CategoricalLoss())
    weights = [float(curvature.stats[f"layers.{i}"].history.started) for i in range(9)]
    assert weights == [1.0] * 9
    seen = [float(curvature.stats[f"layers.{i}"].a.weight) for i in range(9)]  # type: ignore[union-attr]
    assert seen[:4] == [pytest.approx(0.0199)] * 4 and seen[4:] == [pytest.approx(0.01)] * 5


def test_one_bad_layer_spoils_no_other() -> None:
    model = deep()
    curvature = Preconditioner(model, plain_config())
    block = curvature.stats["4"]
    for last in (False, True):
        with curvature.capture() as captured:
            output = model(randn(6, 4))
        curvature.observe(captured, output, CategoricalLoss(), last=last)
        block.a.add(torch.full((5, 5), torch.nan).double(), 1)  # type: ignore[union-attr]
    others = [b for b in curvature.stats.values() if b is not block]
    assert int(block.history.rejected) == 1
    assert {int(b.history.rejected) for b in others} == {0}
    assert all(abs(float(b.a.weight) - 0.01) < 1e-9 for b in others)  # type: ignore[union-attr]


def test_dampings_that_differ_are_kept() -> None:
    model = residual()
    groups = [
        {"params": model.layers[:3].parameters(), "weight_decay": 0.5},
        {"params": [*model.layers[3:].parameters(), *model.leave.parameters()]},
    ]
    optimizer = KFAC(model, plain_config(damping=0.1), param_groups=groups)
    with optimizer.capture() as captured:
        output = model(randn(6, 3))
    optimizer.observe(captured, output, CategoricalLoss())
    CategoricalLoss()(output, torch.zeros(6, dtype=torch.long)).backward()
    optimizer.refresh()
    step = optimizer.direction()
    first = optimizer.curvature.stats["layers.0"]
    gradients = optimizer.curvature.gradients({f"layers.0.{n}": 0.5 for n in ("weight", "bias")})
    assert same(first.precondition(gradients, 0.6)["layers.0.weight"], step["layers.0.weight"])  # type: ignore[union-attr]


def test_batches_are_folded_together_as_one_by_one_bit_for_bit() -> None:
    """Batches in parts, of NaN, and such that a block did not see."""
    kinds = {"together": fold_together, "apart": None}
    found = {}
    for kind, together in kinds.items():
        histories = [History(f"layer {i}", 3, torch.device("cpu")) for i in range(4)]
        averages = [
            [RunningAverage(torch.zeros(n, n)) for n in (3, 2)] for _ in range(len(histories))
        ]
        for batch in range(5):
            for place, mine in enumerate(averages):
                for average in mine:
                    size = average.value.shape
                    for part in range(2):
                        sums = randn(*size, seed=100 * batch + 10 * place + part).float()
                        if (batch, place) == (2, 1):
                            sums[0, 1] = torch.nan
                        if (batch, place) == (3, 2):
                            average.pass_over(3.0)
                        else:
                            average.add(sums, 3.0 if batch % 2 else 0.0)
            if together is not None:
                together(histories, averages, 0.7)
            else:
                for history, mine in zip(histories, averages, strict=True):
                    history.fold(mine, 0.7)
        found[kind] = [
            ([(a.value, a.weight) for a in mine], history.state_dict())
            for history, mine in zip(histories, averages, strict=True)
        ]
        assert any(history.rejected == 0 for history in histories)
    assert same(found["together"], found["apart"])
