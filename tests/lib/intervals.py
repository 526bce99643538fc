"""Arithmetic that knows how wrong it may be: a formula of it bounds what every rounding can give.

An Interval holds, for each element, the least and the largest result that arithmetic in a narrower
precision may come to. Wherever a formula is ill-conditioned, as where terms cancel, where a small
number is divided by, or at a jump, the interval widens by itself. So one rule judges all inputs:
what was computed lies in the interval, rounded to the dtype that stores it. Rounding is monotone,
so the rounded ends bound the rounded result, and nothing is added for the store.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDINGS = 4
"""Roundings of the package that one operation of a formula stands for, each half an ulp.

beta * m + (1 - beta) * g is computed as m + (1 - beta) * (g - m): the coefficient, the difference
and the product are rounded in the place of one product, so three; the ends of the interval are
computed in float64, which for a float64 parameter rounds as much once more. Everything else is
rounded less often: a product with a number has the number's rounding and its own.
"""


class Precision(NamedTuple):
    """The dtype that a step computes in."""

    unit: float
    """Half an ulp of 1."""
    tiny: float
    """Half the smallest number above 0: what underflow may take."""
    largest: float


def precision(dtype: torch.dtype) -> Precision:
    """That of a step of parameters of `dtype`: float64 for its own, else float32."""
    wide = dtype in (torch.float64, torch.complex128)
    limits = torch.finfo(torch.float64 if wide else torch.float32)
    return Precision(limits.eps / 2, limits.smallest_normal * limits.eps / 2, limits.max)


@dataclass
class Maybe:
    """A comparison of intervals."""

    certain: Tensor
    possible: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any, _kwargs: Any = None) -> Any:
        return FUNCTIONS[function](*args)


class Interval:
    """Numbers between two float64 tensors; NaN where nothing is known."""

    def __init__(self, low: Tensor, high: Tensor, precision: Precision) -> None:
        self.low, self.high, self.precision = low, high, precision

    @classmethod
    def of(cls, x: Any, precision: Precision) -> Interval:
        """Exactly `x`."""
        if isinstance(x, Interval):
            return x
        exact = torch.as_tensor(x, dtype=torch.float64)
        return cls(exact, exact, precision)

    def rounded(self, underflow: bool = True) -> Interval:
        """With what rounding an operation adds; nothing to an exact 0."""
        size = torch.maximum(self.low.abs(), self.high.abs())
        more = ROUNDINGS * (self.precision.unit * size + underflow * self.precision.tiny)
        more = torch.where(size == 0, 0.0, more)
        return Interval(self.low - more, self.high + more, self.precision)

    def __add__(self, other: Any) -> Interval:
        other = Interval.of(other, self.precision)
        total = Interval(self.low + other.low, self.high + other.high, self.precision)
        return total.rounded(underflow=False)  # a subnormal sum is exact

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low, self.precision)

    def __sub__(self, other: Any) -> Interval:
        return self + -Interval.of(other, self.precision)

    def __rsub__(self, other: Any) -> Interval:
        return -self + other

    def __mul__(self, other: Any) -> Interval:
        other = Interval.of(other, self.precision)
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        return _hull(ends, self.precision).rounded()

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Interval:
        """The quotient; 0 / 0 is 0, because what has never seen a gradient does not move."""
        other = Interval.of(other, self.precision)
        ends = [a / b for a in (self.low, self.high) for b in (other.low, other.high)]
        quotient = _hull(ends, self.precision).rounded()
        zero = (self == 0).certain
        unknown = (other.low <= 0) & (other.high >= 0) & ~zero
        low = torch.where(unknown, -torch.inf, torch.where(zero, 0.0, quotient.low))
        high = torch.where(unknown, torch.inf, torch.where(zero, 0.0, quotient.high))
        return Interval(low, high, self.precision)

    def __rtruediv__(self, other: Any) -> Interval:
        return Interval.of(other, self.precision) / self

    def __pow__(self, exponent: int) -> Interval:
        assert exponent == 2
        ends = torch.stack([self.low * self.low, self.high * self.high])
        least = torch.where((self.low < 0) & (self.high > 0), 0.0, ends.amin(0))
        return Interval(least, ends.amax(0), self.precision).rounded()

    def __gt__(self, other: Any) -> Maybe:
        other = Interval.of(other, self.precision)
        return Maybe(self.low > other.high, ~(self.high <= other.low))

    def __lt__(self, other: Any) -> Maybe:
        return Interval.of(other, self.precision) > self

    def __eq__(self, other: object) -> Any:
        that = Interval.of(other, self.precision)
        exact = (self.low == self.high) & (that.low == that.high)
        apart = (self.low > that.high) | (self.high < that.low)
        return Maybe(exact & (self.low == that.low), ~apart)

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any, _kwargs: Any = None) -> Any:
        return FUNCTIONS[function](*args)


def _hull(ends: list[Tensor], precision: Precision) -> Interval:
    stacked = torch.stack(torch.broadcast_tensors(*ends))
    # 0 * inf is nothing known.
    return Interval(stacked.amin(0), stacked.amax(0), precision)


def _sqrt(x: Interval) -> Interval:
    low, high = x.low.clamp(min=0).sqrt(), x.high.clamp(min=0).sqrt()
    return Interval(low, high, x.precision).rounded()


def _where(condition: Maybe, chosen: Any, otherwise: Any) -> Interval:
    """One of two, or both where nobody can say."""
    known = next(x for x in (chosen, otherwise) if isinstance(x, Interval)).precision
    a, b = Interval.of(chosen, known), Interval.of(otherwise, known)

    def pick(first: Tensor, second: Tensor, both: Tensor) -> Tensor:
        return torch.where(condition.certain, first, torch.where(condition.possible, both, second))

    low = pick(a.low, b.low, torch.minimum(a.low, b.low))
    high = pick(a.high, b.high, torch.maximum(a.high, b.high))
    return Interval(low, high, known)


def _monotone(function: Callable[[Tensor], Tensor]) -> Callable[[Interval], Interval]:
    return lambda x: Interval(function(x.low), function(x.high), x.precision)


FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.sqrt: _sqrt,
    torch.where: _where,
    torch.sign: _monotone(torch.sign),
    torch.relu: _monotone(torch.relu),
}
"""What the formulas call."""


class Count(float):
    """A number of steps; beta ** count is formed in float64, and by exp and log on a GPU."""

    def __add__(self, other: Any) -> Count:
        return Count(float(self) + other)

    def __rpow__(self, base: Any) -> Interval:
        power = torch.tensor(float(base) ** float(self), dtype=torch.float64)
        # exp(t * log(beta)) is at most 2^-52 away, libm's pow less.
        return Interval(power - 2.0**-52, power + 2.0**-52, precision(torch.float64))
