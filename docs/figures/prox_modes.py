"""Draw prox_modes: where one step with l1 takes a weight w, in each of the three modes.

Every weight of a grid sees the same constant gradient of the loss, smaller than l1. Then w = 0
minimises loss + l1 |w|, so a step must leave 0 where it is. Whether it does depends on the ratio of
the threshold to what the gradient moves: that is why the threshold of "prox" is not lr * l1.

The moments are brought to rest before the step by steps with lr = 0, which move moments only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from drawing import TITLE, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

import fusedreg
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

L1 = 0.5
GRADIENT = 0.25
"""Of the loss, the same at every weight and in every step."""

MODES = ("prox", "decoupled", "subgradient")
WARM_UP = 400
"""Steps with lr = 0: 0.9 ** 400 = 5e-19, so momentum and moments are at their limits."""

SETTINGS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "SGD": (fusedreg.SGD, {"lr": 0.02, "momentum": 0.9}),
    "Adam": (fusedreg.Adam, {"lr": 0.05}),
}
"""With these rates the gradient alone moves a weight by 0.05 in either panel."""


class Map(NamedTuple):
    """Weights before and after one step."""

    before: Tensor
    after: Tensor

    @property
    def dead_zone(self) -> tuple[float, float] | None:
        """The outermost weights that the step makes exactly 0."""
        zeroed = self.before[self.after == 0]
        return (zeroed.min().item(), zeroed.max().item()) if len(zeroed) else None

    @property
    def of_zero(self) -> float:
        """Where the weight 0 goes."""
        return self.after[self.before == 0].item()


def grid() -> Tensor:
    """Weights from -0.28 to 0.28 with 0 among them, in float64.

    The spacing, 0.005 * 7 / 400, has no multiple at the edges of the dead zones (multiples of 0.005
    that are not of 0.035), where rounding decides, nor where the subgradient step crosses 0.
    """
    return torch.arange(-3200, 3201, dtype=torch.float64) * (0.005 * 7 / 400)


def compute(optimizer: str, mode: str) -> Map:
    """One step of every weight of the grid."""
    make, options = SETTINGS[optimizer]
    w = torch.nn.Parameter(grid())
    stepper = make([w], **{**options, "lr": 0.0}, l1=L1, l1_mode=mode)
    w.grad = torch.full_like(w, GRADIENT)
    for _ in range(WARM_UP):
        stepper.step()
    stepper.param_groups[0]["lr"] = options["lr"]
    before = w.detach().clone()
    stepper.step()
    return Map(before, w.detach())


def compute_all() -> dict[str, dict[str, Map]]:
    """The map of every mode of every optimizer."""
    return {name: {mode: compute(name, mode) for mode in MODES} for name in SETTINGS}


def draw(maps: Mapping[str, Mapping[str, Map]]) -> Figure:
    """One panel for each optimizer."""
    figure = new_figure(10, 5.4, caption())
    panels = figure.subplots(1, len(maps), sharex=True, sharey=True)
    for axes, (name, modes) in zip(panels, maps.items(), strict=True):
        draw_maps(axes, modes)
        options = ", ".join(f"{key}={value}" for key, value in SETTINGS[name][1].items())
        axes.set_title(f"{name}({options}, l1={L1})\ngradient of the loss: {GRADIENT}", **TITLE)
    panels[0].set_ylabel("w after the step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=10, frameon=False)
    return figure


STYLES: dict[str, dict[str, Any]] = {
    "prox": {"color": SPIKE, "linewidth": 4.5},
    "decoupled": {"color": COLOURS[0], "linewidth": 2.2},
    "subgradient": {"color": COLOURS[2], "linewidth": 1.8, "linestyle": (0, (4, 2))},
}


def draw_maps(axes: Axes, modes: Mapping[str, Map]) -> None:
    """The three maps, and the dead zones of those that have one."""
    edge = modes["prox"].before.max().item()
    axes.plot([-edge, edge], [-edge, edge], ":", color=QUIET, linewidth=1.2, label="w stays")
    for mode, found in modes.items():
        axes.plot(found.before, without_jumps(found), **STYLES[mode], label=f'l1_mode="{mode}"')
    axes.axhline(0, color=QUIET, linewidth=0.6, zorder=0)
    axes.axvline(0, color=QUIET, linewidth=0.6, zorder=0)
    draw_zone(axes, "prox", modes["prox"], (-0.305, 0.3), ha="left", va="top")
    draw_zone(axes, "decoupled", modes["decoupled"], (0.31, -0.33), ha="right", va="bottom")
    axes.set_xlabel("w before the step")
    axes.set_aspect("equal")
    tidy(axes)


def without_jumps(found: Map) -> Tensor:
    """The new weights with a gap at each jump, where plotting would draw a vertical line."""
    after = found.after.clone()
    after[1:][after.diff().abs() > 10 * found.before.diff().max()] = torch.nan
    return after


def draw_zone(axes: Axes, mode: str, found: Map, corner: tuple[float, float], **align: Any) -> None:
    """What becomes exactly 0, as a band and in words."""
    assert found.dead_zone is not None
    low, high = found.dead_zone
    colour = STYLES[mode]["color"]
    axes.axvspan(low, high, 0.17, 1, color=colour, alpha=0.12, linewidth=0)  # above the words
    of_zero = f"0 moves to {found.of_zero:.3g}" if found.of_zero else "0 stays 0"
    words = f"{mode}: exactly 0 for\n{low:.3f} ≤ w ≤ {high:.3f};\n{of_zero}"
    axes.text(*corner, words.replace("-", "\N{MINUS SIGN}"), color=colour, fontsize=9.5, **align)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("prox_modes", lambda: draw(compute_all()), arguments)


if __name__ == "__main__":
    main()
