"""What rules and penalties call, on values of the host; names as in triton and rules.py.

Every word takes Python numbers too, and only where all its arguments are Python numbers is what it
returns one.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from fusedreg.kernels.cpu.values import (
    DOUBLE,
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    Operand,
    Value,
    intrinsic,
    select,
)

PropagateNan = SimpleNamespace(ALL=None)  # a maximum with a NaN is always one here
float64, float32, int64, int32, int16, int8 = DOUBLE, FLOAT, INT64, INT32, INT16, INT8
tensor = Value


def constexpr(value: float) -> float:
    """A number that compiled code knows."""
    return value


def where(condition: Value | bool, chosen: Operand, otherwise: Operand) -> Operand:
    """`chosen` where `condition` holds, else `otherwise`."""
    if not isinstance(condition, Value):
        return chosen if condition else otherwise
    return select(condition, chosen, otherwise)


def maximum(a: Operand, b: Operand, propagate_nan: None = None) -> Operand:
    """The larger of two numbers, and a NaN where either is one."""
    return where((a > b) | (a != a), a, b)  # true of NaN only


def minimum(a: Operand, b: Operand, propagate_nan: None = None) -> Operand:
    """The smaller of two numbers, and a NaN where either is one."""
    return where((a < b) | (a != a), a, b)


def divide(a: Operand, b: Operand) -> Operand:
    """IEEE division."""
    return a / b


def reciprocal(x: Operand) -> Operand:
    """1 / x."""
    return 1.0 / x


def square_root(x: Operand) -> Operand:
    """IEEE square root."""
    return intrinsic("sqrt", x) if isinstance(x, Value) else math.sqrt(x)


sqrt = square_root


def power(base: Operand, exponent: Operand) -> Operand:
    """base ** exponent, by the host's libm."""
    if isinstance(base, Value):
        return intrinsic("pow", base, base.like(exponent))
    if isinstance(exponent, Value):
        return intrinsic("pow", exponent.like(base), exponent)
    return math.pow(base, exponent)


def absolute(x: Operand) -> Operand:
    """|x|."""
    return intrinsic("fabs", x) if isinstance(x, Value) else math.fabs(x)


abs = absolute


WORDS = (
    "PropagateNan", "abs", "constexpr", "float32", "float64", "int16", "int32", "int64", "int8",
    "maximum", "minimum", "sqrt", "tensor", "where",
)  # fmt: skip
"""Triton's words that are here. Those of rules.py, like `divide`, are called by their own name."""
