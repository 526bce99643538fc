"""Draw ulp_error: how far rounding takes a weight in 1,000 steps, by fusedreg and by torch.optim.

All start from the same weights and get the same gradients, rounded to the dtype once, and the exact
run takes these rounded numbers in float64 (torch's for-loop). The gradients are random and do not
depend on the weights, so that an error is never fed back through a loss: what differs between the
runs is their arithmetic alone. In training, an error moves the gradients too.

Weights start between 1 and 2 in size and most stay there, where one ulp is the dtype's eps, and the
learning rates are about an ulp of bfloat16, which would lose much smaller steps altogether.

AdamW's error grows with the steps and not with their root, because 1 - lr * weight_decay is rounded
once and multiplies in every step: with weight_decay=0 the float32 error is 12 ulps instead of 214.

Implementations of torch that give the same bits share a line. SGD(fused=True) is left out: on a CPU
torch 2.13 leaves whole blocks of bfloat16 as they were (see docs/differences.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from drawing import TITLE, run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

import fusedreg
from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

STEPS = 1000
WEIGHTS = 2048
"""Enough that a root mean square over them is known to a few percent."""

DTYPES = (torch.float32, torch.bfloat16)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.01},
    "SGD": {"lr": 0.001, "momentum": 0.9, "weight_decay": 0.01},
}
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


class Curve(NamedTuple):
    """Root mean square of the error in ulps, after some of the steps."""

    name: str
    steps: list[int]
    errors: list[float]


def random(seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers in float64 that `dtype` can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WEIGHTS, generator=generator, dtype=torch.float64).to(dtype).double()


def start(dtype: torch.dtype) -> Tensor:
    """Weights of either sign from 1 to 2 in size, in float64, that `dtype` can hold."""
    generator = torch.Generator().manual_seed(0)
    size = 1 + torch.rand(WEIGHTS, generator=generator, dtype=torch.float64)
    return (size * random(1, dtype).sign()).to(dtype).double()


def seen_steps(steps: int) -> list[int]:
    """When the error is looked at: about 40 times, evenly on a log axis."""
    return sorted({round(float(step)) for step in np.geomspace(1, steps, 50)})


def trajectory(
    make: Callable[..., Optimizer],
    options: Mapping[str, Any],
    rounded_to: torch.dtype,
    run_in: torch.dtype,
    steps: int,
) -> Tensor:
    """The weights after each of `seen_steps`, from numbers that `rounded_to` can hold."""
    w = torch.nn.Parameter(start(rounded_to).to(run_in))
    optimizer = make([w], **options)
    seen, found = set(seen_steps(steps)), []
    for step in range(1, steps + 1):
        w.grad = random(1000 + step, rounded_to).to(run_in)
        optimizer.step()
        if step in seen:
            found.append(w.detach().to(torch.float64, copy=True))
    return torch.stack(found)


def compute(name: str, dtype: torch.dtype, steps: int = STEPS) -> list[Curve]:
    """The error of each implementation, fusedreg's first; equal ones of torch share a curve."""
    ours, theirs, options = getattr(fusedreg, name), getattr(torch.optim, name), OPTIMIZERS[name]
    exact = trajectory(theirs, {**options, "foreach": False}, dtype, torch.float64, steps)
    runs = {"fusedreg": trajectory(ours, options, dtype, dtype, steps)}
    if dtype != torch.float32:
        wide = {**options, "state_dtype": torch.float32}
        runs["fusedreg, float32 states"] = trajectory(ours, wide, dtype, dtype, steps)
    for key, choice in IMPLEMENTATIONS.items():
        if (name, key) != ("SGD", "fused"):
            found = trajectory(theirs, {**options, **choice}, dtype, dtype, steps)
            runs = share(runs, key, found)
    return [
        Curve(key, seen_steps(steps), rms_ulps(found, exact, dtype)) for key, found in runs.items()
    ]


def share(runs: Mapping[str, Tensor], key: str, found: Tensor) -> dict[str, Tensor]:
    """`runs` and one of torch, whose name joins that of an equal one."""
    for other, weights in runs.items():
        if other.startswith("torch") and torch.equal(weights, found):
            return {f"{n}, {key}" if n == other else n: w for n, w in runs.items()}
    return {**runs, f"torch {key}": found}


def rms_ulps(found: Tensor, exact: Tensor, dtype: torch.dtype) -> list[float]:
    """The error over the distance of neighbouring numbers at the exact weight, root mean square."""
    nearest = exact.abs().to(dtype)
    ulp = torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).double() - nearest.double()
    errors: list[float] = ((found - exact) / ulp).square().mean(1).sqrt().tolist()
    return errors


def compute_all(steps: int = STEPS) -> dict[torch.dtype, dict[str, list[Curve]]]:
    """Every optimizer in every dtype."""
    return {dtype: {name: compute(name, dtype, steps) for name in OPTIMIZERS} for dtype in DTYPES}


STYLES: dict[str, dict[str, Any]] = {
    "fusedreg": {"color": SPIKE, "linewidth": 5},
    "fusedreg, float32 states": {"color": COLOURS[5], "linewidth": 3.5},
    "torch for-loop": {"color": COLOURS[0], "linewidth": 1.8, "linestyle": "--"},
    "torch foreach": {"color": COLOURS[1], "linewidth": 1.8, "linestyle": "-."},
    "torch fused": {"color": "black", "linewidth": 1.8, "linestyle": ":"},
}


def draw(curves: Mapping[torch.dtype, Mapping[str, Sequence[Curve]]]) -> Figure:
    """A row for each dtype, a column for each optimizer."""
    figure = new_figure(10, 7.4, caption())
    panels = figure.subplots(len(curves), len(OPTIMIZERS), sharex=True, sharey="row")
    for row, (dtype, columns) in zip(panels, curves.items(), strict=True):
        kind = str(dtype).removeprefix("torch.")
        row[0].set_ylabel(f"error in ulps of {kind},\nroot mean square")
        for axes, (name, found) in zip(row, columns.items(), strict=True):
            draw_curves(axes, found)
            options = ", ".join(f"{key}={value}" for key, value in OPTIMIZERS[name].items())
            axes.set_title(f"{name}, {kind}\n{options}", **TITLE)
    why = "1 \N{MINUS SIGN} lr · weight_decay is rounded to float32,\nthe same way in every step, by all of them"
    style: dict[str, Any] = {"transform": panels[0, 0].transAxes, "fontsize": 9.5, "color": QUIET}
    panels[0, 0].text(0.98, 0.05, why, ha="right", **style)
    for axes in panels[-1]:
        axes.set_xlabel("steps")
    return figure


def draw_curves(axes: Axes, curves: Iterable[Curve]) -> None:
    """The errors over the steps, beside that of rounding a weight once in each step."""
    for curve in curves:
        style = STYLES[curve.name.replace(", foreach", "").replace(", fused", "")]
        axes.plot(curve.steps, curve.errors, label=curve.name, **style)
    # An error that is uniform over one ulp has the root mean square 1 / sqrt(12).
    once = [(step / 12) ** 0.5 for step in curve.steps]
    axes.plot(
        curve.steps, once, color=QUIET, linewidth=1, label="one rounding a step: √(steps / 12)"
    )
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    tidy(axes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw it."""
    run("ulp_error", lambda: draw(compute_all()), arguments)


if __name__ == "__main__":
    main()
