"""What the contexts of one step of noisy K-FAC add up to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from acktr.kfac.tensors import wide


class Contexts:
    """The gradients and the noise of the contexts since the last step.

    Contexts are weight samples or micro-batches. Each counts in the means as many times as it has
    loss terms, as it does in the statistics; one that was not observed counts as the one before it,
    and one without a gradient not at all.

    Args:
        named: The parameters by name.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._named = named
        self.forget()

    def forget(self) -> None:
        """Begin a step anew."""
        self.count = 0
        """Contexts with a gradient."""
        self.observed = False
        """Whether there are statistics of a context."""
        self._gradients: dict[str, Tensor] = {}
        self._noise: dict[str, Tensor] = {}
        self._total = 0.0
        self._share, self._unit = 1.0, 0.0
        self._terms = 0.0

    def observe(self, terms: float | None) -> None:
        """Count the loss terms of an observation of the open context; None if not known."""
        self.observed = True
        self._terms += terms or 0.0

    def close(self, noise: Mapping[str, Tensor]) -> None:
        """Take the noise of a context that ends, and its gradients; ``grad`` is then the mean.

        Args:
            noise: w - mu by name.
        """
        given = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        if self._terms > 0:
            # Beside the first one, so that equal contexts count as exactly 1.
            self._unit = self._unit or self._terms
            self._share = self._terms / self._unit
        self._terms = 0.0
        if given:
            self.count += 1
            self._total += self._share
            self._add(self._gradients, given)
            self._add(self._noise, noise)
        if self.count > 1 or not given:
            for name, total in self._gradients.items():
                parameter = self._named[name]
                parameter.grad = (total / self._total).to(parameter.dtype)

    def noise(self, name: str) -> Tensor | None:
        """The mean of a parameter's noise; None without any."""
        total = self._noise.get(name)
        return None if total is None else (total / self._total).to(self._named[name].dtype)

    def _add(self, totals: dict[str, Tensor], parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            summand = wide(part) if self._share == 1 else wide(part) * self._share
            before = totals.get(name)
            if before is not None:
                totals[name] = before + summand
            else:  # the module's own gradient may be set to zero in place
                totals[name] = summand.clone() if summand is self._named[name].grad else summand
