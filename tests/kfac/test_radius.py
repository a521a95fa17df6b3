"""The corrected trust region: what it promises of the step that is taken, and of its parts."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Exact,
    GaussianLoss,
    KFACConfig,
    KroneckerBlock,
    Preconditioner,
    SumLoss,
    dense_fisher,
    trust_scale,
)
from acktr.kfac.corrected import CorrectedRegion
from tests.tools.kfac import build, parameters, plain_config, randn, same, set_gradients
from tests.tools.product_cases import close

LOSS = CategoricalLoss()


class Heads(nn.Module):
    """Shared trunk, a policy, and a value whose head is as wild as asked."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy = nn.Linear(4, 5), nn.Linear(5, 3)
        self.value = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.policy(hidden), self.value(hidden)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(x + functional.gelu(self.first(x))))
        return out


def net(kind: str) -> nn.Module:
    if kind == "residual":
        return build(Residual())
    return build(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def blocks(optimizer: KFAC) -> list[KroneckerBlock]:
    return [block for block in optimizer.blocks if isinstance(block, KroneckerBlock)]


def settings(**given: Any) -> KFACConfig:
    return plain_config(**{"lr": 0.5, "kl_clip": 1e-6, "quadratic": "corrected", **given})


def change(before: dict[str, Tensor], model: nn.Module) -> Tensor:
    return torch.cat([(p.detach() - before[n]).flatten() for n, p in model.named_parameters()])


def region_of(optimizer: KFAC) -> CorrectedRegion:
    region = optimizer.curvature.region.corrected
    assert region is not None
    return region


def take(optimizer: KFAC, model: nn.Module, x: Tensor, loss: Any = LOSS) -> Tensor:
    """One step towards targets that are a function of the inputs; the change of the parameters."""
    with optimizer.capture() as captured:
        output = model(x)
    optimizer.observe(captured, output, loss, source=Exact())
    optimizer.zero_grad()
    label = x[:, :3].argmax(-1)
    target = (label, x.sum(1, keepdim=True)) if isinstance(output, tuple) else label
    torch.autograd.backward(loss(output, target))
    before = parameters(model)
    optimizer.step()
    return change(before, model)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_the_step_taken_costs_what_was_promised(kind: str, momentum: float) -> None:
    """Exactly where the form is measured and nothing of former steps is left.

    Then the promise is half the form, times what the real KL was over that.
    """
    model = net(kind)
    optimizer = KFAC(model, settings(momentum=momentum))
    region = region_of(optimizer)
    for index in range(12):
        x = randn(60, 4, seed=index)
        fisher = dense_fisher(model, (x,), LOSS)
        measured = optimizer.curvature.measuring
        step = take(optimizer, model, x)
        info = optimizer.last_step
        assert info is not None
        assert float(region.beyond) == pytest.approx(1.0, abs=0.01)
        promised = float(info.predicted_kl)
        spent = float(region.beyond) * float(step @ fisher @ step) / 2
        if measured and (index == 0 or momentum == 0):
            assert promised == pytest.approx(spent, rel=1e-9)
        assert promised <= 0.5e-6 * (1 + 1e-9)
        assert 0.4 < spent / promised < 2.5
    assert momentum or promised == pytest.approx(0.5e-6)


def test_a_long_step_that_is_measured_costs_what_was_promised() -> None:
    """Half a nat, where half the quadratic form is no KL; all samples are measured."""
    model = net("mlp")
    optimizer = KFAC(model, settings(kl_clip=1.0, lr=1.0, momentum=0.5))
    off, quadratic = [], []
    for index in range(30):
        if index == 15:  # a resume on the way
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = KFAC(model, optimizer.config)
            optimizer.load_state_dict(state)
        x = 3 * randn(32, 4, seed=index)
        fisher = dense_fisher(model, (x,), LOSS)
        measured, before = optimizer.curvature.measuring, parameters(model)
        with optimizer.capture() as captured:
            output = model(x)
        optimizer.observe(captured, output, LOSS, source=Exact())
        optimizer.zero_grad()
        torch.autograd.backward(LOSS(output, (x[:, :3] @ randn(3, 3)).argmax(-1)))
        optimizer.step(outputs=lambda x=x: model(x))  # type: ignore[misc]
        info, step = optimizer.last_step, change(before, model)
        assert info is not None and info.spent_kl is not None
        assert float(info.predicted_kl) <= 0.5 * (1 + 1e-9)
        if measured and index:
            off.append(float(info.spent_kl.sum() / info.predicted_kl))
            quadratic.append(float(step @ fisher @ step / 2 / info.predicted_kl))
    assert len(off) > 5
    assert min(off) > 0.7 and max(off) < 1.3
    assert sum(abs(ratio - 1) < 1e-6 for ratio in off) > len(off) / 3  # those not shortened
    assert max(quadratic) > 1.3


@pytest.mark.parametrize("against", [False, True])
def test_a_velocity_that_the_gradient_opposes_is_shortened_until_the_step_does_not_ascend(
    against: bool,
) -> None:
    """Before that and else it is mu v + nu U, shortened as a whole by the region."""
    model, x = net("mlp"), randn(60, 4)
    optimizer = KFAC(model, settings(momentum=0.9, kl_clip=1e-4, stat_interval=99))
    for _ in range(6):
        take(optimizer, model, x)
    old = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.parameters()])
    sign = -1 if against else 1
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= sign
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    update = torch.cat([u.flatten() for u in optimizer.direction().values()])
    before = parameters(model)
    optimizer.step()
    step = change(before, model)
    parts = torch.linalg.lstsq(torch.stack([old, update], 1), -step[:, None]).solution.flatten()
    close(-step, parts[0] * old + parts[1] * update)
    assert parts[1] > 0
    region = region_of(optimizer)
    nu = trust_scale(update @ gradient * float(region.ratio * region.beyond), 0.5, 1e-4)
    ascent = float(gradient @ (0.9 * old + nu * update))
    assert (ascent < 0) is against
    if against:
        assert abs(float(gradient @ step)) < 1e-9 * float(gradient.norm() * step.norm())
        assert 0 < float(parts[0] / parts[1] * nu) < 0.9
    else:
        assert float(parts[0] / parts[1] * nu) == pytest.approx(0.9, rel=1e-6)


