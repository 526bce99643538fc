"""What rules and penalties call, for one element of the host; names as in triton and rules.py."""

from __future__ import annotations

import math
from enum import Enum

from numba import njit

__all__ = ["PropagateNan", "divide", "maximum", "power", "reciprocal", "square_root", "where"]

compiled = njit(error_model="numpy")  # x / 0 is inf or NaN, as elsewhere


class PropagateNan(Enum):
    """Whether `maximum` of a NaN is a NaN: here it always is."""

    ALL = 0


@compiled
def where(condition, chosen, otherwise):
    """`chosen` where `condition`; both are known, so that it becomes a select."""
    return chosen if condition else otherwise


@compiled
def maximum(a, b, propagate_nan):
    """The larger of two numbers, and a NaN where either is one."""
    return a if a > b or a != a else b


@compiled
def divide(a, b):
    """IEEE division."""
    return a / b


@compiled
def reciprocal(x):
    """1 / x in the dtype of x."""
    return type(x)(1) / x


@compiled
def square_root(x):
    """IEEE square root."""
    return math.sqrt(x)


@compiled
def power(base, exponent):
    """base ** exponent, by the host's libm."""
    return base**exponent
