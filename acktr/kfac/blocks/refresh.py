"""Refreshes of decompositions: snapshots of factors, decomposed at once or in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from acktr.kfac.blocks.registry import StatBlock
from acktr.kfac.blocks.remote import RemoteJob
from acktr.kfac.blocks.shared import Exchange
from acktr.kfac.linalg import FactorError, Inverse, Parts, decompose
from acktr.kfac.ranks import Ranks
from acktr.kfac.state import plain_name, require_like

Snapshot = dict[str, list[Tensor]]
"""The matrices that each block wants decomposed, by name; nothing changes them any more."""
Decompositions = dict[str, list[Parts | FactorError]]
"""What becomes of a snapshot."""
Damping = Callable[[StatBlock], float]
"""The damping of a block."""
Result = TypeVar("Result")
Part = TypeVar("Part")


def decomposed(blocks: Mapping[str, StatBlock], snapshot: Snapshot) -> Decompositions:
    """Decompose a snapshot, matrices of equal size in one call; it touches no block's state.

    Failures are returned, not raised.
    """
    results: Decompositions = {name: [] for name in snapshot}
    for name, matrices in snapshot.items():
        block = blocks[name]
        if block.method is None:
            results[name] = block.decompose(matrices) if matrices else []
    requests = _requests(blocks, snapshot)
    found = decompose([(matrix, method) for _, matrix, method in requests])
    for (name, _, _), parts in zip(requests, found, strict=True):
        results[name].append(parts)
    return results


def _requests(
    blocks: Mapping[str, StatBlock], snapshot: Snapshot
) -> list[tuple[str, Tensor, Inverse]]:
    """The matrices of blocks that do not decompose theirs by themselves."""
    return [
        (name, matrix, method)
        for name, matrices in snapshot.items()
        if (method := blocks[name].method) is not None
        for matrix in matrices
    ]


class Refresher:
    """Renews the decompositions of blocks at once, or in the background for a later turn.

    The background is a thread, or the process that decomposes for the ranks.

    Args:
        blocks: The blocks with statistics, by name.
        ranks: Among which the matrices are shared out; None for one process.
    """

    def __init__(self, blocks: Mapping[str, StatBlock], ranks: Ranks | None = None) -> None:
        self._blocks, self._ranks = blocks, ranks
        self._exchange: Exchange | None = None
        self._channel = None if ranks is None else ranks.channel
        self._job: BackgroundJob[Decompositions] | RemoteJob | None = None
        self._snapshot: Snapshot = {}
        self._due = 0

    @torch.no_grad()
    def renew(self, damping: Damping, due: int | None = None) -> None:
        """Renew the decompositions, after installing what is under way.

        Args:
            damping: Of each block.
            due: The turn at which :meth:`finish` installs what is decomposed until then; None to
                decompose at once.

        Raises:
            FactorError: A block failed ``max_failures`` times in a row.
            RankError: Another rank, or the process that decomposes, did not answer.
        """
        self.finish()
        snapshot = {name: block.requests(damping(block)) for name, block in self._blocks.items()}
        if due is not None:
            self._begin(snapshot, due)
            return
        mine = self._mine(snapshot)
        if self._channel is None:
            self._install(self._all(decomposed(self._blocks, mine)))
        else:
            requests = _requests(self._blocks, mine)
            self._settle(RemoteJob(self._channel, requests, at_once=True))

    def finish(self, turn: int | None = None) -> None:
        """Install a refresh under way, waiting for it, if it is due; raises as :meth:`renew`.

        Without a turn it is.
        """
        if self._job is not None and (turn is None or turn >= self._due):
            job, self._job = self._job, None
            self._settle(job)

    def _settle(self, job: BackgroundJob[Decompositions] | RemoteJob) -> None:
        try:
            found: Decompositions | FactorError = job.collect()
        except FactorError as error:
            if self._exchange is None:
                raise
            found = error  # the other ranks are told, who wait for it
        self._install(self._all(found))

    def close(self) -> None:
        """Wait for a running refresh and forget it; no thread is left, and no answer to come."""
        if self._job is not None:
            job, self._job = self._job, None
            job.wait()

    def _begin(self, snapshot: Snapshot, due: int) -> None:
        blocks = self._blocks
        self._snapshot, self._due = snapshot, due
        mine = self._mine(snapshot)
        if self._channel is not None:
            self._job = RemoteJob(self._channel, _requests(blocks, mine), at_once=False)
            return
        places = [matrix.device for matrices in mine.values() for matrix in matrices]
        self._job = BackgroundJob(lambda: decomposed(blocks, mine), *places[:1])

    def _mine(self, snapshot: Snapshot) -> Snapshot:
        """What this rank decomposes of a snapshot; without ranks all of it."""
        if self._ranks is None:
            return snapshot
        self._exchange = Exchange(self._blocks, snapshot, self._ranks)
        return self._exchange.mine()

    def _all(self, found: Decompositions | FactorError) -> Decompositions:
        """The decompositions of all ranks; messages are sent by the thread of the steps alone."""
        if self._exchange is None:
            assert not isinstance(found, FactorError)
            return found
        return self._exchange.share(found)

    def _install(self, results: Decompositions) -> None:
        for name, found in results.items():
            block = self._blocks[name]
            parts = [part for part in found if not isinstance(part, FactorError)]
            if found and block.history.settle(found):
                block.install(parts)

    @staticmethod
    def _named(parts: Mapping[str, Part]) -> dict[str, Part]:
        return {plain_name(name): part for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any] | None:
        """A refresh under way; None without one."""
        return (
            None
            if self._job is None
            else {"due": self._due, "matrices": self._named(self._snapshot)}
        )

    def check_state(self, state: Any) -> None:
        """Raise ValueError when the state of a refresh under way does not fit the blocks."""
        given = state.get("matrices") if isinstance(state, dict) else None
        without = [n for n, ms in given.items() if ms == []] if isinstance(given, dict) else []
        matrices = {
            name: [] if name in without else [factor.value for factor in block.factors]
            for name, block in self._named(self._blocks).items()
        }
        template = {"due": 0, "matrices": matrices}
        require_like(state, template, "K-FAC refresh under way", finite=False)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restore a checked state: the refresh under way begins again."""
        self.close()
        if state is not None:
            snapshot = {
                name: [
                    matrix.to(block.factors[0].value)
                    for matrix in state["matrices"][plain_name(name)]
                ]
                for name, block in self._blocks.items()
            }
            self._begin(snapshot, state["due"])


