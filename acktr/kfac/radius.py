"""A trust region that holds: Kronecker forms, corrected by measurements of the exact ones.

The damped Kronecker factors give the quadratic form of a step almost for nothing, by parameter:

    U^T (F + lambda) U = g . U,     v'^T (F + lambda) v' = mu^2 w + 2 mu nu (g . v) + nu^2 (g . U)

with v' = mu v + nu U, the velocity after the step, and w the form of v. How far they are from the
exact form d^T F d of the step d that is taken is measured now and then, and the ratio multiplies
them until the next measurement. A measurement that the last one foretold within 3/2 doubles the
number of steps to the next, up to ten; another halves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acktr.kfac.trust import StepInfo

_LONGEST = 10
"""Most steps from one measurement to the next."""
_FORETOLD = math.log(1.5)
_SHARE = 0.5
"""Part of a radius that shared parameters may use whatever a part's own parameters do."""

Measure = Callable[[Tensor], Tensor | None]
"""Scales of U by parameter (P,) -> exact forms (parts, m, m) of the step with them, if they can be
had."""


class Fit(NamedTuple):
    """How a step is fitted into the region, by parameter (P,)."""

    scale: Tensor
    """nu of v' = mu v + nu U."""
    keep: Tensor
    """Factor of v', 1 unless the velocity would leave the region."""
    info: StepInfo


