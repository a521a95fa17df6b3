"""State of the random generators that a pass may draw from, for one that runs again."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the global random generators: those of torch, of Python, and of numpy if loaded."""

    cpu: Tensor
    """That of the CPU."""
    cuda: Mapping[int, Tensor]
    """Those of the CUDA devices that matter."""
    python: tuple[Any, ...]
    """That of the module random."""
    numpy: dict[str, Any] | None
    """That of numpy.random; None where nothing has loaded it."""

    @classmethod
    def now(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The present state, of the CPU and the devices of these tensors."""
        devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
        states = {device: torch.cuda.get_rng_state(device) for device in devices}
        return cls(torch.get_rng_state(), states, random.getstate(), _numpy_state())

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from this state on, and set the generators back afterwards."""
        with torch.random.fork_rng(devices=list(self.cuda)):
            torch.set_rng_state(self.cpu)
            for device, state in self.cuda.items():
                torch.cuda.set_rng_state(state, device)
            python, numpy = random.getstate(), _numpy_state()
            try:
                _set_others(self.python, self.numpy)
                yield
            finally:
                _set_others(python, numpy)


def _numpy_state() -> dict[str, Any] | None:
    generator: Any = sys.modules.get("numpy.random")
    state: dict[str, Any] | None = generator and generator.get_state(legacy=False)
    return state


def _set_others(python: tuple[Any, ...], numpy: dict[str, Any] | None) -> None:
    """Set the generators that are not torch's."""
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy.random"].set_state(numpy)