class BackgroundJob(Generic[Result]):
    """One run of a function in a daemon thread, which ends with the function.

    The function must read nothing that the caller goes on to change. Torch kernels release the
    interpreter lock, so that the caller computes meanwhile; on CUDA the job has a stream of its
    own, which waits for what was queued before.

    Args:
        function: What to run.
        device: Where its tensors are; None for the CPU.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device | None = None) -> None:
        self._function = function
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._stream = _stream(device) if device and device.type == "cuda" else None
        if self._stream is not None:
            self._ready = torch.cuda.current_stream(device).record_event()
        self._thread = threading.Thread(target=self._run, name="kfac-refresh", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                if self._stream is None:
                    self._result.append(self._function())
                    return
                self._stream.wait_event(self._ready)
                with torch.cuda.stream(self._stream):
                    self._result.append(self._function())
                self._stream.synchronize()
        except BaseException as error:  # surfaces in collect
            self._error = error

    def wait(self) -> None:
        """Wait for the function, whatever it does."""
        self._thread.join()

    def collect(self) -> Result:
        """Wait for the function and return its result.

        Raises:
            FactorError: The function raised something; the cause is chained.
        """
        self._thread.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise FactorError(
                f"the background refresh failed: {type(error).__name__}: {error}"
            ) from error
        return self._result[0]


@lru_cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all jobs on a device: each of torch's 32 keeps freed memory for itself."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
