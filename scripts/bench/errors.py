"""What the user is told in one line."""

from __future__ import annotations


class BenchError(ValueError):
    """Bad options or a results folder that cannot be written; the message is one line."""
