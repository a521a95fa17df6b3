"""Training on all splits at once, and what is measured at its end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from acktr.kfac import FactorError, NoisePrecision, gaussian_log_prob
from scripts.bayes.data import Splits
from scripts.bayes.methods import PAPER, Method, Rates, Trained, make

TEST_SAMPLES = 100
_TRAIN_SAMPLES = 10
_PRECISION_DECAY = 0.99


@dataclass(frozen=True)
class Budget:
    """How long and on what a method is trained."""

    epochs: int
    batch: int
    hidden: int
    noise_prior: tuple[float, float]
    """Shape and rate of the prior of the noise precision."""
    seed: int

    def steps(self, splits: Splits) -> int:
        """Steps in all; a last batch that is not full is left out of every epoch."""
        return self.epochs * (splits.data_size // self.batch)


@dataclass(frozen=True)
class Score:
    """What a method reached on one split."""

    split: int
    rmse: float
    """Root mean squared error of the mean prediction on the test part, in the target's units."""
    log_likelihood: float
    """Mean log density of a test target, in its units, nats."""
    train_rmse: float
    """That of the training part, with fewer samples of the weights."""
    noise: float
    """Standard deviation 1 / sqrt(E tau) of the noise in the target's units."""

    @property
    def finite(self) -> bool:
        """Whether training went well."""
        return math.isfinite(self.rmse) and math.isfinite(self.log_likelihood)


class Training:
    """One method on all splits of a data set.

    Args:
        method: Its name.
        splits: The data.
        budget: How long, and the networks.
        rates: Of noisy K-FAC.
    """

    def __init__(
        self, method: Method, splits: Splits, budget: Budget, rates: Rates = PAPER
    ) -> None:
        self.splits, self.budget = splits, budget
        self.networks: Trained = make(method, splits, budget.hidden, budget.seed, rates)
        shape, rate = budget.noise_prior
        self.precision = NoisePrecision(
            splits.data_size,
            splits.count,
            prior_shape=shape,
            prior_rate=rate,
            decay=_PRECISION_DECAY,
            seed=budget.seed,
        )
        self._shuffle = torch.Generator().manual_seed(budget.seed)
        self.step = self.epochs = 0

    def epoch(self) -> None:
        """Take all data once, in an order of its own for every split.

        From half time on steps have a tenth of their size.
        """
        if self.epochs == (self.budget.epochs + 1) // 2 > 0:
            self.networks.slow(0.1)
        self.epochs += 1
        splits, batch = self.splits, self.budget.batch
        order = torch.rand(splits.y_train.shape, generator=self._shuffle).argsort(0)
        x = splits.x_train.gather(0, order[..., None].expand_as(splits.x_train))
        y = splits.y_train.gather(0, order)
        for start in range(0, len(y) - batch + 1, batch):
            rows = slice(start, start + batch)
            root = self.precision.sample().sqrt()
            output = self.networks.update(x[rows], y[rows], root)
            self.precision.observe(output, y[rows])
            self.step += 1

    @torch.no_grad()
    def scores(self) -> list[Score]:
        """What is reached, split by split."""
        splits = self.splits
        outputs = self.networks.predict(splits.x_test, TEST_SAMPLES)
        precisions = torch.stack([self.precision.sample() for _ in range(TEST_SAMPLES)])
        errors = outputs.mean(0) - splits.y_test
        likelihood = predictive_log_likelihood(outputs, splits.y_test, precisions)
        fitted = self.networks.predict(splits.x_train, _TRAIN_SAMPLES).mean(0) - splits.y_train
        columns = (
            errors.square().mean(0).sqrt() * splits.scale,
            likelihood.mean(0) - splits.scale.log(),
            fitted.square().mean(0).sqrt() * splits.scale,
            self.precision.mean().rsqrt() * splits.scale,
        )
        numbers = torch.stack(columns, 1).tolist()
        return [Score(split, *row) for split, row in enumerate(numbers)]


def predictive_log_likelihood(outputs: Tensor, target: Tensor, precisions: Tensor) -> Tensor:
    """Log of the mean over samples of N(y; f, 1 / tau), (N, S).

    Args:
        outputs: f, (samples, N, S).
        target: y, (N, S).
        precisions: tau, (samples, S), one for every sample of the weights.
    """
    log_prob = gaussian_log_prob(outputs, target, precisions[:, None])
    return torch.logsumexp(log_prob, 0) - math.log(len(outputs))


def train(
    method: Method, splits: Splits, budget: Budget, report: Callable[[float], None]
) -> tuple[list[Score], float]:
    """Train a method.

    Args:
        method: Its name.
        splits: The data.
        budget: How long.
        report: Takes the steps that are made.

    Returns:
        Scores of all splits, which are NaN if it broke down, and the processor's seconds per step.
    """
    training, began = Training(method, splits, budget), time.process_time()
    try:
        for _ in range(budget.epochs):
            training.epoch()
            report(training.step)
        seconds = (time.process_time() - began) / max(training.step, 1)
        return training.scores(), seconds
    except FactorError:
        lost = [Score(split, *(math.nan,) * 4) for split in range(splits.count)]
        return lost, math.nan
