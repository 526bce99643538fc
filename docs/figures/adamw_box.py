"""Draw adamw_box: what weight_decay does to the fixed points of AdamW and of Adam.

A regression with four coefficients, in float64, on the full batch. AdamW's decay is not in the
gradient, so it is weighed against a step that does not know the size of the gradient: in the limit
the loss is minimised under |w| <= 1 / weight_decay. Adam's is in the gradient, and solves the ridge.
Lines are both problems solved by scipy and by linear algebra, dots the ends of optimizer runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from drawing import TITLE, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.optimize import lsq_linear
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR

import fusedreg
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

DECAYS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.25, 2.0, 3.2, 5.0, 10.0)
STEPS = 2000
LR, LAST_LR = 0.1, 1e-4
"""The first learning rate times weight_decay, and what is left of it at the end.

AdamW comes closer to its box by the factor 1 - lr * weight_decay a step, by 4e-10 in all of them.
"""

# With the default beta2 = 0.999 the second moment remembers the steeper gradients of the way for so
# long that AdamW ends 0.3 from the fixed point of weight_decay 0.5, and 0.07 in ten times the steps.
BETAS = (0.9, 0.9)


class Ends(NamedTuple):
    """The fixed points (a row for each weight_decay) by an optimizer and as the problem's solution."""

    decays: Sequence[float]
    found: Tensor
    exact: Tensor


def problem() -> tuple[Tensor, Tensor]:
    """X and y of 50 rows, with the Hessian X'X / n of mean((y - Xw)^2) / 2 near the identity."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(50, generator=generator, dtype=torch.float64)
    return X, X @ torch.tensor([3.0, -2.0, 1.0, -0.5], dtype=torch.float64) + 0.5 * noise


def box(decay: float) -> Tensor:
    """The minimum of the loss under |w| <= 1 / decay."""
    X, y = (tensor.numpy() for tensor in problem())
    return torch.from_numpy(lsq_linear(X, y, (-1 / decay, 1 / decay), method="bvls", tol=1e-14).x)


def ridge(decay: float) -> Tensor:
    """The minimum of the loss + decay / 2 |w|^2."""
    X, y = problem()
    n, p = X.shape
    return torch.linalg.solve(X.T @ X / n + decay * torch.eye(p, dtype=X.dtype), X.T @ y / n)


EXACT: dict[str, Callable[[float], Tensor]] = {"AdamW": box, "Adam": ridge}


def compute(name: str, decays: Sequence[float] = DECAYS) -> Ends:
    """Train from 0 with every weight_decay at once: a param group for each."""
    X, y = problem()
    hessian, slope = X.T @ X / len(y), X.T @ y / len(y)
    ws = [torch.nn.Parameter(torch.zeros(X.shape[1], dtype=X.dtype)) for _ in decays]
    groups = [
        {"params": [w], "weight_decay": decay, "lr": LR / decay}
        for w, decay in zip(ws, decays, strict=True)
    ]
    optimizer = getattr(fusedreg, name)(groups, betas=BETAS)
    schedule = ExponentialLR(optimizer, LAST_LR ** (1 / STEPS))
    for _ in range(STEPS):
        for w in ws:
            w.grad = hessian @ w.detach() - slope
        optimizer.step()
        schedule.step()
    found = torch.stack([w.detach() for w in ws])
    return Ends(decays, found, torch.stack([EXACT[name](decay) for decay in decays]))


def compute_all(decays: Sequence[float] = DECAYS) -> dict[str, Ends]:
    """Both optimizers."""
    return {name: compute(name, decays) for name in EXACT}


def draw(ends: Mapping[str, Ends]) -> Figure:
    """One panel for each optimizer."""
    figure = new_figure(10, 4.8, caption("scipy"))
    panels = figure.subplots(1, len(ends), sharex=True, sharey=True)
    for axes, (name, found) in zip(panels, ends.items(), strict=True):
        draw_ends(axes, found, EXACT[name])
    decays = np.geomspace(0.085, 11.8, 200)
    for sign in (1, -1):
        panels[0].fill_between(decays, sign / decays, sign * 10, color=SPIKE, alpha=0.13, lw=0)
    panels[0].set_title("AdamW: the box |w| ≤ 1 / weight_decay", **TITLE)
    panels[1].set_title("Adam: the ridge", **TITLE)
    panels[0].set_ylabel("coefficient at the fixed point")
    panels[0].text(2.2, 2.4, "|w| > 1 / weight_decay", color=SPIKE, fontsize=10, ha="center")
    line = Line2D([], [], color=QUIET, linewidth=3, alpha=0.45, label="exact solution")
    dots = Line2D([], [], color=QUIET, marker="o", ls="", label="end of a run by fusedreg")
    panels[1].legend(handles=[line, dots], fontsize=9.5, frameon=False, loc="upper right")
    return figure


def draw_ends(axes: Axes, ends: Ends, exact: Callable[[float], Tensor]) -> None:
    """The coefficients over weight_decay, each in its colour."""
    decays = np.geomspace(min(ends.decays), max(ends.decays), 80).tolist()
    lines = torch.stack([exact(decay) for decay in decays])
    for i, colour in enumerate((COLOURS[0], COLOURS[2], COLOURS[6], COLOURS[9])):
        axes.plot(decays, lines[:, i], color=colour, linewidth=3, alpha=0.45)
        axes.plot(ends.decays, ends.found[:, i], "o", color=colour, markersize=5)
    axes.axhline(0, color=QUIET, linewidth=0.6, zorder=0)
    axes.set(xscale="log", xlabel="weight_decay", ylim=(-2.6, 3.6), xlim=(0.085, 11.8))
    axes.set_xticks([0.1, 0.5, 1, 2, 10], ["0.1", "0.5", "1", "2", "10"])
    tidy(axes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("adamw_box", lambda: draw(compute_all()), arguments)


if __name__ == "__main__":
    main()
