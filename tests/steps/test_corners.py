"""Numbers near both ends of a dtype: what a step forms on the way must not leave it sooner.

Where gradient, parameter and states are finite, and so are what the formula makes of them, a step
is the formula's up to roundings. The formulas are those of `fusedreg.cases`. They are
evaluated on decimal numbers, which no size leaves, and on ranges of them: `Range` has the
arithmetic.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.check.oracle import Slot, one_step

from cases import CASES, PATHS, TORCH_CASES, Case

FLOATS = (torch.float32, torch.bfloat16, torch.float64)
BEYOND = Decimal("1e100000")
"""Stands for infinity, without its NaN."""


# ---- arithmetic of what roundings may make of a number -------------------------------------------


class Range:
    """Decimal numbers between two, elementwise, and what arithmetic in a dtype may make of them.

    A result may be an ulp away at either end: half of it for the operation itself, and half for a
    constant that was rounded before or for another order of the same operations. Below the normal
    numbers an ulp is the smallest of all.
    """

    ulp: Decimal
    smallest: Decimal

    def __init__(self, low: Any, high: Any) -> None:
        self.low, self.high = low, high

    @classmethod
    def of(cls, x: Tensor) -> Range:
        """The numbers of a tensor, exactly."""
        beyond = {math.inf: BEYOND, -math.inf: -BEYOND}
        exact = np.array([beyond.get(n) or Decimal(n) for n in x.tolist()], dtype=object)
        return cls(exact, exact)

    def rounded(self, ulps: int = 1) -> Range:
        """What rounding may make of it; 0 is exact."""
        unit, zero = self.ulp * ulps, Decimal(0)
        low, high = (
            np.where(end == 0, zero, abs(end) * unit + self.smallest * ulps)
            for end in (self.low, self.high)
        )
        return Range(self.low - low, self.high + high)

    def _with(self, other: Any, operation: Callable[[Any, Any], Any]) -> Range:
        other = _range(other)
        ends = [operation(a, b) for a in (self.low, self.high) for b in (other.low, other.high)]
        return Range(np.minimum.reduce(ends), np.maximum.reduce(ends)).rounded()

    def __add__(self, other: Any) -> Range:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Range:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Range:
        return self._with(other, lambda a, b: a * b)

    def __truediv__(self, other: Any) -> Range:
        other = _range(other)
        zero = (other.low <= 0) & (other.high >= 0)
        safe = [np.where(zero, Decimal(1), end) for end in (other.low, other.high)]
        quotient = self._with(Range(*safe), lambda a, b: a / b)
        return Range(np.where(zero, -BEYOND, quotient.low), np.where(zero, BEYOND, quotient.high))

    __radd__, __rmul__ = __add__, __mul__

    def __rtruediv__(self, other: Any) -> Range:
        return _range(other) / self

    def __neg__(self) -> Range:
        return Range(-self.high, -self.low)

    def __pow__(self, exponent: int) -> Range:
        assert exponent == 2
        square = self * self
        return Range(np.maximum(square.low, Decimal(0)), square.high)

    def __gt__(self, other: Any) -> Truth:
        other = _range(other)
        return Truth(self.low > other.high, self.high > other.low)

    def __lt__(self, other: Any) -> Truth:
        return _range(other) > self

    def __eq__(self, other: Any) -> Any:
        other = _range(other)
        possible = (self.low <= other.high) & (self.high >= other.low)
        return Truth(possible & (self.low == self.high) & (other.low == other.high), possible)

    __hash__ = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        return FUNCTIONS[function](*args)


@dataclass
class Truth:
    """Where a comparison of ranges holds for all of their numbers, and where for some."""

    sure: Any
    possible: Any

    __torch_function__ = Range.__torch_function__


def _range(x: Any) -> Range:
    if isinstance(x, Range):
        return x
    exact = np.asarray(Decimal(x), dtype=object)
    return Range(exact, exact)


def _where(condition: Truth, chosen: Any, otherwise: Any) -> Range:
    chosen, otherwise = _range(chosen), _range(otherwise)
    low, high = np.minimum(chosen.low, otherwise.low), np.maximum(chosen.high, otherwise.high)
    return Range(
        np.where(condition.sure, chosen.low, np.where(condition.possible, low, otherwise.low)),
        np.where(condition.sure, chosen.high, np.where(condition.possible, high, otherwise.high)),
    )


def _relu(x: Range) -> Range:
    return Range(np.maximum(x.low, Decimal(0)), np.maximum(x.high, Decimal(0)))


def _sqrt(x: Range) -> Range:
    x = _relu(x)
    return Range(np.sqrt(x.low), np.sqrt(x.high)).rounded()


def _sign(x: Range) -> Range:
    return Range(*((end > 0) * Decimal(1) - (end < 0) * Decimal(1) for end in (x.low, x.high)))


def _norm(x: Range) -> float:
    middle = (x.low + x.high) / 2
    return float(np.sqrt((middle * middle).sum()))


FUNCTIONS = {
    torch.where: _where,
    torch.relu: _relu,
    torch.sqrt: _sqrt,
    torch.sign: _sign,
    torch.linalg.norm: _norm,
}


# ---- gradients, weights and states of any size ---------------------------------------------------


def sizes(dtype: torch.dtype) -> list[float]:
    """From the smallest number to the largest, close together where squares leave the dtype."""
    limits = torch.finfo(dtype)
    root, least = math.sqrt(limits.max), limits.smallest_normal * limits.eps
    small = [least, 3 * least, limits.smallest_normal, math.sqrt(least), 3 * math.sqrt(least)]
    large = [0.3 * root, 0.99 * root, 1.05 * root, 5 * root, 25 * root, 40 * root]
    return [*small, 1e-8, 30.0, root**0.5, *large, limits.max / 3, limits.max]


def gradients(dtype: torch.dtype) -> Tensor:
    """These sizes with both signs."""
    both = [sign * size for size in sizes(dtype) for sign in (1, -1)]
    return torch.tensor(both, dtype=torch.float64).to(dtype)


def weights(case: Case, dtype: torch.dtype, count: int) -> Tensor:
    """A few sizes in turn."""
    limits = torch.finfo(dtype)
    values = [0.0, 1.0, limits.smallest_normal, limits.max / 4, -limits.max / 4, -1e-3, 1e-8]
    if case.cls.layerwise:  # whose sums of squares are float64, and whose ratio is at most 2**120
        values = [0.0, 1.0, limits.smallest_normal, -1e-3, 1e30]
    values = torch.tensor(values, dtype=torch.float64).to(dtype)
    return values[torch.arange(count) % len(values)]


def settle(optimizer: Any, param: Tensor, grad: Tensor) -> None:
    """Set states to what long stays of a gradient leave; squares may be infinite."""
    for name, state in optimizer.state[param].items():
        if name.endswith("_sq") or name in ("square_avg", "sum"):
            state.copy_(grad * grad)
        elif name == "momentum_buffer" and isinstance(optimizer, fusedreg.RMSprop):
            state.copy_(grad.sign())
        elif state.dim():
            state.copy_(grad)


@dataclass
class Start:
    """What a step begins with, and what the formula makes of it."""

    w: Tensor
    grad: Tensor
    saved: dict[str, Any]
    """The optimizer's state_dict."""
    slot: Slot


