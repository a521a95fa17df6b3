"""ACKTR: actor-critic with Kronecker-factored trust regions (Wu et al. 2017), in PyTorch."""

from acktr.api import A2C, ACKTR, TRPO
from acktr.checkpoint import CheckpointError
from acktr.config import (
    A2CConfig,
    ACKTRConfig,
    Config,
    ConfigError,
    CriticConfig,
    NetworkConfig,
    TRPOConfig,
)
from acktr.kfac import KFAC, KFACConfig
from acktr.presets import preset
from acktr.train import Episode, TrainStats
from envs import AtariSettings, EnvError, EnvFault

__version__ = "0.1.0"

__all__ = [
    "A2C",
    "ACKTR",
    "KFAC",
    "TRPO",
    "A2CConfig",
    "ACKTRConfig",
    "AtariSettings",
    "CheckpointError",
    "Config",
    "ConfigError",
    "CriticConfig",
    "EnvError",
    "EnvFault",
    "Episode",
    "KFACConfig",
    "NetworkConfig",
    "TRPOConfig",
    "TrainStats",
    "preset",
]
