"""What rules and penalties call, on values of the host; names as in triton and rules.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusedreg.kernels.cpu.values import Operand, Value

PropagateNan = SimpleNamespace(ALL=None)  # a maximum with a NaN is always one here


def constexpr(value: float) -> float:
    """A number that compiled code knows."""
    return value


def where(condition: Value, chosen: Operand, otherwise: Operand) -> Value:
    """`chosen` where `condition` holds, else `otherwise`."""
    of = chosen if isinstance(chosen, Value) else otherwise
    if not isinstance(of, Value):
        raise TypeError(
            "one of the two that tl.where chooses from must be computed: it has a dtype"
        )
    builder = condition.builder
    return Value(builder, builder.select(condition.ir, of.like(chosen).ir, of.like(otherwise).ir))


def maximum(a: Value, b: Value, propagate_nan: None = None) -> Value:
    """The larger of two numbers, and a NaN where either is one."""
    return where((a > b) | (a != a), a, b)  # true of NaN only


def divide(a: Value, b: Operand) -> Value:
    """IEEE division."""
    return a / b


def reciprocal(x: Value) -> Value:
    """1 / x."""
    return 1.0 / x


def square_root(x: Value) -> Value:
    """IEEE square root."""
    return _intrinsic("sqrt", x)


def power(base: Value, exponent: Value) -> Value:
    """base ** exponent, by the host's libm."""
    return _intrinsic("pow", base, exponent)


def absolute(x: Value) -> Value:
    """|x|."""
    return _intrinsic("fabs", x)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"device code of a CPU has no tl.{name}: fused=False steps without it")


def _intrinsic(name: str, *values: Value) -> Value:
    builder = values[0].builder
    function = builder.module.declare_intrinsic(f"llvm.{name}", [values[0].ir.type])
    return Value(builder, builder.call(function, [value.ir for value in values]))
