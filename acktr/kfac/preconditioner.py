"""K-FAC in front of any torch optimizer."""

from __future__ import annotations

import math

import torch

from acktr.kfac.corrected import Proposal
from acktr.kfac.curvature import Curvature
from acktr.kfac.fisher.observed import Observed
from acktr.kfac.trust import StepInfo


class Preconditioner(Curvature):
    """Kronecker-factored curvature in front of any torch optimizer.

    Its arguments, and what every kind of layer gets, are those of the curvature. One step::

        with curvature.capture() as captured:
            output = model(inputs)
        curvature.observe(captured, output, loss)
        optimizer.zero_grad()
        loss(output, targets).backward()
        curvature.precondition(lr=0.1)  # the optimizer's, or the largest of its schedule
        optimizer.step()
    """

    @property
    def observed(self) -> Observed | None:
        """The last observed pass, without its graph after the step."""
        return self.region.observed

    @torch.no_grad()
    def precondition(
        self,
        *,
        lr: float,
        momentum: float = 0.0,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> StepInfo | None:
        """Replace every gradient by nu U, which the torch optimizer then steps along.

        Args:
            lr: The optimizer's step size, which the trust region must know. While the radius binds,
                a schedule cannot shorten steps that know of it: where there is one give its largest
                step size, so that it takes its part of them.
            momentum: The optimizer's momentum, which makes its steps up to 1 / (1 - momentum) as
                long.
            grad_scaler: The scaler of gradients that its ``unscale_`` has not divided by the loss
                scale yet; they stay scaled, for its ``step``.

        Returns:
            What was done; None without any gradient.

        Raises:
            FactorError: As :meth:`prepare`.
            ValueError: lr or momentum is out of range, an exact quadratic form has nothing to
                work with, or the gradients are preconditioned already.
        """
        if not (0 <= lr < math.inf and 0 <= momentum < 1):
            raise ValueError(f"lr must be >= 0 and momentum in [0, 1), got {lr!r} and {momentum!r}")
        self._guard.check_new()
        self.prepare()
        loss_scale = 1.0 if grad_scaler is None else float(grad_scaler.get_scale())
        gradients = self.gradients(factor=1 / loss_scale)
        step = self.direction(gradients)
        info = None
        if step:
            none = dict.fromkeys(step, 0.0)  # a step of the other optimizer's is of U alone
            longest = lr / (1 - momentum)
            fit = self.region.fit(
                Proposal(gradients, step, {}, none, longest, full=longest), self.turn
            )
            info = fit.info
            for name, update in fit.updates().items():
                if grad_scaler is not None:  # NaN is what makes it skip a step and scale less
                    valid = torch.isfinite(info.quadratic).all()
                    update = torch.where(valid, update * loss_scale, torch.nan)
                grad = self.named[name].grad
                assert grad is not None
                if grad.is_sparse:
                    self.named[name].grad = update
                else:
                    grad.copy_(update)
            self._guard.keep(step, scaled=grad_scaler is not None)
        self.advance(None if info is None else info.quadratic)
        return info
