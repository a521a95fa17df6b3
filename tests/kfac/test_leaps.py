"""Bounds of steps whose measured forms say next to nothing, as once a task is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from acktr.kfac import KFAC
from acktr.kfac.corrected import CorrectedRegion, Proposal
from acktr.kfac.trust import Fit
from tests.tools.kfac import build, plain_config, randn, set_gradients

CLIP, LR, MOMENTUM = 0.1, 1.0, 0.5
Spend = Callable[[Mapping[str, Tensor]], Tensor | None]


class Steps:
    """Steps in two parameters whose Kronecker form is |g|^2, and whose exact form is as asked."""

    def __init__(self, exact: float) -> None:
        self.exact, self.velocities = exact, {}
        self.region = CorrectedRegion(["a", "b"], CLIP, torch.zeros((), dtype=torch.float64))

    def fit(self, turn: int, size: float, spend: Spend = lambda _: None) -> Fit:
        """A step along a gradient of such a length."""
        gradients = {name: torch.full((2,), size / 2, dtype=torch.float64) for name in "ab"}
        proposal = Proposal(
            gradients, gradients, self.velocities, dict.fromkeys("ab", MOMENTUM), LR, LR
        )

        def measure(vectors: Sequence[Mapping[str, Tensor]]) -> Tensor:
            return self.exact * length(vectors[0]).square().reshape(1, 1, 1)

        fit = self.region.fit(proposal, measure, spend, turn, lambda _: False)
        self.velocities = {n: v.clone() for n, v in self.velocities.items()}
        moving = {n: self.velocities.get(n, torch.zeros_like(g)) for n, g in gradients.items()}
        fit.accelerate(moving, dict.fromkeys("ab", MOMENTUM))
        self.velocities = moving
        return fit

    def taken(self) -> float:
        """The length of the last step."""
        return float(length(self.velocities)) * LR * (1 - MOMENTUM)


def length(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in vectors.values()]).norm()


def settled(exact: float, size: float) -> tuple[Steps, int]:
    """Steps until one is not measured, and its turn."""
    steps, turn = Steps(exact), 0
    while steps.region.due(turn):
        steps.fit(turn, size)
        turn += 1
    return steps, turn


def test_a_step_without_a_measurement_is_bounded_by_the_last_measured_one() -> None:
    """The exact form was a millionth of the Kronecker one, so that nothing else bounds it."""
    steps, turn = settled(exact=1e-6, size=1e-3)
    measured = steps.taken()
    steps.fit(turn, 1e2)
    assert steps.taken() == pytest.approx(2 * measured, rel=1e-9)


def test_a_step_of_the_usual_length_is_left_alone() -> None:
    steps, turn = settled(exact=1e-6, size=1e-3)
    fit = steps.fit(turn, 1.5e-3)
    assert float(fit.info.scale) == 1


def test_a_measured_step_may_be_of_any_length() -> None:
    steps, turn = settled(exact=1e-6, size=1e-3)
    while not steps.region.due(turn):
        steps.fit(turn, 1e-3)
        turn += 1
    fit = steps.fit(turn, 1e2)
    assert float(fit.info.scale) == 1


@pytest.mark.parametrize("power", [1, 2])
def test_a_measured_step_that_costs_too_much_is_shortened_until_it_does_not(power: int) -> None:
    """The real KL is 1000 radii at the promised length and grows as a power of it."""
    steps, radius = Steps(exact=1.0), CLIP / 2
    steps.fit(0, 1.0)
    seen: list[float] = []

    def spend(change: Mapping[str, Tensor]) -> Tensor:
        seen.append(float(length(change)))
        return torch.tensor([1000 * radius * (seen[-1] / seen[0]) ** power], dtype=torch.float64)

    turn = next(t for t in range(1, 20) if steps.region.due(t))
    steps.fit(turn, 1.0, spend)
    cost = 1000 * radius * (steps.taken() / seen[0]) ** power
    assert cost <= 4 * radius
    assert 2 <= len(seen) <= 5


def test_a_real_cost_that_is_not_finite_shortens_the_step() -> None:
    steps = Steps(exact=1.0)
    steps.fit(0, 1.0)
    before, seen = steps.taken(), 0

    def spend(change: Mapping[str, Tensor]) -> Tensor:
        nonlocal seen
        seen += 1
        return torch.tensor([torch.nan if seen < 3 else 1e-3], dtype=torch.float64)

    steps.velocities = {}
    steps.fit(next(t for t in range(1, 20) if steps.region.due(t)), 1.0, spend)
    assert seen == 3
    assert steps.taken() < 0.02 * before


@pytest.mark.parametrize(("cost", "interval"), [(0.4, 1), (0.6, 4), (1.0, 4), (1.9, 4), (2.1, 1)])
def test_a_real_cost_far_from_the_promise_brings_the_next_measurement_near(
    cost: float, interval: int
) -> None:
    steps, turn = settled(1.0, 1e-3)
    while not steps.region.due(turn):
        steps.fit(turn, 1e-3)
        turn += 1
    steps.fit(turn, 1e-3, lambda change: cost * 0.5 * length(change).square().reshape(1))
    assert steps.region.measurements.next == turn + interval


@pytest.mark.parametrize("parts", [CLIP, (CLIP, CLIP)])
def test_a_form_below_zero_by_rounding_is_not_believed(parts: float | tuple[float, ...]) -> None:
    region = CorrectedRegion(["a"], parts, torch.zeros(()))
    before = region.ratio.clone()
    forms = torch.ones(1)
    region._learn(torch.full_like(region.ratio, -1e-9), forms)
    assert torch.equal(region.ratio, before)
    region._learn(2 * torch.eye(len(before[0])).repeat(len(before), 1, 1), forms)
    assert float(region.ratio[0, 0, 0]) == 2.0


def test_steps_that_cannot_be_measured_are_tried_ever_more_rarely_with_one_warning() -> None:
    steps = Steps(2.0)
    tried = []

    def measure(_: Sequence[Mapping[str, Tensor]]) -> Tensor:
        tried.append(turn)
        if turn < 20:
            raise RuntimeError("no second derivative")
        return torch.ones(1, 1, 1, dtype=torch.float64)

    gradients = {name: torch.ones(2, dtype=torch.float64) for name in "ab"}
    proposal = Proposal(gradients, gradients, {}, dict.fromkeys("ab", 0.0), LR, LR)
    with pytest.warns(UserWarning, match="no second derivative") as told:
        for turn in range(30):
            steps.region.fit(proposal, measure, lambda _: None, turn, lambda _: False)
    assert tried[:5] == [0, 2, 6, 14, 24]
    assert len(told) == 1
    assert steps.region.ratio.item() != 1


@pytest.mark.filterwarnings("ignore:the trust region cannot")
@pytest.mark.parametrize("given", [False, True])
def test_what_never_gives_a_loss_is_measured_once_or_with_forms_of_its_own(given: bool) -> None:
    model = build(nn.Linear(4, 3))
    optimizer = KFAC(model, plain_config(quadratic="corrected", kl_clip=1e-6))
    due: list[bool] = []
    asked: list[Mapping[str, Tensor]] = []

    def form(step: Mapping[str, Tensor]) -> Tensor:
        asked.append(step)
        return torch.stack([d.square().sum() for d in step.values()]).sum()

    for index in range(20):
        with optimizer.capture() as captured:
            output = model(randn(9, 4, seed=index))
        optimizer.update_curvature(captured, output.log_softmax(-1)[:, 0].sum())
        set_gradients(model)
        due.append(optimizer.curvature.measuring)
        optimizer.step(fisher_quadratic=form if given and index else None)
    assert due[0] and sum(due[1:]) == max(0, len(asked) - 1)
    assert bool(asked) is given
