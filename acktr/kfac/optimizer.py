"""K-FAC as a torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Never, get_args

import torch
from torch import Tensor, nn

from acktr.kfac.blocks.rules import Rules
from acktr.kfac.blocks.skip import Skip
from acktr.kfac.checks import check_choice, refuse_settings
from acktr.kfac.config import KFACConfig
from acktr.kfac.corrected import Proposal
from acktr.kfac.modules import check_module
from acktr.kfac.named_optimizer import NamedOptimizer
from acktr.kfac.parameter_groups import check_whole, listed, make_groups
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.quadratic import (
    LMConfig,
    QuadraticModel,
    adaptive_objective,
    model_step,
    reduction_ratio,
)
from acktr.kfac.ranks import Ranks
from acktr.kfac.trust import FisherQuadratic, Named, StepInfo, clipped

StepRule = Literal["trust_region", "quadratic_model"]
Moves = dict[str, tuple[Tensor, float]]
"""Changes of the parameters by name: a tensor, and its factor."""
_BOUND = (
    'kl_clip binds and alone sets the length of a step (with quadratic="corrected" a schedule'
    " takes a part of that length)"
)


class KFAC(NamedOptimizer):
    """Natural gradient descent with Kronecker-factored curvature and a KL trust region.

    The curvature, and what every kind of layer gets, is that of :attr:`curvature`, a
    :class:`acktr.kfac.Preconditioner`, whose ``capture``, ``observe``, ``update_curvature`` and
    ``forget`` the optimizer has too. One update with one forward pass::

        with optimizer.capture() as captured:
            output = model(inputs)
        optimizer.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, targets).backward()
        optimizer.step()

    The update is U = (F + lambda)^-1 g, v <- m v + nu U, theta <- theta - lr (1 - mu) v (Martens &
    Grosse 2015; Wu et al. 2017, section 3.2). By default (``quadratic="corrected"``) nu and m <= mu
    keep the KL of the whole step within c / 2, by forms that are measured now and then. With
    "kronecker" and "exact" m is mu, and nu = min(1, sqrt(c / (lr^2 q))) with q = U^T F U bounds
    the step without momentum. With ``step_rule="quadratic_model"`` it is
    theta <- theta + alpha (-U) + mu delta_0, delta_0 the last change, where alpha and mu minimise
    the quadratic model with the exact Fisher of the observed batch (Martens & Grosse 2015, sections
    6.4 and 7); lr and momentum are then not used.

    Args:
        module: The network; its parameters are optimised.
        config: Settings; by default those of supervised learning, ``KFACConfig()``.
        known_fisher: Diagonal Fisher by parameter name, for parameters outside of layers.
        layers: How layers of one's own become rows, by their type.
        skip: Layers without a block of their own, see :class:`acktr.kfac.Preconditioner`.
        param_groups: As for every torch optimizer: dicts with "params" and any of "lr", "momentum",
            "weight_decay"; what they do not name stays as it is and may belong to another
            optimizer. Parameters of one layer belong to one group.
        step_rule: How long the step is, see above.
        adaptive: Levenberg-Marquardt adaptation of the damping; needs ``objective`` in
            :meth:`step`.
        maximize: Ascend the objective instead of descending it.
        decoupled_weight_decay: Shrink weights by theta <- (1 - lr weight_decay) theta at every step
            (Loshchilov & Hutter 2019), outside of gradient, damping and trust region.
        seed: Seed of the generator that sampled targets are drawn with.
        ranks: The processes that have the other shares of every batch, whose gradients are averaged
            before :meth:`step`; None for one process.
        settings: There are none: they belong into the config.

    Raises:
        ValueError: ``known_fisher`` names a parameter that does not exist, or a group or a rule for
            layers does not fit.
        TypeError: There is no such argument.
    """

    curvature: Preconditioner

    def __init__(
        self,
        module: nn.Module,
        config: KFACConfig | None = None,
        *,
        known_fisher: Mapping[str, float] | None = None,
        layers: Rules | None = None,
        skip: Skip = (),
        param_groups: Sequence[dict[str, Any]] | None = None,
        step_rule: StepRule = "trust_region",
        adaptive: LMConfig | None = None,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        seed: int = 0,
        ranks: Ranks | None = None,
        **settings: Never,
    ) -> None:
        refuse_settings(self, settings, KFACConfig)
        check_choice("step_rule", step_rule, get_args(StepRule))
        check_module(module)
        self.config = config or KFACConfig()
        self.step_rule = step_rule
        every = {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups = make_groups(every, self.config, listed(param_groups))
        self.curvature = Preconditioner(
            module,
            self.config,
            known_fisher=known_fisher,
            layers=layers,
            skip=skip,
            parameters=[p for g in groups for p in g["params"]] if param_groups else None,
            seed=seed,
            ranks=ranks,
        )
        self.capture = self.curvature.capture
        self.observe = self.curvature.observe
        self.update_curvature, self.forget = self.curvature.update_curvature, self.curvature.forget
        self.blocks, self.close = self.curvature.blocks, self.curvature.close
        self.extreme_eigenvalues = self.curvature.extreme_eigenvalues
        check_whole(groups, self.curvature.blocks)
        defaults = ("lr", "momentum", "weight_decay")
        options = {name: getattr(self.config, name) for name in defaults}
        super().__init__(groups, options)
        self.adaptive = adaptive
        if adaptive is not None:
            adaptive.check(self.config.damping)
        self.maximize = maximize
        self.decoupled_weight_decay = decoupled_weight_decay
        modelled, region = step_rule == "quadratic_model", self.curvature.region
        if decoupled_weight_decay and (modelled or adaptive is not None):
            raise ValueError(
                "decoupled_weight_decay is not part of the quadratic model: leave it out, or"
                " step_rule=quadratic_model and adaptive"
            )
        if modelled and isinstance(self.config.kl_clip, tuple):
            raise ValueError("a quadratic-model step takes one kl_clip, not one for each part")
        region.follow_all = region.follow_all or modelled or adaptive is not None
        if modelled:
            region.corrected = None  # its own form is exact
        self.last_step: StepInfo | None = None

    # --- what belongs to the curvature ------------------------------------------------------------

    @property
    def failures(self) -> int:
        """Failed decompositions so far, over all blocks."""
        return self.curvature.failures

    @property
    def damping(self) -> float:
        """The present damping lambda."""
        return self.curvature.damping

    def refresh(self) -> None:
        """Renew the decompositions now, see :meth:`Preconditioner.refresh`."""
        self.curvature.refresh(self._decay())

    # --- step -------------------------------------------------------------------------------------

    @property
    def observing(self) -> bool:
        """Whether batches are folded before the next step (``stat_interval``)."""
        return self.curvature.observing

    @property
    def needs_refresh(self) -> bool:
        """Whether the next step renews the decompositions."""
        return self._steps >= self.config.cold_steps and self.curvature.needs_refresh

    def _count(self, steps: int) -> None:
        super()._count(steps)
        self.curvature.cold = steps < self.config.cold_steps

    def _decay(self) -> dict[str, float]:
        """Weight decay by name that is part of the objective."""
        decay = self._each("weight_decay")
        return dict.fromkeys(decay, 0.0) if self.decoupled_weight_decay else decay

    def _gradients(self, decay: Mapping[str, float]) -> Named:
        """Gradients of what is minimised, weight decay included."""
        return self.curvature.gradients(decay, factor=-1.0 if self.maximize else 1.0)

    @torch.no_grad()
    def direction(self) -> Named:
        """U = (F + lambda)^-1 (g + weight decay) by parameter name, from the current gradients."""
        decay = self._decay()
        return self.curvature.direction(self._gradients(decay), decay)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        fisher_quadratic: FisherQuadratic | None = None,
        objective: Callable[[], Tensor] | None = None,
        outputs: Callable[[], Any] | None = None,
    ) -> Tensor | None:
        """Take one step.

        Args:
            closure: Optional re-evaluation of the loss, as for every torch optimizer.
            fisher_quadratic: d -> d^T F d with the exact Fisher: of the steps that
                ``quadratic="corrected"`` measures, with one ``kl_clip``, or of the update of
                ``quadratic="exact"``; without it the Fisher of the last observed batch is taken.
            objective: The loss on the batch of the gradient, at the present parameters, without
                weight decay; evaluated around the steps that adapt the damping, both times with the
                same random numbers, and without a trace in the generators or in buffers.
            outputs: The output that observe() was given, at the present parameters, such as
                ``lambda: model(inputs)``: evaluated before and after the step, with the random
                numbers of the observed pass, for ``last_step.spent_kl``.

        Raises:
            FactorError: A factor could not be decomposed ``max_failures`` times in a row.
            ValueError: An exact quadratic form, or the adaptation, has nothing to work with; or
                ``fisher_quadratic`` is of no use.
        """
        if fisher_quadratic is not None and not self._takes_forms:
            raise ValueError(
                'fisher_quadratic is of no use: it is for quadratic="exact", or "corrected" with'
                ' one kl_clip, and step_rule="trust_region"'
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not (self._steps or self.curvature.batches or any(self._each("lr").values())):
            self._fill_state()
            return loss
        if self._steps < self.config.cold_steps:
            self._cold_step()
        else:
            if self._steps == self.config.cold_steps:
                self._clear_momentum()
            spent = None if outputs is None else self.curvature.region.spending(outputs)
            self._natural_step(fisher_quadratic, objective)
            if spent is not None and self.last_step is not None:
                self.last_step = replace(self.last_step, spent_kl=spent())
            self.curvature.advance(None if self.last_step is None else self.last_step.quadratic)
        self._count(self._steps + 1)
        return loss

    @property
    def _takes_forms(self) -> bool:
        """Whether the trust region can do with exact forms of the caller's."""
        corrected = self.curvature.region.corrected
        one = corrected is not None and not corrected.separate
        return self.step_rule == "trust_region" and (self.config.quadratic == "exact" or one)

    def _natural_step(
        self,
        fisher_quadratic: FisherQuadratic | None,
        objective: Callable[[], Tensor] | None,
    ) -> None:
        """Refresh, direction, length, move; then the damping if it adapts after this step."""
        decay, rule, evaluate = self._decay(), self.adaptive, None
        if rule is not None and rule.due(self._steps - self.config.cold_steps):
            evaluate = adaptive_objective(self.curvature, objective, decay, self.maximize)
        self.curvature.prepare(decay)
        gradients = self._gradients(decay)
        step = self.curvature.direction(gradients, decay)
        if not step:
            return
        before = 0.0 if evaluate is None else evaluate()
        predicted = None
        if self.step_rule == "trust_region":
            moves, self.last_step = self._trust_region(gradients, step, fisher_quadratic)
            if evaluate is not None:
                change = {name: move * factor for name, (move, factor) in moves.items()}
                model = QuadraticModel.of(self.curvature, gradients, [change], decay)
                predicted = model.predicted(torch.ones_like(model.slopes))
        else:
            moves, self.last_step, predicted = self._quadratic_model(gradients, step)
        rates = self._each("lr") if self.decoupled_weight_decay else {}
        self._move(moves, rates, torch.isfinite(self.last_step.quadratic))
        if rule is not None and evaluate is not None and predicted is not None:
            rho = reduction_ratio(before, evaluate(), float(predicted))
            self.curvature.damping = rule.adapted(self.curvature.damping, rho)
            self.last_step = replace(self.last_step, rho=rho)

    def _trust_region(
        self, gradients: Named, step: Named, fisher_quadratic: FisherQuadratic | None
    ) -> tuple[Moves, StepInfo]:
        """V <- mu v + nu U; the parameters are to move by -lr (1 - mu) v."""
        rates, momenta = self._each("lr"), self._each("momentum")
        lr = max(rates.values())
        if lr > 0 and any(rate != lr for rate in rates.values()):
            step = {name: update * (rates[name] / lr) for name, update in step.items()}
            gradients = {name: gradients[name] * (rates[name] / lr) for name in step}
        # A group whose lr is 0 stands still, momentum included, which decays meanwhile.
        still = {name for name in step if rates[name] == 0 < lr}
        velocities = {n: v for n, v in self._velocities(step).items() if n not in still}
        full = max(lr, self._full_lr())
        proposal = Proposal(gradients, step, velocities, momenta, lr, full)
        region = self.curvature.region
        fit = region.fit(proposal, self.curvature.turn, fisher_quadratic)
        if region.corrected is None and self.config.kl_clip is not None:
            self._warn_schedule(_BOUND, fit.info.scale)
        moving = {n: velocities[n] if n in velocities else self._momentum(n) for n in step}
        fit.accelerate(moving, momenta)
        moves = {n: (v, 0.0 if n in still else -lr * (1 - momenta[n])) for n, v in moving.items()}
        return moves, fit.info

    def _quadratic_model(self, gradients: Named, step: Named) -> tuple[Moves, StepInfo, Tensor]:
        """The best combination of -U and the last change, and what the model predicts of it."""
        ahead = {name: -update for name, update in step.items()}
        last = self._velocities(step)
        vectors = [ahead, last] if last else [ahead]
        self._warn_schedule('step_rule="quadratic_model" finds the length of a step itself')
        model = QuadraticModel.of(self.curvature, gradients, vectors, self._decay())
        assert not isinstance(self.config.kl_clip, tuple)
        change, info, predicted = model_step(model, vectors, self.config.kl_clip)
        moves = {name: (moved, 1.0) for name, moved in change.items()}
        for name, (moved, _) in moves.items():
            self.state[self._named[name]]["momentum"] = moved
        return moves, info, predicted

    def _cold_step(self) -> None:
        """SGD with momentum and a clipped gradient."""
        gradients = self._gradients(self._decay())
        if not gradients:
            return
        updates, norm = clipped(gradients, self.config.cold_max_grad_norm)
        rates, momenta = self._each("lr"), self._each("momentum")
        largest = max(rates.values())
        rates = {n: self.config.cold_lr * (r / largest if largest else 0) for n, r in rates.items()}
        moves = {
            name: (self._momentum(name).mul_(momenta[name]).add_(update), -rates[name])
            for name, update in updates.items()
        }
        self._move(moves, rates, torch.isfinite(norm))
        zero = torch.zeros_like(norm)
        self.last_step = StepInfo(zero, torch.ones_like(norm), zero)

    def _move(self, moves: Moves, rates: Mapping[str, float], finite: Tensor) -> None:
        """Shrink the weights if decay is decoupled, and move parameters; if the step is finite."""
        on_cpu = finite.device.type == "cpu"  # where no number has to be waited for
        if on_cpu and not finite.tolist():
            return
        decay = self._each("weight_decay") if self.decoupled_weight_decay else {}
        for name in decay.keys() & moves.keys() & self.curvature.weights:
            if shrink := rates[name] * decay[name]:
                weight = self._named[name]
                weight.sub_(weight * shrink * finite)
        parameters: list[Tensor] = [self._named[name] for name in moves]
        tensors, factors = zip(*moves.values(), strict=True)
        if not on_cpu:
            tensors = torch._foreach_mul(tensors, finite.to(tensors[0].dtype))
        if len(set(factors)) == 1:
            torch._foreach_add_(parameters, tensors, alpha=factors[0])
            return
        for parameter, move, factor in zip(parameters, tensors, factors, strict=True):
            parameter.add_(move, alpha=factor)

    def _fill_state(self) -> None:
        """Zero momentum: torch.distributed.checkpoint makes states by a first step of length 0."""
        for name in self.curvature.gradients(self._decay()):
            self._momentum(name).zero_()

    # --- state ------------------------------------------------------------------------------------

    def _check_own(self, state: Mapping[str, Any]) -> None:
        super()._check_own(state)
        if self.adaptive is not None:
            self.adaptive.check(state["curvature"]["damping"])
