"""The demo's figures: paths as lines with scikit-learn's dots, and histograms of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fusedreg.demo import diabetes
from fusedreg.demo.diabetes import Data, Path
from fusedreg.demo.digits import Pair, Recipe
from fusedreg.demo.progress import Track
from fusedreg.demo.style import CLOUD, COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

FEATURES = {
    "bp": "blood pressure",
    "s1": "total cholesterol",
    "s2": "LDL",
    "s3": "HDL",
    "s4": "cholesterol / HDL",
    "s5": "log triglycerides",
    "s6": "blood sugar",
}
"""What scikit-learn's short names stand for."""

ZERO_SLOT = -8.7
"""Where the bar of exact zeros stands on the axis of log10 |w|, which has no place for them."""

SMALLEST = -7.0
"""Weights below 1e-7 that are not 0 are counted into the leftmost bin."""

HOW_TO_READ = (
    "How to read\n\n"
    "Weights by their size, on a log axis.\n"
    "The bar at 0 stands for those that are\n"
    "exactly 0 (w == 0).\n\n"
    "A proximal step stops at 0. All other\n"
    "penalties shrink a weight without end,\n"
    "or carry it past 0 and back."
)


def write(
    out: FilePath, data: Data, paths: Sequence[Path], pairs: Sequence[Pair], track: Track
) -> list[str]:
    """Draw all figures into the folder `out`; their file names."""
    drawings: dict[str, Callable[[], Figure]] = {
        "demo.png": lambda: overview(data, paths, pairs),
        "diabetes-paths.png": lambda: all_paths(data, paths),
        "digits-weights.png": lambda: all_histograms(pairs),
    }
    for name, draw in track(list(drawings.items()), "figures"):
        draw().savefig(out / name, dpi=150)
    return list(drawings)


