"""The same random numbers on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

_DRAWS = ("rand", "randn", "randint", "randperm")


@contextmanager
def same_noise() -> Iterator[None]:
    """A context in which generators of every device give the numbers of one on the CPU.

    CUDA's own streams are others, and so would be the targets of a sampled Fisher matrix.
    """
    twins: dict[int, tuple[torch.Generator, torch.Generator]] = {}

    def drawing(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(
            *shape: Any, generator: torch.Generator | None = None, device: Any = None, **how: Any
        ) -> torch.Tensor:
            if generator is None:
                return draw(*shape, device=device, **how)
            if id(generator) not in twins:  # both are kept, as the number may be used again
                twin = torch.Generator().manual_seed(generator.initial_seed())
                twins[id(generator)] = generator, twin
            given = how.pop("dtype", None)
            wide = torch.float64 if given is not None and given.is_floating_point else given
            found = draw(*shape, generator=twins[id(generator)][1], dtype=wide, **how)
            return found.to(device=device or generator.device, dtype=given)

        return drawn

    with ExitStack() as stack:
        for name in _DRAWS:
            plain = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, drawing(plain)))
        yield
