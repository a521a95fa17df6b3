"""Equal ways to the same curvature: micro-batches, resumed runs, another capture."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from acktr.checkpoint import load_checkpoint, save_checkpoint
from acktr.kfac import (
    KFAC,
    BernoulliLoss,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    KFACConfig,
    LMConfig,
    OutputLoss,
)
from acktr.kfac.losses import Reduction
from tests.kfac.helpers import (
    block,
    build,
    factors,
    mlp,
    parameters,
    randn,
    same,
    seeded,
    set_gradients,
    snapshot,
)

# --- micro-batches --------------------------------------------------------------------------------

PARTS = (1, 4, 2)
REDUCTIONS: tuple[Reduction, ...] = ("mean", "batchmean", "sum")


def conv_net(seed: int = 0) -> nn.Sequential:
    return build(
        nn.Conv2d(2, 4, 2, groups=2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
        nn.LayerNorm(3),
        seed=seed,
    )


def sequence_net(seed: int = 0) -> nn.Sequential:
    return build(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), seed=seed)


def inputs_of(kind: str, index: int = 0) -> Tensor:
    if kind == "conv":
        return randn(7, 2, 3, 3, seed=index)
    if kind == "sequence":
        return torch.randint(5, (7, 4), generator=seeded(index))
    return randn(7, 4, seed=index)


NETS = {"conv": conv_net, "sequence": sequence_net, "mlp": mlp}
STRUCTURES: dict[str, dict[str, Any]] = {
    "kfac": {},
    "ekfac": {"structure": "ekfac"},
    "tridiagonal": {"structure": "tridiagonal", "factored_damping": True},
}


def observe_in(
    optimizer: KFAC,
    model: nn.Module,
    inputs: Tensor,
    parts: tuple[int, ...],
    loss: OutputLoss[Any] | None,
    target: Tensor | None = None,
) -> None:
    """One batch in parts, by ``observe``, or by ``update_curvature`` without a loss."""
    done = 0
    for size in parts:
        cut = slice(done, done + size)
        done += size
        with optimizer.capture() as captured:
            output = model(inputs[cut])
        last = done == len(inputs)
        if loss is None:
            noise = randn(len(inputs), *output.shape[1:], seed=9)[cut]
            optimizer.update_curvature(captured, (noise * output).sum(), last=last)
        else:
            source = Exact() if target is None else Empirical(target[cut])
            optimizer.observe(captured, output, loss, source=source, last=last)


def nearly(first: Any, second: Any) -> None:
    """Nested states agree up to rounding."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            nearly(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            nearly(one, other)
    elif isinstance(first, Tensor):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    else:
        assert first == second


def statistics(optimizer: KFAC) -> dict[str, Any]:
    """What was learnt of the curvature, without the bases (whose signs are free)."""
    state = optimizer.curvature.state_dict()
    layers = {
        name: {k: v for k, v in entry.items() if k not in ("basis", "inverses")}
        for name, entry in state["layers"].items()
    }
    chain = state["chain"]
    moments = None if chain is None else (chain["moments"], chain["weights"])
    return {"layers": layers, "chain": moments, "statistics": state["statistics"]}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("kind", "structure"),
    [*itertools.product(NETS, ("kfac", "ekfac")), ("mlp", "tridiagonal")],
)
def test_micro_batches_are_one_large_batch(kind: str, structure: str, reduction: Reduction) -> None:
    results = []
    for parts in ((7,), PARTS):
        model = NETS[kind]()
        optimizer = KFAC(model, KFACConfig(stat_decay=0.8, **STRUCTURES[structure]))
        loss = CategoricalLoss(reduction=reduction)
        observe_in(optimizer, model, inputs_of(kind), (7,), loss)
        optimizer.refresh()  # the same basis for both: scales are moments in it
        observe_in(optimizer, model, inputs_of(kind, 1), parts, loss)
        found = statistics(optimizer)
        optimizer.refresh()
        set_gradients(model)
        results.append((found, optimizer.direction()))
    nearly(results[0][0], results[1][0])
    for name, step in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], step, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("source", ["update_curvature", "empirical"])
def test_micro_batches_of_other_sources(kind: str, source: str) -> None:
    results = []
    for parts in ((7,), PARTS):
        model = NETS[kind]()
        optimizer = KFAC(model)
        with torch.no_grad():
            shape = model(inputs_of(kind)).shape
        target = randn(*shape, seed=8) if source == "empirical" else None
        loss = GaussianLoss() if source == "empirical" else None
        observe_in(optimizer, model, inputs_of(kind), parts, loss, target)
        results.append(statistics(optimizer))
    nearly(*results)


def test_a_part_of_a_batch_is_not_yet_learnt() -> None:
    model = mlp()
    optimizer = KFAC(model)
    observe_in(optimizer, model, randn(7, 4), (1, 4), GaussianLoss())  # never the last part
    assert statistics(optimizer)["statistics"] == 0
    assert block(optimizer, "0").a.value is None


