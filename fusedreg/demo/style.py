"""How all figures of the project look; needs matplotlib."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Paul Tol's "muted" scheme, distinct for every common colour blindness, with its two colours that
# are too pale for text on white replaced from Okabe and Ito's, and black for the tenth.
COLOURS = (
    *("#332288", "#56B4E9", "#44AA99", "#117733", "#999933"),
    *("#E69F00", "#CC6677", "#882255", "#AA4499", "#000000"),
)
SPIKE, CLOUD, QUIET = "#D55E00", "#6699BB", "#555555"
"""What a figure is about, what it is compared with, and what only explains."""


def new_figure(width: float, height: float, caption: str) -> Figure:
    """A figure of so many inches (of no window system) with the caption in its lower left corner.

    The caption names the machine and the versions: `fusedreg.machine.caption()`, or what the file
    of the numbers says of them.
    """
    room = 0.26 / height
    layout = ConstrainedLayoutEngine(rect=(0, room, 1, 1 - room))
    figure = Figure(figsize=(width, height), layout=layout)
    figure.text(0.008, 0.06 / height, caption, fontsize=7, color=QUIET, va="bottom")
    return figure


def tidy(axes: Axes) -> None:
    """No frame, quiet ticks and labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=QUIET)
    axes.xaxis.label.set(fontsize=10, color=QUIET)
    axes.yaxis.label.set(fontsize=10, color=QUIET)
