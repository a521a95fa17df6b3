"""Parts of a study, each with a file: what is there is read, the rest is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.text import Text

from acktr.report.tables import as_csv
from acktr.runs.progress import Display, duration
from scripts.common import ScriptError, save
from scripts.contest import read_own

Rows = list[list[float]]
Tell = Callable[[float], None]
"""Takes how much of a part is done."""


@dataclass(frozen=True)
class Part:
    """A part of a study."""

    label: str
    path: Path
    """Its CSV file."""
    identity: str
    """All that decides the outcome, apart from the machine, as one line of JSON."""
    columns: Sequence[str]
    size: float
    """How much there is to do, for the time that is left."""
    make: Callable[[Tell], tuple[Rows, str]]
    """Makes its rows, and says in a line what was found."""


def run(title: str, parts: Sequence[Part]) -> list[Rows]:
    """The rows of every part.

    Args:
        title: Of the progress.
        parts: What is asked for.

    Raises:
        ScriptError: A file belongs to another study, or cannot be read or written.
    """
    progress, found = _Progress(title, sum(part.size for part in parts)), []
    with closing(progress.display):
        for part in parts:
            rows = _read(part)
            if rows is None:
                rows, note = part.make(partial(progress.tell, part))
                body = [[f"{value:.9g}" for value in row] for row in rows]
                save(part.path.parent, {part.path.name: as_csv(part.columns, body, part.identity)})
                progress.made += part.size
                progress.display.note(f"{part.label}: {note}")
            progress.done += part.size
            found.append(rows)
    return found


class _Progress:
    """How far a study is."""

    def __init__(self, title: str, total: float) -> None:
        self.display, self._total = Display(title, 10.0), total
        self.done = self.made = 0.0
        self._began = time.monotonic()

    def tell(self, part: Part, much: float) -> None:
        """Show that so much of a part is done, when it is time to."""
        if self.display.due():
            done, made = self.done + much, max(self.made + much, 1e-9)
            left = (time.monotonic() - self._began) / made * max(self._total - done, 0.0)
            line = (
                f"{part.label}: {much / part.size:.0%}; {done / self._total:.1%} of all,"
                f" ETA {duration(left)}"
            )
            self.display.show(line, int(done), int(self._total), Text(line))


def _read(part: Part) -> Rows | None:
    rows = read_own(part.path, part.identity)
    if rows is None:
        return None
    try:
        return [[float(row[column]) for column in part.columns] for row in rows]
    except (KeyError, ValueError) as error:
        raise ScriptError(f"{part.path}: not a file of this study: {error}") from error
