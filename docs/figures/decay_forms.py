"""Draw decay_forms: what lr and weight_decay do to a weight without a gradient, in four forms.

A cosine schedule of lr, and each form three times: as it is, with half the lr, and with twice the
weight_decay. What is left of the weight tells which of the two numbers the decay obeys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from drawing import TITLE, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedreg
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption
from fusedreg.optimizer import FusedOptimizer

STEPS = 1000
LR = 1.4e-3
"""The first one; all of them add up to 0.7, so that about half of the weight is left."""


class Form(NamedTuple):
    """One way to decay."""

    make: Callable[..., FusedOptimizer]
    weight_decay: float
    options: dict[str, Any]


FORMS: dict[str, Form] = {
    "coupled (Adam)": Form(fusedreg.Adam, 1.0, {}),
    "decoupled (AdamW)": Form(fusedreg.AdamW, 1.0, {}),
    "independent of lr (AdamW)": Form(fusedreg.AdamW, LR, {"lr_independent_decay": True}),
    "in the trust ratio (LAMB)": Form(fusedreg.LAMB, 1.0, {}),
}
CHANGES: dict[str, tuple[float, float]] = {
    "as it is": (1.0, 1.0),
    "half the lr": (0.5, 1.0),
    "twice the weight_decay": (1.0, 2.0),
}
"""What lr and weight_decay are multiplied with."""

STYLES: dict[str, dict[str, Any]] = {
    "as it is": {"color": QUIET, "linewidth": 4, "alpha": 0.4},
    "half the lr": {"color": COLOURS[0], "linewidth": 1.8, "linestyle": (0, (5, 3))},
    "twice the weight_decay": {"color": SPIKE, "linewidth": 1.8, "linestyle": (5, (3, 5))},
}


def compute(form: Form, of_lr: float = 1.0, of_decay: float = 1.0) -> list[float]:
    """The weight before the first step and after each."""
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = form.make(
        [w], lr=of_lr * LR, weight_decay=of_decay * form.weight_decay, **form.options
    )
    schedule = CosineAnnealingLR(optimizer, STEPS)
    w.grad = torch.zeros_like(w)
    way = [w.item()]
    for _ in range(STEPS):
        optimizer.step()
        schedule.step()
        way.append(w.item())
    return way


def compute_all() -> dict[str, dict[str, list[float]]]:
    """Every form with every change."""
    return {
        name: {change: compute(form, *factors) for change, factors in CHANGES.items()}
        for name, form in FORMS.items()
    }


def draw(ways: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """One panel for each form."""
    figure = new_figure(11, 4.3, caption())
    panels = figure.subplots(1, len(ways), sharex=True, sharey=True)
    for axes, (name, of) in zip(panels, ways.items(), strict=True):
        draw_form(axes, of)
        axes.set_title(name, **TITLE)
    panels[0].set_ylabel("weight")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=3, frameon=False, handlelength=3.5
    )
    return figure


def draw_form(axes: Axes, ways: Mapping[str, Sequence[float]]) -> None:
    """The three ways, those that lie on another as dashes on its broad line."""
    for change, way in ways.items():
        axes.plot(way, label=change, **STYLES[change])
    axes.set(xlabel="step", ylim=(0, 1.03), xlim=(0, STEPS))
    axes.set_xticks([0, STEPS // 2, STEPS])
    tidy(axes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("decay_forms", lambda: draw(compute_all()), arguments)


if __name__ == "__main__":
    main()
