"""ACKTR: actor-critic with Kronecker-factored trust regions (Wu et al. 2017), in PyTorch."""

from acktr.api import ACKTR
from acktr.checkpoint import CheckpointError
from acktr.config import ACKTRConfig, Config, ConfigError, NetworkConfig
from acktr.kfac import KFAC, KFACConfig
from acktr.presets import preset
from acktr.train import Episode, TrainStats
from envs import AtariSettings, EnvError, EnvFault

__version__ = "0.1.0"

__all__ = [
    "ACKTR",
    "KFAC",
    "ACKTRConfig",
    "AtariSettings",
    "CheckpointError",
    "Config",
    "ConfigError",
    "EnvError",
    "EnvFault",
    "Episode",
    "KFACConfig",
    "NetworkConfig",
    "TrainStats",
    "preset",
]