class TrustRegion:
    """Scales of steps, such that the KL of the step that is taken stays within its bounds.

    With one radius the forms are (1, 1, 1). With one for each of K parts of the loss they are
    (K, 2, 2): the first row and column belong to the parameters that several parts share, the
    second to those that this part alone depends on.

    Args:
        names: The parameters.
        clips: c of each part, None for no bound; a number is one radius for all.
        example: A parameter: device and type.
    """

    def __init__(
        self,
        names: Sequence[str],
        clips: float | tuple[float | None, ...] | None,
        example: Tensor,
    ) -> None:
        self.separate = isinstance(clips, tuple)
        every = clips if isinstance(clips, tuple) else (clips,)
        kind = torch.promote_types(example.dtype, torch.float32)
        self._like = torch.zeros((), dtype=kind, device=example.device)
        self._clips = self._like.new_tensor([math.inf if c is None else c for c in every])
        self.places = {name: place for place, name in enumerate(names)}
        size = 2 if self.separate else 1
        self.ratio = torch.eye(size, dtype=kind, device=example.device).repeat(len(every), 1, 1)
        """Exact form over the Kronecker one, entry by entry in units of the latter's roots."""
        self.forms = self._like.new_zeros(len(names))
        """w: the Kronecker form of the velocity by parameter."""
        self.groups = torch.zeros(len(names), dtype=torch.int64, device=example.device)
        """0 for a parameter that parts share, 1 + k for one of part k alone."""
        self._interval = 1
        self._due = 0
        self.blind = False
        """Whether there is nothing to measure with."""
        self.whole = False
        """Whether a part of the samples was seen not to stand for the observed pass."""

    @property
    def parts(self) -> int:
        """Number of radii."""
        return len(self._clips)

    def due(self, turn: int) -> bool:
        """Whether the step of this turn is measured."""
        return turn >= self._due and not self.blind

    @property
    def entire(self) -> bool:
        """Whether the next measurement takes all samples, as the first one does."""
        return self.whole or self._due == 0

    def own(self, groups: Mapping[str, int]) -> None:
        """Set which parameters belong to one part alone, see :attr:`groups`."""
        values = [groups.get(name, 0) for name in self.places]
        self.groups = torch.tensor(values, device=self.groups.device)

    def own_names(self) -> set[str]:
        """The parameters of one part alone."""
        groups = self.groups.tolist()
        return {name for name, place in self.places.items() if groups[place]}

    def dots(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        """Dot products by parameter (P,), 0 where one is missing."""
        both = [name for name in self.places if name in first and name in second]
        if not both:
            return torch.zeros_like(self.forms)
        products = torch._foreach_mul([first[n] for n in both], [second[n] for n in both])
        dots = torch.stack([product.sum(dtype=self._like.dtype) for product in products])
        if len(both) == len(self.places):
            return dots
        places = torch.tensor([self.places[name] for name in both], device=dots.device)
        return torch.zeros_like(self.forms).index_copy(0, places, dots)

    def spread(self, values: Mapping[str, float]) -> Tensor:
        """Numbers by name as (P,), 0 where one is missing."""
        return self._like.new_tensor([values.get(name, 0.0) for name in self.places])

    def fit(
        self,
        quadratic: Tensor,
        slope: Tensor,
        momentum: Tensor,
        lengths: Tensor,
        lr: float,
        measure: Measure | None,
        turn: int,
    ) -> Fit:
        """Fit a step d = -l (mu v + nu U) into the region.

        nu alone keeps lr nu U inside, as without momentum (Wu et al. 2017, section 3.2); what is
        left of former steps may then still take the sum out of it, and both are shortened.

        Args:
            quadratic: g . U (P,).
            slope: g . v (P,).
            momentum: mu (P,).
            lengths: l (P,); 0 for a parameter that stays.
            lr: Step size of U alone.
            measure: Gives the exact forms of d; None without a measurement.
            turn: Number of the step.
        """
        finite = torch.isfinite(quadratic).all()
        quadratic = torch.where(finite, quadratic, torch.zeros_like(quadratic))
        slope = torch.where(finite, slope, torch.zeros_like(slope))

        def form(nu: Tensor) -> Tensor:
            old, new = momentum.square() * self.forms, nu.square() * quadratic
            cross = 2 * momentum * nu * slope
            limit = 2 * (old.sum() * new.sum()).clamp(min=0.0).sqrt()
            share = (limit / cross.sum().abs()).clamp(max=1.0)  # by Cauchy-Schwarz, unless w is old
            return old + cross * share.nan_to_num(nan=1.0) + new

        nu = self._scales(lr * lr * quadratic)
        if measure is not None:
            exact = measure(torch.where(finite, nu, 0.0))
            if exact is not None:
                self._learn(exact, lengths.square() * form(nu), turn)
                nu = self._scales(lr * lr * quadratic)
        nu = torch.where(finite, nu, 0.0)
        forms = form(nu)
        keep = self._scales(lengths.square() * forms)
        forms = keep.square() * forms
        kl = 0.5 * self._wholes(lengths.square() * forms)
        self.forms = torch.where(lengths > 0, forms, self.forms)
        whole = torch.where(finite, self._wholes(quadratic).sum(), torch.nan)
        scale = (nu * keep).min()
        info = StepInfo(whole, scale, kl.sum(), part_kl=kl if self.separate else None)
        return Fit(nu, keep, info)

    def _kronecker(self, forms: Tensor) -> Tensor:
        """Forms by parameter (P,), summed to (parts, m)."""
        if not self.separate:
            return forms.sum().clamp(min=0.0).reshape(1, 1)
        sums = forms.new_zeros(1 + self.parts).index_add_(0, self.groups, forms).clamp_(min=0.0)
        return torch.stack([sums[:1].expand(self.parts), sums[1:]], dim=1)

    def _expected(self, forms: Tensor) -> Tensor:
        """The exact forms (parts, m, m) that the last measurement foretells."""
        roots = self._kronecker(forms).sqrt()
        return self.ratio * roots[:, :, None] * roots[:, None, :]

    def _wholes(self, forms: Tensor) -> Tensor:
        """Those of all parameters together (parts,)."""
        return self._expected(forms).sum((1, 2)).clamp(min=0.0)

    def _scales(self, forms: Tensor) -> Tensor:
        """Scales in [0, 1] by parameter that take steps of these forms into the region."""
        expected = self._expected(forms)
        if not self.separate:
            return _root(self._clips / expected[:, 0, 0]).clamp(max=1.0).expand(len(forms))
        return part_scales(expected, self._clips)[self.groups]

    def _learn(self, exact: Tensor, forms: Tensor, turn: int) -> None:
        """Take notice of the exact forms of a step whose Kronecker forms are given."""
        exact = exact.to(self.ratio.dtype)
        before, after = self._wholes(forms), exact.sum((1, 2))
        off = float((after / before).log().abs().max())  # NaN where there is nothing to compare
        roots = self._kronecker(forms).sqrt()
        found = exact / (roots[:, :, None] * roots[:, None, :])
        self.ratio = torch.where(torch.isfinite(found) & (found != 0), found, self.ratio)
        near = off <= _FORETOLD
        self._interval = min(_LONGEST, 2 * self._interval) if near else max(1, self._interval // 2)
        self._due = turn + self._interval

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs."""
        return {
            "ratio": self.ratio.clone(),
            "forms": self.forms.clone(),
            "groups": self.groups.clone(),
            "interval": self._interval,
            "due": self._due,
            "whole": self.whole,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        for name in ("ratio", "forms", "groups"):
            mine = getattr(self, name)
            setattr(self, name, state[name].to(mine.device, mine.dtype).clone())
        self._interval, self._due = state["interval"], state["due"]
        self.whole = state["whole"]


def part_scales(forms: Tensor, clips: Tensor) -> Tensor:
    """Scales of the shared parameters, and of each part's own, for one radius per part.

    Scaled by s and x_k the step has the form a_k s^2 + 2 b_k s x_k + d_k x_k^2 in part k. All of it
    scaled alike would take s = x_k = sqrt(c_k / (a_k + 2 b_k + d_k)); a wild head would then stop
    the whole network. So s is bounded by the smallest over k of the larger of that and
    sqrt(c_k / a_k) / 2, and every x_k is the largest that the rest of its radius allows.

    Args:
        forms: (K, 2, 2), shared parameters first.
        clips: c (K,).

    Returns:
        (1 + K,), in [0, 1].
    """
    a, b, d = forms[:, 0, 0], forms[:, 0, 1], forms[:, 1, 1].clamp(min=0.0)
    alike = _root(clips / (a + 2 * b + d).clamp(min=0.0))
    shared = torch.maximum(alike, _SHARE * _root(clips / a)).min().clamp(max=1.0)
    across = b * shared
    room = across.square() + d * (clips - a * shared.square())
    own = (room.clamp(min=0.0).sqrt() - across) / d
    own = torch.where(d > 0, own, torch.ones_like(own)).clamp(0.0, 1.0)
    return torch.cat([shared[None], own])


def _root(room: Tensor) -> Tensor:
    """Square root; infinite for no step in no bound, which is 0 / 0 or inf / inf."""
    return room.nan_to_num(nan=math.inf).sqrt()
