"""Arguments of a module's call, kept by reference, and the precision it ran in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def detached(leaf: Any) -> Any:
    """A tensor without its graph, and anything else as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Autocast:
    """The lower precision that a module ran in."""

    device: str
    """Type of the device."""
    dtype: torch.dtype
    """Of its products."""

    @classmethod
    def now(cls, module: nn.Module) -> Autocast | None:
        """The present one where a module lies; None where there is none."""
        first = next(module.parameters(), None)
        device = "cpu" if first is None else first.device.type
        if not torch.is_autocast_enabled(device):
            return None
        return cls(device, torch.get_autocast_dtype(device))

    def again(self) -> torch.autocast:
        """A context in which operations run as they did."""
        return torch.autocast(self.device, self.dtype)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a module; tensors may be anywhere in tuples, lists and dicts."""

    args: tuple[Any, ...]
    """Positional inputs."""
    kwargs: Mapping[str, Any]
    """Inputs given by keyword."""
    versions: tuple[int, ...] = ()
    """How often each tensor had been changed in place when it was kept."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Inputs:
        """The inputs without the caller's graph, in containers of their own."""
        if not kwargs and all(isinstance(x, Tensor) for x in args):  # the usual, quickly
            return cls(tuple(x.detach() for x in args), {}, tuple(map(_version, args)))
        positional, named = tree_map(detached, (tuple(args), dict(kwargs or {})))
        leaves = tree_flatten((positional, named))[0]
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        return cls(positional, named, tuple(map(_version, tensors)))

    def check_unchanged(self, what: str) -> None:
        """Raise ValueError when a tensor was changed in place since it was kept.

        Autograd itself sees it only where it kept the very same tensor, and not a copy of another
        precision as under autocast.
        """
        plain = not self.kwargs and all(isinstance(x, Tensor) for x in self.args)
        leaves = self.args if plain else tree_flatten((self.args, dict(self.kwargs)))[0]
        if self.versions != tuple(_version(leaf) for leaf in leaves if isinstance(leaf, Tensor)):
            raise ValueError(
                f"the input of {what} was changed in place after it had been used there, as by"
                " h += layer(h): write h = h + layer(h)"
            )

    def double(self) -> Inputs:
        """The same in float64."""
        return Inputs.of(*tree_map(_double, (self.args, dict(self.kwargs))))

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