@cache
def beginning(case: Case, dtype: torch.dtype, stage: str) -> Start:
    """The same for all paths; "settled" lets many new gradients meet many old ones."""
    grad = gradients(dtype)
    if case.cls.layerwise:  # whose ratio has no square to spare
        root = math.sqrt(torch.finfo(dtype).max)
        grad = grad[grad.abs() < (30 if stage == "fresh" else 2) * root]
    old, new = (x.flatten() for x in torch.meshgrid(grad, grad, indexing="ij"))
    taken = torch.arange(len(old)) % 3 == 0
    old, new = (old[taken], new[taken]) if stage == "settled" else (old, grad.repeat(7))
    param = nn.Parameter(weights(case, dtype, len(new)))
    optimizer = case.make([param])
    param.grad = torch.zeros_like(param)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()  # which creates the states
    optimizer.param_groups[0]["lr"] = case.options["lr"]
    if stage == "settled":
        settle(optimizer, param, old)
    slot = predicted(case, param.detach(), optimizer.state[param], Range.of(new))
    return Start(param.detach(), new, optimizer.state_dict(), slot)


def predicted(case: Case, w: Tensor, states: dict[str, Tensor], grad: Range) -> Slot:
    """A step of the formula, in the arithmetic that the dtype of the parameter is stepped in."""
    take_roundings_of(torch.promote_types(w.dtype, torch.float32))
    with decimal.localcontext(prec=60):
        slot = Slot(Range.of(w))
        for name, state in states.items():
            slot.history[name] = Range.of(state) if state.dim() else state.item()
        if "momentum_buffer" in states and slot.history["momentum_mass"] == 0:
            slot.history["momentum_mass"] = 1.0  # which is not kept without a threshold
        one_step(slot, grad, case)
    return slot


