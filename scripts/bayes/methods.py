"""The methods: networks of all splits at once, each with the same steps, noise and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from acktr.kfac import BayesByBackprop, GaussianLoss, NoisyConfig, NoisyKFAC, Replicas
from scripts.bayes.data import Splits

Method = Literal["bbb", "ffg", "mvg-factored", "mvg", "emvg", "dropout"]
METHODS: tuple[Method, ...] = get_args(Method)

DROPOUT = 0.05
"""Probability of dropout before both layers; the grid of Gal's code has .005, .01, .05 and .1."""
ADAM_LR = 1e-3


class Rates(NamedTuple):
    """How fast noisy K-FAC moves."""

    lr: float
    """Step size of the mean."""
    stat_decay: float
    """Decay of the curvature from one of its batches, every second, to the next."""


PAPER = Rates(0.01, 0.998)
"""0.01 for the mean, and 0.001 a step for the curvature."""
SHORT = Rates(0.05, 0.98)
"""Those of some thousand steps; with the paper's the curvature has not settled by then."""
_NOISY = NoisyConfig(momentum=0.9, stat_interval=2, refresh_interval=20)
"""With the prior N(0, 1)."""
_CONFIGS = {
    "ffg": replace(_NOISY, structure="ffg"),
    "mvg-factored": replace(_NOISY, damping_form="factored"),
    "mvg": _NOISY,
    # Variances begin at each refresh as 100 batches of the factors' products: fifty batches on one
    # basis make a third of them measured ones (the paper's own code begins anew every 50 steps).
    "emvg": replace(_NOISY, structure="emvg", refresh_interval=100),
}

Loss = GaussianLoss()
"""The mean over a batch of half the squared error, summed over splits."""


class Regressor(nn.Module):
    """S networks with one hidden layer of ReLU: inputs (N, S, D), outputs (N, S).

    Args:
        count: S.
        inputs: D.
        hidden: Width of the hidden layer.
        dropout: Probability of dropout before both layers; 0 is none.
        seed: Of the weights, which begin as Xavier's normal ones.
    """

    def __init__(self, count: int, inputs: int, hidden: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.first, self.second = Replicas(count, inputs, hidden), Replicas(count, hidden, 1)
        self.dropout = nn.Dropout(dropout) if dropout else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.first, self.second):
                _, out, into = layer.weight.shape
                layer.weight.normal_(0, (2 / (into + out)) ** 0.5, generator=generator)
                assert layer.bias is not None
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The outputs."""
        hidden = self.first(x if self.dropout is None else self.dropout(x)).relu()
        hidden = hidden if self.dropout is None else self.dropout(hidden)
        output: Tensor = self.second(hidden)[..., 0]
        return output


class Trained(Protocol):
    """Networks of all splits that are trained by one method."""

    @property
    def posterior(self) -> NoisyKFAC | BayesByBackprop:
        """The distribution of the weights; dropout has none."""

    def update(self, x: Tensor, y: Tensor, root: Tensor) -> Tensor:
        """Make a step on a batch, (B, S, D) and (B, S), at noise of the precision root^2 (S,).

        Returns:
            The outputs (B, S) at the sampled weights.
        """

    def slow(self, factor: float) -> None:
        """Multiply the step size."""

    def predict(self, x: Tensor, samples: int) -> Tensor:
        """Outputs (samples, N, S) at samples of the weights, (N, S, D)."""


class Noisy:
    """Noisy K-FAC."""

    def __init__(self, model: nn.Module, config: NoisyConfig, data_size: int, seed: int) -> None:
        self.model = model
        self.posterior = NoisyKFAC(model, config, data_size=data_size, seed=seed)
        self.predict = self.posterior.predict

    def update(self, x: Tensor, y: Tensor, root: Tensor) -> Tensor:
        """See :class:`Trained`; the precision is inside of the Fisher, by scaled outputs."""
        optimizer = self.posterior
        with optimizer.sampled_params(train=True) as captured:
            output: Tensor = self.model(x)
            scaled = output * root
            optimizer.observe(captured, scaled, Loss)
            Loss(scaled, y * root).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return output.detach()

    def slow(self, factor: float) -> None:
        """See :class:`Trained`."""
        self.posterior.lr *= factor


class ByAdam:
    """A network that is random by itself, trained by Adam on its loss and a penalty.

    Args:
        network: It; a forward pass is one sample of its noise.
        penalty: What is added to the mean loss.
    """

    def __init__(self, network: nn.Module, penalty: Callable[[], Tensor]) -> None:
        self._network, self._penalty = network, penalty
        self._optimizer = torch.optim.Adam(network.parameters(), ADAM_LR)

    @property
    def posterior(self) -> BayesByBackprop:
        """See :class:`Trained`."""
        assert isinstance(self._network, BayesByBackprop)
        return self._network

    def update(self, x: Tensor, y: Tensor, root: Tensor) -> Tensor:
        """See :class:`Trained`."""
        output: Tensor = self._network(x)
        loss = Loss(output * root, y * root) + self._penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._optimizer.zero_grad()
        return output.detach()

    def slow(self, factor: float) -> None:
        """See :class:`Trained`."""
        for group in self._optimizer.param_groups:
            group["lr"] *= factor

    @torch.no_grad()
    def predict(self, x: Tensor, samples: int) -> Tensor:
        """See :class:`Trained`; a module's own way, or else by passes through it."""
        if isinstance(self._network, BayesByBackprop):
            return self._network.predict(x, samples)
        return torch.stack([self._network(x) for _ in range(samples)])


def dropout_penalty(model: nn.Module, data_size: int) -> Tensor:
    """[(1 - p) ||W||^2 + ||b||^2] / 2N, for MC dropout (Gal & Ghahramani 2016) and a N(0, 1) prior.

    W are the weights behind dropout of the probability p.
    """
    kept = {"weight": 1 - DROPOUT, "bias": 1.0}
    squares = [
        kept[name.rpartition(".")[2]] * p.square().sum() for name, p in model.named_parameters()
    ]
    return torch.stack(squares).sum() / (2 * data_size)


def settings(method: Method, rates: Rates = PAPER) -> dict[str, Any]:
    """All that a method is, apart from the networks, the noise precision and the budget."""
    if method in _CONFIGS:
        return asdict(_config(method, rates))
    return {"lr": ADAM_LR, **({"dropout": DROPOUT} if method == "dropout" else {"local": True})}


def _config(method: Method, rates: Rates) -> NoisyConfig:
    return replace(_CONFIGS[method], lr=rates.lr, stat_decay=rates.stat_decay)


def make(method: Method, splits: Splits, hidden: int, seed: int, rates: Rates = PAPER) -> Trained:
    """Networks for all splits, and how they are trained."""
    dropout = DROPOUT if method == "dropout" else 0.0
    model = Regressor(splits.count, splits.inputs, hidden, dropout, seed)
    if method == "dropout":
        torch.manual_seed(seed)  # dropout takes no generator
        return ByAdam(model, lambda: dropout_penalty(model, splits.data_size))
    if method == "bbb":
        posterior = BayesByBackprop(model, data_size=splits.data_size, local=True, seed=seed)
        return ByAdam(posterior, posterior.penalty)
    return Noisy(model, _config(method, rates), splits.data_size, seed)
