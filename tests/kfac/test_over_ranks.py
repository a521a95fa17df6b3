"""K-FAC over ranks that share out every batch is K-FAC of one process on the whole batch.

The processes are started once and run all cases; what they give is compared here, with the same
training in one process.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn

from acktr.kfac import (
    KFAC,
    CategoricalLoss,
    Empirical,
    FactorError,
    GaussianLoss,
    KFACConfig,
    LMConfig,
    NoisyKFAC,
    OutputLoss,
    Preconditioner,
    Ranks,
    SumLoss,
    placement,
)
from acktr.kfac import estimator as estimator_module
from acktr.kfac.blocks import refresh as refresh_module
from acktr.kfac.statistics.averages import RunningAverage, join_ranks
from tests.kfac.test_micro_batches import nearly
from tests.tools.kfac import build, mlp, parameters, plain_config, randn, seeded
from tests.tools.ranks import Case, Results, on_ranks, on_threads

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")

STEPS = 20
UNEVEN = {1: (12,), 2: (5, 7), 3: (3, 2, 7)}
EVEN = {1: (12,), 2: (6, 6), 3: (4, 4, 4)}
MANY = {1: (96,), 2: (40, 56), 3: (16, 47, 33)}


class Rows(nn.Module):
    """The second layer is called for the rows that begin with a positive number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.first(inputs)
        some = (inputs[:, 0] > 0).nonzero()[:, 0]
        return output.index_add(0, some, self.second(inputs[some])) if len(some) else output


class TwoHeads(nn.Module):
    """A policy and a value on one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.policy, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(inputs).tanh()
        return self.policy(hidden), self.value(hidden)


class Twice(nn.Module):
    """One layer twice, then its weight in another layer, and a raw parameter at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.other(self.one(self.one(inputs).tanh()).tanh()))
        return result


