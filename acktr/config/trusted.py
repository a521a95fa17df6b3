"""Files never make a program import code: names in them that would are refused."""

from __future__ import annotations

import sys

from acktr.config.schema import ConfigError
from acktr.config.settings import Config


def refuse_import(name: str, what: str = "environment") -> None:
    """Refuse a name from a file that would import a module which is not imported already.

    Raises:
        ConfigError: ``module:Name`` with a module that nobody asked for.
    """
    module, colon, _ = name.rpartition(":")
    if colon and module not in sys.modules:
        raise ConfigError(
            f"its {what} {name} would import the module {module}; import it first if you"
            f" trust it (on the command line: --import {module})"
        )


def modules_of(config: Config) -> list[str]:
    """The modules that a configuration's environment and wrappers name, each once."""
    names = (config.env, *config.wrappers)
    return list(dict.fromkeys(name.rpartition(":")[0] for name in names if ":" in name))


def refuse_imports(config: Config) -> None:
    """Refuse a configuration from a file whose names would import such a module.

    Raises:
        ConfigError: As :func:`refuse_import`.
    """
    refuse_import(config.env)
    for wrapper in config.wrappers:
        refuse_import(wrapper, "wrapper")
