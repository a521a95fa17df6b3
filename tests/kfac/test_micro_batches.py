"""Micro-batches give the curvature of the large batch they are parts of."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import (
    KFAC,
    BernoulliLoss,
    CategoricalLoss,
    Empirical,
    Exact,
    GaussianLoss,
    OutputLoss,
    Preconditioner,
    SumLoss,
)
from acktr.kfac.losses.likelihoods import Reduction
from tests.tools.kfac import (
    block,
    build,
    factors,
    mlp,
    parameters,
    plain_config,
    randn,
    seeded,
    set_gradients,
)
from tests.tools.product_cases import filled

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
    "tridiagonal": {"structure": "tridiagonal"},
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
            total = (noise * output).sum()
            optimizer.update_curvature(captured, total, samples=size, last=last)
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
        name: {k: v for k, v in entry.items() if k not in ("basis", "inverses", "inverse")}
        for name, entry in state["layers"].items()
    }
    return {"layers": layers, "statistics": state["statistics"]}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("kind", "structure"),
    [*itertools.product(NETS, ("kfac", "ekfac")), ("mlp", "tridiagonal")],
)
def test_micro_batches_are_one_large_batch(kind: str, structure: str, reduction: Reduction) -> None:
    results = []
    for parts in ((7,), PARTS):
        model = NETS[kind]()
        optimizer = KFAC(model, plain_config(stat_decay=0.8, **STRUCTURES[structure]))
        loss = CategoricalLoss(reduction=reduction)
        observe_in(optimizer, model, inputs_of(kind), (7,), loss)
        optimizer.refresh()  # the same basis for both: scales are moments in it
        observe_in(optimizer, model, inputs_of(kind, 1), parts, loss)
        found = statistics(optimizer)
        optimizer.refresh()
        set_gradients(model)
        if structure == "ekfac":  # the basis of what was never seen is arbitrary, and so its scales
            optimizer.zero_grad()
            output = model(inputs_of(kind, 1))
            loss(output, torch.randint(3, output.shape[:-1], generator=seeded(5))).backward()
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
    assert block(optimizer, "0").a.weight == 0


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
    model = filled(Experts())
    inputs = randn(8, 3)
    inputs[:, 0] = torch.tensor([-1.0, -2, -3, -1, 1, 2, 1, 3])
    whole, split = (KFAC(model, plain_config(structure="ekfac")) for _ in range(2))
    for _ in range(2):  # the second batch has a basis to take scales in
        observe_in(whole, model, inputs, (8,), GaussianLoss(reduction=reduction))
        observe_in(split, model, inputs, parts, GaussianLoss(reduction=reduction))
        whole.refresh()
        split.curvature.load_state_dict(copy.deepcopy(whole.curvature.state_dict()))
    observe_in(whole, model, inputs, (8,), GaussianLoss(reduction=reduction))
    observe_in(split, model, inputs, parts, GaussianLoss(reduction=reduction))
    assert len(statistics(whole)["layers"]) == 4
    nearly(statistics(split), statistics(whole))


STEPS: dict[str, dict[str, Any]] = {
    "corrected": {},
    "exact": {"quadratic": "exact"},
    "kronecker": {"quadratic": "kronecker"},
}


@pytest.mark.parametrize("quadratic", STEPS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_run_in_micro_batches_is_the_run_in_large_ones(structure: str, quadratic: str) -> None:
    results = []
    for parts in ((7,), PARTS):
        model = mlp()
        settings = {**STRUCTURES[structure], **STEPS[quadratic]}
        optimizer = KFAC(model, plain_config(refresh_interval=2, kl_clip=0.01, **settings))
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


class TwoHeads(nn.Module):
    """Logits for every position and a value for the whole, of vectors or of tokens."""

    def __init__(self, tokens: bool) -> None:
        super().__init__()
        self.body = nn.Embedding(5, 4) if tokens else nn.Linear(3, 4)
        self.policy, self.value = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h.mean(1))


@pytest.mark.parametrize("tokens", [False, True])
def test_parts_of_a_sum_that_weigh_differently_in_micro_batches_are_refused(tokens: bool) -> None:
    """With "sum", and weights that hold each part's own 1 / Z, they are one large batch."""
    model = filled(TwoHeads(tokens))
    inputs = torch.randint(5, (7, 4), generator=seeded(1)) if tokens else randn(7, 4, 3)
    mask = (torch.arange(4) < torch.tensor([4, 1, 2, 3, 1, 1, 2])[:, None]).double()

    def seen(reduction: Reduction, weights: Tensor, parts: tuple[int, ...]) -> KFAC:
        optimizer = KFAC(model, plain_config(stat_decay=0.0))
        losses = CategoricalLoss(reduction=reduction), GaussianLoss(reduction=reduction)
        values = None if reduction == "mean" else torch.full((7,), 1 / 7, dtype=torch.float64)
        for cut in torch.arange(7).split(list(parts)):
            with optimizer.capture() as captured:
                output = model(inputs[cut])
            each = weights[cut], None if values is None else values[cut]
            last = int(cut[-1]) == 6
            loss = SumLoss(*losses, weights=(1.0, 0.5))
            optimizer.observe(captured, output, loss, source=Exact(), weights=each, last=last)
        return optimizer

    right = statistics(seen("mean", mask, (7,)))
    nearly(statistics(seen("sum", mask / mask.sum(), (7,))), right)
    nearly(statistics(seen("sum", mask / mask.sum(), (3, 4))), right)
    nearly(
        statistics(seen("mean", torch.ones_like(mask), (3, 4))),
        statistics(seen("mean", torch.ones_like(mask), (7,))),
    )
    with pytest.raises(ValueError, match=r'do not add up.*reduction="sum"'):
        seen("mean", mask, (3, 4))


