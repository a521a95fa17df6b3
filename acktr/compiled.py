"""Functions that torch compiles where it can."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Generic, TypeVar, TypeVarTuple

import torch
from torch import Tensor

Args = TypeVarTuple("Args")
R = TypeVar("R")


class Compiled(Generic[R, *Args]):
    """A function by way of torch.compile, which compiles at the first call.

    Where torch cannot compile it (no compiler, an unsupported Python) a warning says so once, and
    it runs uncompiled from then on.

    Args:
        function: Of tensors; it may be called twice for one call.
        name: What the warning calls it.
        graph: Whether torch records the kernels as a CUDA graph, whose next replay overwrites what
            the last one returned.
        dynamic: Whether one compilation serves all shapes: no, or (None) once they have changed.
    """

    def __init__(
        self, function: Callable[[*Args], R], name: str, *, graph: bool, dynamic: bool | None
    ) -> None:
        self._function = function
        self._name = name
        mode = "reduce-overhead" if graph else None
        self._compiled: Callable[[*Args], R] | None = torch.compile(
            function, mode=mode, dynamic=dynamic
        )

    @property
    def active(self) -> bool:
        """Whether it is still by way of the compiler."""
        return self._compiled is not None

    def __call__(self, *args: *Args) -> R:
        """Call the function."""
        if self._compiled is None:
            return self._function(*args)
        try:
            return self._compiled(*args)
        except Exception as error:  # what is not the compiler's fault comes again below
            answer = self._function(*args)
            self._compiled = None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"compile: torch cannot compile {self._name} ({reason}); it runs uncompiled",
                RuntimeWarning,
                stacklevel=2,
            )
            return answer


def compiled_for_updates(network: Callable[[Tensor], R]) -> Compiled[R, Tensor]:
    """A network for gradients of a loss: batches differ in size, and gradients outlive a replay."""
    return Compiled(network, "the update", graph=False, dynamic=None)
