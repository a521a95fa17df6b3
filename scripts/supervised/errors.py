"""What the user is told in one line."""

from __future__ import annotations


class SupervisedError(ValueError):
    """Bad options, data or results folder; the message is one line."""
