"""Whether somebody else has reset or stepped environments."""

from __future__ import annotations

import weakref
from functools import update_wrapper
from typing import Any

from acktr.envs.groups import GroupedEnvs
from acktr.envs.guard import GuardedVectorEnv
from acktr.envs.parallel import ParallelEnvs
from acktr.envs.vector import AnyVectorEnv, inner_envs, layers

_NAMES = ("reset", "step")


class _Counted:
    """A method that counts its calls; that of a copied environment is the copy's own."""

    def __init__(self, env: Any, name: str) -> None:
        self.call, self.replaced = getattr(env, name), vars(env).get(name)
        self.count = self.witnesses = 0
        update_wrapper(self, self.call)  # its signature, which Gymnasium looks at

    def __call__(self, *args: Any, **more: Any) -> Any:
        """Call it."""
        self.count += 1
        return self.call(*args, **more)


class Witness:
    """Sees resets and steps of environments that their user has not made.

    Calls are counted: of the vector environment, and, where a caller has them at hand, of the
    innermost environments, whose ``reset`` and ``step`` count for as long as this object lives.

    Args:
        envs: The environments.
    """

    def __init__(self, envs: AnyVectorEnv) -> None:
        inner: Any = envs.unwrapped
        own = isinstance(inner, GroupedEnvs) or (isinstance(inner, ParallelEnvs) and not inner.lent)
        lent = [] if own else [inner, *(each.unwrapped for each in inner_envs(inner))]
        self._envs = envs
        self._methods = [_counted(each, name) for each in lent for name in _NAMES]
        self._noted: list[int] = []
        weakref.finalize(self, _release, lent).atexit = False

    def note(self) -> None:
        """Take note of the calls so far."""
        self._noted = self._calls()

    @property
    def played(self) -> bool:
        """Whether others have reset or stepped the environments since they were noted."""
        return self._calls() != self._noted

    def _calls(self) -> list[int]:
        kinds = GuardedVectorEnv | GroupedEnvs
        turns = (layer.turns for layer in layers(self._envs) if isinstance(layer, kinds))
        return [next(turns, 0), *(each.count for each in self._methods)]


def _counted(env: Any, name: str) -> _Counted:
    method = vars(env).get(name)
    if not isinstance(method, _Counted):
        # Past any __setattr__; a method that its class keeps from being replaced goes uncounted.
        method = vars(env)[name] = _Counted(env, name)
    method.witnesses += 1
    return method


def _release(envs: list[Any]) -> None:
    """Give environments their own methods back, or they would refer to themselves for ever."""
    for env in envs:
        own: dict[str, Any] = env.__dict__
        for name in _NAMES:
            method = own.get(name)
            if isinstance(method, _Counted):
                method.witnesses -= 1
                if not method.witnesses:
                    del own[name]
                    if method.replaced is not None:
                        own[name] = method.replaced
