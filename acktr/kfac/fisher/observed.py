"""The observed forward pass, and products with its exact Fisher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from acktr.kfac.fisher.extent import Estimate, Forms, next_sparsest, of_all, stride, term_moments
from acktr.kfac.fisher.extent import sizes as sizes_of
from acktr.kfac.fisher.followed import Followed, lower_rounding, near, same
from acktr.kfac.fisher.products import (
    Curved,
    Vector,
    moved_output,
    output_tangents,
    repeatable,
)
from acktr.kfac.losses.base import OutputLoss, with_weights
from acktr.kfac.losses.sums import SumLoss
from acktr.kfac.statistics.capture import Capture, sample_rows
from acktr.kfac.statistics.generators import RandomState
from acktr.kfac.statistics.inputs import Autocast, Inputs, detached
from acktr.kfac.statistics.outputs import Selection, selection
from acktr.kfac.tensors import parts_of


@dataclass
class Observed:
    """The last observed pass: what products with its exact Fisher need.

    While ``followed`` is there, they come from the graph of the pass itself, which knows its
    dropout mask, its batch statistics, and whatever was done to the module's output. Without it
    the module runs again on the kept inputs, from the random state in which capture() began.
    """

    call: Inputs | None
    """Inputs of the whole module; None if only submodules were called."""
    loss: OutputLoss[Any]
    """What the output means."""
    random: RandomState | None = None
    """Random state at the beginning of capture()."""
    autocast: Autocast | None = None
    """What autocast was, in which the module runs again."""
    followed: Followed | None = None
    """The output with its Jacobian, until the step."""
    select: Selection | None = None
    """Takes the loss's output from what the module returns; None if it is no part of that."""
    calls: int = 1
    """Number of calls of the whole module."""
    output: Any = None
    """The loss's output, detached."""
    terms: tuple[Any, Any] = (None, None)
    """Weights and targets that made the loss that of this batch."""
    earlier: tuple[Observed, ...] = ()
    """The former micro-batches of the batch that this pass is the last part of."""
    sizes: tuple[float | None, ...] = ()
    """Z of every part of the loss, of a former micro-batch; None for a sum."""
    share: bool = False
    """Whether other ranks have the rest of the batch: some samples may have no terms."""

    @classmethod
    def of(
        cls,
        captured: Capture,
        output: Any,
        loss: OutputLoss[Any],
        parameters: Mapping[str, Tensor] | None,
        terms: tuple[Any, Any] = (None, None),
    ) -> Observed:
        """The pass that was captured; its Jacobian is kept if parameters are given."""
        try:
            followed = (
                None if parameters is None else Followed.of(output, parameters, captured.autocast)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # a compiled module
            followed = None
        returned = captured.returned
        select = selection(returned[-1], output) if returned else None
        calls, kept = len(returned), tree_map(detached, output)
        made = captured.inputs, loss, captured.random, captured.autocast
        return cls(*made, followed, select, calls, kept, terms)

    @property
    def inputs(self) -> Inputs:
        """The inputs of the whole module.

        Raises:
            ValueError: It was not called once, or did not return the loss's output.
        """
        if self.call is None:
            raise ValueError(
                "the exact Fisher needs the inputs of the whole module, but only submodules were"
                " called inside capture(): call the module itself"
            )
        if self.calls > 1:
            raise ValueError(
                "the exact Fisher needs one call of the module, but inside capture() were"
                f" {self.calls}: join their inputs"
            )
        if self.select is None:
            raise ValueError(
                "the exact Fisher needs the loss's output to be what the module returns, or a part"
                " of it: choose terms by observe(..., weights=mask), and do the rest in forward()"
            )
        self.call.check_unchanged("the module")
        return self.call

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of every part of the loss."""
        return self.loss.part_weights if isinstance(self.loss, SumLoss) else (1.0,)

    @property
    def count(self) -> int:
        """Length of the loss's output."""
        return len(parts_of(self.output)[0])

    @property
    def empty(self) -> bool:
        """Whether the batch has no terms, as the share of a rank may be."""
        return all(size == 0 for size in self.totals()) or not (self.count or self.earlier)

    def former(self) -> Observed:
        """This pass as a former micro-batch, without its output."""
        return replace(self, sizes=self.sizes_now(), output=None)

    def sizes_now(self) -> tuple[float | None, ...]:
        """Z of every part of the loss, of the last micro-batch; None for a sum."""
        return sizes_of(self.loss, self.output)

    def totals(self) -> tuple[float | None, ...]:
        """Z of every part of the loss, of the whole batch; None for a sum."""
        every = [*(part.sizes for part in self.earlier), self.sizes_now()]
        return tuple(
            None if now is None else sum(size or 0.0 for size in sizes)
            for now, sizes in zip(every[-1], zip(*every, strict=True), strict=True)
        )

    def grams(self, module: nn.Module, vectors: Sequence[Vector]) -> Tensor:
        """v_i^T F_k v_j (parts, k, k) of the parts F_k of the Fisher, whose sum is the Fisher.

        Those of former micro-batches, on whose inputs the module runs again, are part of them.

        Raises:
            ValueError: The module must run again, but its inputs are not known, or its output is
                not what the loss takes.
        """
        grams = self._grams(module, vectors)
        if not self.earlier:
            return grams
        try:
            each = torch.stack([*(part._grams(module, vectors) for part in self.earlier), grams])
        except ValueError as error:
            self.earlier = ()
            warnings.warn(
                f"the exact Fisher is that of the last micro-batch alone: {error}", stacklevel=2
            )
            return grams
        return self._mean(each)

    def _mean(self, each: Tensor) -> Tensor:
        """That of values (micro-batches, parts, ...) of the batch, by their sizes."""
        sizes = [*(part.sizes for part in self.earlier), self.sizes_now()]
        shares = each.new_tensor([[size or 1.0 for size in part] for part in sizes])
        if None not in sizes[-1]:
            shares = shares / shares.sum(0)
        return (shares.reshape(*shares.shape, *[1] * (each.dim() - 2)) * each).sum(0)

    def _grams(self, module: nn.Module, vectors: Sequence[Vector]) -> Tensor:
        """The same of this pass alone."""
        wanted: list[Tensor] = []
        if self.followed is not None:
            try:
                return self.followed.grams(self.loss, vectors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # an operation without a second derivative
                wanted, self.followed = self.followed.parts, None
        call = self.inputs
        with self._again():
            more: dict[str, Any] = {"random": self.random, "select": self.select}
            output, tangents = output_tangents(
                module, call.args, vectors, kwargs=call.kwargs, **more
            )
        again, lower = parts_of(output), lower_rounding(self.autocast)
        pairs = zip(wanted, again, strict=False)
        alike = all(same(one, other, lower) for one, other in pairs)
        if not alike or len(wanted) not in (0, len(again)):
            raise ValueError(
                "the observed pass has an operation without a second derivative, and the module"
                " called on its inputs again gives another output than the one observed"
            )
        return Curved.of(self.loss, output, tangents).grams(self.loss)

    @property
    def extent(self) -> tuple[int, int] | None:
        """Samples and terms of the batch; None where a part of the samples cannot be taken.

        A module must have been called once, on tensors with a row for each sample.
        """
        first = self.output[0] if isinstance(self.output, tuple) and self.output else self.output
        if not isinstance(first, Tensor) or first.dim() < 2:
            return None
        if self.call is None or self.calls > 1 or self.select is None:
            return None
        count, terms = len(first), math.prod(first.shape[:-1])
        even = all(len(part) == count for part in parts_of(self.output))
        return (count, terms) if count and even and self.call.by_sample(count)[0] else None

    @property
    def estimable(self) -> bool:
        """Whether a part of the samples can stand for all, and the graph of the pass is there."""
        return self.extent is not None and self.followed is not None

    def estimated_grams(
        self, module: nn.Module, vectors: Sequence[Vector], turn: int, sparsest: int
    ) -> Estimate | None:
        """:meth:`grams` estimated from every k-th sample, in a forward pass of their own.

        It takes about a tenth of the time; micro-batches are taken whole. None if samples give not
        alone what they gave in the batch: dropout, batch statistics in training, where they meet.

        Args:
            module: The network.
            vectors: Directions.
            turn: Number of the step; each one begins with another sample.
            sparsest: Largest k.
        """
        try:
            if self.extent is None or self.earlier:
                return Estimate(self.grams(module, vectors), 1)
            rows = self._rows(turn, sparsest)
            found = self.forms(module, vectors, rows)
            if found is None:
                return None
            times = self.count, found.samples
            grams = of_all(found.grams, found.sizes, self.sizes_now(), times)
            return Estimate(grams, next_sparsest(self.count, found.samples, *found.moments))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None

    def forms(self, module: nn.Module, vectors: Sequence[Vector], rows: slice) -> Forms | None:
        """The exact forms of some samples; None as :meth:`estimated_grams`."""
        try:
            call = self._call(rows)
            with self._again():
                more: dict[str, Any] = {"random": self.random, "select": self.select}
                output, tangents = output_tangents(
                    module, call.args, vectors, kwargs=call.kwargs, **more
                )
            some, lower = parts_of(output), lower_rounding(self.autocast)
            pairs = zip(parts_of(self.output), some, strict=True)
            if not all(near(part[rows], one, lower) for part, one in pairs):
                return None
            loss = self._loss(output, rows)
            curved = Curved.of(loss, output, tangents)
            sizes, moments = sizes_of(loss, output), term_moments(curved)
            return Forms(curved.grams(loss), sizes, len(some[0]), moments)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the module may dislike another number of samples for any reason
            return None

    def estimated_kl(
        self, module: nn.Module, change: Vector, turn: int, sparsest: int
    ) -> Tensor | None:
        """The KL of each part (K,) that a change of the parameters costs.

        It is that of the samples of :meth:`estimated_grams`, in a forward pass of their own, or of
        :meth:`whole_divergence`. None where neither can be had, and of a loss without ``kl``.

        Args:
            module: The network.
            change: By name.
            turn: Number of the step.
            sparsest: Largest k; 0 takes the batch whole.
        """
        if not hasattr(self.loss, "kl"):
            return None
        if self.extent is None or self.earlier or not sparsest:
            found = self.whole_divergence(module, change)
        else:
            found = self.divergence(module, change, self._rows(turn, sparsest))
        return None if found is None else found[0]

    def whole_divergence(
        self, module: nn.Module, change: Vector
    ) -> tuple[Tensor, tuple[float | None, ...]] | None:
        """As :meth:`divergence`, of the batch as a whole, with its dropout mask and statistics.

        The module runs twice on the inputs of all micro-batches, from the random state in which
        capture() began. None where it does not give the observed output again, or after a step.
        """
        if self.output is None:
            return None
        try:
            before = moved_output(module, self.inputs, {}, self.select, self.random)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # no inputs, or an output that the module does not return
            return None
        lower = lower_rounding(self.autocast)
        pairs = zip(parts_of(self.output), parts_of(before), strict=True)
        if not all(near(part, again, lower) for part, again in pairs):
            return None
        every = (*self.earlier, self)
        each = [part.divergence(module, change, slice(None)) for part in every]
        kept = [found[0] for found in each if found is not None]
        return (self._mean(torch.stack(kept)), self.totals()) if len(kept) == len(each) else None

    def _rows(self, turn: int, sparsest: int) -> slice:
        """The samples that an estimate takes: every k-th one."""
        assert self.extent is not None
        count, terms = self.extent
        return sample_rows(count, 1 / stride(count, terms, sparsest), turn) or slice(None)

    def divergence(
        self, module: nn.Module, change: Vector, rows: slice
    ) -> tuple[Tensor, tuple[float | None, ...]] | None:
        """The KL of each part (K,) that a change costs some samples, with their sizes; or None."""
        try:
            call = self._call(rows)
            with self._again():
                after = moved_output(module, call, change, self.select, self.random)
                if self.output is None:  # of a former micro-batch
                    before = moved_output(module, call, {}, self.select, self.random)
                else:
                    before = tree_map(lambda leaf: _part(leaf, rows), self.output)
            loss = self._loss(before, rows)
            kl: Tensor = loss.kl(before, after)  # type: ignore[attr-defined]
            return kl, sizes_of(loss, before)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a part of the loss may have no KL
            return None

    def _again(self) -> AbstractContextManager[Any]:
        """The precision of the pass."""
        return nullcontext() if self.autocast is None else self.autocast.again()

    def _call(self, rows: slice) -> Inputs:
        """The inputs of some samples."""
        if rows == slice(None):
            return self.inputs
        tensors, rebuilt = self.inputs.by_sample(self.count)
        return rebuilt(tensor[rows] for tensor in tensors)

    def _loss(self, output: Any, rows: slice) -> OutputLoss[Any]:
        """The loss of some samples, with their weights."""
        weights, target = tree_map(lambda leaf: _part(leaf, rows), self.terms)
        return with_weights(self.loss, output, weights, target, empty=self.share)

    def spending(self, module: nn.Module, outputs: Callable[[], Any]) -> Callable[[], Tensor]:
        """The KL that parameters move from now on will have cost when it is called, by part (K,).

        Args:
            module: The network.
            outputs: Gives the loss's output at the present parameters.

        Raises:
            ValueError: The loss knows no KL.
        """
        divergence = getattr(self.loss, "kl", None)
        if divergence is None:
            raise ValueError(f"{type(self.loss).__name__} has no kl(output, other)")
        again = repeatable(module, outputs, self.random)
        before = again()

        def spent() -> Tensor:
            kl: Tensor = divergence(before, again())
            return kl

        return spent

    def objective(self, value: float) -> float:
        """The objective of the whole batch, from its value on these samples: they are all."""
        return value


def _part(leaf: Any, rows: slice) -> Any:
    return leaf[rows] if isinstance(leaf, Tensor) else leaf
