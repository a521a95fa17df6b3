"""Messages between the first of the ranks that train and a process that works for them.

They are bytes, and arrive in the order in which they were sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_STOP = -1
"""In place of the length of a question."""
_LOOK = 0.05
"""Seconds between two looks at what else may end the waiting."""
_LONG = timedelta(days=365)
"""How long a message is waited for whose sender is looked after otherwise.

Short waits, one after another, would not do: gloo gives up all connections when one is over.
"""


class RankError(Exception):
    """Another rank did not answer: it failed, hangs or is gone. Nothing can go on without it."""


@contextmanager
def answered() -> Iterator[None]:
    """Raise RankError for what a message fails of; torch's own errors are RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"another process did not answer: {error!s:.200}") from error


class Answer:
    """What will be answered to a question.

    Args:
        sent: The messages of the question, which must not go away before they have left.
        coming: The message of the answer.
        place: Where it comes to.
    """

    def __init__(self, sent: list[tuple[Any, Tensor]], coming: Any, place: Tensor) -> None:
        self._sent, self._coming, self._place = sent, coming, place

    @property
    def here(self) -> bool:
        """Whether it has been waited for."""
        return self._coming is None

    def wait(self) -> Tensor:
        """The answer.

        Raises:
            RankError: There was none within the time limit.
        """
        if not self.here:
            with answered():
                for work, _ in self._sent:
                    work.wait()
                self._coming.wait()
            self._sent, self._coming = [], None
        return self._place


class Channel:
    """An end of the connection: one asks, the other answers in the same order.

    Args:
        group: The two processes, with gloo.
        other: Number of the other one among all processes.
    """

    def __init__(self, group: ProcessGroup, other: int) -> None:
        from torch import distributed

        self._distributed: Any = distributed
        self._group, self._other = group, other
        self._asked: list[Answer] = []
        self._stopped = False

    def ask(self, question: Tensor, room: int) -> Answer:
        """Send a question, and wait for nothing.

        Args:
            question: Bytes, which must not be changed any more.
            room: Number of bytes of the answer.

        Raises:
            ValueError: The other one was told to stop.
        """
        if self._stopped:
            raise ValueError("the process for the curvature has ended: Ranks.close() comes last")
        place = torch.empty(room, dtype=torch.uint8)
        head = torch.tensor([len(question)])
        with answered():
            sent = [(self._send(message), message) for message in (head, question)]
            coming = self._distributed.irecv(place, self._other, group=self._group)
        answer = Answer(sent, coming, place)
        # Also of one that nobody waits for, whose memory gloo writes to all the same.
        self._asked = [*(one for one in self._asked if not one.here), answer]
        return answer

    def stop(self, code: int) -> None:
        """Tell the other one that there are no more questions, with a number; the first time only.

        Answers under way are waited for.

        Raises:
            RankError: It did not take that.
        """
        if self._stopped:
            return
        self._stopped = True
        for answer in self._asked:
            answer.wait()
        self._asked = []
        messages = [torch.tensor([_STOP]), torch.tensor([code])]
        with answered():
            for work in [self._send(message) for message in messages]:
                work.wait()

    def heard(self, check: Callable[[], None]) -> Tensor | int:
        """The next question, or the number with which there are no more.

        Args:
            check: Is called again and again meanwhile; it ends the waiting by what it raises.

        Raises:
            RankError: The one that asks is gone.
        """
        (size,) = self._received(torch.zeros(1, dtype=torch.int64), check).tolist()
        if size == _STOP:
            return int(self._received(torch.zeros(1, dtype=torch.int64), check))
        return self._received(torch.empty(size, dtype=torch.uint8), check)

    def answer(self, answer: Tensor) -> None:
        """Answer the last question heard, with as many bytes as there is room for.

        Raises:
            RankError: The one that asked did not take it.
        """
        with answered():
            self._send(answer).wait()

    def _send(self, message: Tensor) -> Any:
        return self._distributed.isend(message, self._other, group=self._group)

    def _received(self, place: Tensor, check: Callable[[], None]) -> Tensor:
        """The next message, waited for in a thread, as signals wait for what torch waits for."""
        errors: list[RuntimeError] = []
        work = self._distributed.irecv(place, self._other, group=self._group)

        def wait() -> None:
            try:
                work.wait(_LONG)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=wait, name="kfac-question", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK)
            check()
        with answered():
            for error in errors:
                raise error
        return place
