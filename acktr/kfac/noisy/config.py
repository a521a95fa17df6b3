"""Settings of noisy K-FAC."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from acktr.kfac.checks import check_choice, check_flags, check_integer, check_number
from acktr.kfac.config import KFACConfig, Structure

Posterior = Literal["mvg", "ffg", "emvg", "tridiagonal"]
DampingForm = Literal["exact", "factored"]
WARM_START = 0.01
"""Part of the KL weight with which a warm-up begins."""
_CURVATURE: dict[tuple[Posterior, DampingForm], Structure] = {
    ("mvg", "exact"): "kfac",
    ("mvg", "factored"): "kfac_factored",
    ("ffg", "exact"): "diagonal",
    ("emvg", "exact"): "ekfac",
    ("tridiagonal", "factored"): "tridiagonal",
}
"""The structure of the curvature that has each posterior."""


@dataclass(frozen=True, kw_only=True)
class NoisyConfig:
    """Settings of :class:`acktr.kfac.NoisyKFAC`.

    The defaults of lr, stat_decay and momentum are those of small regression networks with some
    tens of thousands of steps.
    """

    structure: Posterior = "mvg"
    """Covariance of the weights of a layer.

    mvg: matrix-variate Gaussian, A (x) G. ffg: fully factorised, which is noisy Adam. emvg: mvg
    with measured variances in the eigenbasis, noisy EK-FAC. tridiagonal: over a chain of linear
    layers.
    """
    damping_form: DampingForm = "exact"
    """How the prior's precision enters the posterior of mvg.

    exact: added to the products of eigenvalues, which is the exact posterior wherever A (x) G is
    the exact Fisher. factored: split between A and G as in the paper; too narrow, by half of the
    variance for 50 data. tridiagonal has no other form.
    """
    prior_variance: float | Mapping[str, float] = 1.0
    """Variance eta of the prior N(0, eta I) of weights and biases.

    A mapping has the names of parameters, or the paths of modules, and "" for the rest.
    """
    kl_weight: float = 1.0
    """Weight lambda of KL(q || prior) in the objective; 0 is K-FAC without noise or prior."""
    kl_warmup: int = 0
    """Steps in which the KL weight rises from a hundredth of itself, linearly."""
    external_damping: float = 0.0
    """Damping gamma_ex of the steps, which never enters the posterior."""
    deterministic: Collection[str] = ()
    """Parameters, or paths of modules, without noise and without a prior."""
    sample_norms: bool = False
    """Whether scales and shifts of normalisations have noise and a prior too."""
    lr: float = 0.01
    """Step size alpha of the mean."""
    momentum: float = 0.9
    """Decay of the bias-corrected average of gradients that is preconditioned."""
    stat_decay: float = 0.99
    """Decay 1 - beta of the running averages of the curvature."""
    stat_interval: int = 1
    """Steps between those whose batches are folded into the curvature."""
    refresh_interval: int = 10
    """Steps between decompositions; the first are after 1, 2, 4, ... steps."""
    initial_curvature: float = 0.1
    """Curvature c per loss term that the averages start from, F = c I, and that fades with them.

    Without any the posterior would be the prior in all directions that the first batches do not
    show, and training diverges. With 0 the first step is at the mean."""
    kl_clip: float | None = None
    """c: a step is shortened to a predicted KL of at most c / 2 nats; None is no bound."""
    max_factor_size: int | None = 2048
    """Largest Kronecker factor that is a matrix; of larger ones the diagonal is kept."""
    max_failures: int = 10
    """Failed decompositions, batches of NaN, or skipped steps in a row that are an error."""

    def __post_init__(self) -> None:
        """Check every value; raises ValueError naming the field."""
        check_choice("structure", self.structure, get_args(Posterior))
        check_choice("damping_form", self.damping_form, get_args(DampingForm))
        if (self.structure, self.damping_form) not in _CURVATURE:
            other = "factored" if self.damping_form == "exact" else "exact"
            raise ValueError(
                f'structure="{self.structure}" has no {self.damping_form} damping: give'
                f' damping_form="{other}"'
            )
        variances = self.prior_variance
        named = variances if isinstance(variances, Mapping) else {"": variances}
        _names("the keys of prior_variance", named)
        for name, variance in named.items():
            what = f"prior_variance of {name!r}" if name else "prior_variance"
            check_number(what, variance, open_low=True)
        for field in ("kl_weight", "external_damping", "initial_curvature"):
            check_number(field, getattr(self, field))
        if self.kl_weight == 0 and self.external_damping == 0:
            raise ValueError("kl_weight=0 leaves nothing to damp with: give external_damping > 0")
        if self.structure == "tridiagonal" and self.external_damping > 0:
            raise ValueError(
                'structure="tridiagonal" has one inverse for noise and steps, so that'
                " external_damping would enter the posterior: it must be 0"
            )
        check_integer("kl_warmup", self.kl_warmup, 0)
        check_flags(self, "sample_norms")
        object.__setattr__(self, "deterministic", _names("deterministic", self.deterministic))
        if isinstance(variances, Mapping):
            object.__setattr__(self, "prior_variance", dict(sorted(variances.items())))
        self.curvature()

    def curvature(self) -> KFACConfig:
        """The settings of the curvature, with a damping that nothing reads."""
        return KFACConfig(
            lr=self.lr,
            kl_clip=self.kl_clip,
            damping=1.0,
            structure=_CURVATURE[self.structure, self.damping_form],
            stat_decay=self.stat_decay,
            stat_interval=self.stat_interval,
            momentum=self.momentum,
            refresh_interval=self.refresh_interval,
            max_factor_size=self.max_factor_size,
            factor_rows=None,
            fast_products=False,
            quadratic="kronecker",
            max_failures=self.max_failures,
        )

    def weight(self, step: int) -> float:
        """The KL weight lambda of a step."""
        share = min(1.0, step / self.kl_warmup) if self.kl_warmup else 1.0
        return self.kl_weight * (WARM_START + (1 - WARM_START) * share)


def _names(field: str, given: object) -> tuple[str, ...]:
    """Names as a tuple; a string by itself would be one name for each of its letters.

    They are in order, as the order of a set is another one in each process, and ranks compare
    settings.
    """
    if isinstance(given, Iterable) and not isinstance(given, str):
        names = tuple(given)
        if all(isinstance(name, str) for name in names):
            return tuple(sorted(set(names)))
    raise ValueError(f"{field} must be a list of names, got {given!r:.100}")
