"""Inputs of a module's call, and passes that leave everything else as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a module; tensors may be anywhere in tuples, lists and dicts."""

    args: tuple[Any, ...]
    """Positional inputs."""
    kwargs: Mapping[str, Any]
    """Inputs given by keyword."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Inputs:
        """The inputs without the caller's graph, in containers of their own."""
        if not kwargs and all(isinstance(x, Tensor) for x in args):  # the usual, quickly
            return cls(tuple(x.detach() for x in args), {})
        return cls(*tree_map(_detached, (tuple(args), dict(kwargs or {}))))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments themselves, those given by position first."""
        return tuple(x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor))

    def by_sample(self, size: int) -> tuple[list[Tensor], Callable[[Iterable[Tensor]], Inputs]]:
        """The tensors, also nested ones, that have a row for each sample.

        Args:
            size: Number of samples N; a tensor with another leading dimension is shared by all.

        Returns:
            Those tensors (N, ...), and a function that puts others in their place.
        """
        leaves, spec = tree_flatten((self.args, dict(self.kwargs)))
        places = [
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        ]

        def rebuilt(tensors: Iterable[Tensor]) -> Inputs:
            filled = list(leaves)
            for place, tensor in zip(places, tensors, strict=True):
                filled[place] = tensor
            return Inputs(*tree_unflatten(filled, spec))

        return [leaves[place] for place in places], rebuilt


def _devices(tensors: Iterable[Tensor]) -> list[int]:
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


@contextmanager
def elementary_attention() -> Iterator[None]:
    """Compute attention from elementary operations, which have derivatives in every mode.

    The fused kernels have no forward-mode derivative.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def undisturbed(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Set the random generators back afterwards; attention is :func:`elementary_attention`."""
    devices = _devices(parameters.values())
    with torch.random.fork_rng(devices=devices), elementary_attention():
        yield


@contextmanager
def _own_buffers(module: nn.Module) -> Iterator[None]:
    """Give the module copies of its buffers, and its own ones back afterwards."""
    copies: dict[int, Tensor] = {}
    kept = [(m, dict(m._buffers)) for m in module.modules() if m._buffers]
    for owner, buffers in kept:
        for name, buffer in buffers.items():
            if buffer is not None:
                owner._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for owner, buffers in kept:
            owner._buffers.update(buffers)


def repeatable(module: nn.Module, function: Callable[[], float]) -> Callable[[], float]:
    """The function, such that all its calls draw the same random numbers.

    They start from the state that the random generators have now. A call leaves the generators
    and the module's buffers (running statistics) as they were.

    Args:
        module: The module that the function calls.
        function: What to evaluate.
    """
    devices = _devices(module.parameters())
    start = torch.get_rng_state()
    starts = {device: torch.cuda.get_rng_state(device) for device in devices}

    def evaluate() -> float:
        with torch.random.fork_rng(devices=devices), _own_buffers(module):
            torch.set_rng_state(start)
            for device, state in starts.items():
                torch.cuda.set_rng_state(state, device)
            return function()

    return evaluate
