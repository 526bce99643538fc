"""Draw regularisation_path: a Lasso path by fusedreg on scikit-learn's, and how optimal each is.

The diabetes data and the loop of `fusedreg demo`: one optimizer walks down the values of l1 and
steps until the KKT residual (the largest distance of a coordinate from optimality, see
`fusedreg.penalty.kkt_distance`) is at most 1e-12. Below, that residual where each solver stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drawing import TITLE, run, silently
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedreg.demo import diabetes
from fusedreg.demo.diabetes import KKT_TOLERANCE, Data, Path
from fusedreg.demo.figures import draw_path
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

PENALTY = "Lasso"
STYLES: dict[str, dict[str, Any]] = {
    "SGD": {"marker": "s", "color": COLOURS[0], "markersize": 8, "fillstyle": "none"},
    "Adam": {"marker": "^", "color": COLOURS[2], "markersize": 5},
    "scikit-learn": {"marker": "o", "color": SPIKE, "markersize": 5},
}


def compute(count: int = 22) -> dict[str, Path]:
    """The path of every optimizer and of scikit-learn, on `count` values of l1."""
    data = diabetes.load()
    l1s = diabetes.l1_grid(data, count)
    paths = {
        solver: diabetes.follow(data, PENALTY, solver, l1s, silently) for solver in diabetes.SOLVERS
    }
    return paths | {"scikit-learn": diabetes.reference(data, PENALTY, l1s)}


def draw(paths: Mapping[str, Path], data: Data | None = None) -> Figure:
    """The path above, the residuals below, over the same l1."""
    figure = new_figure(9.5, 6.8, caption("scikit-learn"))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    draw_path(above, data or diabetes.load(), paths["Adam"], paths["scikit-learn"])
    above.set_title("Lasso path: lines by fusedreg.Adam(l1=…), dots by scikit-learn", **TITLE)
    above.set_xlabel("")
    draw_residuals(below, paths)
    return figure


def draw_residuals(axes: Axes, paths: Mapping[str, Path]) -> None:
    """The KKT residual at each l1, and what was asked for."""
    axes.axhline(KKT_TOLERANCE, color=QUIET, linestyle=":", linewidth=1.2, label="asked for")
    for name, path in paths.items():
        label = name if name == "scikit-learn" else f"fusedreg.{name}"
        axes.plot(path.l1, path.kkt, linestyle="", label=label, **STYLES[name])
    axes.set_yscale("log")
    axes.set_ylabel("KKT residual")
    axes.set_xlabel("l1, decreasing, in units of the loss per unit of a coefficient")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9.5, frameon=False)
    tidy(axes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("regularisation_path", lambda: draw(compute()), arguments)


if __name__ == "__main__":
    main()
