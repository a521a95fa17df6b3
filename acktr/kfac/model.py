"""The quadratic model of the objective along a few directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acktr.kfac.fisher.products import fisher_gram, inner_products
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.quadratic import model_change, solve_step
from acktr.kfac.statistics.inputs import Inputs, repeatable

Named = dict[str, Tensor]


@dataclass(frozen=True)
class QuadraticModel:
    """M(c) = slopes . c + 1/2 c^T (fisher + decay + damping) c along k directions.

    The Fisher is the exact one of a batch (Martens & Grosse 2015, section 6.4); all matrices are
    (k, k). Weight decay acts on weight matrices only, damping on everything.
    """

    slopes: Tensor
    fisher: Tensor
    decay: Tensor
    damping: Tensor

    @classmethod
    def of(
        cls,
        curvature: Preconditioner,
        gradients: Named,
        vectors: Sequence[Named],
        decay: Mapping[str, float],
        inputs: tuple[Any, ...] | None = None,
    ) -> QuadraticModel:
        """The model at the present parameters.

        Args:
            curvature: Gives the module, the observed loss and batch, and lambda.
            gradients: Gradient of the objective, weight decay included.
            vectors: The directions.
            decay: Weight decay by parameter name.
            inputs: Positional inputs of the Fisher's batch; by default the observed ones.

        Raises:
            ValueError: Nothing was observed with a loss, or the module itself was not called.
        """
        observed = curvature.observed
        if observed is None:
            raise ValueError("the quadratic model needs observe() with a loss before the step")
        found = observed.inputs if inputs is None else Inputs.of(inputs)
        loss, module = observed.loss, curvature.module
        fisher = fisher_gram(module, found.args, loss, vectors, kwargs=found.kwargs)
        scaled = [
            {
                n: v * decay[n] if n in curvature.weights else torch.zeros_like(v)
                for n, v in u.items()
            }
            for u in vectors
        ]
        return cls(
            inner_products([gradients], vectors)[0].to(fisher.dtype),
            fisher,
            inner_products(scaled, vectors).to(fisher.dtype),
            curvature.damping * inner_products(vectors, vectors).to(fisher.dtype),
        )

    def minimum(self) -> Tensor:
        """The coefficients c (k,) that minimise M."""
        return solve_step(self.fisher + self.decay + self.damping, self.slopes)

    def predicted(self, coefficients: Tensor) -> Tensor:
        """Change of the objective that the model predicts, its damping term left out."""
        return model_change(self.fisher + self.decay, self.slopes, coefficients)


def adaptive_objective(
    curvature: Preconditioner,
    objective: Callable[[], Tensor] | None,
    decay: Mapping[str, float],
    inputs: tuple[Any, ...] | None,
) -> Callable[[], float]:
    """The loss with its weight decay, for evaluations before and after a step.

    All evaluations draw the same random numbers (dropout); they leave the caller's random stream
    and the module's buffers alone.

    Args:
        curvature: Gives the module, what was observed, and the parameters that decay.
        objective: The loss at the present parameters.
        decay: Weight decay by parameter name.
        inputs: Inputs of the quadratic model, if not the observed ones.

    Raises:
        ValueError: The adaptation of the damping has nothing to work with.
    """
    if objective is None:
        raise ValueError("adaptive damping needs objective in step()")
    if curvature.observed is None:
        raise ValueError("adaptive damping needs observe() with a loss before the step")
    if inputs is None:
        _ = curvature.observed.inputs
    loss = objective

    def evaluate() -> float:
        total = loss().detach().double()
        for name, rate in decay.items():
            if rate and name in curvature.weights:
                total = total + 0.5 * rate * curvature.named[name].double().square().sum()
        return float(total)

    return repeatable(curvature.module, evaluate)