def test_momentum_that_a_schedule_raises_does_not_diverge() -> None:
    """OneCycleLR cycles momentum from 0.95 to 0.85 and back."""
    model = build(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))
    teacher = build(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5), seed=3)
    optimizer = KFAC(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=60)
    losses = []
    for index in range(60):
        x = randn(100, 8, seed=index)
        with optimizer.capture() as captured:
            output = model(x)
        optimizer.observe(captured, output, LOSS)
        optimizer.zero_grad()
        loss = LOSS(output, teacher(x).argmax(-1))
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    assert max(losses[10:]) < losses[0]
    assert sum(losses[-10:]) / 10 < 1.0  # 2.2 without the rule


def test_the_kronecker_form_of_the_velocity_is_followed() -> None:
    model, x = net("residual"), randn(9, 4)
    optimizer = KFAC(
        model, settings(kl_clip=1e-4, momentum=0.8, stat_interval=99, refresh_interval=99)
    )
    names = [name for name, _ in model.named_parameters()]
    take(optimizer, model, x)
    units = torch.eye(sum(p.numel() for p in model.parameters())).double()
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]
    columns = []
    for unit in units:
        parts = zip(names, unit.split(sizes), shapes, strict=True)
        solved = optimizer.curvature.direction({n: u.reshape(s) for n, u, s in parts})
        columns.append(torch.cat([solved[n].flatten() for n in names]))
    matrix = torch.linalg.inv(torch.stack(columns, 1))
    for _ in range(4):
        region = optimizer.curvature.region.corrected
        assert region is not None
        v = torch.cat([optimizer.state[p]["momentum"].flatten() for p in model.parameters()])
        assert float(region.forms.sum()) == pytest.approx(float(v @ matrix @ v), rel=1e-8)
        take(optimizer, model, x)


def test_the_correction_is_one_where_the_kronecker_form_is_exact() -> None:
    model, x = build(nn.Linear(4, 3)), randn(9, 4)
    steps = []
    for quadratic in ("corrected", "kronecker"):
        net = copy.deepcopy(model)
        config = settings(quadratic=quadratic, damping=1e-12, momentum=0.0)
        optimizer = KFAC(net, config)
        with optimizer.capture() as captured:
            output = net(x)
        optimizer.observe(captured, output, GaussianLoss(), source=Exact())
        set_gradients(net)
        optimizer.step()
        steps.append(change(parameters(model), net))
    close(steps[0], steps[1])
    region = KFAC(model, settings()).curvature.region.corrected
    assert region is not None
    close(region.ratio, torch.ones(1, 1, 1).double())


def test_a_wrong_kronecker_form_is_corrected_and_measured_less_and_less() -> None:
    model = net("mlp")
    optimizer = KFAC(model, settings(momentum=0.0))
    turns = []
    for index in range(40):
        if optimizer.curvature.measuring:
            turns.append(index)
        take(optimizer, model, randn(200, 4, seed=index))
    gaps = [b - a for a, b in itertools.pairwise(turns)]
    assert gaps[0] == 1
    assert max(gaps) == 10
    region = optimizer.curvature.region.corrected
    assert region is not None
    assert not 0.9 < float(region.ratio) < 1.1


