"""Problems with known solutions and bitwise comparison, for the tests of penalties and clipping."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import pytest
import torch
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import Tensor

from cases import CASES, FEW_PATHS, Case
from compare import frozen, parameters_of

few_paths = pytest.mark.parametrize("path", FEW_PATHS, indirect=True)
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


def family(case: Case) -> str:
    """How a step depends on the size of the gradient; the one place that says so.

    "linear": in proportion; "adaptive": not, because a root of squares divides it, to which eps is
    added; "sign": not at all, so that there is no threshold which solves the Lasso.
    """
    if "eps" in case.options:
        return "adaptive"
    mode = inspect.signature(case.cls).parameters["l1_mode"].default
    return "linear" if mode == "prox" else "sign"


def linear(cases: list[Case]) -> list[Case]:
    return [case for case in cases if family(case) == "linear"]


def adaptive(cases: list[Case]) -> list[Case]:
    return [case for case in cases if family(case) == "adaptive"]


def elementwise(cases: list[Case]) -> list[Case]:
    """Without those whose steps depend on the norm of the tensor."""
    return [case for case in cases if not case.cls.layerwise]


def minimising(cases: list[Case]) -> list[Case]:
    """Maximising is another test's matter: it is minimising the negative loss, bit for bit."""
    return [case for case in cases if not case.options["maximize"]]


def with_eps(case: Case, eps: float) -> dict[str, float]:
    """The option for a case that has one."""
    return {"eps": eps} if "eps" in case.options else {}


def waits_for_gradient(case: Case) -> bool:
    """Whether the exact threshold is 0 where no gradient has been seen, as nothing divides l1."""
    return family(case) == "adaptive" and not case.options.get("initial_accumulator_value")


def objective(case: Case) -> tuple[float, float] | None:
    """The l1 and weight_decay that the fixed point of a case minimises, or None if it has none."""
    options = case.options
    l1, weight_decay, mode = (options[name] for name in ("l1", "weight_decay", "l1_mode"))
    decoupled = options["decoupled_weight_decay"]
    if mode == "subgradient" and l1:  # goes around the minimiser for ever
        return None
    if family(case) == "sign":  # so does a step whose length does not depend on the gradient
        return None
    if family(case) == "linear":
        # A constant gradient g moves w by lr * gain * g, and what is decoupled by lr alone.
        gain = (1 - options["dampening"]) / (1 - options["momentum"])
        l1 = l1 / gain if mode == "decoupled" else l1
        return l1, weight_decay / gain if decoupled else weight_decay
    # Divided by sqrt(v) is the gradient, but not what is decoupled: no penalty of the loss.
    if (decoupled and weight_decay) or mode == "decoupled":
        return None
    # Only a threshold, which takes back what moves w, ends steps that are as long as lr |w|.
    return None if case.cls.layerwise and not l1 else (l1, weight_decay)


def _with_the_other_decay(case: Case) -> Case:
    other = not case.options["decoupled_weight_decay"]
    name = f"{'de' if other else ''}coupled_{case.penalty}"
    return replace(case, penalty=name, kwargs={**case.kwargs, "decoupled_weight_decay": other})


_MINIMISING = minimising(CASES)
_OTHER_ELASTIC_NETS = [
    _with_the_other_decay(case)
    for case in _MINIMISING
    if case.penalty == "elastic_net" and "decoupled_weight_decay" not in case.cls.fixed_options
]
SOLVABLE = [
    case
    for case in _MINIMISING + _OTHER_ELASTIC_NETS
    if case.penalty != "none" and objective(case) is not None
]
"""Cases whose fixed point is a solution that scikit-learn knows."""

PROX = [
    case
    for case in CASES
    if case.penalty in ("l1_prox", "elastic_net") and case.options["l1_mode"] == "prox"
]

STEPS = {torch.float64: 600, torch.float32: 300}
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""How far from the solution `minimise` may be after STEPS.

Momentum 0.9 and beta1 0.9 contract by sqrt(0.9) = 0.949 a step, AMSGrad, whose denominator
remembers the first gradient, by 0.957. That leaves 0.957 ** 600 = 4e-12 or 0.957 ** 300 = 2e-6 of
the first distance, which is at most 4, times a transient of at most 10. A float32 step is lost once
it is below half an ulp of w, 1.2e-7 for |w| < 4, that is where the residual is below
1.2e-7 / (lr * gain) with lr * gain >= 0.1 / 4.6: 6e-6, and as the Hessian is at least 1, w is at
most sqrt(8) times that away. Adagrad contracts less and less: lr_t / d adds up
to 13 in 300 steps and to 23 in 600 even with lr_decay, which leaves exp(-23) = 1e-10.
"""


def remembers_variances(case: Case) -> bool:
    """Whether what is divided by variances of other steps meets a threshold of today's."""
    return bool(case.options.get("centered") and case.options["momentum"])


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """TOLERANCE, and what the rounding of a variance adds where a buffer remembers it.

    Where gradients have settled at g, v - a^2 is the rounding of g^2, and its root sqrt(eps) |g|.
    Beside the option eps that changes the denominator a little in every step. What a buffer has of
    earlier denominators is not balanced by the threshold, which has today's: a residual of that
    part of g and of l1, which are equal where w is not 0. So w is at most sqrt(8) times that away.
    """
    if not remembers_variances(case):
        return TOLERANCE[dtype]
    l1, eps = case.options["l1"], case.options["eps"]
    noise = torch.finfo(dtype).eps ** 0.5 * l1 / eps
    return TOLERANCE[dtype] + 8**0.5 * noise * 2 * l1


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
