"""What blocks see of one batch: the uses of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from acktr.kfac.statistics.inputs import Inputs

_SPARSEST, _LEAST_SAMPLES = 4, 16
"""One over the least part of a batch that factors come from, and the least part."""
Moments = tuple[Tensor, Tensor]
"""Running mean and variance."""


@dataclass(frozen=True)
class Use:
    """One use of a layer in a forward pass."""

    module: nn.Module
    """The layer (tied layers share a block)."""
    call: Inputs
    """Inputs of the layer."""
    gradients: tuple[Tensor, ...]
    """Gradient of each curvature scalar with respect to the output (N, ...)."""
    part: int | None
    """Place of the output in the tuple that the module returned; None outside of a tuple."""
    moments: Moments | None
    """Running mean and variance that a normalisation used; None for those of its input."""
    turn: int = 0
    """Number of the call among those of all layers."""
    name: str = ""
    """The layer's name in messages."""
    batched: bool = True
    """Whether rows can be added up by samples: in the first dimension, or by ``owners``."""
    owners: Tensor | None = None
    """Sample of each entry of the first dimension; None where that is the samples' own."""
    count: int = 0
    """Number of samples, with ``owners``."""
    complete: bool = True
    """Whether the sample of every row is known, also of those that no gradient reaches."""
    weights: Tensor | None = None
    """Weights of the rows of the input, for the first of its dimensions; None for 1."""

    def by_owner(self, rows: Tensor) -> Tensor:
        """Sums over the samples' own of rows that belong to the first dimension."""
        if self.owners is None:
            return rows
        return rows.new_zeros(self.count, *rows.shape[1:]).index_add_(0, self.owners, rows)

    def seen_as(
        self,
        inputs: Tensor,
        gradients: Iterable[Tensor] | None = None,
        weights: Tensor | None = None,
    ) -> Use:
        """The use with another input, other gradients if given, and weights of its rows."""
        same = self.gradients if gradients is None else tuple(gradients)
        return replace(self, call=Inputs.of((inputs,)), gradients=same, weights=weights)

    @property
    def input(self) -> Tensor:
        """The first tensor among the layer's inputs (N, ...); ValueError if it was changed."""
        self.call.check_unchanged(f"K-FAC layer {self.name!r}")
        given = (*self.call.args, *self.call.kwargs.values())
        return next(tensor for tensor in given if isinstance(tensor, Tensor))


@dataclass(frozen=True)
class LinearMap:
    """What a linear map inside of fused code was given and gave, or several maps of one input."""

    key: str
    """Name of the weight in its module."""
    given: Tensor
    """The input (N, ..., in)."""
    outputs: Sequence[Tensor]
    """The outputs (N, ..., out) of the maps that are stacked in the weight, or of one."""
    first: int = 0
    """Place of the first of them among the maps of the weight."""
    valid: Tensor | None = None
    """Positions (N, ...) that are not padding; None for all."""


Report = Callable[[LinearMap], None]
"""What takes notice of linear maps."""


@dataclass(frozen=True)
class Observation:
    """What a block sees of one batch, or of a part of one.

    The gradients belong to scalars s_c with weights w_c; the curvature of the objective is
    1/Z sum_n sum_c w_c g g^T.
    """

    uses: Sequence[Use]
    """Uses of the block's layers; none in a part of a batch that passed them by."""
    weights: Sequence[float]
    """w_c, one per curvature scalar."""
    count: float
    """What this part adds to the divisor Z; 0 for a sum over the batch, which has no divisor."""

    def double(self) -> Observation:
        """The same in float64."""
        calls: dict[int, Inputs] = {}  # uses that share their inputs go on doing so
        uses = []
        for use in self.uses:
            if id(use.call) not in calls:
                use.call.check_unchanged(f"K-FAC layer {use.name!r}")
                calls[id(use.call)] = use.call.double()
            gradients = tuple(gradient.double() for gradient in use.gradients)
            uses.append(replace(use, call=calls[id(use.call)], gradients=gradients))
        return replace(self, uses=uses)

    def thinned(self, enough: int, width: int, turn: int) -> Observation:
        """The same of every k-th sample, whose weights are k times as large, or itself.

        k is as large as leaves so many rows, and samples to average over; 4 at most. On average
        over the turns the sums over rows stay as they are.

        Args:
            enough: Number of rows.
            width: Number of entries of a row of the gradients.
            turn: Number of the batch; each one begins with another sample.
        """
        sizes = {len(use.gradients[0]) for use in self.uses}
        plain = all(
            use.batched and use.owners is None and not use.call.kwargs and len(use.call.args) == 1
            for use in self.uses
        )
        if len(sizes) != 1 or not plain or {len(use.input) for use in self.uses} != sizes:
            return self
        (count,) = sizes
        rows = sum(use.gradients[0].numel() for use in self.uses) // width
        every = min(_SPARSEST, rows // enough, count // _LEAST_SAMPLES)
        if every <= 1:
            return self
        some = slice(turn % every, None, every)
        calls: dict[int, Inputs] = {}  # uses that share their inputs go on doing so
        uses = []
        for use in self.uses:
            call = calls.setdefault(id(use.call), Inputs.of((use.input[some],)))
            gradients = tuple(gradient[some] for gradient in use.gradients)
            weights = None if use.weights is None else use.weights[some]
            uses.append(replace(use, call=call, gradients=gradients, weights=weights))
        scale = count / len(uses[0].gradients[0])
        return replace(self, uses=uses, weights=[scale * weight for weight in self.weights])


def by_sample(uses: Sequence[Use], name: str) -> bool:
    """Whether the uses' rows can be added up sample by sample.

    If not, only the sum over the batch is that of whole samples. Targets that are drawn for each
    sample by itself have scores of mean zero, so that its square has the same expectation.

    Raises:
        ValueError: The uses have different batch sizes.
    """
    sizes = [len(use.gradients[0]) if use.owners is None else use.count for use in uses]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"K-FAC layer {name!r} was used with different batch sizes in one pass: {sizes}; its"
            " uses are added up sample by sample and must have the same one"
        )
    return all(use.batched for use in uses)