# --- batches that are given up --------------------------------------------------------------------


def given_up(optimizer: KFAC, model: nn.Module, how: str) -> None:
    """A part of other data, after which nothing comes."""
    state = copy.deepcopy(optimizer.state_dict())
    observe_in(optimizer, model, randn(7, 4, seed=90) * 50, (1, 4), GaussianLoss())
    if how == "load":
        optimizer.load_state_dict(state)
    elif how == "forget":
        optimizer.forget()


@pytest.mark.parametrize("how", ["load", "forget", "nothing"])
@pytest.mark.parametrize("quadratic", STEPS)
@pytest.mark.parametrize("structure", [*STRUCTURES, "diagonal"])
def test_a_batch_that_is_given_up_leaves_no_trace(structure: str, quadratic: str, how: str) -> None:
    """Bit for bit; without a word the next batch has it for a part of itself."""
    found = []
    for act in ("", how):
        model = mlp()
        settings = {**STRUCTURES.get(structure, {"structure": structure}), **STEPS[quadratic]}
        optimizer = KFAC(model, plain_config(refresh_interval=1, kl_clip=0.01, **settings))
        for index in range(3):
            if act and index == 1:
                given_up(optimizer, model, act)
            inputs = inputs_of("mlp", index)
            observe_in(optimizer, model, inputs, (3, 4), GaussianLoss())
            optimizer.zero_grad()
            (model(inputs) - 1).square().mean().backward()
            optimizer.step()
        found.append(parameters(model))
    alike = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert alike == (how != "nothing")


@pytest.mark.parametrize("how", ["load", "forget", "nothing"])
def test_scales_of_a_sum_are_not_compared_with_those_of_a_batch_given_up(how: str) -> None:
    model = filled(TwoHeads(False))
    curvature, loss = Preconditioner(model), SumLoss(CategoricalLoss(), GaussianLoss())
    state, inputs = copy.deepcopy(curvature.state_dict()), randn(7, 4, 3)

    def observe(weights: Any, last: bool) -> None:
        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss, weights=weights, last=last)

    observe((torch.arange(7) < 3, None), last=False)
    if how == "nothing":
        with pytest.raises(ValueError, match="its parts have the scales"):
            observe(None, last=True)
        return
    curvature.load_state_dict(state) if how == "load" else curvature.forget()
    observe(None, last=True)
    assert curvature.batches == 1


# --- exact forms ----------------------------------------------------------------------------------
