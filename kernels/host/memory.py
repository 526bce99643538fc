"""Loads and stores through addresses, converted to and from the dtype of the arithmetic.

Numba makes no pointer of an integer and has no 16-bit floats, so these few are written in LLVM's
terms. They take tuples, because how many states or options a rule has is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
INT16, INT32, INT64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Stored(NamedTuple):
    """A dtype in memory, the dtype that it is computed in, and the way from one to the other."""

    memory: ir.Type
    register: ir.Type
    widen: Callable[[Any, Any], Any]
    narrow: Callable[[Any, Any], Any]


def _unchanged(builder: Any, value: Any) -> Any:
    return value


def _widen_bfloat16(builder: Any, bits: Any) -> Any:
    wide = builder.shl(builder.zext(bits, INT32), ir.Constant(INT32, 16))
    return builder.bitcast(wide, FLOAT)


def _narrow_bfloat16(builder: Any, value: Any) -> Any:
    """To nearest even: add half of the last place, less one where that place is even."""
    bits = builder.bitcast(value, INT32)
    last = builder.and_(builder.lshr(bits, ir.Constant(INT32, 16)), ir.Constant(INT32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(INT32, 0x7FFF)), last)
    rounded = builder.lshr(rounded, ir.Constant(INT32, 16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, ir.Constant(INT32, 0x7FC0), rounded), INT16)


STORED = {
    torch.float64: Stored(DOUBLE, DOUBLE, _unchanged, _unchanged),
    torch.float32: Stored(FLOAT, FLOAT, _unchanged, _unchanged),
    torch.bfloat16: Stored(INT16, FLOAT, _widen_bfloat16, _narrow_bfloat16),
    torch.float16: Stored(
        HALF,
        FLOAT,
        lambda builder, value: builder.fpext(value, FLOAT),
        lambda builder, value: builder.fptrunc(value, HALF),
    ),
    torch.int64: Stored(INT64, INT64, _unchanged, _unchanged),
    torch.int32: Stored(INT32, INT64, lambda b, v: b.sext(v, INT64), lambda b, v: b.trunc(v, INT32)),
}
NUMBA = {
    torch.float64: types.float64,
    torch.float32: types.float32,
    torch.int64: types.int64,
}
"""The dtypes of the arithmetic."""


def _load(builder: Any, stored: Stored, address: Any, index: Any, target: ir.Type) -> Any:
    pointer = builder.inttoptr(address, stored.memory.as_pointer())
    value = stored.widen(builder, builder.load(builder.gep(pointer, [index])))
    return _cast(builder, value, target)


def _store(builder: Any, stored: Stored, address: Any, index: Any, value: Any) -> None:
    pointer = builder.inttoptr(address, stored.memory.as_pointer())
    value = stored.narrow(builder, _cast(builder, value, stored.register))
    builder.store(value, builder.gep(pointer, [index]))


def _cast(builder: Any, value: Any, target: ir.Type) -> Any:
    """Between float and double, where they differ."""
    if value.type == target:
        return value
    return builder.fpext(value, target) if target == DOUBLE else builder.fptrunc(value, target)


@cache
def loader(dtype: torch.dtype, compute: torch.dtype, count: int) -> Any:
    """A function (addresses, index) -> the elements of `count` arrays, a tuple like `addresses`."""
    stored, result = STORED[dtype], types.Tuple([NUMBA[compute]] * count)

    @intrinsic
    def load(typing_context: Any, addresses: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            addresses, index = arguments
            target = context.get_value_type(NUMBA[compute])
            values = [
                _load(builder, stored, address, index, target)
                for address in cgutils.unpack_tuple(builder, addresses, count)
            ]
            return context.make_tuple(builder, result, values)

        return result(addresses, index), code

    return load


@cache
def count_loader(dtype: torch.dtype, count: int) -> Any:
    """A function (addresses) -> the float64 numbers there, and 1 where an address is 0."""
    stored, result = STORED[dtype], types.Tuple([types.float64] * count)

    @intrinsic
    def load(typing_context: Any, addresses: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            one = builder.alloca(stored.memory)
            builder.store(ir.Constant(stored.memory, 1.0), one)
            values = []
            for address in cgutils.unpack_tuple(builder, arguments[0], count):
                absent = builder.icmp_unsigned("==", address, ir.Constant(INT64, 0))
                there = builder.select(absent, builder.ptrtoint(one, INT64), address)
                values.append(_load(builder, stored, there, ir.Constant(INT64, 0), DOUBLE))
            return context.make_tuple(builder, result, values)

        return result(addresses), code

    return load


@cache
def count_storer(dtype: torch.dtype, count: int) -> Any:
    """A function (addresses, values) that writes float64 numbers where an address is not 0."""
    stored = STORED[dtype]

    @intrinsic
    def store(typing_context: Any, addresses: Any, values: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = (cgutils.unpack_tuple(builder, argument, count) for argument in arguments)
            for address, value in zip(*pairs, strict=True):
                present = builder.icmp_unsigned("!=", address, ir.Constant(INT64, 0))
                with builder.if_then(present):
                    _store(builder, stored, address, ir.Constant(INT64, 0), value)
            return context.get_dummy_value()

        return types.none(addresses, values), code

    return store


@cache
def storer(dtype: torch.dtype, count: int) -> Any:
    """A function (addresses, index, values) that rounds every value once, to nearest even."""
    stored = STORED[dtype]

    @intrinsic
    def store(typing_context: Any, addresses: Any, index: Any, values: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            addresses = cgutils.unpack_tuple(builder, arguments[0], count)
            values = cgutils.unpack_tuple(builder, arguments[2], count)
            for address, value in zip(addresses, values, strict=True):
                _store(builder, stored, address, arguments[1], value)
            return context.get_dummy_value()

        return types.none(addresses, index, values), code

    return store


@cache
def row_loader(dtype: torch.dtype, compute: torch.dtype, count: int) -> Any:
    """A function (address, first, stride) -> `count` elements of one array, a tuple."""
    stored, result = STORED[dtype], types.Tuple([NUMBA[compute]] * count)

    @intrinsic
    def load(typing_context: Any, address: Any, first: Any, stride: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, stride = arguments
            target = context.get_value_type(NUMBA[compute])
            values = []
            for _ in range(count):
                values.append(_load(builder, stored, address, index, target))
                index = builder.add(index, stride)
            return context.make_tuple(builder, result, values)

        return result(address, first, stride), code

    return load


@cache
def row_storer(count: int) -> Any:
    """A function (address, first, values) that writes a tuple of float64 into one array."""
    stored = STORED[torch.float64]

    @intrinsic
    def store(typing_context: Any, address: Any, first: Any, values: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, index, values = arguments
            for value in cgutils.unpack_tuple(builder, values, count):
                _store(builder, stored, address, index, value)
                index = builder.add(index, ir.Constant(INT64, 1))
            return context.get_dummy_value()

        return types.none(address, first, values), code

    return store


@intrinsic
def next_piece(typing_context: Any, address: Any) -> Any:
    """Returns the int64 at an address and adds 1 to it, for one thread at a time."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(INT64, 1), "monotonic")

    return types.int64(address), code
