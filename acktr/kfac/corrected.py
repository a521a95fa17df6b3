"""A trust region that holds: Kronecker forms, corrected by measurements of the exact ones.

The damped Kronecker factors give the quadratic form of a step almost for nothing, by parameter:

    U^T (F + lambda) U = g . U,     v'^T (F + lambda) v' = mu^2 w + 2 mu nu (g . v) + nu^2 (g . U)

with v' = mu v + nu U, the velocity after the step, and w the form of v. How far they are from the
exact form d^T F d of the step d that is taken is measured now and then, and the ratio multiplies
them until the next measurement (:class:`acktr.kfac.cadence.Measurements`).

Half the form is the KL of a short step. At a radius of some tenths of a nat it is off by up to two,
so that a measured step is also tried out, by a forward pass of the measured samples, and its real
KL over the promise multiplies the following promises, and counts as foretold or not.

A ratio holds for steps like the one that was measured. Once a task is solved the exact form of its
outputs is next to nothing, and the ratio with it, and a single hard batch has a step that is longer
by orders of magnitude. A step without a measurement is therefore bounded by the last one with it
too, and a measured step that costs far more than its radius is shortened until it does not.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from acktr.kfac.cadence import Measurements
from acktr.kfac.tensors import accumulation_type
from acktr.kfac.trust import Fit, Named, StepInfo, UnobservedError, dot, part_scales, root, updates

_FORETOLD, _KEPT = math.log(1.5), math.log(2.0)
"""Logarithms: how far off a form may be foretold, and what a step really costs be promised."""
_FURTHEST = 4.0
"""Most that the KL of a step is taken to differ from half its quadratic form."""
_LEAP = 4.0
"""Most that the Kronecker form of a step may be of that of the last measured step."""
_TRIALS = 4
"""Most times that a step whose real KL is far beyond its radius is shortened and tried again."""

Measure = Callable[[Sequence[Named]], Tensor | None]
"""Exact forms (parts, m, m) of m vectors, those of a part without its weight where it has a radius
of its own; None where a part of the samples does not do."""


class Proposal(NamedTuple):
    """A step d = -lr (1 - mu) (mu v + nu U) that is to be fitted into the region."""

    gradients: Named
    """g by name."""
    step: Named
    """U by name."""
    velocities: Named
    """v by name; one that is missing is zero."""
    momenta: Mapping[str, float]
    """mu by name."""
    lr: float
    """Step size."""
    full: float
    """The step size of a step of the whole radius, at least lr: a schedule takes a part of it."""


class _Forms(NamedTuple):
    """What is known of a step without a measurement, by parameter (P,)."""

    finite: Tensor
    """Whether the update is, (); else its forms are 0."""
    quadratic: Tensor
    """g . U."""
    slope: Tensor
    """g . v."""
    momentum: Tensor
    """mu."""
    length: Tensor
    """full (1 - mu)."""


class CorrectedRegion:
    """Scales of steps, such that the KL of the step that is taken stays within its bounds.

    With one radius the forms are (1, 1, 1). With one for each of K parts of the loss they are
    (K, 2, 2): the first row and column belong to the parameters that several parts share, the
    second to those that this part alone depends on. Numbers by parameter are tensors (P,).

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
        kind = accumulation_type(example)
        self._like = torch.zeros((), dtype=kind, device=example.device)
        self._clips = self._like.new_tensor([math.inf if c is None else c for c in every])
        self._names = list(names)
        size = 2 if self.separate else 1
        self.ratio = torch.eye(size, dtype=kind, device=example.device).repeat(len(every), 1, 1)
        """Exact form over the Kronecker one, entry by entry in units of the latter's roots."""
        self.beyond = self._like.new_ones(len(every))
        """The KL that a step really costs over half its quadratic form, of every part."""
        self.forms = self._like.new_zeros(len(self._names))
        """w: the Kronecker form of the velocity by parameter."""
        self.reach = self._like.new_full((), torch.finfo(kind).max)
        """Kronecker form of the last measured step, as it was taken; no bound before one."""
        self._groups = torch.zeros(len(self._names), dtype=torch.int64, device=example.device)
        """0 for a parameter that parts share, 1 + k for one of part k alone."""
        self.measurements = Measurements()
        self._warned = False
        """Whether it was said that a step could not be measured."""
        self.blind = False
        """Whether there was nothing to measure with at the last try; an `observe` ends it."""
        self.whole = False
        """Whether a part of the samples was seen not to stand for the observed pass."""
        self._fickle = False
        """Whether the observed pass was seen not to come out the same twice."""

    @property
    def entire(self) -> bool:
        """Whether the next measurement takes all samples, as the first one does."""
        return self.whole or self.measurements.next == 0

    def due(self, turn: int) -> bool:
        """Whether the step of this turn is measured."""
        return turn >= self.measurements.next and not self.blind

    def own(self, groups: Mapping[str, int]) -> None:
        """Set which parameters belong to one part alone: 1 + k for one of part k."""
        self._groups = self._groups.new_tensor([groups.get(name, 0) for name in self._names])

    def fit(
        self,
        proposal: Proposal,
        measure: Measure,
        spend: Callable[[Named], Tensor | None],
        turn: int,
        renewed: Callable[[int], bool],
    ) -> Fit:
        """Fit a step into the region.

        nu alone keeps full nu U inside, as without momentum (Wu et al. 2017, section 3.2); what is
        left of former steps may then still take the sum out of it, and both are shortened. Before
        that v is shortened where the step would ascend, g . d > 0: a velocity that is a whole
        radius at every step turns too slowly otherwise, and momentum of 0.9 diverges. All that is
        of a step with the full step size; the one taken is lr / full times as long.

        Args:
            proposal: The step.
            measure: Gives exact forms; it is not called before the next measurement is due.
            spend: Gives the KL of each part that a change really costs, None where that is not
                known; called when a measurement was made.
            turn: Number of the step.
            renewed: Whether the step of a turn is the first one with new decompositions.

        Raises:
            ValueError: There is a radius for each part, and nothing to measure them with.
        """
        step, velocities, full = proposal.step, proposal.velocities, proposal.full
        known = self._known(proposal)
        unit = known.length.square()  # what takes forms of a velocity to those of its step

        def move(nu: Tensor, carry: Tensor) -> Named:
            velocity = self._sum(updates(step, self._by_name(nu)), velocities, carry)
            return {n: v * -(full * (1 - proposal.momenta[n])) for n, v in velocity.items()}

        nu, carry = self._lengths(known, full)
        exact = self._measured(move(nu, carry), measure, turn, renewed) if self.due(turn) else None
        if exact is not None:
            surprise = self._learn(exact, unit * self._velocity_forms(known, nu, carry))
            nu, carry = self._lengths(known, full)
        forms = self._velocity_forms(known, nu, carry)
        scale = self._scales(unit * forms)
        if exact is not None:
            promised = 0.5 * self._wholes(unit * scale.square() * forms)
            factor, excess = self._tried(move(nu * scale, scale * carry), promised, spend)
            scale = scale * factor
            self.measurements.plan(surprise <= _FORETOLD and excess <= _KEPT, turn, renewed)
        scale = scale * self._reached(unit * scale.square() * forms, exact is not None)
        taken = scale.square() * forms
        part = proposal.lr / full if full > 0 else 1.0
        kl = 0.5 * part**2 * self._wholes(unit * taken) * known.finite
        self.forms = torch.where(known.length > 0, taken, self.forms)
        whole = torch.where(known.finite, self._wholes(known.quadratic).sum(), torch.nan)
        info = StepInfo(whole, (nu * scale).min(), kl.sum(), part_kl=kl if self.separate else None)
        return Fit(dict(step), self._by_name(nu * scale), self._by_name(scale * carry), info)

    def _known(self, proposal: Proposal) -> _Forms:
        """The forms of the step, 0 where its update is not finite."""
        gradients, step, momenta = proposal.gradients, proposal.step, proposal.momenta
        quadratic = self._dots(gradients, step)
        slope = self._dots(gradients, proposal.velocities)
        finite = torch.isfinite(quadratic).all()
        quadratic, slope = (torch.where(finite, x, torch.zeros_like(x)) for x in (quadratic, slope))
        lengths = {name: proposal.full * (1 - momenta[name]) for name in step}
        return _Forms(finite, quadratic, slope, self._spread(momenta), self._spread(lengths))

    def _lengths(self, known: _Forms, full: float) -> tuple[Tensor, Tensor]:
        """The scale nu of the update alone, 0 where it is not finite; the velocity's factor."""
        nu, length = self._scales(full * full * known.quadratic), known.length
        old = length * known.momentum * known.slope
        carry = known.momentum * _descending(old, length * nu * known.quadratic)
        return torch.where(known.finite, nu, 0.0), carry

    def _sum(self, updates: Named, velocities: Named, factors: Tensor) -> dict[str, Tensor]:
        """The updates plus factors of the velocities."""
        each = self._by_name(factors)
        return {
            name: update + each[name] * velocities[name] if name in velocities else update
            for name, update in updates.items()
        }

    def _velocity_forms(self, known: _Forms, nu: Tensor, carry: Tensor) -> Tensor:
        """Kronecker forms of the velocity times its factor, plus nu U, by parameter."""
        old, new = carry.square() * self.forms, nu.square() * known.quadratic
        cross = 2 * carry * nu * known.slope
        limit = 2 * (old.sum() * new.sum()).clamp(min=0.0).sqrt()
        share = (limit / cross.sum().abs()).clamp(max=1.0)  # by Cauchy-Schwarz, unless w is old
        return old + cross * share.nan_to_num(nan=1.0) + new

    def _measured(
        self, change: Named, measure: Measure, turn: int, renewed: Callable[[int], bool]
    ) -> Tensor | None:
        """Exact forms of a step; None, after a warning, if they cannot be had."""
        parts: list[Named] = [change]
        if self.separate:
            groups = dict(zip(self._names, self._groups.tolist(), strict=True))
            parts = [
                {n: d for n, d in change.items() if bool(groups[n]) is own} for own in (False, True)
            ]
        try:
            exact = measure(parts)
            if exact is None:  # the next step is measured, with the graph of its pass
                self.whole = True
            elif len(exact) != len(self._clips):
                raise ValueError(
                    f"kl_clip has {len(self._clips)} radii, the output {len(exact)} parts"
                )
            return exact
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if self.separate:
                raise ValueError(f"the radii of the parts cannot be kept: {reason}") from error
            self.blind = isinstance(error, UnobservedError)
            if not self.blind:  # what cannot be measured may cost much to try
                self.measurements.plan(True, turn, renewed)
            self.reach = torch.full_like(self.reach, torch.finfo(self.reach.dtype).max)
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "the trust region cannot be measured, so that a step may cost a KL far from"
                    f" kl_clip / 2: {reason} (observe() with a loss before every step, or give"
                    ' fisher_quadratic to step(), or say quadratic="kronecker" to have it so)',
                    stacklevel=2,
                )
            return None

    def _by_name(self, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._names, values.unbind(), strict=True))

    def _tried(
        self, change: Named, promised: Tensor, spend: Callable[[Named], Tensor | None]
    ) -> tuple[Tensor, float]:
        """Compare what a step really costs with its promise.

        Returns:
            The factor that shortens the step then, and how far off the promise was, as a logarithm.
        """
        spent, factor = None if self._fickle else spend(change), torch.ones_like(self._like)
        if spent is None:
            return factor, 0.0
        off = (spent.to(promised.dtype) / promised).nan_to_num(nan=_FURTHEST)
        off = torch.where(promised > 0, off, torch.ones_like(off)).clamp(1 / _FURTHEST, _FURTHEST)
        self.beyond = (self.beyond * off).clamp(1 / _FURTHEST, _FURTHEST)
        factor = off.max().clamp(min=1.0).rsqrt()
        for _ in range(_TRIALS):
            over = 2 * spent.to(promised.dtype) / self._clips
            if not bool((over.nan_to_num(nan=math.inf) > _FURTHEST).any()):
                break
            factor = factor * over.max().nan_to_num(nan=math.inf).rsqrt().clamp(min=0.1)
            again = spend({name: d * factor for name, d in change.items()})
            if again is None:  # it was known a moment ago: so may every trial have been wrong
                self._fickle, self.beyond = True, torch.ones_like(self.beyond)
                warnings.warn(
                    "a step cannot be tried out, so that its KL is the quadratic form's alone: the"
                    " module called on the same inputs gives now this output, now another, as with"
                    " a torch.Generator of its own (the global ones are set back)",
                    stacklevel=2,
                )
                return torch.ones_like(factor), 0.0
            spent = again
        return factor, float(off.log().abs().max())

    def _reached(self, forms: Tensor, measured: bool) -> Tensor:
        """The factor that keeps a step near the last measured one; Kronecker forms as taken."""
        form = forms.sum().clamp(min=0.0)
        if measured:
            self.reach = form
            return torch.ones_like(form)
        return (_LEAP * self.reach / form).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0).sqrt()

    def _dots(self, first: Named, second: Named) -> Tensor:
        """Dot products by parameter, 0 where one is missing."""
        both = [name for name in self._names if name in first and name in second]
        if not both:
            return torch.zeros_like(self.forms)
        dots = torch.stack([dot(first[n], second[n]).to(self._like.dtype) for n in both])
        if len(both) == len(self._names):
            return dots
        places = torch.tensor([self._names.index(n) for n in both], device=dots.device)
        return torch.zeros_like(self.forms).index_copy(0, places, dots)

    def _spread(self, values: Mapping[str, float]) -> Tensor:
        """Numbers by name as a tensor, 0 where one is missing."""
        return self._like.new_tensor([values.get(name, 0.0) for name in self._names])

    def _kronecker(self, forms: Tensor) -> Tensor:
        """Forms by parameter (P,), summed to (parts, m)."""
        if not self.separate:
            return forms.sum().clamp(min=0.0).reshape(1, 1)
        parts = len(self._clips)
        sums = forms.new_zeros(1 + parts).index_add_(0, self._groups, forms).clamp_(min=0.0)
        return torch.stack([sums[:1].expand(parts), sums[1:]], dim=1)

    def _expected(self, forms: Tensor) -> Tensor:
        """The exact forms (parts, m, m) that the last measurement foretells, at length 0."""
        roots = self._kronecker(forms).sqrt()
        return self.ratio * roots[:, :, None] * roots[:, None, :]

    def _wholes(self, forms: Tensor) -> Tensor:
        """Those of all parameters together (parts,), such that half of them is the KL."""
        return self.beyond * self._expected(forms).sum((1, 2)).clamp(min=0.0)

    def _scales(self, forms: Tensor) -> Tensor:
        """Scales in [0, 1] by parameter that take steps of these forms into the region."""
        expected = self.beyond[:, None, None] * self._expected(forms)
        if not self.separate:
            return root(self._clips / expected[:, 0, 0]).clamp(max=1.0).expand(len(forms))
        return part_scales(expected, self._clips)[self._groups]

    def _learn(self, exact: Tensor, forms: Tensor) -> float:
        """Take notice of the exact forms of a step whose Kronecker forms are given.

        Returns:
            How far off the foretold ones were, as a logarithm; NaN with nothing to compare.
        """
        exact = exact.to(self.ratio.dtype)
        before, after = self._wholes(forms) / self.beyond, exact.sum((1, 2))
        roots = self._kronecker(forms).sqrt()
        ratio = exact / (roots[:, :, None] * roots[:, None, :])
        usable = torch.isfinite(ratio) & (ratio != 0)
        usable &= (ratio.diagonal(dim1=1, dim2=2) >= 0).all(1)[:, None, None]  # but for rounding
        self.ratio = torch.where(usable, ratio, self.ratio)
        return float((after / before).log().abs().max())

    def state_dict(self) -> dict[str, Any]:
        """What a bit-exact resume needs."""
        return {
            "ratio": self.ratio.clone(),
            "beyond": self.beyond.clone(),
            "forms": self.forms.clone(),
            "reach": self.reach.clone(),
            "groups": self._groups.clone(),
            **self.measurements.state_dict(),
            "whole": self.whole,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.ratio = state["ratio"].to(self.ratio, copy=True)
        self.beyond = state["beyond"].to(self.beyond, copy=True)
        self.forms = state["forms"].to(self.forms, copy=True)
        self.reach = state["reach"].to(self.reach, copy=True)
        self._groups = state["groups"].to(self._groups, copy=True)
        self.measurements.load_state_dict(state)
        self.whole = state["whole"]


def _descending(old: Tensor, new: Tensor) -> Tensor:
    """The largest factor in [0, 1] of a velocity with which the step does not ascend.

    It is the gradient's own sign of overshooting (O'Donoghue & Candes 2015, section 3.2), but takes
    no more of the velocity than it must.

    Args:
        old: g . d of the velocity, by parameter; positive where it descends.
        new: The same of the update.
    """
    ascent, descent = -old.sum(), new.sum()
    return torch.where(ascent > 0, (descent / ascent).clamp(max=1.0), torch.ones_like(ascent))
