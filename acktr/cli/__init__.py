"""The command line: words in; an exit code, and one line for what went wrong, out.

Commands and their options.
May import: everything in acktr.
"""

__all__ = ["main"]
