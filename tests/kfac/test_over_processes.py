"""K-FAC in real processes: messages, what they refuse, and who is told of a failure.

The processes are started once and run all cases; what they give is compared here.
"""

from __future__ import annotations

from collections.abc import Callable
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
    KFACConfig,
    NoisyKFAC,
    Preconditioner,
    Ranks,
    placement,
)
from acktr.kfac.blocks import refresh as refresh_module
from tests.tools.kfac import mlp, parameters, randn, seeded
from tests.tools.rank_trainings import (
    KRONECKER,
    STEPS,
    TRAININGS,
    distance,
    made_optimizer,
    observed,
)
from tests.tools.ranks import Case, Results, on_ranks

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")


def _message(kind: type[Exception], act: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        act()
    return str(caught.value)


def gradients_of_their_own(ranks: Ranks) -> str:
    optimizer, model = made_optimizer(ranks)
    observed(optimizer, model, ranks)
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
    observed(optimizer, model, ranks)
    said = _message(ValueError, optimizer.step)
    ranks.start(model)
    observed(optimizer, model, ranks)
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


def failed(ranks: Ranks) -> Any:
    """What one owner cannot decompose fails on all ranks, the rest does not."""
    optimizer, model = made_optimizer(ranks)
    observed(optimizer, model, ranks)
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
    optimizer, model = made_optimizer(ranks, refresh_delay=1, refresh_interval=2)

    def broken(requests: Any) -> Any:
        raise RuntimeError("no memory")

    thread = broken if ranks.rank == 1 else refresh_module.decompose
    with mock.patch.object(placement, "WORTH", 1.0):
        for _ in range(2):
            observed(optimizer, model, ranks)
            optimizer.step()
        with mock.patch.object(refresh_module, "decompose", thread):
            observed(optimizer, model, ranks)
            optimizer.step()
            observed(optimizer, model, ranks)
            return _message(FactorError, optimizer.step)


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
