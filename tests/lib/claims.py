"""The tables of docs/misconceptions.md, each headed by the name of the test that measures it.

And the problem that most of them are measured on: least squares on the diabetes data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache, wraps

import torch
from sklearn.linear_model import Lasso, Ridge
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fusedreg.demo import diabetes

from pages import ROOT

PAGE = ROOT / "docs/misconceptions.md"

Numbers = Mapping[str, float | int | str]
"""Label of a row -> what was measured."""

MEASURED: set[str] = set()
"""The tests that `measures` made."""

TABLE = re.compile(r"^\| `(test_\w+)` \| measured \|\n\|---\|---\|\n((?:\|.*\|\n)+)", re.MULTILINE)


def tables() -> dict[str, dict[str, str]]:
    """Name of the test -> label of the row -> number, as the page prints them."""
    return {
        name: dict(tuple(line.strip("| ").split(" | ")) for line in rows.splitlines())
        for name, rows in TABLE.findall(PAGE.read_text())
    }


def agrees(printed: str, measured: float | int | str) -> bool:
    """Whether a cell says what was measured: a word, a bound, a whole number, or so many digits."""
    if isinstance(measured, str):
        return printed == measured
    if printed.startswith("< "):
        return measured < float(printed[2:])
    number = Decimal(printed)
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int), f"{printed} is no number"
    if exponent == 0:  # a count, or a number that is meant to be exact
        return measured == number
    return abs(Decimal(measured) - number) <= Decimal((0, (5,), exponent - 1))


def measures(measure: Callable[[], Numbers]) -> Callable[[], None]:
    """A test that the page's table of this name has just these rows, with these numbers."""
    MEASURED.add(measure.__name__)

    @wraps(measure)
    def test() -> None:
        printed, measured = tables()[measure.__name__], measure()
        assert list(printed) == list(measured)
        wrong = {
            label: (printed[label], number)
            for label, number in measured.items()
            if not agrees(printed[label], number)
        }
        assert wrong == {}  # label: (printed, measured)

    return test


# ---- what is measured ----------------------------------------------------------------------------


def weight(*start: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(start or [0.0] * 10, dtype=dtype))


@cache
def normal_equations() -> tuple[Tensor, Tensor]:
    """H and c of the diabetes data: the gradient of mean((y - Xw)^2) / 2 is H w - c."""
    X, y, _ = diabetes.load()
    return X.T @ X / len(y), X.T @ y / len(y)


def gradient(w: Tensor) -> Tensor:
    H, c = normal_equations()
    return H @ w - c


def towards(*minimum: float) -> Callable[[Tensor], Tensor]:
    """Gradient of half the squared distance to `minimum`."""
    return lambda w: w - torch.tensor(minimum, dtype=w.dtype)


def descend(
    optimizer: Optimizer,
    steps: int,
    gradient: Callable[[Tensor], Tensor] = gradient,
    cosine: bool = False,
) -> Tensor:
    """Step the only parameter along `gradient`, with lr constant or falling to 0."""
    (w,) = optimizer.param_groups[0]["params"]
    scheduler = CosineAnnealingLR(optimizer, steps) if cosine else None
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
        if scheduler:
            scheduler.step()
    return w.detach()


def ridge(weight_decay: float) -> Tensor:
    """Minimum of loss + weight_decay / 2 |w|^2."""
    X, y, _ = diabetes.load()
    model = Ridge(alpha=len(y) * weight_decay, fit_intercept=False, solver="cholesky")
    return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)


def lasso(l1: float) -> Tensor:
    """Minimum of loss + l1 |w|_1."""
    X, y, _ = diabetes.load()
    model = Lasso(alpha=l1, fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.from_numpy(model.fit(X.numpy(), y.numpy()).coef_)


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def zeros(w: Tensor) -> int:
    return int((w == 0).sum())
