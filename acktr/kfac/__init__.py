"""Kronecker-factored approximate curvature, usable without any reinforcement learning."""

from acktr.kfac.blocks import KroneckerBlock
from acktr.kfac.capture import Capture, capture
from acktr.kfac.config import KFACConfig
from acktr.kfac.linalg import FactorError, symmetric_eigen, trust_scale
from acktr.kfac.optimizer import KFAC, StepInfo, UnsupportedParameterWarning

__all__ = [
    "KFAC",
    "Capture",
    "FactorError",
    "KFACConfig",
    "KroneckerBlock",
    "StepInfo",
    "UnsupportedParameterWarning",
    "capture",
    "symmetric_eigen",
    "trust_scale",
]
