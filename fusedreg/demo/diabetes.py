"""Lasso and elastic net on the diabetes data: whole paths against scikit-learn's own solver.

The loss is mean((y - X w)^2) / 2 in float64, so that scikit-learn's `alpha * l1_ratio` is `l1` and
`alpha * (1 - l1_ratio)` is `weight_decay`. One optimizer walks down the whole path: at each point
its group gets the next `l1`, and its parameters and moments are the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso
from torch import Tensor
from torch.optim import Optimizer

import fusedreg
from fusedreg.demo.comparison import Comparison
from fusedreg.demo.progress import Track
from fusedreg.penalty import kkt_distance

PENALTIES = {"Lasso": 1.0, "elastic net": 0.5}
"""Name of the penalty -> scikit-learn's l1_ratio."""

MOMENTUM = 0.9

KKT_TOLERANCE = 1e-12
"""A point of the path is reached when no coordinate is further than this from optimal."""

MAX_STEPS = 20_000
"""Per point. Momentum shrinks the error by sqrt(0.9) a step: about 500 steps are needed."""

COEFFICIENT_TOLERANCE = 1e-9
"""On standardised data, where coefficients are of order 1; see `guaranteed_difference`."""


class Data(NamedTuple):
    """Standardised predictors (n x p) and response (n)."""

    X: Tensor
    y: Tensor
    names: Sequence[str]


class Path(NamedTuple):
    """The minimisers along `l1`, one row of `coefficients` each, as one solver found them."""

    penalty: str
    solver: str
    l1: list[float]
    coefficients: Tensor
    kkt: list[float]
    steps: list[int]

    @property
    def zeros(self) -> list[int]:
        """Number of coefficients that are exactly 0, at each l1."""
        counts: list[int] = (self.coefficients == 0).sum(1).tolist()
        return counts

    def worst_difference(self, other: Path) -> list[float]:
        """Largest difference of a coefficient, at each l1."""
        worst: list[float] = (self.coefficients - other.coefficients).abs().amax(1).tolist()
        return worst


def load() -> Data:
    """442 patients, 10 measurements, and the disease's progression after a year."""
    bunch = load_diabetes(scaled=False)
    X, y = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target)
    return Data(_standardise(X), _standardise(y), bunch.feature_names)


