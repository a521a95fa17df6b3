"""A computation in a thread of its own, whose result or error is collected later."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from acktr.kfac.linalg import FactorError

Result = TypeVar("Result")


class BackgroundJob(Generic[Result]):
    """One run of a function in a daemon thread, which ends with the function.

    The function must read nothing that the caller goes on to change. Torch kernels release the
    interpreter lock, so that the caller computes meanwhile; on CUDA the job has a stream of its
    own, which waits for what was queued before.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._ready = None
        if torch.cuda.is_available():
            self._ready = torch.cuda.current_stream().record_event()
        self._thread = threading.Thread(target=self._run, name="kfac-refresh", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with torch.no_grad():
                if self._ready is None:
                    self._result.append(self._function())
                    return
                stream = torch.Stream("cuda")
                stream.wait_event(self._ready)
                with stream:
                    self._result.append(self._function())
                stream.synchronize()
        except BaseException as error:  # surfaces in collect
            self._error = error

    @property
    def running(self) -> bool:
        """Whether the function has not returned yet."""
        return self._thread.is_alive()

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
