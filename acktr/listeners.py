"""What listens to a training: what callbacks may be, and how they are told.

A callback is a function of :class:`acktr.TrainStats`, called after every update. What it returns
decides: False (Python's, NumPy's or torch's) stops the training after this update; a dict of
numbers by name is recorded with the metrics; all else is ignored. A callback that wants to know
the agent, and when training begins and ends, is a :class:`Listener`.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from acktr.config import Config
from acktr.evaluate import Evaluation
from acktr.train import TrainStats


class Learning(Protocol):
    """What callbacks may use of an agent; :class:`acktr.agent.Agent` is one."""

    @property
    def config(self) -> Config:
        """How it is trained."""

    @property
    def num_timesteps(self) -> int:
        """Environment steps learned from so far."""

    def evaluate(
        self,
        env: Any = None,
        episodes: int = 100,
        *,
        deterministic: bool | None = None,
        best_by: str | None = None,
    ) -> Evaluation:
        """Play whole episodes."""

    def save(self, path: str | Path) -> None:
        """Write everything to a folder or a file."""


@runtime_checkable
class Listener(Protocol):
    """A callback that is told the agent before the first update, and when training ends."""

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Take in the agent, and the number of steps at which training will end."""

    def __call__(self, stats: TrainStats) -> object:
        """Take in an update; False stops, a dict of numbers is recorded."""

    def end(self) -> None:
        """Leave, also where training ended by an exception."""


class Recorder(Listener):
    """A listener that writes what was learned: also updates that a callback before it fails at."""


Callback = Listener | Callable[[TrainStats], object]
"""A function of an update's statistics, or a ready one."""


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function as a listener."""

    function: Callable[[TrainStats], object]

    def begin(self, agent: Learning, total_timesteps: int) -> None:
        """Nothing to do."""

    def __call__(self, stats: TrainStats) -> object:
        """What the function returns."""
        return self.function(stats)

    def end(self) -> None:
        """Nothing to do."""


def listeners(
    callback: Callback | Sequence[Callback] | None, logs: Listener | None = None
) -> list[Listener]:
    """All that listen to a training: what the user gives, and the logs after it.

    Raises:
        TypeError: A callback is none; one line that says what to write.
    """
    given: Sequence[Any] = callback if isinstance(callback, list | tuple) else [callback]
    those = [] if callback is None else [_listener(each) for each in given]
    return those if logs is None else [*those, logs]


def _listener(given: Any) -> Listener:
    if isinstance(given, type):
        raise TypeError(f"callback {given.__name__} is a class: give {given.__name__}(...)")
    if callable(given):
        _require_one_argument(given)
        return given if isinstance(given, Listener) else _Function(given)
    theirs = " of Stable-Baselines3" if hasattr(given, "on_step") else ""
    raise TypeError(
        f"callback must be a function of acktr.TrainStats, one of acktr.callbacks, or a list of"
        f" them, got {type(given).__name__}{theirs}"
    )


def _require_one_argument(given: Callable[..., Any]) -> None:
    """Raise TypeError with what to write if it cannot be called with an update's statistics."""
    try:
        signature = inspect.signature(given)
    except (TypeError, ValueError):  # of some built-in functions nothing is known
        return
    try:
        signature.bind(None)
    except TypeError:
        name = getattr(given, "__name__", type(given).__name__)
        raise TypeError(
            f"callback {name}{signature} cannot be called with the one argument that it gets, a"
            f" acktr.TrainStats (timesteps, updates, metrics, episodes): write {name}(stats)"
        ) from None


def tell(
    those: Sequence[Listener],
    stats: TrainStats,
    record: Callable[[TrainStats], None],
) -> tuple[TrainStats, bool]:
    """Tell an update to all listeners; each also sees the metrics that earlier ones returned.

    Args:
        those: The listeners.
        stats: The update.
        record: Called with what is known of it where a listener fails.

    Returns:
        The statistics with those, and whether training goes on: none of them said False.

    Raises:
        TypeError: A dict that a callback returned holds something else than numbers by name.
    """
    going_on = True
    waiting = iter(those)
    try:
        for each in waiting:
            answer = each(stats)
            if isinstance(answer, Mapping):
                stats = dataclasses.replace(stats, metrics={**stats.metrics, **_numbers(answer)})
            elif _is_false(answer):
                going_on = False
    except BaseException:
        for each in waiting:
            if isinstance(each, Recorder):
                each(stats)
        record(stats)
        raise
    return stats, going_on


def _numbers(answer: Mapping[Any, Any]) -> dict[str, float]:
    try:
        if all(isinstance(key, str) and key.isprintable() for key in answer):
            return {key: float(value) for key, value in answer.items()}
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"a callback returned {answer!r:.100}: own metrics are numbers by name")


def _is_false(answer: object) -> bool:
    """Whether it is False, of Python, NumPy or torch; None, 0 and all else are not."""
    if isinstance(answer, np.generic | np.ndarray | torch.Tensor) and math.prod(answer.shape) == 1:
        answer = answer.item()
    return answer is False
