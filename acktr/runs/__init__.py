"""One run on disk: a configuration in; a folder with logs and checkpoints out.

Start, resume, train, save, log, show progress, and play what was saved.
May import: acktr.train and what lies below it, acktr.evaluate, acktr.files, acktr.interrupts.
"""

__all__ = [
    "checkpoint",
    "folder",
    "logger",
    "meeting",
    "opening",
    "progress",
    "saved",
    "session",
    "start",
    "tables",
    "video",
]
