"""ACKTR: actor-critic with Kronecker-factored trust regions (Wu et al. 2017), in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acktr.agent import A2C, ACKTR, TRPO
    from acktr.config import (
        A2CConfig,
        ACKTRConfig,
        Config,
        ConfigError,
        CriticConfig,
        NetworkConfig,
        TRPOConfig,
    )
    from acktr.envs import AtariSettings, EnvError, EnvFault
    from acktr.kfac import KFAC, KFACConfig
    from acktr.presets import preset
    from acktr.runs.checkpoint import CheckpointError
    from acktr.train import Episode, TrainStats

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

_HOMES = {
    "A2C": "acktr.agent",
    "A2CConfig": "acktr.config",
    "ACKTR": "acktr.agent",
    "ACKTRConfig": "acktr.config",
    "AtariSettings": "acktr.envs",
    "CheckpointError": "acktr.runs.checkpoint",
    "Config": "acktr.config",
    "ConfigError": "acktr.config",
    "CriticConfig": "acktr.config",
    "EnvError": "acktr.envs",
    "EnvFault": "acktr.envs",
    "Episode": "acktr.train",
    "KFAC": "acktr.kfac",
    "KFACConfig": "acktr.kfac",
    "NetworkConfig": "acktr.config",
    "TRPO": "acktr.agent",
    "TRPOConfig": "acktr.config",
    "TrainStats": "acktr.train",
    "preset": "acktr.presets",
}
"""Where each name lies; they are imported when they are first asked for, as torch takes seconds."""


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__``."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    """What is there, imported or not."""
    return sorted({*globals(), *__all__})
