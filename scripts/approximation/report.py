"""table.csv, table.md and figure.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from acktr.report.figures import COLOURS, picture, plain
from acktr.report.tables import as_csv, markdown
from scripts.approximation.study import SEED, Candidate, Problem, Row, Settings, layer_means
from scripts.common import machine

_HEADINGS = (
    *("approximation", "damping", "matrix", "diagonal blocks", "inverse", "cosine"),
    "model decrease",
)
SHOWN = 0.01
"""Damping of the figure."""
_PIXELS = 210
_BLACK = 0.995
"""Quantile of the exact matrix's pixels that is drawn black."""
_CORNERS = ("matrix", "inverse", "inverse, mean per layer pair")
_VERSIONS = ("python", "torch", "numpy", "matplotlib", "platform", "torch_threads", "git_commit")


def table(rows: Sequence[Row]) -> bytes:
    """The rows with all digits."""
    return as_csv(Row._fields, rows)


def as_markdown(rows: Sequence[Row], problem: Problem, settings: Settings, command: str) -> bytes:
    """The rows, what they mean and where they come from."""
    widths = [problem.inputs.shape[1], *[settings.width] * settings.hidden, 10]
    layers = len(problem.sizes)
    made_on = machine()
    lines = [
        "# How much of the Fisher matrix the approximations keep",
        "",
        f"Command: `{command}`",
        "",
        f"A {'-'.join(map(str, widths))} tanh classifier of drawn digits (built in, 16 x 16),"
        f" {settings.samples} samples, seed {SEED}, after {settings.steps} K-FAC steps"
        f" (loss {problem.objective:.4f}, accuracy {problem.accuracy:.3f} on the same samples)."
        f" F is the exact Fisher matrix of all samples over the {layers} layers between hidden ones"
        f" ({sum(problem.sizes)} parameters); all statistics are exact as well (no sampled targets,"
        " no averaging over time), so that only the structure differs. float64.",
        "",
        markdown(_HEADINGS, map(_cells, rows)),
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
        f"figure.png: absolute values at lambda = {SHOWN:g}; each row has one grey scale, set by"
        " the exact matrices (black: their 99.5 % quantile and more; last row: their maximum)."
        " Blue lines part the layers; averages over squares of entries are drawn. The last row"
        " shows mean absolute values between different layers (brown: a layer with itself).",
        "",
        f"Versions: {', '.join(f'{key} {made_on[key]}' for key in _VERSIONS if key in made_on)}.",
        "",
    ]
    return "\n".join(lines).encode()


def _cells(row: Row) -> list[str]:
    return [row.method, f"{row.damping:g}", *(f"{number:.4f}" for number in row[2:])]


def draw(found: Mapping[str, Candidate], sizes: Sequence[int], title: str) -> bytes:
    """A PNG with a column for every candidate: its matrix, its inverse, the inverse by layers.

    Every row has one grey scale, set by the first candidate (the exact matrices).

    Args:
        found: Candidates by name, the exact one first.
        sizes: Parameters of each layer.
        title: Title of the figure.
    """
    figure = Figure(figsize=(2.35 * len(found), 7.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, len(found), squeeze=False)
    pictures = [
        [pooled(candidate.matrix) for candidate in found.values()],
        [pooled(candidate.inverse) for candidate in found.values()],
        [_between(layer_means(candidate.inverse, sizes)) for candidate in found.values()],
    ]
    for row, (line, images) in enumerate(zip(panels, pictures, strict=True)):
        exact = images[0].flatten()
        black = float(
            exact.nan_to_num(0).quantile(_BLACK) if row < 2 else exact.nan_to_num(0).max()
        )
        for axis, name, image in zip(line, found, images, strict=True):
            edges = list(accumulate(sizes)) if row < 2 else [i + 1 for i in range(len(sizes))]
            _panel(axis, image, black, edges)
            if row == 0:
                axis.set_title(name, fontsize=9)
        line[0].set_ylabel(_CORNERS[row], fontsize=9)
    figure.suptitle(plain(title), fontsize=10)
    return picture(figure, "png")


def pooled(matrix: Tensor) -> Tensor:
    """Absolute values, averaged over squares of entries where there are too many to show."""
    step = max(1, len(matrix) // _PIXELS)
    return functional.avg_pool2d(matrix.abs()[None, None], step, ceil_mode=True)[0, 0]


def _between(means: Tensor) -> Tensor:
    """Means of different layers; NaN, drawn brown, for a layer with itself."""
    return means.masked_fill(torch.eye(len(means), dtype=torch.bool), torch.nan)


def _panel(axis: Axes, image: Tensor, black: float, edges: Sequence[int]) -> None:
    end = edges[-1]
    axis.set_facecolor("#d8c9a8")
    axis.imshow(
        image.numpy(),
        cmap="gray_r",
        vmin=0,
        vmax=black or 1.0,
        extent=(0, end, end, 0),
        interpolation="nearest",
    )
    for edge in edges[:-1]:
        axis.axhline(edge, color=COLOURS[0], linewidth=0.4)
        axis.axvline(edge, color=COLOURS[0], linewidth=0.4)
    axis.set_xticks([])
    axis.set_yticks([])
