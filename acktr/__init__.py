"""ACKTR: actor-critic with Kronecker-factored trust regions (Wu et al. 2017), in PyTorch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acktr.public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public names when one of them, or ``__all__``, is first asked for.

    ``import acktr`` alone is cheap, as torch and Gymnasium take seconds. Nor does a module, such
    as in ``from acktr import kfac``, need more than itself.
    """
    module = not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None
    if not module and (name == "__all__" or not name.startswith("_")):
        public = vars(import_module("acktr.public"))
        names = {key: value for key, value in public.items() if not key.startswith("_")}
        globals().update(names, __all__=sorted(names))
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
