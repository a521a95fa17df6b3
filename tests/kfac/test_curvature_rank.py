"""A process that decomposes for the ranks gives the numbers of their threads, bit for bit.

The processes are started once for each number of ranks; what they give is compared here.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed, nn

from acktr.kfac import (
    KFAC,
    FactorError,
    KFACConfig,
    Ranks,
    placement,
    serve,
)
from acktr.kfac.blocks import remote
from acktr.kfac.blocks.remote import RemoteJob
from acktr.kfac.linalg import decompose
from tests.tools.kfac import mlp, parameters
from tests.tools.rank_trainings import (
    KRONECKER,
    TRAININGS,
    Training,
    distance,
    made_optimizer,
    observed,
    wide,
)
from tests.tools.ranks import Case, Results, on_ranks, on_threads, same

pytestmark = pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs gloo")

DELAYS = (0, 1, 5, 10)


def delayed(delay: int, **settings: Any) -> Training:
    every = {**KRONECKER, "refresh_interval": 10, "eager_start": False, **settings}
    return Training(settings={**every, "refresh_delay": delay}, steps=23)


class Narrow(nn.Module):
    """A network of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp().float()

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs.float())
        return output


TRAINED = {
    **{f"kfac, delay {delay}": delayed(delay) for delay in DELAYS},
    "cholesky": delayed(5, structure="cholesky"),
    "ekfac": delayed(5, structure="ekfac"),
    "float32": dataclasses.replace(delayed(5), net=Narrow),
    "several sizes": dataclasses.replace(TRAININGS["embedding and norm"], steps=6),
}
"""Trainings whose bits must be those without the process."""


def helped(case: Case, ranks: Ranks) -> Any:
    """What a case gives on the ranks that the last process decomposes for; there, what it heard."""
    mine = Ranks(curvature=True)
    if mine.serves:
        return serve(mine)
    try:
        return case(mine)
    finally:
        mine.close(7)


def state(optimizer: KFAC) -> Any:
    return copy.deepcopy(optimizer.state_by_name())


def stepped(optimizer: KFAC, model: nn.Module, ranks: Ranks, count: int) -> None:
    for _ in range(count):
        observed(optimizer, model, ranks)
        optimizer.step()


def several_owners(ranks: Ranks) -> Any:
    """Without the process every rank decomposes some, of which many have one size."""
    training = dataclasses.replace(delayed(5), net=wide)
    with mock.patch.object(placement, "WORTH", 1.0):
        return training.run(ranks)


def failing(ranks: Ranks) -> Any:
    """A factor that is NaN where it is decomposed, at once and later: its block's failure."""
    optimizer, model = made_optimizer(ranks, refresh_delay=1, refresh_interval=2, max_failures=3)
    stepped(optimizer, model, ranks, 1)
    block = optimizer.curvature.stats["0"]
    right = block.requests

    def broken(damping: float) -> list[Tensor]:
        first, *others = right(damping)
        return [torch.full_like(first, torch.nan), *others]

    with mock.patch.object(block, "requests", broken):
        optimizer.refresh()
        stepped(optimizer, model, ranks, 3)
        counts = [b.history.failures for b in optimizer.curvature.stats.values()]
        with pytest.raises(FactorError) as told:
            optimizer.refresh()
    return {"counts": counts, "told": str(told.value), "state": state(optimizer)}


def under_way(ranks: Ranks, delay: int = 5) -> tuple[KFAC, nn.Module]:
    """An optimizer of which a refresh was asked for and has not come."""
    optimizer, model = made_optimizer(ranks, refresh_delay=delay, refresh_interval=5)
    stepped(optimizer, model, ranks, 7)
    assert optimizer.state_by_name()["curvature"]["pending"] is not None
    return optimizer, model


def stopped(ranks: Ranks) -> Any:
    """Refreshes that are given up leave nothing that a later one takes for its own."""
    for _ in range(3):
        optimizer, model = under_way(ranks)
        optimizer.close()
    under_way(ranks)  # and this one is forgotten without a word
    optimizer, model = under_way(ranks)
    stepped(optimizer, model, ranks, 8)
    return {**parameters(model), "state": state(optimizer)}


def loaded(ranks: Ranks, saved: Any) -> Any:
    """What goes on from a state, in which a refresh is under way."""
    optimizer, model = made_optimizer(ranks, refresh_delay=5, refresh_interval=5)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["state"])
    stepped(optimizer, model, ranks, 8)
    return {**parameters(model), "state": state(optimizer)}


