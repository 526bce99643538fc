"""Draw docs/figures/cross_validation.png: choosing l1 by cross-validation, beside scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from drawing import TITLE, run, silently
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.model_selection import KFold
from torch import Tensor

from fusedreg.demo import diabetes
from fusedreg.demo.diabetes import Data
from fusedreg.demo.style import CLOUD, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import caption

FOLDS = KFold(5, shuffle=True, random_state=0)
POINTS = 20

Fit = Callable[[Data], diabetes.Path]


class Curve(NamedTuple):
    """Along l1: mean squared error of each fold, and the coefficients on all data."""

    l1: Sequence[float]
    errors: np.ndarray
    coefficients: Tensor

    @property
    def mean(self) -> np.ndarray:
        """Cross-validated error."""
        return self.errors.mean(1)

    @property
    def standard_error(self) -> np.ndarray:
        """Of that mean."""
        return self.errors.std(1, ddof=1) / FOLDS.n_splits**0.5

    @property
    def best(self) -> int:
        """Where the error is smallest."""
        return int(self.mean.argmin())

    @property
    def chosen(self) -> int:
        """The largest l1 within one standard error of the smallest error; l1 decreases."""
        return int(np.argmax(self.mean <= self.mean[self.best] + self.standard_error[self.best]))

    @property
    def nonzeros(self) -> np.ndarray:
        """Of the coefficients on all data."""
        return (self.coefficients != 0).sum(1).numpy()


def folds(data: Data) -> Iterator[tuple[Data, Data]]:
    """What each fold is fitted on, standardised, and what is held out, in the same units."""
    for train, test in FOLDS.split(data.X):
        X, y = data.X[train], data.y[train]
        mean, std, intercept = X.mean(0), X.std(0, correction=0), y.mean()
        yield (
            Data((X - mean) / std, y - intercept, data.names),
            Data((data.X[test] - mean) / std, data.y[test] - intercept, data.names),
        )


def cross_validate(data: Data, fit: Fit) -> Curve:
    """Fit paths without each fold, score them on it, and fit all data at last."""
    errors = []
    for train, held_out in folds(data):
        residuals = held_out.X @ fit(train).coefficients.T - held_out.y[:, None]
        errors.append((residuals**2).mean(0))
    path = fit(data)
    return Curve(path.l1, torch.stack(errors, 1).numpy(), path.coefficients)


def compute(count: int = POINTS) -> tuple[Curve, Curve]:
    """The curve of fusedreg and that of scikit-learn, on `count` values of l1."""
    data = diabetes.load()
    l1s = diabetes.l1_grid(data, count)
    return (
        cross_validate(data, lambda part: diabetes.follow(part, "Lasso", "SGD", l1s, silently)),
        cross_validate(data, lambda part: diabetes.reference(part, "Lasso", l1s)),
    )


def draw(ours: Curve, theirs: Curve) -> Figure:
    """Error over l1 above, nonzeros over l1 below, by fusedreg and by scikit-learn."""
    figure = new_figure(8, 6.4, caption("scikit-learn"))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    draw_errors(upper, ours, theirs)
    draw_nonzeros(lower, ours, theirs)
    for axes in (upper, lower):
        tidy(axes)
        for index in (ours.best, ours.chosen):
            axes.axvline(ours.l1[index], color=QUIET, linewidth=1, linestyle=":")
    worst = abs(ours.errors - theirs.errors).max()
    upper.set_title(
        "Lasso on the diabetes data, five folds: cross-validated error\n"
        f"largest difference to scikit-learn in any fold: {worst:.0e}",
        **TITLE,
    )
    return figure


def draw_errors(axes: Axes, ours: Curve, theirs: Curve) -> None:
    """The mean over folds with its band, scikit-learn's dots, and the two choices."""
    l1s = ours.l1
    low, high = ours.mean - ours.standard_error, ours.mean + ours.standard_error
    axes.fill_between(
        l1s, low, high, color=CLOUD, alpha=0.3, linewidth=0, label="± one standard error"
    )
    axes.plot(l1s, ours.mean, color=CLOUD, linewidth=3, label="fusedreg.SGD(l1=…)")
    axes.plot(l1s, theirs.mean, "o", color=SPIKE, markersize=3.5, label="scikit-learn's Lasso")
    limit = high[ours.best]
    axes.hlines(limit, l1s[ours.best], l1s[ours.chosen], color=QUIET, linewidth=1)
    for index, name, side in [
        (ours.best, "smallest error", "right"),
        (ours.chosen, "largest l1 within\none standard error", "left"),
    ]:
        axes.annotate(
            name,
            (l1s[index], 0.62),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if side == "right" else 6, 0),
            textcoords="offset points",
            ha=side,
            color=QUIET,
            fontsize=9,
        )
    axes.set_ylabel("mean squared error, y standardised")
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_nonzeros(axes: Axes, ours: Curve, theirs: Curve) -> None:
    """Coefficients that are not 0, fitted on all data."""
    axes.plot(ours.l1, ours.nonzeros, color=CLOUD, linewidth=3, drawstyle="steps-mid")
    axes.plot(theirs.l1, theirs.nonzeros, "o", color=SPIKE, markersize=3.5)
    axes.set_xscale("log")
    axes.set_ylim(-0.5, 10.5)
    axes.set_yticks(range(0, 11, 2))
    axes.set_ylabel("nonzeros of 10")
    axes.set_xlabel("l1, for the loss mean((y - Xw)²) / 2")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw into the folder that is named, or beside this file."""
    run("cross_validation", lambda: draw(*compute()), arguments)


if __name__ == "__main__":
    main()