def _standardise(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def loss(data: Data, w: Tensor) -> Tensor:
    """Half the mean squared residual."""
    return ((data.y - data.X @ w) ** 2).mean() / 2


def l1_grid(data: Data, count: int) -> list[float]:
    """`count` values of l1 on a geometric grid that starts below lambda_max and ends at 1e-3 of it.

    lambda_max is the largest entry of the loss gradient at 0: from there on all is exactly 0.
    """
    lambda_max = (data.X.T @ data.y).abs().max().item() / len(data.y)
    return [float(value) for value in lambda_max * np.geomspace(1, 1e-3, count + 1)[1:]]


def curvature(data: Data) -> tuple[float, float]:
    """Smallest and largest eigenvalue of the loss's Hessian, X'X / n."""
    eigenvalues = torch.linalg.eigvalsh(data.X.T @ data.X / len(data.y))
    return eigenvalues[0].item(), eigenvalues[-1].item()


def guaranteed_difference(data: Data) -> float:
    """What the two residuals allow the coefficients of two solvers to differ by.

    If no subgradient entry of an m-strongly convex function exceeds r at w, then
    |w - minimiser| <= sqrt(p) r / m. (scikit-learn's residual is added, and is far smaller.)
    """
    return sqrt(data.X.shape[1]) * KKT_TOLERANCE / curvature(data)[0]


Make = Callable[[Tensor], Optimizer]
Rate = Callable[[float, float], float]

SOLVERS: dict[str, tuple[Make, Rate]] = {
    "SGD": (
        lambda w: fusedreg.SGD([w], momentum=MOMENTUM),
        lambda step, l1: step,
    ),
    # At the solution every active coordinate has |gradient| = l1, so Adam divides by l1 and
    # averages with weight 1 - beta1: with this lr it moves as the SGD above does. Any constant lr
    # has the same fixed point; a much larger one circles around it.
    "Adam": (
        lambda w: fusedreg.Adam([w], betas=(MOMENTUM, 0.99)),
        lambda step, l1: step * l1 / (1 - MOMENTUM),
    ),
}
"""Optimizer -> how it is made, and its lr from the step length 1 / curvature and l1."""


def follow(data: Data, penalty: str, solver: str, l1s: Sequence[float], track: Track) -> Path:
    """The path of `penalty` along the decreasing `l1s`, by an optimizer of fusedreg."""
    make, rate = SOLVERS[solver]
    _, steepest = curvature(data)
    w = torch.zeros(data.X.shape[1], dtype=data.X.dtype, requires_grad=True)
    optimizer = make(w)
    group = optimizer.param_groups[0]
    points = []
    for l1 in track(l1s, f"diabetes: {penalty}, {solver}"):
        group["l1"] = l1
        group["weight_decay"] = _weight_decay(penalty, l1)
        group["lr"] = rate(1 / (steepest + group["weight_decay"]), l1)
        kkt, steps = minimise(data, w, optimizer)
        points.append((w.detach().clone(), kkt, steps))
    coefficients, kkts, counts = zip(*points, strict=True)
    return Path(penalty, solver, list(l1s), torch.stack(coefficients), list(kkts), list(counts))


def minimise(data: Data, w: Tensor, optimizer: Optimizer) -> tuple[float, int]:
    """Step until `w` is optimal to KKT_TOLERANCE; the KKT residual reached and the steps taken."""
    group = optimizer.param_groups[0]
    kkt = float("inf")
    for step in range(MAX_STEPS + 1):
        optimizer.zero_grad()
        loss(data, w).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if step % 10 == 0:  # the gradient is there anyway; the residual costs as much as a step
            kkt = _kkt(w, w.grad, group["l1"], group["weight_decay"])
            if kkt <= KKT_TOLERANCE:
                break
        optimizer.step()
    return kkt, step


def reference(data: Data, penalty: str, l1s: Sequence[float]) -> Path:
    """The same path by scikit-learn's coordinate descent."""
    X, y = data.X.numpy(), data.y.numpy()
    points = []
    for l1 in l1s:
        exact = {"fit_intercept": False, "tol": 1e-14, "max_iter": 1_000_000}
        ratio = PENALTIES[penalty]
        if ratio == 1:
            model = Lasso(alpha=l1, **exact)
        else:
            model = ElasticNet(alpha=l1 / ratio, l1_ratio=ratio, **exact)
        w = torch.from_numpy(model.fit(X, y).coef_.copy())
        gradient = data.X.T @ (data.X @ w - data.y) / len(data.y)
        points.append((w, _kkt(w, gradient, l1, _weight_decay(penalty, l1)), model.n_iter_))
    coefficients, kkts, counts = zip(*points, strict=True)
    return Path(
        penalty, "scikit-learn", list(l1s), torch.stack(coefficients), list(kkts), list(counts)
    )


def _weight_decay(penalty: str, l1: float) -> float:
    ratio = PENALTIES[penalty]
    return l1 * (1 - ratio) / ratio


def _kkt(w: Tensor, gradient: Tensor | None, l1: float, weight_decay: float) -> float:
    assert gradient is not None
    distance = kkt_distance(w.detach(), gradient, l1=l1, weight_decay=weight_decay)
    return distance.max().item()


def comparisons(paths: Sequence[Path]) -> list[Comparison]:
    """What must hold of every path against scikit-learn's path of the same penalty."""
    exact = {path.penalty: path for path in paths if path.solver == "scikit-learn"}
    found = []
    for path in paths:
        name = f"{path.penalty} path, {path.solver}"
        found.append(Comparison(f"{name}: KKT residual", max(path.kkt), "<=", KKT_TOLERANCE))
        if path.solver == "scikit-learn":
            continue
        other = exact[path.penalty]
        worst = max(path.worst_difference(other))
        unequal = sum(a != b for a, b in zip(path.zeros, other.zeros, strict=True))
        found += [
            Comparison(
                f"{name}: largest coefficient difference to scikit-learn",
                worst,
                "<=",
                COEFFICIENT_TOLERANCE,
            ),
            Comparison(
                f"{name}: values of l1 with another number of exact zeros", unequal, "<=", 0
            ),
        ]
    return found
