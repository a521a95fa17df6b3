"""Variational posteriors of weights from the curvature: noisy K-FAC.

In come a module and its losses, as for :class:`acktr.kfac.KFAC`; out go steps of the mean, samples
of the weights, and what they predict. It stands on everything of ``acktr.kfac``.
"""

from acktr.kfac.noisy.config import NoisyConfig
from acktr.kfac.noisy.mean_field import BayesByBackprop
from acktr.kfac.noisy.optimizer import NoisyKFAC
from acktr.kfac.noisy.precision import NoisePrecision, gaussian_log_prob

__all__ = ["BayesByBackprop", "NoisePrecision", "NoisyConfig", "NoisyKFAC", "gaussian_log_prob"]