def saved(ranks: Ranks) -> Any:
    optimizer, model = under_way(ranks)
    return {"model": copy.deepcopy(model.state_dict()), "state": state(optimizer)}


def saved_and_loaded(ranks: Ranks) -> Any:
    found = saved(ranks)
    return {"saved": found, "found": loaded(ranks, found)}


def two_optimizers(ranks: Ranks) -> Any:
    """Their refreshes cross, and are waited for in another order than they were asked for."""
    pairs = [
        made_optimizer(ranks, refresh_delay=delay, refresh_interval=4, eager_start=False)
        for delay in (3, 1)
    ]
    for _ in range(14):
        for optimizer, model in pairs:
            stepped(optimizer, model, ranks, 1)
    return [parameters(model) for _, model in pairs]


def refused(ranks: Ranks) -> list[str]:
    """Lines of what cannot be."""
    said: list[str] = []
    acts: tuple[Callable[[], Any], ...] = (
        lambda: KFAC(mlp(), KFACConfig(structure="tridiagonal"), ranks=ranks),
        lambda: serve(ranks),
        lambda: Ranks(distributed.group.WORLD, curvature=True),
    )
    for act in acts:
        with pytest.raises(ValueError) as told:
            act()
        said.append(str(told.value))
    return said


def serving(ranks: Ranks) -> Any:
    """The process that serves has no K-FAC; those that are let go before a refresh hear of it."""
    mine = Ranks(curvature=True)
    if mine.serves:
        with pytest.raises(ValueError) as told:
            KFAC(mlp(), ranks=mine)
        return [str(told.value), serve(mine)]
    optimizer, model = made_optimizer(mine)
    observed(optimizer, model, mine)
    mine.close()
    mine.close()
    if mine.size > 1:  # of which the other one would wait
        return ""
    with pytest.raises(ValueError) as told:
        optimizer.step()
    return str(told.value)


def crashed(ranks: Ranks) -> Any:
    """What breaks down where it is decomposed is an error on all ranks, later and at once."""
    mine, right, calls = Ranks(curvature=True), decompose, iter(range(9))

    def broken(requests: Any) -> Any:
        if next(calls):
            raise MemoryError("no memory")
        return right(requests)

    if mine.serves:
        with mock.patch.object(remote, "decompose", broken):
            return serve(mine)
    optimizer, model = made_optimizer(mine, refresh_delay=1, refresh_interval=2)
    stepped(optimizer, model, mine, 3)
    observed(optimizer, model, mine)
    said = []
    for act in (optimizer.step, optimizer.refresh):
        with pytest.raises(FactorError) as told:
            act()
        said.append(f"{told.value} <- {told.value.__cause__}")
    mine.close()
    return said


class EndedError(Exception):
    """What a check ends the waiting by."""


def ended(ranks: Ranks) -> Any:
    """The process that serves has another reason to end; the first rank hears nothing any more."""
    mine = Ranks(curvature=True)
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 3:
            raise EndedError

    if mine.serves:
        with pytest.raises(EndedError):
            serve(mine, check)
        return len(looks)
    return None


SHARED: dict[str, Case] = {
    **{name: training.run for name, training in TRAINED.items()},
    "several owners": several_owners,
    "failing": failing,
    "stopped": stopped,
    "saved": saved_and_loaded,
    "two optimizers": two_optimizers,
}
"""Cases that give the same with and without the process."""

