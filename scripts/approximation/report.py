"""table.csv and table.md."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, fields

from acktr.runs.folder import versions
from scripts.approximation.study import Problem, Row, Settings

_HEADINGS = {
    "method": "approximation",
    "damping": "damping",
    "matrix": "matrix",
    "blocks": "diagonal blocks",
    "inverse": "inverse",
    "cosine": "cosine",
    "decrease": "model decrease",
}
_VERSIONS = ("python", "torch", "numpy", "matplotlib", "platform", "torch_threads", "git_commit")


def as_csv(rows: Sequence[Row]) -> bytes:
    """The rows with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(map(astuple, rows))
    return buffer.getvalue().encode()


def as_markdown(
    rows: Sequence[Row], problem: Problem, settings: Settings, shown: float, command: str
) -> bytes:
    """The rows, what they mean and where they come from."""
    widths = [problem.inputs.shape[1], *[settings.width] * settings.hidden, 10]
    layers = len(problem.sizes)
    lines = [
        "# How much of the Fisher matrix the approximations keep",
        "",
        f"Command: `{command}`",
        "",
        f"A {'-'.join(map(str, widths))} tanh classifier of drawn digits (built in, 16 x 16),"
        f" {settings.samples} samples, seed {settings.seed}, after {settings.steps} K-FAC steps"
        f" (loss {problem.objective:.4f}, accuracy {problem.accuracy:.3f} on the same samples)."
        f" F is the exact Fisher matrix of all samples over the {layers} layers between hidden ones"
        f" ({sum(problem.sizes)} parameters); all statistics are exact as well (no sampled targets,"
        " no averaging over time), so that only the structure differs. float64.",
        "",
        "| " + " | ".join(_HEADINGS[field.name] for field in fields(Row)) + " |",
        "|---|" + "---:|" * (len(fields(Row)) - 1),
    ]
    for row in rows:
        numbers = (row.matrix, row.blocks, row.inverse, row.cosine, row.decrease)
        cells = [row.method, f"{row.damping:g}", *(f"{number:.4f}" for number in numbers)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "With lambda the damping, M the damped matrix of a row, E = F + lambda I and g the gradient"
        " of the loss:",
        "",
        "- matrix: ||M - E|| / ||E||, Frobenius norm; diagonal blocks: the same for these alone;",
        "- inverse: ||M^-1 - E^-1|| / ||E^-1||;",
        "- cosine: of M^-1 g, the preconditioned gradient, with E^-1 g, the natural gradient;",
        "- model decrease: how much the quadratic model with E falls along M^-1 g at the best step"
        " length, as a part of what E^-1 g achieves.",
        "",
        "Exact block diagonal has the diagonal blocks of E; exact block tridiagonal has its"
        " diagonal and neighbouring blocks, and a block-tridiagonal inverse. K-FAC and EKFAC add"
        " lambda; factored damping, which the tridiagonal form needs as well, splits it between the"
        " factors and so adds more than lambda I.",
        "",
        f"figure.png: absolute values at lambda = {shown:g}; each row has one grey scale, set by"
        " the exact matrices (black: their 99.5 % quantile and more; last row: their maximum)."
        " Blue lines part the layers; averages over squares of entries are drawn. The last row"
        " shows mean absolute values between different layers (brown: a layer with itself).",
        "",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in _versions().items()) + ".",
        "",
    ]
    return "\n".join(lines).encode()


def _versions() -> dict[str, object]:
    found = versions()
    return {key: found[key] for key in _VERSIONS if found.get(key) is not None}