class Scaled(nn.Module):
    """A raw parameter, which gets the diagonal of its Fisher."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.layer(inputs) * self.scale
        return result


def made(kind: type[nn.Module]) -> nn.Module:
    """A float64 module with reproducible parameters."""
    return build(kind())[0]


def conv() -> nn.Module:
    return build(
        nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def words() -> nn.Module:
    layers = (nn.Embedding(5, 3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))
    return build(*layers)


def wide() -> nn.Module:
    """Nine small layers of one shape, which are taken together."""
    hidden = (layer for _ in range(9) for layer in (nn.Linear(4, 4), nn.Tanh()))
    return build(*hidden, nn.Linear(4, 3))


@dataclass(frozen=True)
class Training:
    """Some steps on batches that are shared out by rows."""

    net: Callable[[], nn.Module] = mlp
    settings: dict[str, Any] = field(default_factory=dict)
    shares: dict[int, tuple[int, ...]] = field(default_factory=lambda: UNEVEN)
    shape: tuple[int, ...] = (4,)
    tokens: bool = False
    loss: OutputLoss[Any] = field(default_factory=CategoricalLoss)
    options: dict[str, Any] = field(default_factory=dict)
    pieces: dict[int, int] = field(default_factory=dict)
    """Micro-batches of each rank; 1 by default."""
    own_loss: bool = False
    """Whether targets are drawn here, for update_curvature."""
    noise_seed: int = 0
    """Times the rank: what other noise on each rank begins with."""
    split_alone: bool = False
    """Whether one process takes the shares as micro-batches: where those are not one batch."""
    steps: int = STEPS

    def batch(self, step: int, rows: int) -> tuple[Tensor, Any]:
        """Inputs and targets of all ranks."""
        if self.tokens:
            return (
                torch.randint(5, (rows, 4), generator=seeded(step)),
                torch.randint(3, (rows, 4), generator=seeded(step + 100)),
            )
        inputs = randn(rows, *self.shape, seed=step)
        labels = torch.randint(3, (rows,), generator=seeded(step + 100))
        if isinstance(self.loss, SumLoss):
            return inputs, (labels, randn(rows, 1, seed=step + 200))
        return inputs, labels

    def cuts(self, size: int, rank: int) -> list[slice]:
        """This rank's micro-batches."""
        shares = self.shares[size]
        first = sum(shares[:rank])
        count = self.pieces.get(rank, 1)
        ends = [first + shares[rank] * k // count for k in range(count + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def run(self, ranks: Ranks | None) -> dict[str, Any]:
        """Train; the parameters, and what the curvature and the last step say."""
        size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
        model = self.net()
        settings: dict[str, Any] = {"refresh_interval": 3, "stat_interval": 1, "factor_rows": None}
        settings |= {"structure": "kfac", "kl_clip": 0.01, "damping": 0.03}  # rounding stays small
        config = KFACConfig(**{**settings, **self.settings})
        optimizer = KFAC(model, config, ranks=ranks, **self.options)
        cuts = self.cuts(size, rank)
        if ranks is None and self.split_alone:
            cuts = [cut for place in range(3) for cut in self.cuts(3, place)]
        for step in range(self.steps):
            self.step(optimizer, model, ranks, step, cuts)
        last = optimizer.last_step
        assert last is not None
        return {
            **parameters(model),
            "damping": torch.tensor(optimizer.damping),
            "promise": last.predicted_kl.clone(),
            "generator": optimizer.curvature.generator.get_state().double(),
        }

    def step(
        self,
        optimizer: KFAC,
        model: nn.Module,
        ranks: Ranks | None,
        step: int,
        cuts: Sequence[slice],
    ) -> None:
        inputs, target = self.batch(step, sum(self.shares[1]))
        mine, loss = sum(len(inputs[cut]) for cut in cuts), self.loss
        optimizer.zero_grad()
        for cut in cuts:
            some = tuple(t[cut] for t in target) if isinstance(target, tuple) else target[cut]
            last = cut is cuts[-1]
            with optimizer.capture() as captured:
                output = model(inputs[cut])
            if self.own_loss:
                seed = step + 1000 * self.noise_seed * (0 if ranks is None else ranks.rank)
                noise = randn(len(inputs), *output.shape[1:], seed=seed)[cut]
                total = (noise * output).sum()
                optimizer.update_curvature(captured, total, samples=len(output), last=last)
            else:
                optimizer.observe(captured, output, loss, source=Empirical(some), last=last)
            if len(output if isinstance(output, Tensor) else output[0]):
                (loss(output, some) * len(inputs[cut]) / mine).backward()
        if ranks is not None:
            ranks.average(model, mine)

        def objective() -> Tensor:
            rows = slice(cuts[0].start, cuts[-1].stop)
            return loss(model(inputs[rows]), target[rows])

        optimizer.step(objective=None if optimizer.adaptive is None else objective)


KRONECKER = {"quadratic": "kronecker"}
TRAININGS = {
    "kfac": Training(settings=KRONECKER),
    "even": Training(settings=KRONECKER, shares=EVEN),
    "cholesky of convolutions": Training(
        conv, {**KRONECKER, "structure": "cholesky"}, shape=(2, 3, 3)
    ),
    "exact form of convolutions": Training(conv, {"quadratic": "exact"}, shape=(2, 3, 3)),
    "embedding and norm": Training(words, {"quadratic": "exact"}, tokens=True),
    "many layers": Training(wide, {**KRONECKER, "structure": "cholesky"}),
    "tridiagonal": Training(settings={**KRONECKER, "structure": "tridiagonal"}),
    "ekfac": Training(settings={**KRONECKER, "structure": "ekfac"}, shares=MANY),
    "corrected, a few rows": Training(),
    "corrected, estimated": Training(shares=MANY),
    "two parts": Training(
        partial(made, TwoHeads), loss=SumLoss(CategoricalLoss(), GaussianLoss()), shares=MANY
    ),
    "radii of two parts": Training(
        partial(made, TwoHeads),
        {"kl_clip": (0.01, 0.02)},
        loss=SumLoss(CategoricalLoss(), GaussianLoss()),
        shares=MANY,
    ),
    "quadratic model": Training(
        options={"step_rule": "quadratic_model", "adaptive": LMConfig(interval=2)}
    ),
    "adaptive damping": Training(settings={"quadratic": "exact"}, options={"adaptive": LMConfig()}),
    "shared weights": Training(partial(made, Twice), {"quadratic": "exact"}),
    "a layer for some rows": Training(partial(made, Rows), KRONECKER),
    "micro-batches": Training(settings={"quadratic": "exact"}, pieces={0: 2, 1: 1, 2: 3}),
    "targets of one's own": Training(settings=KRONECKER, own_loss=True),
    "delayed": Training(settings={**KRONECKER, "refresh_delay": 2}),
    "cold": Training(settings={**KRONECKER, "cold_steps": 4}),
}
"""Trainings that are those of one process."""


# --- what goes wrong ------------------------------------------------------------------------------


def first_factor(ranks: Ranks) -> Tensor:
    optimizer, model = _optimizer(ranks)
    _observed(optimizer, model, ranks)
    return optimizer.curvature.stats["0"].factors[1].mean()


def _optimizer(ranks: Ranks, **settings: Any) -> tuple[KFAC, nn.Module]:
    model = mlp()
    return KFAC(model, plain_config(quadratic="kronecker", **settings), ranks=ranks), model


def _observed(optimizer: KFAC, model: nn.Module, ranks: Ranks, factor: float = 1.0) -> None:
    """Observe an uneven share, and its averaged gradients."""
    inputs, labels = Training().batch(0, 12)
    (cut,) = Training().cuts(ranks.size, ranks.rank)
    with optimizer.capture() as captured:
        output = model(inputs[cut] * factor)
    optimizer.observe(captured, output, CategoricalLoss(), source=Empirical(labels[cut]))
    optimizer.zero_grad()
    CategoricalLoss()(output, labels[cut]).backward()
    ranks.average(model, len(output))


def _message(kind: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def gradients_of_their_own(ranks: Ranks) -> str:
    optimizer, model = _optimizer(ranks)
    _observed(optimizer, model, ranks)
    before = parameters(model)
    if ranks.rank == 2:
        next(model.parameters()).grad *= 2  # type: ignore[operator]
    said = _message(ValueError, optimizer.step)
    assert all(torch.equal(before[name], p) for name, p in parameters(model).items())
    return said


def parameters_of_their_own(ranks: Ranks) -> list[str]:
    """Refused, until all have those of rank 0."""
    model = mlp(seed=ranks.rank)
    optimizer = KFAC(model, ranks=ranks)
    _observed(optimizer, model, ranks)
    said = _message(ValueError, optimizer.step)
    ranks.start(model)
    _observed(optimizer, model, ranks)
    optimizer.step()
    same = ranks.gather([float(sum(p.sum() for p in model.parameters()))], torch.device("cpu"))
    return [said, str(len({row[0] for row in same}))]


def settings_of_their_own(ranks: Ranks) -> str:
    return _message(ValueError, lambda: KFAC(mlp(), ranks=ranks, seed=ranks.rank))


def without_ranks(ranks: Ranks) -> list[str]:
    """K-FAC made before the group stops at its first step, and is not made after it."""
    model, loss = mlp(), CategoricalLoss()
    with mock.patch.object(distributed, "is_initialized", return_value=False):
        optimizer = KFAC(model)
    with optimizer.capture() as captured:
        output = model(randn(6, 4, seed=ranks.rank))
    optimizer.observe(captured, output, loss)
    loss(output, torch.zeros(6, dtype=torch.int64)).backward()
    before = parameters(model)
    said = [_message(ValueError, optimizer.step)]
    assert all(torch.equal(before[name], p) for name, p in parameters(model).items())
    kinds = (KFAC, Preconditioner, partial(NoisyKFAC, data_size=9))
    return said + [_message(ValueError, partial(kind, mlp())) for kind in kinds]


def not_finite(ranks: Ranks) -> Any:
    """A batch that is NaN on one rank is rejected on all."""
    optimizer, model = _optimizer(ranks)
    _observed(optimizer, model, ranks)
    optimizer.step()
    _observed(optimizer, model, ranks, torch.nan if ranks.rank == 1 else 1.0)
    optimizer.step()
    return {**parameters(model), "rejected": optimizer.curvature.stats["0"].history.rejected}


def failed(ranks: Ranks) -> Any:
    """What one owner cannot decompose fails on all ranks, the rest does not."""
    optimizer, model = _optimizer(ranks)
    _observed(optimizer, model, ranks)
    optimizer.step()
    right = refresh_module.decompose

    def broken(requests: Any) -> Any:
        found = right(requests)
        return [FactorError("broken"), *found[1:]] if ranks.rank == 1 else found

    with mock.patch.object(placement, "WORTH", 1.0):
        with mock.patch.object(refresh_module, "decompose", broken):
            optimizer.refresh()
        once = [block.history.failures for block in optimizer.curvature.stats.values()]
        optimizer.refresh()
    after = [block.history.failures for block in optimizer.curvature.stats.values()]
    return {"once": once, "after": after}


def crashed(ranks: Ranks) -> str:
    """What stops the thread of one rank is an error on all."""
    optimizer, model = _optimizer(ranks, refresh_delay=1, refresh_interval=2)

    def broken(requests: Any) -> Any:
        raise RuntimeError("no memory")

    thread = broken if ranks.rank == 1 else refresh_module.decompose
    with mock.patch.object(placement, "WORTH", 1.0):
        for _ in range(2):
            _observed(optimizer, model, ranks)
            optimizer.step()
        with mock.patch.object(refresh_module, "decompose", thread):
            _observed(optimizer, model, ranks)
            optimizer.step()
            _observed(optimizer, model, ranks)
            return _message(FactorError, optimizer.step)


# --- what else is promised ------------------------------------------------------------------------


def sampled(ranks: Ranks) -> Any:
    """Targets are drawn by every rank for itself; what comes of them is common."""
    model = mlp()
    optimizer, loss = KFAC(model, KFACConfig(), ranks=ranks), CategoricalLoss()
    drawn = []
    for step in range(12):
        inputs, labels = Training().batch(step, 12)
        (cut,) = Training().cuts(ranks.size, ranks.rank)
        with optimizer.capture() as captured:
            output = model(inputs[cut])
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, labels[cut]).backward()
        ranks.average(model, len(output))
        optimizer.step()
        copied = torch.Generator()
        copied.set_state(optimizer.curvature.generator.get_state())
        source = optimizer.curvature._estimator.targets(copied)
        optimizer.curvature._estimator.drop()
        drawn.append(torch.randint(1000, (), generator=source))
    state = optimizer.state_by_name()
    return {"state": copy.deepcopy(state), "model": parameters(model), "drawn": torch.stack(drawn)}


def replicated(ranks: Ranks) -> Any:
    """DistributedDataParallel averages what the ranks have as many rows of."""
    from torch.nn.parallel import DistributedDataParallel

    training = TRAININGS["even"]
    model = DistributedDataParallel(mlp(seed=0))
    config = KFACConfig(**KRONECKER, refresh_interval=3, stat_interval=1, structure="kfac")
    curvature = Preconditioner(model.module, config, ranks=ranks)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        inputs, labels = training.batch(step, 12)
        (cut,) = training.cuts(ranks.size, ranks.rank)
        _preconditioned(curvature, sgd, model, inputs[cut], labels[cut])
    return parameters(model.module)


def _preconditioned(
    curvature: Preconditioner,
    sgd: torch.optim.Optimizer,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
) -> None:
    with curvature.capture() as captured:
        output = model(inputs)
    curvature.observe(captured, output, CategoricalLoss(), source=Empirical(labels))
    sgd.zero_grad()
    CategoricalLoss()(output, labels).backward()
    curvature.precondition(lr=1.0)
    sgd.step()


def messages(ranks: Ranks) -> Any:
    """Sums and copies of tensors of several types, empty ones too."""
    shapes = [(n,) for n in range(4)] + [(3, 3), (2, 2, 2), ()]
    kinds = (torch.float32, torch.float64, torch.int64)
    values = [
        100 * torch.randn(shape, generator=seeded(ranks.rank), dtype=torch.float64)
        for shape in shapes
    ]
    tensors = [value.to(kind) for value in values for kind in kinds]
    return {
        "given": tensors,
        "sums": ranks.summed(tensors),
        "copies": ranks.broadcast(tensors, 1),
        "table": ranks.gather([ranks.rank + 0.1, -0.0], torch.device("cpu")),
    }


def gradients(ranks: Ranks) -> Any:
    """Gradients that some ranks lack."""
    model = nn.ParameterList([torch.zeros(2), torch.zeros(2), torch.zeros(2)])
    if ranks.rank > 0:
        model[0].grad = torch.full((2,), float(ranks.rank))
    model[1].grad = torch.full((2,), torch.nan if ranks.rank == 0 else 1.0)
    ranks.average(model, [0, 1, 3][ranks.rank])
    found = [p.grad for p in model]
    for p in model:
        p.grad = torch.ones(2)
    ranks.average(model, None)
    return [*found, model[0].grad]


CASES: dict[str, Case] = {
    "without ranks": without_ranks,
    "gradients of their own": gradients_of_their_own,
    "parameters of their own": parameters_of_their_own,
    "settings of their own": settings_of_their_own,
    "failed": failed,
    "replicated": replicated,
    "messages": messages,
    "gradients": gradients,
    "crashed": crashed,
    "by processes": TRAININGS["delayed"].run,
}
"""What real processes do."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return on_ranks(CASES, 3, tmp_path_factory.mktemp("ranks"))


def of(results: Results, name: str) -> list[Any]:
    """What all ranks gave; the first error is raised."""
    for found in results[name]:
        if isinstance(found, str) and found.startswith("Traceback"):
            pytest.fail(found)
    return results[name]


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    return max(
        float((found[n] - w).norm() / w.norm().clamp(min=1e-300))
        for n, w in wanted.items()
        if n != "generator"  # which ranks draw the seeds of their own ones from
    )


@pytest.fixture
def owners_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank decomposes, although the work is little."""
    monkeypatch.setattr(placement, "WORTH", 1.0)


@pytest.mark.usefixtures("owners_all")
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_that_of_one_process(name: str) -> None:
    wanted = TRAININGS[name].run(None)
    found = on_threads(TRAININGS[name].run, 3)
    for mine in found[1:]:
        assert all(torch.equal(mine[key], found[0][key]) for key in wanted)
    assert distance(found[0], wanted) < 1e-12


@pytest.mark.usefixtures("owners_all")
def test_two_ranks() -> None:
    for name in ("corrected, estimated", "tridiagonal"):
        found = on_threads(TRAININGS[name].run, 2)
        assert distance(found[0], TRAININGS[name].run(None)) < 1e-12


def test_means_of_means_and_other_noise_are_seen() -> None:
    """What the tests above would not see is worth nothing."""
    wanted = TRAININGS["kfac"].run(None)
    with mock.patch.object(Ranks, "share", lambda self, rows, device: 1 / self.size):
        assert distance(on_threads(TRAININGS["kfac"].run, 3)[0], wanted) > 1e-3
    training = Training(settings=KRONECKER, own_loss=True)
    other = Training(settings=KRONECKER, own_loss=True, noise_seed=1)
    assert distance(on_threads(other.run, 3)[0], training.run(None)) > 1e-3


def test_counts_of_one_rank_are_seen() -> None:
    """Sums over the ranks, divided by what a rank counts itself, are other factors."""

    def join(averages: Sequence[RunningAverage], ranks: Ranks) -> None:
        counts = [average.part()[1] for average in averages]
        join_ranks(averages, ranks)
        for average, count in zip(averages, counts, strict=True):
            total, _, given = average.part()
            average.replace_part(total, count, given)

    right = on_threads(first_factor, 3)[0]
    with mock.patch.object(estimator_module, "join_ranks", join):
        wrong = on_threads(first_factor, 3)[0]
    assert float((right - wrong).norm() / right.norm()) > 0.1


def test_without_processes_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Ranks()


@pytest.mark.usefixtures("owners_all")
def test_sampled_targets_differ_and_all_else_agrees() -> None:
    first, *others = on_threads(sampled, 3)
    for mine in others:
        nearly(mine["state"], first["state"])
        assert all(torch.equal(mine["model"][n], p) for n, p in first["model"].items())
        assert not torch.equal(mine["drawn"], first["drawn"])


def test_what_is_not_finite_on_one_rank_is_rejected_on_all() -> None:
    first, *others = on_threads(not_finite, 3)
    assert all(int(mine["rejected"]) == 1 for mine in (first, *others))
    assert all(torch.equal(mine[n], p) for mine in others for n, p in first.items())


# --- processes ------------------------------------------------------------------------------------


def test_processes_add_up_and_copy(results: Results) -> None:
    given = of(results, "messages")
    for mine in given:
        for place, sent in enumerate(zip(*(one["given"] for one in given), strict=True)):
            total = sent[0] + sent[1] + sent[2]
            torch.testing.assert_close(mine["sums"][place], total)
            assert torch.equal(mine["sums"][place], given[0]["sums"][place])
            assert torch.equal(mine["copies"][place], sent[1])
        assert mine["table"] == [[0.1, 0.0], [1.1, 0.0], [2.1, 0.0]]


def test_averaged_gradients(results: Results) -> None:
    for first, second, none, total in of(results, "gradients"):
        torch.testing.assert_close(first, torch.full((2,), (1 + 3 * 2) / 4))
        torch.testing.assert_close(second, torch.ones(2))  # a rank without rows does not count
        assert none is None
        torch.testing.assert_close(total, torch.full((2,), 3.0))


def test_a_training_by_processes(results: Results) -> None:
    wanted = TRAININGS["delayed"].run(None)
    first, *others = of(results, "by processes")
    assert all(torch.equal(mine[name], first[name]) for mine in others for name in wanted)
    assert distance(first, wanted) < 1e-12


def test_processes_without_ranks_are_refused(results: Results) -> None:
    for said in of(results, "without ranks"):
        assert len(said) == 4 and len(set(said)) == 1
        assert "the 3 ranks would become different models: use one process, or KFAC" in said[0]


def test_ranks_that_differ_are_refused(results: Results) -> None:
    for said in of(results, "gradients of their own"):
        assert said.startswith("rank 2 has other gradients than rank 0")
    for said, count in of(results, "parameters of their own"):
        assert said.startswith("rank 1 has other parameters than rank 0") and count == "1"
    for said in of(results, "settings of their own"):
        assert said.startswith("rank 1 has other modules, settings or seeds")


def test_failures_are_those_of_all(results: Results) -> None:
    found = of(results, "failed")
    assert all(mine == found[0] for mine in found)
    assert sorted(found[0]["once"]) == [0, 1] and found[0]["after"] == [0, 0]
    assert of(results, "crashed") == ["the refresh failed on rank 1"] * 3


def test_gradients_of_distributed_data_parallel(results: Results) -> None:
    training, model = TRAININGS["even"], mlp(seed=0)
    config = KFACConfig(**KRONECKER, refresh_interval=3, stat_interval=1, structure="kfac")
    curvature = Preconditioner(model, config)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(STEPS):
        _preconditioned(curvature, sgd, model, *training.batch(step, 12))
    wanted = parameters(model)
    assert all(distance(found, wanted) < 1e-9 for found in of(results, "replicated"))