class Sometimes(nn.Module):
    """The second layer is used for long inputs only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.first(inputs)
        return output + self.second(inputs) if len(inputs) > 1 else output


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_layer_that_is_missing_from_the_first_part(reduction: Reduction) -> None:
    model = Sometimes().double()
    optimizer = KFAC(model)
    inputs = randn(5, 3)
    observe_in(optimizer, model, inputs, (1, 4), GaussianLoss(reduction=reduction))
    used = inputs[1:]
    rows = torch.cat([used, torch.ones(4, 1).double()], dim=1)
    scale = 4 if reduction == "sum" else 4 / 5  # the objective is a mean over all five samples
    a, g = factors(optimizer, "second")
    torch.testing.assert_close(a, rows.mT @ rows / 4, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g, scale * torch.eye(2).double(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        factors(optimizer, "first")[1],
        (5 if reduction == "sum" else 1) * torch.eye(2).double(),
        rtol=1e-12,
        atol=1e-14,
    )


class Experts(nn.Module):
    """Samples go to one of two layers, or two scales, by the sign of their first input."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.norms = nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(3)])

    def forward(self, inputs: Tensor) -> Tensor:
        output = torch.zeros_like(inputs)
        for index, (expert, norm) in enumerate(zip(self.experts, self.norms, strict=True)):
            mine = ((inputs[:, 0] > 0) == bool(index)).nonzero()[:, 0]
            output = output.index_add(0, mine, norm(expert(inputs[mine])))
        return output


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("parts", [(4, 4), (3, 5), (2, 3, 3)])
def test_layers_that_some_parts_do_not_use(parts: tuple[int, ...], reduction: Reduction) -> None:
    """Parts that hold samples of one kind only, or of both."""
    model = Experts().double()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index))
    inputs = randn(8, 3)
    inputs[:, 0] = torch.tensor([-1.0, -2, -3, -1, 1, 2, 1, 3])
    whole, split = (KFAC(model, KFACConfig(structure="ekfac")) for _ in range(2))
    for _ in range(2):  # the second batch has a basis to take scales in
        observe_in(whole, model, inputs, (8,), GaussianLoss(reduction=reduction))
        observe_in(split, model, inputs, parts, GaussianLoss(reduction=reduction))
        whole.refresh()
        split.curvature.load_state_dict(copy.deepcopy(whole.curvature.state_dict()))
    observe_in(whole, model, inputs, (8,), GaussianLoss(reduction=reduction))
    observe_in(split, model, inputs, parts, GaussianLoss(reduction=reduction))
    stored = [optimizer.curvature.state_dict()["layers"] for optimizer in (whole, split)]
    assert len(stored[0]) == 4
    for name, state in stored[0].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(stored[1][name][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_run_in_micro_batches_is_the_run_in_large_ones(structure: str) -> None:
    results = []
    for parts in ((7,), PARTS):
        model = mlp()
        config = KFACConfig(refresh_interval=2, kl_clip=0.01, **STRUCTURES[structure])
        optimizer = KFAC(model, config)
        loss = BernoulliLoss()
        for index in range(6):
            inputs = inputs_of("mlp", index)
            observe_in(optimizer, model, inputs, parts, loss)
            optimizer.zero_grad()
            for size, x in zip(parts, torch.split(inputs, parts), strict=True):
                (loss(model(x), torch.ones(size, 3).double()) * size / 7).backward()
            optimizer.step()
        results.append(parameters(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-7, atol=1e-10)


# --- resumed runs ---------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "background": {"refresh_delay": 2},
    "ekfac in the background": {"refresh_delay": 2, "structure": "ekfac"},
    "ekfac": {"structure": "ekfac"},
    "cholesky": {"inverse": "cholesky", "factored_damping": True, "refresh_delay": 2},
    "chain": STRUCTURES["tridiagonal"],
    "staleness": {"refresh_staleness": 0.2, "refresh_delay": 1},
    "fraction": {"stat_fraction": 0.5, "weight_decay": 0.1},
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
        config = KFACConfig(refresh_interval=4, stat_decay=0.9, damping=0.1, **settings)
        lm = LMConfig(interval=2)
        return model, KFAC(model, config, step_rule=rule, adaptive=lm, seed=seed)

    for saved_at in (5, 6, 7):
        model, optimizer = made(1)
        run(optimizer, model, range(saved_at))
        state = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
        if saved_at == 5 and settings.get("refresh_delay"):
            assert state["optimizer"]["curvature"]["pending"] is not None
        save_checkpoint(tmp_path / "saved", state, {})
        run(optimizer, model, range(saved_at, 14))

        stored, _ = load_checkpoint(tmp_path / "saved")
        other, resumed = made(2)
        other.load_state_dict(stored["model"])
        resumed.load_state_dict(stored["optimizer"])
        assert same(resumed.state_dict(), stored["optimizer"])
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
    optimizer = KFAC(model, KFACConfig(structure="ekfac"))
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
    block(optimizer, "0").scales.value = None  # what follows is the next batch alone
    block(optimizer, second).scales.value = None
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
        assert layer.basis is not None
        _, q_a, _, q_g = layer.basis
        assert q_a is not None
        whole = torch.einsum("nto,nti->noi", g, rows)
        scales = (q_g.mT @ whole @ q_a).square().mean(0)
        torch.testing.assert_close(layer.scales.mean(), scales, rtol=1e-10, atol=1e-13)