@pytest.mark.parametrize(
    "given, renewed",
    [
        ({}, {0, 10, 20, 30, 40}),
        ({"refresh_interval": 7, "refresh_delay": 2}, {0, 9, 16, 23, 30, 37}),
        ({"refresh_interval": 20, "eager_start": True}, {0, 1, 2, 4, 8, 16, 20, 40}),
        ({"refresh_interval": 1}, set(range(41))),
    ],
)
def test_measurements_meet_new_decompositions(given: dict[str, Any], renewed: set[int]) -> None:
    """Of the steps until the next measurement the last one with a refresh is measured."""
    model = net("residual")
    optimizer = KFAC(model, settings(**given))
    turns, refreshes = [], set()
    for index in range(41):
        old = blocks(optimizer)[0].inverse.a
        if optimizer.curvature.measuring:
            turns.append(index)
        take(optimizer, model, randn(60, 4, seed=index))
        if blocks(optimizer)[0].inverse.a is not old:
            refreshes.add(index)
    optimizer.close()
    assert refreshes == renewed
    gaps = [(a, b) for a, b in itertools.pairwise(turns)]
    assert all(b in renewed or not renewed & set(range(a + 1, b + 1)) for a, b in gaps)
    assert len(turns) < 16


def test_a_resume_is_bit_exact_and_former_states_load() -> None:
    def run(optimizer: KFAC, model: nn.Module, first: int, last: int) -> None:
        for index in range(first, last):
            take(optimizer, model, randn(9, 4, seed=index), SumLoss(parts=(LOSS, GaussianLoss())))

    config = settings(kl_clip=(1e-5, 1e-6))
    model = build(Heads())
    optimizer = KFAC(model, config)
    run(optimizer, model, 0, 7)
    other = copy.deepcopy(model)
    resumed = KFAC(other, config)
    state = copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(state)
    run(optimizer, model, 7, 20)
    run(resumed, other, 7, 20)
    assert same(parameters(model), parameters(other))
    del state["param_groups"][0]["curvature"]["trust"]
    resumed.load_state_dict(state)
    run(resumed, other, 7, 8)


def test_without_anything_to_measure_one_warning_says_so() -> None:
    model, x = net("mlp"), randn(9, 4)
    optimizer = KFAC(model, settings())
    with optimizer.capture() as captured:
        output = model(x)
    optimizer.update_curvature(captured, output.log_softmax(-1)[:, 0].sum())
    set_gradients(model)
    with pytest.warns(UserWarning, match="trust region cannot be measured"):
        optimizer.step()
    optimizer.step()
    assert optimizer.last_step is not None
    assert 0 < float(optimizer.last_step.scale) < 1


@pytest.mark.filterwarnings("ignore:no statistics of", "ignore:the trust region cannot")
def test_after_a_step_with_nothing_observed_the_next_is_measured() -> None:
    model = net("mlp")
    optimizer = KFAC(model, settings(momentum=0.0))
    set_gradients(model)
    optimizer.step()
    for index in range(2):
        x = randn(60, 4, seed=index)
        fisher = dense_fisher(model, (x,), LOSS)
        step = take(optimizer, model, x)
        assert float(step @ fisher @ step) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_preconditioner_is_corrected_too(momentum: float) -> None:
    model, x = net("mlp"), randn(9, 4)
    curvature = Preconditioner(model, settings())
    with curvature.capture() as captured:
        output = model(x)
    curvature.observe(captured, output, LOSS)
    set_gradients(model)
    info = curvature.precondition(lr=0.3, momentum=momentum)
    assert info is not None
    step = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    fisher = dense_fisher(model, (x,), LOSS)
    longest = 0.3 / (1 - momentum)
    assert longest**2 * float(step @ fisher @ step) == pytest.approx(1e-6, rel=1e-8)
    assert float(info.predicted_kl) == pytest.approx(0.5e-6, rel=1e-8)


def test_the_kl_that_was_spent_is_measured_with_the_observed_mask() -> None:
    """Dropout and two parts; for a small step it is what was promised."""
    (heads,), x = build(Heads()), randn(9, 4)
    model = nn.Sequential(heads.trunk, nn.Dropout(0.5))
    parts = (CategoricalLoss(), GaussianLoss(std=0.5))
    whole = nn.ModuleDict({"net": model, "heads": heads})
    optimizer = KFAC(whole, settings(kl_clip=(1e-8, 1e-8), lr=1.0))

    def outputs() -> tuple[Tensor, Tensor]:
        hidden = model(x).tanh()
        return heads.policy(hidden), heads.value(hidden)

    with optimizer.capture() as captured:
        output = outputs()
    optimizer.observe(captured, output, SumLoss(parts=parts, weights=(1.0, 0.3)))
    set_gradients(whole)
    state = torch.get_rng_state()
    optimizer.step(outputs=outputs)
    assert torch.equal(torch.get_rng_state(), state)
    info = optimizer.last_step
    assert info is not None
    assert info.spent_kl is not None
    assert info.part_kl is not None
    torch.testing.assert_close(info.spent_kl, info.part_kl, rtol=1e-3, atol=0)


def test_a_kl_counts_the_weights_of_the_terms() -> None:
    output, other = randn(5, 3, seed=1), randn(5, 3, seed=2)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0]).double()
    p, q = output.log_softmax(-1), other.log_softmax(-1)
    terms = (p.exp() * (p - q)).sum(-1)
    close(LOSS.kl(output, other), terms.mean()[None])
    found = LOSS.weighted(output, weights).kl(output, other)
    close(found, (weights * terms).sum()[None] / 4)
