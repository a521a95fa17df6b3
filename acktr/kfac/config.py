"""Settings of the K-FAC optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from acktr.kfac.checks import check_choice, check_flags, check_integer, check_number

Sharing = Literal["expand", "reduce"]
Structure = Literal["kfac", "kfac_factored", "cholesky", "ekfac", "tridiagonal", "diagonal"]
SmallParameters = Literal["diagonal", "dense", "gradient"]
Quadratic = Literal["corrected", "kronecker", "exact"]


@dataclass(frozen=True, kw_only=True)
class KFACConfig:
    """Settings of :class:`acktr.kfac.KFAC`; the defaults are those of supervised learning.

    Statistics come from every fifth batch, after a start with all of them. Momentum is less than
    with other optimizers: the whole step is held to the trust region. For reinforcement learning
    there is :meth:`for_rl`.
    """

    lr: float = 1.0
    """Largest step size (eta_max); the trust region can only shorten the step."""
    kl_clip: float | tuple[float | None, ...] | None = 0.3
    """c = 2 delta: the step is scaled so that lr^2 q <= c, a predicted KL of at most c/2.

    A tuple has one c for each part of a SumLoss, such as policy and value, and None for no bound;
    the KL of a part does not count its weight. It needs quadratic="corrected".
    """
    damping: float = 0.001
    """Tikhonov damping lambda added to the curvature."""
    structure: Structure = "cholesky"
    """Curvature of a layer with the factors A and G, and its damping.

    kfac: A (x) G + lambda, by eigenvalues. kfac_factored: the damping is split between A and G by
    the trace ratio pi. cholesky: the same with Cholesky inverses, which keep the damping of their
    refresh. ekfac: corrected eigenvalues plus lambda. tridiagonal: one inverse for a whole chain of
    linear layers, with split damping. diagonal: the diagonal of the Fisher, sample by sample, plus
    lambda.
    """
    stat_decay: float = 0.8
    """Decay of the running averages of the factors (bias-corrected)."""
    stat_interval: int = 5
    """Fold the batches of every stat_interval-th step only, and of all cold steps."""
    momentum: float = 0.5
    """Momentum mu of v <- mu v + U, theta <- theta - lr (1 - mu) v."""
    weight_decay: float = 0.0
    """L2 coefficient of weight matrices; also added to their damping."""
    refresh_interval: int = 10
    """Steps between decompositions of the factors."""
    eager_start: bool = True
    """In the first refresh_interval steps fold every batch, and decompose after 1, 2, 4, ...

    The factors of one batch alone know few directions; steps along others would be too long."""
    refresh_delay: int | None = None
    """Decompose in a background thread and use the result this many steps later (None: inline)."""
    cold_steps: int = 0
    """First steps taken by SGD with momentum while the factors warm up."""
    cold_lr: float = 0.03
    """Learning rate of the cold steps, of the parameter group with the largest lr."""
    cold_max_grad_norm: float = 0.5
    """Largest gradient norm of the cold steps (it never applies to K-FAC steps)."""
    conv_sharing: Sharing = "expand"
    """Convolution factors: every position an observation (expand) or averaged first (reduce)."""
    linear_sharing: Sharing = "expand"
    """The same for the extra dimensions, and several uses, of a linear layer."""
    small_parameters: SmallParameters = "diagonal"
    """Curvature of the parameters outside of known layers, which need not be small.

    diagonal: the diagonal of their Fisher, from the gradient of whole batches; it asks nothing of
    the module. dense: their full second moment, if they are at most dense_limit numbers, by a
    backward pass for every sample; the module must take each sample by itself. gradient: none,
    their steps are plain gradients.
    """
    dense_limit: int = 1024
    """Largest number of parameters in a dense block (normalisations, lone biases, small
    parameters); above it only the diagonal is kept."""
    max_factor_size: int | None = 2048
    """Largest Kronecker factor that is a matrix; of larger ones the diagonal is kept (None: no
    limit)."""
    factor_rows: int | None = 4
    """Rows of a batch that are enough for every row of a Kronecker factor: where samples times
    positions are more, every second to fourth sample is taken (None: all)."""
    float64: bool = False
    """Kronecker factors, their decompositions and products in float64: for a damping below 1e-6 of
    the largest eigenvalue of A (x) G, which float32 does not tell from rounding."""
    fast_products: bool = True
    """Products of large matrices in the fastest way that the processor has: second moments and
    exact forms by the faster of two float32 libraries and, where bfloat16 takes half the time,
    inverses of G from structure="cholesky" in it, which rounds a step by half a percent."""
    quadratic: Quadratic = "corrected"
    """Where q comes from.

    corrected: the damped Kronecker factors, times the ratio of the exact form to theirs, which is
    measured every few steps; the bound holds for the step taken, momentum included. kronecker: the
    factors alone. exact: the exact Fisher at every step, before momentum.
    """
    max_failures: int = 10
    """Failed decompositions, batches of NaN, or skipped steps in a row that are an error."""

    @staticmethod
    def for_supervised() -> KFACConfig:
        """Settings of supervised learning, which are the defaults."""
        return KFACConfig()

    @classmethod
    def for_rl(cls) -> KFACConfig:
        """The settings of ACKTR, which noisy gradients of short rollouts need.

        They stay as they are when the defaults change.
        """
        return cls(
            lr=0.25,
            kl_clip=0.001,
            damping=0.01,
            structure="kfac",
            stat_decay=0.99,
            stat_interval=1,
            momentum=0.9,
            refresh_interval=10,
            eager_start=False,
            refresh_delay=None,
            small_parameters="gradient",
            max_factor_size=None,
            factor_rows=None,
            float64=False,
            fast_products=False,
            quadratic="kronecker",
        )

    def __post_init__(self) -> None:
        """Check every value; raises ValueError naming the field."""
        radii = self.kl_clip if isinstance(self.kl_clip, tuple) else (self.kl_clip,)
        for radius in (radius for radius in radii if radius is not None):
            check_number("kl_clip", radius, open_low=True)
        for name in ("lr", "damping", "cold_lr", "cold_max_grad_norm"):
            check_number(name, getattr(self, name), open_low=True)
        check_number("weight_decay", self.weight_decay)
        for name in ("stat_decay", "momentum"):
            check_number(name, getattr(self, name), high=1.0, open_high=True)
        for name in ("refresh_interval", "stat_interval", "max_failures", "dense_limit"):
            check_integer(name, getattr(self, name), 1)
        check_integer("cold_steps", self.cold_steps, 0)
        for name in ("max_factor_size", "factor_rows"):
            value = getattr(self, name)
            check_integer(name, 1 if value is None else value, 1)
        check_flags(self, "eager_start", "float64", "fast_products")
        check_choice("structure", self.structure, get_args(Structure))
        for name in ("conv_sharing", "linear_sharing"):
            check_choice(name, getattr(self, name), get_args(Sharing))
        check_choice("small_parameters", self.small_parameters, get_args(SmallParameters))
        check_choice("quadratic", self.quadratic, get_args(Quadratic))
        if isinstance(self.kl_clip, tuple) and (not radii or self.quadratic != "corrected"):
            raise ValueError(
                "kl_clip with a radius for each part needs one number at least,"
                ' and quadratic="corrected"'
            )
        if self.refresh_delay is not None:
            check_integer("refresh_delay", self.refresh_delay, 0)
            if self.refresh_delay > self.refresh_interval:
                raise ValueError(
                    f"refresh_delay must be at most refresh_interval ({self.refresh_interval}),"
                    f" got {self.refresh_delay}"
                )
