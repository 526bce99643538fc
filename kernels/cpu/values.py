"""Python expressions that write LLVM instructions.

A `Value` stands for a number that is there when the compiled code runs. Arithmetic on it appends an
instruction to the function that is being written, so running a Python function on values compiles
it. Its loops over states or options have a known number of turns, and are unrolled as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, Union

import torch
from llvmlite import ir

BOOL, INT8, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()

Operand: TypeAlias = Union["Value", float]
Convert: TypeAlias = Callable[[ir.IRBuilder, ir.Value], ir.Value]


class Value:
    """A number of the compiled code: float, double, an integer or a condition."""

    def __init__(self, builder: ir.IRBuilder, ir_value: ir.Value) -> None:
        self.builder, self.ir = builder, ir_value

    @property
    def dtype(self) -> ir.Type:
        """Its type, as `to` takes it."""
        return self.ir.type

    def like(self, other: Operand) -> Value:
        """A Python number as a constant of the same type; a value as it is."""
        if isinstance(other, Value):
            if other.ir.type != self.ir.type:
                raise TypeError(f"{self.ir.type} and {other.ir.type}: convert one by to()")
            return other
        exact = self.ir.type in (FLOAT, DOUBLE)
        constant = ir.Constant(self.ir.type, float(other) if exact else int(other))
        return Value(self.builder, constant)

    def constant(self, number: float) -> Value:
        """A float64 of the same function."""
        return Value(self.builder, ir.Constant(DOUBLE, number))

    def to(self, target: ir.Type, bitcast: bool = False) -> Value:
        """The number in another type, or the number that has the same bits there."""
        source = self.ir.type
        if source == target:
            return self
        is_float = source in (FLOAT, DOUBLE), target in (FLOAT, DOUBLE)
        if bitcast:
            cast = self.builder.bitcast
        elif is_float == (True, True):
            cast = self.builder.fpext if target == DOUBLE else self.builder.fptrunc
        elif is_float == (True, False):
            cast = self.builder.fptosi
        elif is_float == (False, True):
            cast = self.builder.uitofp if source == BOOL else self.builder.sitofp
        elif target.width < source.width:
            cast = self.builder.trunc
        else:
            cast = self.builder.zext if source == BOOL else self.builder.sext
        return Value(self.builder, cast(self.ir, target))

    def _with(self, other: Operand, of_floats: str, of_integers: str, flip: bool = False) -> Value:
        first, second = self, self.like(other)
        if flip:
            first, second = second, first
        name = of_floats if self.ir.type in (FLOAT, DOUBLE) else of_integers
        if not name:
            raise TypeError("device code cannot do this with integers, or not with floats")
        return Value(self.builder, getattr(self.builder, name)(first.ir, second.ir))

    def _compared(self, sign: str, other: Operand) -> Value:
        floats = self.ir.type in (FLOAT, DOUBLE)
        # As in IEEE and Python: a NaN is unequal to everything, and no other relation holds for it.
        unordered = self.builder.fcmp_unordered if sign == "!=" else self.builder.fcmp_ordered
        compare = unordered if floats else self.builder.icmp_signed
        return Value(self.builder, compare(sign, self.ir, self.like(other).ir))

    def __add__(self, other: Operand) -> Value:
        return self._with(other, "fadd", "add")

    def __radd__(self, other: Operand) -> Value:
        return self._with(other, "fadd", "add", flip=True)

    def __sub__(self, other: Operand) -> Value:
        return self._with(other, "fsub", "sub")

    def __rsub__(self, other: Operand) -> Value:
        return self._with(other, "fsub", "sub", flip=True)

    def __mul__(self, other: Operand) -> Value:
        return self._with(other, "fmul", "mul")

    def __rmul__(self, other: Operand) -> Value:
        return self._with(other, "fmul", "mul", flip=True)

    def __truediv__(self, other: Operand) -> Value:
        return self._with(other, "fdiv", "")

    def __rtruediv__(self, other: Operand) -> Value:
        return self._with(other, "fdiv", "", flip=True)

    def __and__(self, other: Operand) -> Value:
        return self._with(other, "", "and_")

    def __or__(self, other: Operand) -> Value:
        return self._with(other, "", "or_")

    def __lshift__(self, other: Operand) -> Value:
        return self._with(other, "", "shl")

    def __rshift__(self, other: Operand) -> Value:
        return self._with(other, "", "ashr")

    def __neg__(self) -> Value:
        return Value(self.builder, self.builder.fneg(self.ir))

    def __lt__(self, other: Operand) -> Value:
        return self._compared("<", other)

    def __le__(self, other: Operand) -> Value:
        return self._compared("<=", other)

    def __gt__(self, other: Operand) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Operand) -> Value:
        return self._compared(">=", other)

    def __eq__(self, other: object) -> Any:
        return self._compared("==", other)  # type: ignore[arg-type]  # Python's signature

    def __ne__(self, other: object) -> Any:
        return self._compared("!=", other)  # type: ignore[arg-type]  # as above

    __hash__ = None  # type: ignore[assignment]  # no value is equal to another in Python

    def __bool__(self) -> bool:
        raise TypeError("device code cannot branch in Python on a number: use tl.where")


def select(condition: Value, chosen: Operand, otherwise: Operand) -> Value:
    """`chosen` where `condition` holds, else `otherwise`. One of the two is a value."""
    of = chosen if isinstance(chosen, Value) else otherwise
    if not isinstance(of, Value):
        raise TypeError(
            "one of the two that tl.where chooses from must be computed: it has a dtype"
        )
    builder = condition.builder
    return Value(builder, builder.select(condition.ir, of.like(chosen).ir, of.like(otherwise).ir))


def intrinsic(name: str, *values: Value) -> Value:
    """A function that LLVM knows, of numbers of one type."""
    builder = values[0].builder
    function = builder.module.declare_intrinsic(f"llvm.{name}", [values[0].ir.type])
    return Value(builder, builder.call(function, [value.ir for value in values]))


class Stored(NamedTuple):
    """How a dtype lies in memory, what it is in a register, and the ways from one to the other."""

    memory: ir.Type
    register: ir.Type
    widen: Convert
    narrow: Convert


def _unchanged(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return value


def _widen_bfloat16(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    wide = builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16))
    return builder.bitcast(wide, FLOAT)


def _narrow_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """To nearest even: add half of the last place, less one where that place is even."""
    bits = builder.bitcast(value, INT32)
    last = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(INT32, 0x7FFF)), last)
    rounded = builder.lshr(rounded, ir.Constant(INT32, 16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, ir.Constant(INT32, 0x7FC0), rounded), INT16)


def _integer(memory: ir.IntType) -> Stored:
    """An integer of fewer bits, an int64 in a register."""
    return Stored(
        memory, INT64, lambda b, bits: b.sext(bits, INT64), lambda b, value: b.trunc(value, memory)
    )


STORED = {
    torch.float64: Stored(DOUBLE, DOUBLE, _unchanged, _unchanged),
    torch.float32: Stored(FLOAT, FLOAT, _unchanged, _unchanged),
    torch.bfloat16: Stored(INT16, FLOAT, _widen_bfloat16, _narrow_bfloat16),
    torch.float16: Stored(
        HALF, FLOAT, lambda b, value: b.fpext(value, FLOAT), lambda b, value: b.fptrunc(value, HALF)
    ),
    torch.int64: Stored(INT64, INT64, _unchanged, _unchanged),
    torch.int32: _integer(INT32),
    torch.int16: _integer(INT16),
    torch.int8: _integer(INT8),
}


class Pointer:
    """An array in memory: `pointer[i]` loads, `pointer[i] = value` rounds once and stores."""

    def __init__(self, address: Value, dtype: torch.dtype) -> None:
        self.builder, self.stored = address.builder, STORED[dtype]
        self.start = self.builder.inttoptr(address.ir, self.stored.memory.as_pointer())

    def _place(self, index: Operand) -> ir.Value:
        place = index.ir if isinstance(index, Value) else ir.Constant(INT64, index)
        return self.builder.gep(self.start, [place])

    def __getitem__(self, index: Operand) -> Value:
        loaded = self.builder.load(self._place(index))
        return Value(self.builder, self.stored.widen(self.builder, loaded))

    def __setitem__(self, index: Operand, value: Value) -> None:
        rounded = value.to(self.stored.register)
        self.builder.store(self.stored.narrow(self.builder, rounded.ir), self._place(index))

    def take(self) -> Value:
        """What is at index 0, an int64, which grows by 1; each thread gets another number."""
        one = ir.Constant(INT64, 1)
        return Value(self.builder, self.builder.atomic_rmw("add", self.start, one, "monotonic"))


class Variable:
    """A number that changes in a loop."""

    def __init__(self, first: Value) -> None:
        self.builder = first.builder
        with self.builder.goto_entry_block():  # a stack slot in a loop would grow the stack
            self.slot = self.builder.alloca(first.ir.type)
        self.set(first)

    def get(self) -> Value:
        """The number now."""
        return Value(self.builder, self.builder.load(self.slot))

    def set(self, value: Value) -> None:
        """Change it."""
        self.builder.store(value.ir, self.slot)

    def add_in_any_order(self, value: Value) -> None:
        """Add a float; LLVM may sum in another order, and so in vectors."""
        total = self.builder.fadd(self.get().ir, value.ir, flags=("reassoc",))
        self.builder.store(total, self.slot)


@contextmanager
def when(condition: Value) -> Iterator[None]:
    """What is written inside happens where `condition` holds."""
    with condition.builder.if_then(condition.ir):
        yield


@contextmanager
def count(begin: Value, end: Operand) -> Iterator[Value]:
    """A loop over the integers from `begin` up to `end`."""
    index = Variable(begin)
    with repeat(lambda: index.get() < end):
        yield index.get()
        index.set(index.get() + 1)


@contextmanager
def repeat(condition: Callable[[], Value]) -> Iterator[None]:
    """A loop while `condition`, which is written anew at its end, holds."""
    first = condition()
    builder = first.builder
    body, after = builder.append_basic_block("body"), builder.append_basic_block("after")
    builder.cbranch(first.ir, body, after)
    builder.position_at_end(body)
    yield
    builder.cbranch(condition().ir, body, after)
    builder.position_at_end(after)
