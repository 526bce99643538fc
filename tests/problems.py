"""Problems with known solutions and bitwise comparison, for the tests of penalties and clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import Tensor

import fusedreg

from cases import CASES, Case
from compare import frozen, parameters_of

few_paths = pytest.mark.parametrize("path", ["reference", "device"], indirect=True)
"""For tests that take many steps: numbers on the host, and numbers as tensors."""

quick = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # `path` has no state
)
"""The same examples in every run, so that CI fails on a change and on nothing else."""


# ---- a regression that scikit-learn solves too ---------------------------------------------------


@cache
def regression() -> tuple[Tensor, Tensor]:
    """X and y with the Hessian X'X / n of mean((y - Xw)^2) / 2 between 1 and 2, not diagonal.

    The penalties of the case table zero some coefficients: lambda_max is 4.5, `l1` is 0.3.
    """
    n, p = 40, 8
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(n + p + 1, n, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(normal[:n, :p]).Q
    right = torch.linalg.qr(normal[n : n + p, :p]).Q
    X = n**0.5 * left * torch.linspace(1, 2, p, dtype=torch.float64).sqrt() @ right.T
    truth = torch.tensor([3, -2, 1, -0.5, 0, 0, 0, 0], dtype=torch.float64)
    return X, X @ truth + normal[-1]


@cache
def normal_equations(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """H and c with gradient H w - c."""
    X, y = regression()
    return (X.T @ X / len(y)).to(dtype), (X.T @ y / len(y)).to(dtype)


def loss_gradient(w: Tensor) -> Tensor:
    H, c = normal_equations(w.dtype)
    return H @ w - c


@cache
def solution(l1: float, weight_decay: float) -> Tensor:
    """What scikit-learn finds for the loss plus l1 |w| + weight_decay / 2 |w|^2."""
    X, y = (array.numpy() for array in regression())
    # A coefficient is final when a sweep over all moves it by less than tol: far below 1e-8.
    descent: dict[str, Any] = {"fit_intercept": False, "tol": 1e-14, "max_iter": 10_000}
    if l1 == 0:
        model = Ridge(alpha=len(y) * weight_decay, fit_intercept=False, solver="cholesky")
    elif weight_decay == 0:
        model = Lasso(alpha=l1, **descent)
    else:
        alpha = l1 + weight_decay
        model = ElasticNet(alpha=alpha, l1_ratio=l1 / alpha, **descent)
    return torch.from_numpy(model.fit(X, y).coef_)


def objective(case: Case) -> tuple[float, float] | None:
    """The l1 and weight_decay that the fixed point of a case minimises, or None if it has none."""
    options = case.kwargs
    l1, weight_decay = options.get("l1", 0.0), options["weight_decay"]
    mode = options.get("l1_mode", "prox")
    decoupled = options.get("decoupled_weight_decay", case.cls is fusedreg.AdamW)
    if mode == "subgradient":  # goes around the minimiser for ever
        return None
    if issubclass(case.cls, fusedreg.SGD):
        # A constant gradient g moves w by lr * gain * g, and what is decoupled by lr alone.
        gain = (1 - options.get("dampening", 0.0)) / (1 - options.get("momentum", 0.0))
        l1 = l1 / gain if mode == "decoupled" else l1
        return l1, weight_decay / gain if decoupled else weight_decay
    # Divided by sqrt(v) is the gradient, but not what is decoupled: no penalty of the loss.
    if (decoupled and weight_decay) or mode == "decoupled":
        return None
    return l1, weight_decay


def _with_decoupled_decay(case: Case) -> Case:
    kwargs = {**case.kwargs, "decoupled_weight_decay": True}
    return replace(case, penalty="decoupled_elastic_net", kwargs=kwargs)


# Maximising is another test's matter: it is minimising the negative loss, bit for bit.
_MINIMISING = [case for case in CASES if not case.kwargs.get("maximize")]
_SGD_ELASTIC_NETS = [
    _with_decoupled_decay(case)
    for case in _MINIMISING
    if case.penalty == "elastic_net" and issubclass(case.cls, fusedreg.SGD)
]
SOLVABLE = [
    case
    for case in _MINIMISING + _SGD_ELASTIC_NETS
    if case.penalty != "none" and objective(case) is not None
]
"""Cases whose fixed point is a solution that scikit-learn knows."""

PROX = [case for case in CASES if case.penalty in ("l1_prox", "elastic_net")]

STEPS = {torch.float64: 600, torch.float32: 300}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far from the solution `minimise` may be after STEPS.

Momentum 0.9 and beta1 0.9 contract by sqrt(0.9) = 0.949 a step, AMSGrad, whose denominator
remembers the first gradient, by 0.957. That leaves 0.957 ** 600 = 4e-12 or 0.957 ** 300 = 2e-6 of
the first distance, which is at most 4, times a transient of at most 10. A float32 step is lost once
it is below half an ulp of w, 1.2e-7 for |w| < 4, that is where the residual is below
1.2e-7 / (lr * gain) with lr * gain >= 0.1 / 4.6: 6e-6, and as the Hessian is at least 1, w is at
most sqrt(8) times that away.
"""


def minimise(
    optimizer: torch.optim.Optimizer,
    steps: int,
    each: Callable[[], object] = lambda: None,
    gradient: Callable[[Tensor], Tensor] = loss_gradient,
) -> Tensor:
    """Step the only parameter of `optimizer` along the full gradient, calling `each` after it."""
    (w,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        w.grad = gradient(w.detach())
        optimizer.step()
        each()
    return w.detach()


def start(dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    """Where a fit begins: nothing is 0, and half of the signs are wrong."""
    return torch.nn.Parameter(torch.linspace(-1, 1, 8, dtype=dtype))


# ---- nothing may differ -------------------------------------------------------------------------


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bit patterns: -0.0 differs from 0.0, NaN equals NaN."""
    return frozen(a) == frozen(b)


def snapshot(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    """The bits of every parameter and of everything in its state."""
    return {
        (index, name): frozen(tensor)
        for index, param in enumerate(parameters_of(optimizer))
        for name, tensor in {"param": param, **optimizer.state.get(param, {})}.items()
    }


def differences(
    actual: dict[tuple[int, str], Any], expected: dict[tuple[int, str], Any]
) -> list[tuple[int, str]]:
    """What is expected and is missing or has other bits; empty is good, and more may be there."""
    return [key for key, bits in expected.items() if actual.get(key) != bits]
