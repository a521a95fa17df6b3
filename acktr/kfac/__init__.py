"""Kronecker-factored approximate curvature, usable without any reinforcement learning."""

from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.registry import UnsupportedParameterWarning
from acktr.kfac.config import KFACConfig
from acktr.kfac.dense import (
    FisherOperator,
    KFACError,
    curved_names,
    dense_inverse,
    dense_kfac,
    flattened,
    kfac_error,
    relative_error,
    unflattened,
)
from acktr.kfac.fisher.linearized import Linearized, Metric
from acktr.kfac.fisher.products import (
    dense_fisher,
    fisher_gram,
    fisher_vector_product,
    output_tangents,
)
from acktr.kfac.linalg import FactorError, symmetric_eigen, trust_scale
from acktr.kfac.losses.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    Gaussian,
    MultiCategorical,
)
from acktr.kfac.losses.likelihoods import (
    BernoulliLoss,
    CategoricalLoss,
    GaussianLoss,
    LearntGaussianLoss,
    OutputLoss,
    SumLoss,
)
from acktr.kfac.losses.sources import Empirical, Exact, Sampled
from acktr.kfac.optimizer import KFAC
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.quadratic import LMConfig
from acktr.kfac.statistics.capture import Capture, capture
from acktr.kfac.trust import FisherQuadratic, StepInfo

__all__ = [
    "KFAC",
    "Bernoulli",
    "BernoulliLoss",
    "Capture",
    "Categorical",
    "CategoricalLoss",
    "DiagonalGaussian",
    "Distribution",
    "Empirical",
    "Exact",
    "FactorError",
    "FisherOperator",
    "FisherQuadratic",
    "Gaussian",
    "GaussianLoss",
    "KFACConfig",
    "KFACError",
    "KroneckerBlock",
    "LMConfig",
    "LearntGaussianLoss",
    "Linearized",
    "Metric",
    "MultiCategorical",
    "OutputLoss",
    "Preconditioner",
    "Sampled",
    "StepInfo",
    "SumLoss",
    "UnsupportedParameterWarning",
    "capture",
    "curved_names",
    "dense_fisher",
    "dense_inverse",
    "dense_kfac",
    "fisher_gram",
    "fisher_vector_product",
    "flattened",
    "kfac_error",
    "output_tangents",
    "relative_error",
    "symmetric_eigen",
    "trust_scale",
    "unflattened",
]
