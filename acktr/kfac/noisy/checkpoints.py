"""Weights that are there for one pass alone, which torch.utils.checkpoint computes again later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from acktr.kfac.fisher.graph import joined, nodes
from acktr.kfac.statistics.capture import computed_again
from acktr.kfac.statistics.elementary import checkpointed

_REFUSED = (
    "torch.utils.checkpoint computes its part again in the backward pass, when the sample of the"
    " weights is gone, so that gradients would be wrong: BayesByBackprop needs a module without it"
)


class CheckpointWatch(TorchFunctionMode):
    """Looks for uses of a pass's own weights inside of torch.utils.checkpoint.

    What torch compiles is left alone: there the weights are inputs of what is computed again.

    Args:
        weights: Those of the pass.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights}
        self.hidden = False
        """Whether a weight was used where no graph is made, as by use_reentrant=True."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch; raises ValueError for a weight inside of a checkpoint."""
        if not torch.compiler.is_compiling():
            silent = not torch.is_grad_enabled()
            if (silent or checkpointed()) and self._takes((args, kwargs)):
                if not silent:
                    raise ValueError(_REFUSED)
                self.hidden = True
        return func(*args, **(kwargs or {}))

    def _takes(self, given: Any) -> bool:
        return any(id(leaf) in self._weights for leaf in tree_leaves(given))

    def check(self, output: Any) -> None:
        """Raise ValueError where the graph of an output has a checkpoint in it."""
        total = joined(output) if self.hidden else None
        if total is None:
            return
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes(total)):
            raise ValueError(_REFUSED)


@contextmanager
def watched(module: nn.Module, weights: Iterable[Tensor]) -> Iterator[CheckpointWatch | None]:
    """Context of a pass with weights of its own; without a graph there is nothing to look for.

    Args:
        module: The network. One with compiled parts is not looked into: torch's compiler does not
            get along with hooks while a mode is active.
        weights: Those of the pass.

    Raises:
        ValueError: The pass is inside of a checkpoint, or a part of it is.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield None
        return
    if computed_again():
        raise ValueError(_REFUSED)
    if any(part._compiled_call_impl or hasattr(part, "_orig_mod") for part in module.modules()):
        yield None
        return
    with CheckpointWatch(weights) as mode:
        yield mode
