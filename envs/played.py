"""Whether somebody else has reset or stepped environments, as far as it can be seen."""

from __future__ import annotations

from typing import Any

from acktr.envs import snapshot
from acktr.envs.groups import GroupedEnvs
from acktr.envs.guard import GuardedVectorEnv
from acktr.envs.parallel import ParallelEnvs
from acktr.envs.vector import AnyVectorEnv, inner_envs

Trace = dict[str, Any]


class Witness:
    """Sees resets and steps of environments that their user has not made.

    Calls of the vector environment are counted. What a caller does by hand in an environment that
    he gave is seen by what steps change: the counter of a time limit and the variables of
    Gymnasium's own environments, or else by whole numbers and the generator, as far as the user's
    own steps are seen to change them. Whatever else differs is no step: settings such as gravity,
    windows, logs.

    Args:
        envs: The environments.
    """

    def __init__(self, envs: AnyVectorEnv) -> None:
        self._envs = envs
        self._stepping: set[str] = set()  # what steps are known to change
        self._turns: int | None = None
        self._trace: Trace | None = None
        self._start: Trace | None = None

    def note(self) -> None:
        """Take note of how the environments are, after which others may use them."""
        self.count()
        self._trace = _traced(self._envs)

    def count(self) -> None:
        """Take note of the calls so far."""
        self._turns = _turns(self._envs)

    def begin(self) -> None:
        """Nobody but the user steps them for now."""
        self._start = None if self._trace is None else _traced(self._envs)
        self._trace = None

    def stepped(self) -> None:
        """The user has stepped them; after the first step it is seen what that changed."""
        if self._start is not None:
            start, self._start = self._start, None
            self._stepping |= _differences(start, _traced(self._envs))

    @property
    def played(self) -> bool:
        """Whether others have reset or stepped the environments since they were noted."""
        if _turns(self._envs) != self._turns:
            return True
        if self._trace is None:
            return False
        changed = _differences(self._trace, _traced(self._envs))
        return any(name.startswith(snapshot.CERTAIN) or name in self._stepping for name in changed)


def _differences(one: Trace, other: Trace | None) -> set[str]:
    """The names of what is in both and differs."""
    return set() if other is None else {k for k in one.keys() & other if one[k] != other[k]}


def _turns(envs: AnyVectorEnv) -> int | None:
    """Resets and steps that environments have had, whoever called; None if they do not count."""
    layer: Any = envs
    while layer is not None:
        if isinstance(layer, GuardedVectorEnv | GroupedEnvs):
            return layer.turns
        layer = getattr(layer, "env", None)
    return None


def _traced(envs: AnyVectorEnv) -> Trace | None:
    """What is seen of environments that a caller has at hand; None of others."""
    inner = envs.unwrapped
    if isinstance(inner, GroupedEnvs) or (isinstance(inner, ParallelEnvs) and not inner.lent):
        return None
    try:
        return {
            f"{name} {place}": value
            for place, each in enumerate((inner, *inner_envs(inner)))
            for name, value in snapshot.trace(each).items()
        }
    except Exception:  # whatever attributes of others raise when they are read
        return None