ONLY: dict[str, Case] = {
    "refused": partial(helped, refused),
    "serving": serving,
    "crashed": crashed,
    "ended": ended,
}
CASES: dict[str, Case] = {**{n: partial(helped, case) for n, case in SHARED.items()}, **ONLY}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """One rank, and the process for the curvature."""
    return on_ranks(CASES, 2, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks, and the process for the curvature."""
    return on_ranks(CASES, 3, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks alone."""
    return on_ranks(SHARED, 2, tmp_path_factory.mktemp("without"))


def of(results: Results, name: str) -> list[Any]:
    """What all processes gave; the first error is raised."""
    for found in results[name]:
        if isinstance(found, str) and found.startswith("Traceback"):
            pytest.fail(found)
    return results[name]


@pytest.mark.parametrize("name", SHARED)
def test_one_rank_is_one_process(one: Results, name: str) -> None:
    found, code = of(one, name)
    assert code == 7
    training = TRAINED.get(name)
    wanted = on_threads(SHARED[name], 1)[0] if training is None else training.run(None)
    assert same(found, wanted, set())


@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_are_two_processes(two: Results, without: Results, name: str) -> None:
    first, other, code = of(two, name)
    assert code == 7
    assert name == "several owners" or same([first, other], of(without, name), set())


def test_other_batches_are_the_same_to_rounding(two: Results, without: Results) -> None:
    """Of two ranks each decomposes a part; LAPACK rounds by where a matrix lies in its batch."""
    (first, other, _), (wanted, _) = of(two, "several owners"), of(without, "several owners")
    assert same(first, other, set()) and distance(first, wanted) < 1e-12


def test_delays_are_seen() -> None:
    """What is installed at another turn gives other numbers."""
    first, *others = [delayed(delay).run(None)["0.weight"] for delay in DELAYS]
    assert not any(torch.equal(first, other) for other in others)


def test_a_state_under_way_goes_on_with_and_without(one: Results) -> None:
    (kept, _), wanted = of(one, "saved"), on_threads(saved_and_loaded, 1)[0]
    assert kept["saved"]["state"]["curvature"]["pending"]["due"] == 10
    assert same(on_threads(partial(loaded, saved=kept["saved"]), 1)[0], wanted["found"], set())


def test_what_breaks_down_is_told_to_all(one: Results, two: Results) -> None:
    why = "the refresh failed in the process for the curvature: MemoryError: no memory"
    first, code = of(one, "crashed")
    assert first == [f"the refresh failed on rank 0 <- {why}"] * 2 and code == 0
    assert of(two, "crashed")[1] == ["the refresh failed on rank 0 <- None"] * 2


def test_what_cannot_be_is_refused(one: Results, two: Results) -> None:
    for said in (of(one, "refused")[0], *of(two, "refused")[:2]):
        assert said[0].startswith("structure=tridiagonal refreshes at once and by itself")
        assert said[1].startswith("serve() is for the last process of Ranks(curvature=True)")
        assert said[2].startswith("Ranks(curvature=True) is of all processes, two or more")
    for found in (one, two):
        refusal, code = of(found, "serving")[-1]
        assert refusal.startswith("this process decomposes for the others and has no K-FAC")
        assert code == 0
    first = of(one, "serving")[0]
    assert first.startswith("the process for the curvature has ended: Ranks.close() comes last")


def test_the_waiting_has_another_end(one: Results) -> None:
    assert of(one, "ended") == [None, 4]


def test_threads_are_those_of_the_one_that_asks() -> None:
    """A thread has the number that new threads begin with, and a caller that waits its own."""
    counts: list[int] = []
    before = torch.get_num_threads()

    def noted(requests: Any) -> Any:
        counts.append(torch.get_num_threads())
        return decompose(requests)

    channel = mock.Mock()
    with mock.patch.object(remote, "decompose", noted):
        for at_once in (True, False):
            torch.set_num_threads(before + 1)
            RemoteJob(channel, [("0", torch.eye(3), "eigen")], at_once)
            torch.set_num_threads(before)
            remote._answered(channel.ask.call_args.args[0], None)
    assert counts == [before + 1, before] and torch.get_num_threads() == before


def test_bytes_are_what_they_were() -> None:
    """Matrices of all types, stacks, diagonals and what fails come back as they are decomposed."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 9, 5, generator=draw, dtype=torch.float64)
    stack = rows.mT @ rows
    requests: list[Any] = [
        ("a", stack[0], "eigen"),
        ("a", stack.float(), "cholesky"),
        ("b", stack[1].diagonal(), "eigen"),
        ("b", -stack[0], "cholesky"),
        ("c", stack[1].float(), "eigen"),
        ("c", torch.ones(3, dtype=torch.bfloat16), "cholesky"),
    ]
    channel = mock.Mock()
    job = RemoteJob(channel, requests, at_once=True)
    question, room = channel.ask.call_args.args
    answer = remote._answered(question, None)
    assert len(answer) == room
    channel.ask.return_value.wait.return_value = answer
    found = [part for parts in job.collect().values() for part in parts]
    for mine, wanted in zip(found, decompose([(m, how) for _, m, how in requests]), strict=True):
        if isinstance(wanted, FactorError):
            assert str(mine) == str(wanted)
        else:
            pairs = zip(mine, wanted, strict=True)  # type: ignore[arg-type]
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert sum(isinstance(part, FactorError) for part in found) == 1
