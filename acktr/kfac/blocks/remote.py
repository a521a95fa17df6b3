"""Refreshes by a process that only decomposes: what it is asked, and what it answers.

It knows no network: matrices come in, with how to decompose each; out go their parts, with a text
in place of those that could not be made. The numbers are those of a thread of the one that asks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.channel import Channel
from acktr.kfac.linalg import FactorError, Inverse, Parts, Request, decompose, part_shapes
from acktr.kfac.ranks import Ranks

_HEAD = 8
"""Bytes that say how long the description of the matrices is; it and their numbers follow."""
_TEXT = 160
"""Bytes of a text, of why there is no answer, and of why each matrix has none: zeros if it has."""
_KINDS = {str(kind): kind for kind in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class RemoteJob:
    """One run of :func:`acktr.kfac.linalg.decompose` in the process that decomposes.

    Args:
        channel: To it.
        requests: The matrices, each with the name of its block and how to decompose it.
        at_once: Whether the caller waits, whose number of threads it takes then; otherwise that of
            a new thread.
    """

    def __init__(
        self, channel: Channel, requests: Sequence[tuple[str, Tensor, Inverse]], at_once: bool
    ) -> None:
        self._requests = list(requests)
        shapes = [part_shapes(matrix, method) for _, matrix, method in requests]
        self._sizes = [
            _bytes_of(shape, matrix.dtype)
            for (_, matrix, _), mine in zip(requests, shapes, strict=True)
            for shape in mine
        ]
        described = {
            "threads": torch.get_num_threads() if at_once else None,
            "matrices": [
                {"shape": [*matrix.shape], "dtype": str(matrix.dtype), "method": method}
                for _, matrix, method in requests
            ],
        }
        words = json.dumps(described).encode()
        head = len(words).to_bytes(_HEAD, "little") + words
        question = torch.cat([_raw(head), *(_bytes(matrix) for _, matrix, _ in requests)])
        self._answer = channel.ask(question, _TEXT * (1 + len(requests)) + sum(self._sizes))

    def wait(self) -> None:
        """Wait for the answer.

        Raises:
            RankError: There is none.
        """
        self._answer.wait()

    def collect(self) -> dict[str, list[Parts | FactorError]]:
        """Wait for the decompositions, or why there is none, by block.

        Raises:
            FactorError: All of them failed.
            RankError: There is no answer.
        """
        answer = self._answer.wait()
        lengths = [_TEXT] * (1 + len(self._requests))
        pieces = torch.split(answer, [*lengths, *self._sizes])
        why, *texts = (_text(row) for row in pieces[: len(lengths)])
        if why:
            raise FactorError(f"the refresh failed in the process for the curvature: {why}")
        numbers = iter(pieces[len(lengths) :])
        found: dict[str, list[Parts | FactorError]] = {}
        for (name, matrix, method), text in zip(self._requests, texts, strict=True):
            shapes = part_shapes(matrix, method)
            parts = tuple(_tensor(next(numbers), shape, matrix.dtype) for shape in shapes)
            here = tuple(part.to(matrix.device) for part in parts)
            found.setdefault(name, []).append(FactorError(text) if text else here)
        return found


def serve(
    ranks: Ranks, check: Callable[[], None] = lambda: None, device: torch.device | None = None
) -> int:
    """Decompose for the other ranks until they :meth:`Ranks.close`.

    Args:
        ranks: Made with ``curvature=True``, in the last process.
        check: Is called while there is nothing to do, some times a second; what it raises ends
            this.
        device: Where to decompose; that of the other ranks, for the same bits. By default the CPU.

    Returns:
        The code that they closed with.

    Raises:
        ValueError: This process is to train.
        RankError: The first rank is gone.
    """
    if not ranks.serves or ranks.channel is None:
        raise ValueError("serve() is for the last process of Ranks(curvature=True); others train")
    while not isinstance(question := ranks.channel.heard(check), int):
        ranks.channel.answer(_answered(question, device))
    return question


@torch.no_grad()
def _answered(question: Tensor, device: torch.device | None) -> Tensor:
    """The bytes of the answer to a question."""
    start = _HEAD + int.from_bytes(question[:_HEAD].numpy().tobytes(), "little")
    described = json.loads(question[_HEAD:start].numpy().tobytes())
    requests = _requests(question[start:], described["matrices"], device)
    try:
        with _threads(described["threads"]):
            results = decompose(requests)
    except Exception as error:  # is told to those who asked, whose error it is
        why = f"{type(error).__name__}: {error}"
        results = [FactorError(why)] * len(requests)
    else:
        why = ""
    texts, numbers = [why], []
    for (matrix, method), found in zip(requests, results, strict=True):
        failed = isinstance(found, FactorError)
        texts.append(str(found) or "failed" if failed else "")
        for place, shape in enumerate(part_shapes(matrix, method)):
            empty = torch.zeros(_bytes_of(shape, matrix.dtype), dtype=torch.uint8)
            numbers.append(empty if isinstance(found, FactorError) else _bytes(found[place]))
    return torch.cat([*(_row(text) for text in texts), *numbers])


def _requests(
    numbers: Tensor, described: Sequence[dict[str, Any]], device: torch.device | None
) -> list[Request]:
    found: list[Request] = []
    for one in described:
        shape, kind = torch.Size(one["shape"]), _KINDS[one["dtype"]]
        size = _bytes_of(shape, kind)
        found.append((_tensor(numbers[:size], shape, kind).to(device), one["method"]))
        numbers = numbers[size:]
    return found


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads; None for those that a new thread has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _raw(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _row(text: str) -> Tensor:
    return _raw(text.encode()[:_TEXT].ljust(_TEXT, b"\0"))


def _text(row: Tensor) -> str:
    return row.numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def _bytes_of(shape: torch.Size, kind: torch.dtype) -> int:
    return math.prod(shape) * kind.itemsize


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _tensor(data: Tensor, shape: torch.Size, kind: torch.dtype) -> Tensor:
    """A tensor in memory of its own, aligned as torch does: kernels may round by that."""
    return data.clone().view(kind).view(shape)
