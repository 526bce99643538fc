"""Draw docs/figures/engine.png: the path of one gradient through the engine."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HOST, DEVICE, DATA, LAUNCH = "#f3ead7", "#dde8f3", "white", "#bcd5ee"
LINE = "#333333"
WIDTH = 3.0

# Lower left corner, height, colour, title and text.
BOXES = [
    (0.3, 3.85, 1.2, DATA, "param.grad", ["its address, dtype", "and layout, compared", "in every step"]),
    (4.4, 3.85, 1.2, DATA, "plan", ["buckets by device and", "program; made anew when", "shapes, dtypes or rules change"]),
    (8.5, 3.85, 1.2, DATA, "param group", ["lr, betas, weight_decay,", "l1, max_grad_norm, a live", "tensor among them or not"]),
    (0.3, 2.05, 1.15, DATA, "table", ["addresses of p, g and states,", "numel, chunk → tensor,", "tensor → group"]),
    (8.5, 2.05, 1.15, DATA, "numbers", ["step scalars, and scalars", "of each group,", "float64"]),
    (0.3, -0.15, 1.5, LAUNCH, "1  norms", ["one partial norm for each", "chunk, float64, no atomics", "(only with max_grad_norm", "or skip_nonfinite)"]),
    (4.4, -0.15, 1.5, LAUNCH, "2  rows", ["total norm, clip factor, skip?", "t + 1, bias corrections:", "one row of scalars", "for each tensor"]),
    (8.5, -0.15, 1.5, LAUNCH, "3  step", ["scale g → subgradient, L2 →", "rule → decay → prox,", "in registers; p and states", "are stored, g is not"]),
]  # fmt: skip

# From, to, and a label above the middle.
ARROWS = [
    ((3.4, 4.45), (4.3, 4.45), ""),
    ((8.4, 4.45), (7.5, 4.45), ""),
    ((4.6, 3.75), (3.0, 3.3), ""),
    ((7.2, 3.75), (8.8, 3.3), ""),
    ((1.8, 1.95), (1.8, 1.5), ""),
    ((3.2, 1.97), (4.8, 1.5), ""),
    ((8.7, 1.97), (7.1, 1.5), ""),
    ((3.4, 0.6), (4.3, 0.6), "partials"),
    ((7.5, 0.6), (8.4, 0.6), "rows"),
]


def rounded(
    x: float, y: float, width: float, height: float, pad: float, color: str
) -> FancyBboxPatch:
    """A box with rounded corners."""
    style = f"round,pad={pad}"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, fc=color, ec=LINE, lw=1)


def add_box(
    ax: Axes, x: float, y: float, height: float, color: str, title: str, text: list[str]
) -> None:
    """One box with its title and text."""
    ax.add_patch(rounded(x, y, WIDTH, height, 0.06, color))
    middle, top = x + WIDTH / 2, y + height
    ax.text(middle, top - 0.04, title, ha="center", va="top", fontsize=10, weight="bold")
    lines = "\n".join(text)
    ax.text(middle, top - 0.36, lines, ha="center", va="top", fontsize=8.5, linespacing=1.4)


def draw() -> Figure:
    """The figure."""
    fig, ax = plt.subplots(figsize=(11, 5.6), dpi=150)
    ax.set_xlim(-0.2, 12.2)
    ax.set_ylim(-0.4, 5.5)
    ax.axis("off")
    for y, height, name, color in [(3.75, 1.65, "host", HOST), (-0.3, 3.75, "device", DEVICE)]:
        area = rounded(0, y, 12, height, 0.1, color)
        area.set_edgecolor("none")
        ax.add_patch(area)
        ax.text(0.02, y + height + 0.02, name, fontsize=10, style="italic", va="top")
    for box in BOXES:
        add_box(ax, *box)
    for start, end, label in ARROWS:
        ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=LINE))
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        ax.text(x, y + 0.07, label, ha="center", va="bottom", fontsize=8)
    ax.text(7.95, 0.48, "LAMB first:\nsquares,\nfold", fontsize=8, va="top", ha="center")
    for x, side in [(4.05, "left"), (7.75, "right")]:
        ax.text(x, 3.42, "if changed:\nasync copy", fontsize=8, va="center", ha=side)
    return fig


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight")
