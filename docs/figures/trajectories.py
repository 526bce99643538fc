"""Draw trajectories: the ways of coupled L2, decoupled decay and prox L1 down one quadratic.

The loss is (w - c)' H (w - c) / 2 in two dimensions, in float64, with its full gradient. Rings mark
where each penalised loss has its minimum, by other means than the optimizers (see `minimum`), dots
where the optimizers end. Both panels have the same weight_decay and l1; the disc and the diamond
are the level sets of the L2 and the L1 norm through the first and the last of the minima.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from drawing import TITLE, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon, Rectangle
from scipy.optimize import lsq_linear
from sklearn.linear_model import Lasso
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import fusedreg
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

H = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
CENTRE = torch.tensor([2.2, 0.3], dtype=torch.float64)
START = torch.tensor([-0.7, 1.7], dtype=torch.float64)
WEIGHT_DECAY = L1 = 1.0
MOMENTUM = 0.9
STEPS = 3000
LAST_LR = 1e-4
"""What is left of the learning rate at the end: Adam circles a minimum as closely as that."""

PENALTIES: dict[str, dict[str, Any]] = {
    "coupled L2": {"weight_decay": WEIGHT_DECAY},
    "decoupled decay": {"weight_decay": WEIGHT_DECAY, "decoupled_weight_decay": True},
    "prox L1": {"l1": L1},
}

# With the default beta2 = 0.999 the second moment remembers the steeper gradients of the way for so
# long that decoupled decay ends 0.04 from its minimum, and 0.001 in ten times the steps.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "SGD": (fusedreg.SGD, {"lr": 0.01, "momentum": MOMENTUM}),
    "Adam": (fusedreg.Adam, {"lr": 0.05, "betas": (0.9, 0.9)}),
}


class Run(NamedTuple):
    """Every iterate, the start first, and the minimum of what should be minimised."""

    way: Tensor
    minimum: Tensor

    @property
    def miss(self) -> float:
        """How far from the minimum the run ends, in the larger coordinate."""
        return (self.way[-1] - self.minimum).abs().max().item()


def compute(optimizer: str, penalty: str) -> Run:
    """Step from START while the learning rate falls to LAST_LR times what it was."""
    make, options = OPTIMIZERS[optimizer]
    w = torch.nn.Parameter(START.clone())
    stepper = make([w], **options, **PENALTIES[penalty])
    schedule = ExponentialLR(stepper, LAST_LR ** (1 / STEPS))
    way = [START]
    for _ in range(STEPS):
        w.grad = H @ (w.detach() - CENTRE)
        stepper.step()
        schedule.step()
        way.append(w.detach().clone())
    return Run(torch.stack(way), minimum(optimizer, penalty))


def minimum(optimizer: str, penalty: str) -> Tensor:
    """What docs/semantics.md says that the run minimises, by linear algebra, scipy or scikit-learn.

    With the Cholesky factor R of H, the loss is half the sum of squares of R' (w - c).
    """
    X = torch.linalg.cholesky(H).T
    y = X @ CENTRE
    if penalty == "prox L1":  # whose loss is a mean, of two rows
        lasso = Lasso(alpha=L1 / 2, fit_intercept=False, tol=1e-14)
        return torch.from_numpy(lasso.fit(X.numpy(), y.numpy()).coef_)
    if penalty == "decoupled decay" and optimizer == "Adam":
        bound = 1 / WEIGHT_DECAY
        return torch.from_numpy(
            lsq_linear(X.numpy(), y.numpy(), (-bound, bound), method="bvls", tol=1e-14).x
        )
    strength = WEIGHT_DECAY * (1 - MOMENTUM if penalty == "decoupled decay" else 1)
    return torch.linalg.solve(H + strength * torch.eye(2, dtype=H.dtype), H @ CENTRE)


def compute_all() -> dict[str, dict[str, Run]]:
    """Every penalty by every optimizer."""
    return {name: {penalty: compute(name, penalty) for penalty in PENALTIES} for name in OPTIMIZERS}


COLOUR = {"coupled L2": COLOURS[0], "decoupled decay": COLOURS[2], "prox L1": SPIKE}
NAMES: dict[str, dict[str, tuple[str, tuple[float, float]]]] = {
    "SGD": {
        "coupled L2": ("ridge", (0.95, 0.33)),
        "decoupled decay": ("ridge of\nweight_decay / 10", (1.95, -0.75)),
        "prox L1": ("Lasso", (1.35, -0.3)),
    },
    "Adam": {
        "coupled L2": ("ridge", (1.75, 0.75)),
        "decoupled decay": ("loss in the box\n|w| ≤ 1 / weight_decay", (1.75, 1.5)),
        "prox L1": ("Lasso", (2.0, -0.35)),
    },
}
"""What has its minimum at a ring, and the middle of these words."""


def draw(runs: Mapping[str, Mapping[str, Run]]) -> Figure:
    """One panel for each optimizer."""
    figure = new_figure(10, 5.3, caption("scikit-learn"))
    panels = figure.subplots(1, len(runs), sharex=True, sharey=True)
    for axes, (name, ways) in zip(panels, runs.items(), strict=True):
        draw_loss(axes)
        draw_balls(axes, ways["coupled L2"].minimum, ways["prox L1"].minimum)
        for penalty, found in ways.items():
            draw_way(axes, found, COLOUR[penalty], *NAMES[name][penalty])
        options = ", ".join(f"{key}={value}" for key, value in OPTIMIZERS[name][1].items())
        axes.set_title(f"{name}({options})", **TITLE)
    bound = 1 / WEIGHT_DECAY
    box: dict[str, Any] = {
        "edgecolor": COLOUR["decoupled decay"],
        "linestyle": "--",
        "linewidth": 1.5,
    }
    panels[1].add_patch(Rectangle((-bound, -bound), 2 * bound, 2 * bound, fill=False, **box))
    panels[0].set_ylabel("w[1]")
    words = "disc: ‖w‖₂ of the ridge\ndiamond: ‖w‖₁ of the Lasso"
    panels[0].text(-0.45, -0.6, words, color=QUIET, fontsize=9.5, ha="center", va="center")
    add_legend(figure)
    return figure


def add_legend(figure: Figure) -> None:
    """What the colours and the marks are, above the panels."""
    handles = [
        *(Line2D([], [], color=colour, lw=2.5, label=name) for name, colour in COLOUR.items()),
        Line2D([], [], color=QUIET, marker="o", ls="", label="end of the run"),
        Line2D([], [], color=QUIET, **RING, ls="", label="exact minimum"),
        Line2D([], [], color=QUIET, marker="+", ls="", ms=9, label="minimum of the loss"),
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=6, fontsize=9, frameon=False,
        handlelength=1.5, columnspacing=1.4,
    )  # fmt: skip


RING: dict[str, Any] = {"marker": "o", "fillstyle": "none", "ms": 13, "mew": 1.5}
X_RANGE, Y_RANGE = (-1.9, 2.7), (-1.9, 2.0)


def draw_loss(axes: Axes) -> None:
    """Contours of the loss and its minimum."""
    x, y = np.meshgrid(np.linspace(*X_RANGE, 120), np.linspace(*Y_RANGE, 120))
    d = np.stack([x - CENTRE[0].item(), y - CENTRE[1].item()])
    loss = np.einsum("iab,ij,jab->ab", d, H.numpy(), d) / 2
    axes.contour(x, y, loss, [0.1, 0.5, 1.2, 2.5, 4.5, 7], colors="#BBBBBB", linewidths=0.9)
    axes.plot(*CENTRE, "+", color=QUIET, markersize=9)
    axes.set(xlim=X_RANGE, ylim=Y_RANGE, aspect="equal", xlabel="w[0]")
    tidy(axes)


def draw_balls(axes: Axes, ridge: Tensor, lasso: Tensor) -> None:
    """The disc of the L2 norm and the diamond of the L1 norm."""
    radius, size = ridge.norm().item(), lasso.abs().sum().item()
    corners = [(size, 0), (0, size), (-size, 0), (0, -size)]
    axes.add_patch(Circle((0, 0), radius, color=COLOUR["coupled L2"], alpha=0.10, linewidth=0))
    axes.add_patch(Polygon(corners, color=COLOUR["prox L1"], alpha=0.12, linewidth=0))


def draw_way(axes: Axes, found: Run, colour: str, name: str, place: tuple[float, float]) -> None:
    """The way, where it ends, and where it should, with a name for that."""
    axes.plot(*found.way.T, color=colour, linewidth=1.8)
    axes.plot(*found.way[0], "s", color=QUIET, markersize=5)
    axes.plot(*found.way[-1], "o", color=colour, markersize=6)
    axes.plot(*found.minimum, color=colour, **RING)
    line = {"arrowstyle": "-", "color": colour, "shrinkB": 7, "linewidth": 0.8}
    axes.annotate(
        name, (found.minimum[0].item(), found.minimum[1].item()), place, color=QUIET, fontsize=9.5, ha="center", va="center",
        arrowprops=line,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("trajectories", lambda: draw(compute_all()), arguments)


if __name__ == "__main__":
    main()
