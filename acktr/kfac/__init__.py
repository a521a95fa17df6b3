"""Kronecker-factored approximate curvature, usable without any reinforcement learning."""

from acktr.kfac.capture import Capture, capture
from acktr.kfac.config import KFACConfig
from acktr.kfac.kronecker import KroneckerBlock
from acktr.kfac.linalg import FactorError, symmetric_eigen, trust_scale
from acktr.kfac.losses import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    SumLoss,
)
from acktr.kfac.optimizer import KFAC
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.products import dense_fisher, fisher_gram, fisher_vector_product
from acktr.kfac.quadratic import LMConfig
from acktr.kfac.registry import UnsupportedParameterWarning
from acktr.kfac.sources import Empirical, Exact, Sampled
from acktr.kfac.trust import StepInfo

__all__ = [
    "KFAC",
    "BernoulliLoss",
    "Capture",
    "CategoricalLoss",
    "Empirical",
    "Exact",
    "FactorError",
    "GaussianLoss",
    "KFACConfig",
    "KroneckerBlock",
    "LMConfig",
    "LearntGaussianLoss",
    "OutputLoss",
    "Preconditioner",
    "Sampled",
    "StepInfo",
    "SumLoss",
    "UnsupportedParameterWarning",
    "capture",
    "dense_fisher",
    "fisher_gram",
    "fisher_vector_product",
    "symmetric_eigen",
    "trust_scale",
]