def overview(data: Data, paths: Sequence[Path], pairs: Sequence[Pair]) -> Figure:
    """The one picture: a Lasso path, and where L1 in the loss and L1 by prox leave the weights."""
    figure = new_figure(11, 4.9, caption("scikit-learn"))
    ((left, right),) = figure.subfigures(1, 2, width_ratios=(1.3, 1), wspace=0.03, squeeze=False)
    axes = left.subplots()
    draw_path(axes, data, _find(paths, "Lasso", "Adam"), _find(paths, "Lasso", "scikit-learn"))
    axes.set_title("Lasso path of the diabetes data: fusedreg.Adam(l1=…)", fontsize=11)
    _path_legend(axes)

    both = [pair for pair in pairs if pair.recipe.l1 > 0 and pair.recipe.optimizer == "SGD"]
    rows = right.subplots(len(both), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for row, pair in zip(rows, both, strict=True):
        draw_histogram(row, pair)
        row.set_ylabel("number of weights")
    rows[-1].set_xlabel("|w|, the weights of a network trained on the digits data")
    return figure


def all_paths(data: Data, paths: Sequence[Path]) -> Figure:
    """Every path by every optimizer, and below how far it is from scikit-learn's."""
    figure = new_figure(12, 11, caption("scikit-learn"))
    solvers = list(diabetes.SOLVERS)
    heights = [3.0] * len(solvers) + [1.2]
    grid = figure.subplots(
        len(heights), len(diabetes.PENALTIES), sharey="row", height_ratios=heights
    )
    for column, penalty in zip(grid.T, diabetes.PENALTIES, strict=True):
        exact = _find(paths, penalty, "scikit-learn")
        for axes, solver in zip(column, solvers, strict=False):
            draw_path(axes, data, _find(paths, penalty, solver), exact)
            axes.set_title(f"{penalty}, fusedreg.{solver}", fontsize=11)
        ours = [_find(paths, penalty, solver) for solver in solvers]
        draw_differences(column[-1], ours, exact)
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    _path_legend(grid[0, 0])
    grid[-1, 0].legend(fontsize=9, loc="upper left", ncols=3, frameon=False)
    return figure


def draw_path(axes: Axes, data: Data, path: Path, exact: Path) -> None:
    """Coefficients over l1: `path` as lines, `exact` as dots, names at the right end."""
    ends = path.coefficients[-1].tolist()
    gap = 0.045 * float(exact.coefficients.max() - exact.coefficients.min())
    heights = spread(ends, gap)
    for i, name in enumerate(data.names):
        line, dots = path.coefficients[:, i].tolist(), exact.coefficients[:, i].tolist()
        axes.plot(path.l1, line, color=COLOURS[i], linewidth=3, alpha=0.45)
        axes.plot(exact.l1, dots, "o", color=COLOURS[i], markersize=3.5, markeredgewidth=0)
        axes.annotate(
            FEATURES.get(name, name),
            (path.l1[-1], ends[i]),
            xytext=(1.01, heights[i]),
            textcoords=axes.get_yaxis_transform(),
            color=COLOURS[i],
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    axes.axhline(0, color=QUIET, linewidth=0.6, zorder=0)
    _l1_axis(axes, exact)
    axes.set_ylabel("coefficient, standardised data")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions close to `values`, in their order, and at least `gap` apart: for labels.

    >>> spread([0.0, 5.0, 0.5], 1.0)
    [-0.25, 5.0, 0.75]
    """
    order = np.argsort(values)
    # With the gaps taken out, "in order and apart" is "not decreasing": average what violates it.
    blocks: list[list[float]] = []
    for rank, index in enumerate(order):
        blocks.append([values[index] - rank * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [float(np.mean(block)) for block in blocks for _ in block]
    placed = [0.0] * len(values)
    for rank, index in enumerate(order):
        placed[index] = level[rank] + rank * gap
    return placed


def draw_differences(axes: Axes, paths: Sequence[Path], exact: Path) -> None:
    """Largest coefficient difference to `exact` at each l1, and what is allowed."""
    for path, style, colour in zip(paths, ("-", "--"), (CLOUD, SPIKE), strict=True):
        worst = path.worst_difference(exact)
        axes.plot(path.l1, worst, style, color=colour, linewidth=1.8, label=path.solver)
    allowed = diabetes.COEFFICIENT_TOLERANCE
    axes.axhline(allowed, color=QUIET, linewidth=1.2, linestyle=":", label="tolerance")
    _l1_axis(axes, exact)
    axes.set_yscale("log")
    axes.set_ylim(1e-16, 1e-7)
    axes.set_ylabel("largest difference\nto scikit-learn")


def all_histograms(pairs: Sequence[Pair]) -> Figure:
    """One panel per recipe; only the proximal ones have weights in the slot of exact zeros."""
    figure = new_figure(13, 6.2, caption("scikit-learn"))
    columns = 4
    grid = figure.subplots(len(pairs) // columns + 1, columns, sharex=True, sharey=True)
    panels = list(grid.flat)
    for axes, pair in zip(panels, pairs, strict=False):
        draw_histogram(axes, pair)
        axes.tick_params(labelbottom=True)
    for axes in grid[-1]:
        axes.set_xlabel("|w|")
    for axes in grid[:, 0]:
        axes.set_ylabel("number of weights")
    for axes in panels[len(pairs) :]:
        axes.axis("off")
    guide = panels[len(pairs)]
    guide.text(0, 0.9, HOW_TO_READ, transform=guide.transAxes, fontsize=10, color=QUIET, va="top")
    return figure


def draw_histogram(axes: Axes, pair: Pair) -> None:
    """Sizes of the weights on a log axis, with a slot of its own for those that are exactly 0.

    On a linear axis the small weights that L1 in the loss leaves behind would look like zeros.
    """
    weights, zeros = pair.ours.weights.abs().numpy(), pair.ours.zeros
    sizes = np.log10(weights[weights > 0]).clip(min=SMALLEST)
    axes.hist(sizes, bins=np.arange(SMALLEST, 1.01, 0.25).tolist(), color=CLOUD)
    axes.bar(ZERO_SLOT, zeros, width=0.8, color=SPIKE)
    style: dict[str, Any] = {"textcoords": "offset points", "color": SPIKE, "fontsize": 9.5}
    if zeros:
        label = f"{zeros:,} exact zeros ({zeros / weights.size:.0%})"
        axes.annotate(label, (ZERO_SLOT + 0.4, zeros), (4, 0), va="top", weight="bold", **style)
    else:  # upright, because the next bin may be high
        axes.annotate("no exact zero", (ZERO_SLOT, 0), (0, 4), ha="center", rotation=90, **style)
    name = f"{pair.recipe.name}: test accuracy {pair.ours.accuracy:.1%}"
    axes.set_title(f"{name}\n{_call(pair.recipe)}", fontsize=10)
    powers = range(-4, 1, 2)
    labels = ["0", "≤$10^{-7}$", *(f"$10^{{{power}}}$" for power in powers)]
    axes.set_xticks([ZERO_SLOT, SMALLEST, *powers], labels)
    axes.set_xlim(ZERO_SLOT - 0.8, 0.8)
    tidy(axes)


def _call(recipe: Recipe) -> str:
    """The optimizer with the options of the penalty that are not at their defaults."""
    names = ("l1", "l1_mode", "weight_decay", "max_grad_norm")
    defaults = Recipe._field_defaults
    given = [(name, getattr(recipe, name)) for name in names]
    options = [f"{name}={value!r}" for name, value in given if value != defaults[name]]
    return f"{recipe.optimizer}({', '.join(options)})"


def _find(paths: Sequence[Path], penalty: str, solver: str) -> Path:
    (found,) = (path for path in paths if (path.penalty, path.solver) == (penalty, solver))
    return found


def _path_legend(axes: Axes) -> None:
    line = Line2D([], [], color=QUIET, linewidth=3, alpha=0.45, label="line: fusedreg")
    dots = Line2D([], [], color=QUIET, marker="o", markersize=4, ls="", label="dots: scikit-learn")
    axes.legend(handles=[line, dots], loc="upper left", fontsize=9.5, frameon=False)


def _l1_axis(axes: Axes, path: Path) -> None:
    axes.set_xscale("log")
    axes.set_xlim(max(path.l1) * 1.15, min(path.l1) / 1.1)
    axes.set_xlabel("l1, decreasing")
    tidy(axes)