def take_roundings_of(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    Range.ulp = Decimal(limits.eps)
    Range.smallest = Decimal(limits.smallest_normal) * Range.ulp


def compared(x: Tensor, expected: Range) -> tuple[Any, Any]:
    """Where the formula gives a number of the dtype of `x`, and where `x` is another."""
    take_roundings_of(x.dtype)
    expected, largest = expected.rounded(), Decimal(torch.finfo(x.dtype).max)  # as it is stored
    fits = (-largest <= expected.low) & (expected.high <= largest)
    found = Range.of(x.nan_to_num(nan=math.inf))
    return fits, fits & ((found.low < expected.low) | (expected.high < found.high))


def step(optimizer: Any, start: Start) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of an optimizer whose one parameter begins like that; what is left."""
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.load_state_dict(deepcopy(start.saved))  # torch's would step the tensors in it
    param.grad = start.grad.clone()
    optimizer.step()
    return param.detach(), {n: s for n, s in optimizer.state[param].items() if s.dim()}


# ---- tests ---------------------------------------------------------------------------------------

PLAIN = [(case, dtype) for case in CASES for dtype in FLOATS if case.penalty == "none"]
PENALISED = [(case, torch.float32) for case in CASES if case.penalty == "elastic_net"]
BY_ID = {case.id: case for case in CASES}
three_paths = pytest.mark.parametrize("path", ["reference", "default", "fused"], indirect=True)


@pytest.mark.sampled(4)
@three_paths
@pytest.mark.parametrize("stage", ["fresh", "settled"])
@pytest.mark.parametrize(("of", "dtype"), PLAIN + PENALISED, ids=lambda x: getattr(x, "id", str(x)))
def test_a_step_is_the_formulas_where_that_is_finite(
    of: Case, dtype: torch.dtype, stage: str, path: str
) -> None:
    start = beginning(of, dtype, stage)
    w, states = step(of.make([nn.Parameter(start.w.clone())], path), start)
    gradient, direction = representable(of, start)
    assert not w[torch.from_numpy(gradient)].isnan().any()
    fits = gradient & direction
    for name, state in states.items():
        fits &= compared(state, start.slot.history[name])[0]
    for value, expected in [
        (w, start.slot.w),
        *((state, start.slot.history[name]) for name, state in states.items()),
    ]:
        wrong = np.flatnonzero(compared(value, expected)[1] & fits)
        assert wrong.size == 0, told(wrong, start, value, expected)
    assert fits.mean() > 0.25  # or there were nothing to show
    if of in TORCH_CASES:
        assert_as_torch(of, start, w, gradient & ~fits)


def representable(case: Case, start: Start) -> tuple[Any, Any]:
    """Where the penalised gradient is a number of the dtype, and where the direction is.

    They are numbers of the docstrings, in g = g + weight_decay * w and, under nesterov, in
    u = g + momentum * b.
    """
    largest = Decimal(torch.finfo(start.w.dtype).max)
    decay, lr = (Decimal(case.options[name]) for name in ("weight_decay", "lr"))
    w, grad, moved = Range.of(start.w).low, Range.of(start.grad).low, start.slot.w
    way = np.maximum(abs(moved.high - w), abs(moved.low - w))
    return abs(grad) + decay * abs(w) < largest, way < lr * largest


def assert_as_torch(case: Case, start: Start, w: Tensor, where: Any) -> None:
    """Where a state overflows, torch's for-loop stands still or goes to infinity, and so must we.

    To an ulp for the product of a decay and one for the difference.
    """
    param = nn.Parameter(start.w.clone())
    made = case.torch_cls([param], **case.torch_kwargs, foreach=False)
    theirs, _ = step(made, start)
    there = torch.from_numpy(where) & ~theirs.isnan()
    rtol = 2 * torch.finfo(w.dtype).eps
    torch.testing.assert_close(w[there], theirs[there], rtol=rtol, atol=0)


def told(wrong: Any, start: Start, value: Tensor, expected: Range) -> str:
    """The first that is wrong."""
    i = int(wrong[0])
    return (
        f"{wrong.size} of {len(value)}, first of w={start.w[i]} and g={start.grad[i]}: "
        f"{value[i]} is not between {expected.low[i]:.9e} and {expected.high[i]:.9e}"
    )


SCALES = [1e-30, 2.0**-149, 2.0**16, 3e38]
"""Of GradScaler, whose own numbers are float32."""


@three_paths
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e-30, 1e38])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_scaled_and_clipped_gradients(
    rule: str, dtype: torch.dtype, max_grad_norm: float | None, path: str
) -> None:
    """Of any size: scale, norm and factor are float64, each at most four ulps of it away."""
    case = BY_ID[f"{rule}-none"]
    grad = gradients(dtype)
    if dtype == torch.float64:  # whose norm and factor shall be numbers of it
        grad = grad[grad.abs() < 1e250]
    for scale in SCALES:
        param = nn.Parameter(torch.zeros_like(grad))
        optimizer = case.make([param], path, max_grad_norm=max_grad_norm)
        param.grad = grad.clone()
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        exact = Range.of(grad).low / Decimal(optimizer.grad_scale.item())
        if max_grad_norm is not None:
            norm = np.sqrt((exact * exact).sum()) + Decimal("1e-6")
            exact = exact * min(Decimal(1), Decimal(max_grad_norm) / norm)
        take_roundings_of(torch.float64)
        clipped = Range(exact, exact).rounded(4)
        take_roundings_of(torch.promote_types(dtype, torch.float32))
        slot = predicted(case, torch.zeros_like(grad), {}, clipped.rounded())
        fits = abs(exact) < Decimal(torch.finfo(dtype).max)
        for name, state in optimizer.state[param].items():
            if state.dim():
                fits &= compared(state, slot.history[name])[0]
        wrong = np.flatnonzero(compared(param.detach(), slot.w)[1] & fits)
        start = Start(torch.zeros_like(grad), grad, {}, slot)
        assert wrong.size == 0, told(wrong, start, param.detach(), slot.w)


@three_paths
def test_adagrad_is_slowed_by_any_factor(path: str) -> None:
    """The root times the factor is no number of float32, but the step is."""
    param = nn.Parameter(torch.zeros(3))
    optimizer = fusedreg.Adagrad([param], lr=1.0, lr_decay=1e25, **PATHS[path])
    for _ in range(2):
        param.data.zero_()
        param.grad = torch.full_like(param, 1e18)
        optimizer.step()
    expected = torch.full((3,), -(0.5**0.5) / 1e25)  # g over sqrt(2 g^2) over 1 + 1e25
    # Half an ulp each for two squares, their sum, root, quotient and factor, its quotient, and for
    # the number that is expected.
    torch.testing.assert_close(param.detach(), expected, rtol=8 * 2.0**-24, atol=0)


@three_paths
@pytest.mark.parametrize("cls", [fusedreg.Adam, fusedreg.LAMB, fusedreg.RMSprop, fusedreg.Adagrad])
def test_an_eps_that_vanishes_in_float32_is_0(cls: Any, path: str) -> None:
    """A coordinate without a second moment stays, as with eps=0."""
    param = nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=0.1, weight_decay=0.0, eps=1e-60, **PATHS[path])
    param.grad = torch.tensor([0.0, 1e-30, 1.0])
    optimizer.step()
    assert param[:2].tolist() == [1.0, 1.0]
    assert param[2] < 1
