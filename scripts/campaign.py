"""Parts of a study, each with a file: what is there is read, the rest is made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.text import Text

from acktr.files import flat
from acktr.report.tables import as_csv
from acktr.runs.progress import Display, duration
from acktr.runs.tables import read_table
from scripts.common import ScriptError, save

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
    progress, found = Progress(title, sum(part.size for part in parts)), []
    with closing(progress.display):
        for part in parts:
            rows = _read(part)
            made = rows is None
            if rows is None:
                rows, note = part.make(partial(_tell, progress, part))
                body = [[f"{value:.9g}" for value in row] for row in rows]
                save(part.path.parent, {part.path.name: as_csv(part.columns, body, part.identity)})
                progress.display.note(f"{part.label}: {note}")
            progress.end(part.size, made)
            found.append(rows)
    return found


class Progress:
    """How far a study is.

    Args:
        title: Its name.
        total: How much there is to do, in whatever measure.
    """

    def __init__(self, title: str, total: float) -> None:
        self.display, self._total = Display(title, 10.0), total
        self._done = self._made = 0.0
        self._began = time.monotonic()

    def tell(self, said: str, much: float) -> None:
        """Show that so much of a part is done, when it is time to."""
        if self.display.due():
            done, made = self._done + much, max(self._made + much, 1e-9)
            left = (time.monotonic() - self._began) / made * max(self._total - done, 0.0)
            line = f"{said}; {done / self._total:.1%} of all, ETA {duration(left)}"
            self.display.show(line, int(done), int(self._total), Text(line))

    def end(self, size: float, made: bool) -> None:
        """A part is done, made now or before."""
        self._done += size
        self._made += size if made else 0.0


def read_own(path: Path, identity: str) -> list[dict[str, str]] | None:
    """The rows of a CSV file whose first line is this identity; None if there is no such file.

    Args:
        path: The file.
        identity: One line of JSON.

    Raises:
        ScriptError: The file is damaged or belongs to another run.
    """
    if not path.exists():
        return None
    try:
        content = read_table(path)
        stored = flat(json.loads((content.comment or "").removeprefix("#")))
    except (ValueError, AttributeError) as error:
        raise ScriptError(f"{path}: not a run's file: {error}") from error
    wanted = flat(json.loads(identity))
    for name in wanted | stored:
        if stored.get(name) != wanted.get(name):
            raise ScriptError(
                f"{path}: made with {name} {stored.get(name)}, not {wanted.get(name)};"
                " choose another --out or delete the file"
            )
    return content.rows


def _tell(progress: Progress, part: Part, much: float) -> None:
    progress.tell(f"{part.label}: {much / part.size:.0%}", much)


def _read(part: Part) -> Rows | None:
    rows = read_own(part.path, part.identity)
    if rows is None:
        return None
    try:
        return [[float(row[column]) for column in part.columns] for row in rows]
    except (KeyError, ValueError) as error:
        raise ScriptError(f"{part.path}: not a file of this study: {error}") from error
