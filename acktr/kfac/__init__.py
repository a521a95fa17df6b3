"""Kronecker-factored approximate curvature, usable without any reinforcement learning."""

from acktr.kfac.blocks.kronecker import KroneckerBlock
from acktr.kfac.blocks.registry import LargeFactorWarning, UnsupportedParameterWarning
from acktr.kfac.blocks.remote import serve
from acktr.kfac.blocks.replicas import Replicas
from acktr.kfac.blocks.rules import LayerRule
from acktr.kfac.channel import RankError
from acktr.kfac.clock import Stopwatch
from acktr.kfac.config import KFACConfig, SmallParameters, Structure
from acktr.kfac.dense import (
    KFACError,
    curved_names,
    dense_inverse,
    dense_kfac,
    kfac_error,
    relative_error,
)
from acktr.kfac.fisher.flat import flattened, unflattened
from acktr.kfac.fisher.linearized import Linearized, Metric
from acktr.kfac.fisher.products import (
    dense_fisher,
    fisher_gram,
    fisher_vector_product,
    output_tangents,
)
from acktr.kfac.guard import NoStatisticsWarning
from acktr.kfac.linalg import FactorError, fill_bound, symmetric_eigen
from acktr.kfac.losses.base import Likelihood
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
)
from acktr.kfac.losses.sources import Empirical, Exact, Sampled
from acktr.kfac.losses.sums import SumLoss
from acktr.kfac.noisy import (
    BayesByBackprop,
    NoisePrecision,
    NoisyConfig,
    NoisyKFAC,
    gaussian_log_prob,
)
from acktr.kfac.optimizer import KFAC
from acktr.kfac.preconditioner import Preconditioner
from acktr.kfac.quadratic import LMConfig
from acktr.kfac.ranks import Ranks, bits_of, processes
from acktr.kfac.statistics.capture import Capture, capture, sample_rows
from acktr.kfac.trust import FisherQuadratic, StepInfo, trust_scale

__all__ = [
    "KFAC",
    "BayesByBackprop",
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
    "FisherQuadratic",
    "Gaussian",
    "GaussianLoss",
    "KFACConfig",
    "KFACError",
    "KroneckerBlock",
    "LMConfig",
    "LargeFactorWarning",
    "LayerRule",
    "LearntGaussianLoss",
    "Likelihood",
    "Linearized",
    "Metric",
    "MultiCategorical",
    "NoStatisticsWarning",
    "NoisePrecision",
    "NoisyConfig",
    "NoisyKFAC",
    "OutputLoss",
    "Preconditioner",
    "RankError",
    "Ranks",
    "Replicas",
    "Sampled",
    "SmallParameters",
    "StepInfo",
    "Stopwatch",
    "Structure",
    "SumLoss",
    "UnsupportedParameterWarning",
    "bits_of",
    "capture",
    "curved_names",
    "dense_fisher",
    "dense_inverse",
    "dense_kfac",
    "fill_bound",
    "fisher_gram",
    "fisher_vector_product",
    "flattened",
    "gaussian_log_prob",
    "kfac_error",
    "output_tangents",
    "processes",
    "relative_error",
    "sample_rows",
    "serve",
    "symmetric_eigen",
    "trust_scale",
    "unflattened",
]
