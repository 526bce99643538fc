"""The three loops of a step on the host, over the tables that the kernels of a GPU walk.

Each is compiled for one rule and one set of dtypes. It takes the address of int64 numbers, of which
the first counts the chunks that are taken: so threads share a loop, each taking chunks until all
are done, and results do not depend on who did which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fusedreg.kernels.columns import (
    ACTIVE,
    COUPLED,
    DECOUPLED,
    HEADER,
    LR,
    MAX_NORM,
    OPTIONS,
    PROX,
    ROW,
    ROW_DECAY,
    ROW_L1,
    ROW_L2,
    ROW_LR,
    ROW_RULE,
    ROW_SCALE,
    ROW_THRESHOLD,
    SCALE,
    SHRINK,
    SIGN,
    SKIP,
    SKIP_NONFINITE,
    SUBGRADIENT,
)
from fusedreg.kernels.host.build import built, device
from fusedreg.kernels.host.language import absolute, square_root, where
from fusedreg.kernels.host.values import (
    DOUBLE,
    FLOAT,
    Pointer,
    Value,
    Variable,
    count,
    repeat,
    when,
)

CHUNK = 65536
"""Elements of one chunk: many, because each starts its vectors and its norm anew."""

SMALL = 1e-280
"""A sum of squares below which some may have vanished."""
TINY, LARGEST, INFINITY = 2.2250738585072014e-308, 1.7976931348623157e308, float("inf")


def _numbers(work: Value, how_many: int) -> list[Value]:
    """The int64 numbers that follow the count of chunks taken."""
    at = Pointer(work, torch.int64)
    return [at[i] for i in range(1, 1 + how_many)]


@contextmanager
def _each_chunk(work: Value, chunks: Value) -> Iterator[Value]:
    """A loop over chunks that no other thread has taken."""
    counter = Pointer(work, torch.int64)
    chunk = Variable(counter.take())
    with repeat(lambda: chunk.get() < chunks):
        yield chunk.get()
        chunk.set(counter.take())


def _bounds(chunk: Value, tensor: Value, numels: Value, first_chunks: Value) -> tuple[Value, Value]:
    """The first element of a chunk and the one after its last."""
    begin = (chunk - Pointer(first_chunks, torch.int32)[tensor]) * CHUNK
    numel = Pointer(numels, torch.int64)[tensor]
    return begin, where(begin + CHUNK < numel, begin + CHUNK, numel)


# ---- norms ---------------------------------------------------------------------------------------


def _norm(elements: Pointer, begin: Value, end: Value, wide: bool) -> Value:
    """The norm of some elements, which are `wide` if their squares may overflow or vanish."""
    squares = Variable(begin.constant(0.0))
    with count(begin, end) as i:
        g = elements[i].to(DOUBLE)
        squares.add_in_any_order(g * g)
    norm = Variable(square_root(squares.get()))
    if wide:
        # No relation holds for a NaN, which stays one.
        with when((squares.get() < SMALL) | (squares.get() == INFINITY)):
            largest = Variable(begin.constant(TINY))
            with count(begin, end) as i:
                g = absolute(elements[i])
                largest.set(where(g > largest.get(), g, largest.get()))
            # The limits keep 0/0 and inf/inf out and let an infinite element through to the norm.
            scale = where(largest.get() > LARGEST, LARGEST, largest.get())
            ratios = Variable(begin.constant(0.0))
            with count(begin, end) as i:
                ratio = elements[i] / scale
                ratios.set(ratios.get() + ratio * ratio)
            norm.set(scale * square_root(ratios.get()))
    return norm.get()


@cache
def norm_loop(grad: torch.dtype) -> Any:
    """Writes the norm of each chunk; 0 where there is no gradient."""

    def norms(work: Value) -> None:
        chunks, grads, numels, first_chunks, owners, partials, first = _numbers(work, 7)
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            address = Pointer(grads, torch.int64)[tensor]
            out = Pointer(partials, torch.float64)
            out[first + chunk] = work.constant(0.0)
            with when(address != 0):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                norm = _norm(Pointer(address, grad), begin, end, wide=grad == torch.float64)
                out[first + chunk] = norm

    return built(norms)


# ---- rows ----------------------------------------------------------------------------------------


def _count(address: Value, dtype: torch.dtype) -> Value:
    """A count, and 1 where a parameter has none."""
    count = Variable(address.constant(1.0))
    with when(address != 0):
        count.set(Pointer(address, dtype)[0].to(DOUBLE))
    return count.get()


@cache
def rows_loop(
    scalars_of: Any, states: int, counts: int, dtype: torch.dtype, options: int, norm: bool
) -> Any:
    """Writes the row of every tensor and advances its counts; see launch.py for the arguments.

    The address of what is not given is 0.
    """

    def rows(work: Value) -> None:
        (
            tensors, addresses, grads, groups, numbers, rows, partials, parts, grad_norm, skipped,
        ) = _numbers(work, 10)  # fmt: skip
        sent = Pointer(numbers, torch.float64)
        scale, skip = sent[SCALE.value], sent[SKIP.value] != 0.0
        first = tensors.like(0)
        if norm:
            total = _norm(Pointer(partials, torch.float64), first, parts, wide=True) * scale
            nonfinite = (total != total) | (total == INFINITY)  # NaN or inf
            skip = skip | ((sent[SKIP_NONFINITE.value] != 0.0) & nonfinite)
            max_norm = sent[MAX_NORM.value]
            factor = max_norm / (total + 1e-6)
            factor = where(factor > 1.0, 1.0, factor)  # a NaN stays one
            scale = where(max_norm < INFINITY, scale * factor, scale)
            with when(grad_norm != 0):
                Pointer(grad_norm, torch.float32)[0] = total
        with when(skip & (skipped != 0)):
            counter = Pointer(skipped, torch.int64)
            counter[0] = counter[0] + 1

        with count(first, tensors) as tensor:
            active = (skip == 0) & (Pointer(grads, torch.int64)[tensor] != 0)
            line = Pointer(groups, torch.int32)[tensor] * (OPTIONS.value + options) + HEADER.value
            slots = Pointer(addresses, torch.int64)
            places = [slots[tensors * (1 + states + i) + tensor] for i in range(counts)]
            old = tuple(_count(place, dtype) for place in places)
            own = tuple(sent[line + OPTIONS.value + i] for i in range(options))
            gain, scalars, new = device(scalars_of)(own, old)

            lr = sent[line + LR.value]
            threshold = lr * sent[line + PROX.value] * gain + lr * sent[line + SHRINK.value]
            row = {
                ACTIVE: where(active, work.constant(1.0), 0.0),
                ROW_SCALE: sent[line + SIGN.value] * scale,
                ROW_LR: lr,
                ROW_L1: sent[line + SUBGRADIENT.value],
                ROW_L2: sent[line + COUPLED.value],
                ROW_DECAY: 1.0 - lr * sent[line + DECOUPLED.value],
                ROW_THRESHOLD: threshold,
            }
            out, start = Pointer(rows, torch.float64), tensor * ROW.value
            for column, number in row.items():
                out[start + column.value] = number
            for i, number in enumerate(scalars):
                out[start + ROW_RULE.value + i] = number
            for place, number in zip(places, new, strict=True):
                with when(active & (place != 0)):
                    Pointer(place, dtype)[0] = number

    return built(rows)


# ---- steps ---------------------------------------------------------------------------------------


@cache
def step_loop(
    tile: Any,
    width: int,
    states: int,
    hooks: tuple[Any, Any, Any, Any],
    scaled: bool,
    param: torch.dtype,
    grad: torch.dtype,
    state: torch.dtype,
) -> Any:
    """Steps every chunk of the tensors that have a gradient; see launch.py for the arguments."""
    rule = device(tile)
    subgradient, coupled, decoupled, prox = (hook and device(hook) for hook in hooks)
    compute = DOUBLE if param == torch.float64 else FLOAT

    def step(work: Value) -> None:
        chunks, addresses, grads, numels, first_chunks, owners, rows, tensors = _numbers(work, 8)
        slots = Pointer(addresses, torch.int64)
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            row, start = Pointer(rows, torch.float64), tensor * ROW.value
            with when(row[start + ACTIVE.value] != 0.0):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                params = Pointer(slots[tensor], param)
                gradients = Pointer(Pointer(grads, torch.int64)[tensor], grad)
                moments = [Pointer(slots[tensors * (i + 1) + tensor], state) for i in range(states)]
                scale = row[start + ROW_SCALE.value]
                lr, l1, l2, keep, threshold = (
                    row[start + column.value].to(compute)
                    for column in (ROW_LR, ROW_L1, ROW_L2, ROW_DECAY, ROW_THRESHOLD)
                )
                scalars = tuple(row[start + ROW_RULE.value + i].to(compute) for i in range(width))

                with count(begin, end) as i:
                    w, g = params[i].to(compute), gradients[i]
                    if scaled:
                        # In float64: a float32 factor below 1.2e-38 would be subnormal.
                        g = (g.to(DOUBLE) * scale).to(compute)
                    else:
                        g = g.to(compute) * scale.to(compute)  # 1, or -1 to maximize
                    if subgradient is not None:
                        g = subgradient(g, w, l1)
                    if coupled is not None:
                        g = coupled(g, w, l2)
                    if decoupled is not None:
                        w = decoupled(w, keep)
                    old = tuple(moment[i].to(compute) for moment in moments)
                    direction, gain, new = rule(g, old, scalars)
                    w = w - lr * direction
                    if prox is not None:
                        w = prox(w, threshold, gain)
                    with when(lr != 0.0):  # lr = 0 must leave every bit, of -0.0 and inf too
                        params[i] = w
                    for moment, number in zip(moments, new, strict=True):
                        moment[i] = number

    return built(step)
