"""What the user is told in one line."""

from __future__ import annotations


class PeerError(ValueError):
    """Bad options, settings or run folder; the message is one line."""


class PeerFault(RuntimeError):  # noqa: N818 - as TrainingFault
    """Training cannot go on; the message is one line.

    Args:
        message: What happened.
        environment: Whether the environment is at fault rather than the numbers.
    """

    def __init__(self, message: str, environment: bool) -> None:
        super().__init__(message)
        self.environment = environment
