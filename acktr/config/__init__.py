"""Configurations: an environment's name, or a file of settings, in; a frozen, checked one out.

Presets, settings as dataclasses with limits in their types, and what earlier versions wrote.
May import: acktr.kfac, acktr.envs, acktr.files.
"""

from acktr.config.network import Activation, NetworkConfig, Trunk
from acktr.config.presets import ALGOS, PRESETS, PUBLISHED, has_own, known_presets, preset
from acktr.config.rates import LearningRate, rate_at, with_learning_rate
from acktr.config.schema import ConfigError, JsonObject, build, overlay
from acktr.config.settings import (
    A2CConfig,
    ACKTRConfig,
    Algo,
    Config,
    CriticConfig,
    SampledKFACConfig,
    TRPOConfig,
    check_recurrent,
    from_dict,
    merge,
    read_settings,
    to_dict,
)
from acktr.config.shorthand import (
    Settings,
    lacking_attribute,
    refuse_learn,
    refuse_load,
    require_attribute,
    with_settings,
)
from acktr.config.trusted import modules_of, refuse_import, refuse_imports

__all__ = [
    "ALGOS",
    "PRESETS",
    "PUBLISHED",
    "A2CConfig",
    "ACKTRConfig",
    "Activation",
    "Algo",
    "Config",
    "ConfigError",
    "CriticConfig",
    "JsonObject",
    "LearningRate",
    "NetworkConfig",
    "SampledKFACConfig",
    "Settings",
    "TRPOConfig",
    "Trunk",
    "build",
    "check_recurrent",
    "from_dict",
    "has_own",
    "known_presets",
    "lacking_attribute",
    "merge",
    "modules_of",
    "overlay",
    "preset",
    "rate_at",
    "read_settings",
    "refuse_import",
    "refuse_imports",
    "refuse_learn",
    "refuse_load",
    "require_attribute",
    "to_dict",
    "with_learning_rate",
    "with_settings",
]
