"""The loops of a step on the host, over the tables that the kernels of a GPU walk.

Each is compiled for one rule and one set of dtypes. It takes the address of int64 numbers, of which
the first counts the chunks that are taken: so threads share a loop, each taking chunks until all
are done, and results do not depend on who did which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from fusedreg.kernels.cpu.compiler import built, device, written
from fusedreg.kernels.cpu.language import absolute, square_root, where
from fusedreg.kernels.cpu.values import (
    DOUBLE,
    FLOAT,
    Pointer,
    Value,
    Variable,
    count,
    repeat,
    when,
)
from fusedreg.kernels.layout import (
    ACTIVE,
    COUPLED,
    DECAY_LR,
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


@cache
def check(rule: Any, states: int, counts: int, options: int) -> None:
    """Raise where a rule does not return what its optimizer says, or cannot be compiled."""

    def run(work: Value) -> None:
        number = work.constant(1.0)
        _, scalars, new = _returned(rule.scalars, (number,) * options, (number,) * counts)
        _check_length(rule.scalars, "scalars", scalars, rule.width, "the width of the Rule")
        _check_length(rule.scalars, "counts", new, counts, "scalar_states")
        _, _, new = _returned(rule.tile, number, (number,) * states, scalars)
        _check_length(rule.tile, "states", new, states, "states(group)")

    written(run)


def _returned(function: Any, *args: Any) -> tuple[Any, Any, Any]:
    returned = device(function)(*args)
    if not (isinstance(returned, tuple) and len(returned) == 3):
        raise TypeError(f"{function.fn.__name__} does not return three things: see rules.py")
    return returned


def _check_length(function: Any, what: str, found: Any, expected: int, by: str) -> None:
    if not isinstance(found, tuple) or len(found) != expected:
        number = len(found) if isinstance(found, tuple) else "no tuple of"
        raise ValueError(
            f"{function.fn.__name__} returns {number} {what}, but {by} says {expected}"
        )


def _places(
    addresses: Value, tensors: Value, tensor: Value, states: int, counts: int
) -> list[Value]:
    """Where the counts of a tensor are, 0 for one that it has not."""
    slots = Pointer(addresses, torch.int64)
    return [slots[tensors * (1 + states + i) + tensor] for i in range(counts)]


def _count(address: Value, dtype: torch.dtype) -> Value:
    """A count, and 1 where a parameter has none."""
    count = Variable(address.constant(1.0))
    with when(address != 0):
        count.set(Pointer(address, dtype)[0].to(DOUBLE))
    return count.get()


@cache
def rows_loop(
    rule: Any, states: int, counts: tuple[torch.dtype, ...], options: int, norm: bool
) -> Any:
    """Writes the row of every tensor, with its new counts; see launch.py for the arguments.

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
            places = _places(addresses, tensors, tensor, states, len(counts))
            old = tuple(map(_count, places, counts))
            own = tuple(sent[line + OPTIONS.value + i] for i in range(options))
            gain, scalars, new = device(rule.scalars)(own, old)

            lr = sent[line + LR.value]
            threshold = lr * sent[line + PROX.value] * gain + lr * sent[line + SHRINK.value]
            row = {
                ACTIVE: where(active, work.constant(1.0), 0.0),
                ROW_SCALE: sent[line + SIGN.value] * scale,
                ROW_LR: lr,
                ROW_L1: sent[line + SUBGRADIENT.value],
                ROW_L2: sent[line + COUPLED.value],
                ROW_DECAY: sent[line + DECOUPLED.value] / sent[line + DECAY_LR.value],
                ROW_THRESHOLD: threshold,
            }
            out, start = Pointer(rows, torch.float64), tensor * ROW.value
            for column, number in row.items():
                out[start + column.value] = number
            for i, number in enumerate((*scalars, *new)):
                out[start + ROW_RULE.value + i] = lr.like(number)

    return built(rows)


# ---- steps ---------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """What a loop over elements is compiled for."""

    rule: Any
    states: int
    subgradient: Any
    """A device function or None, like `coupled`."""
    coupled: Any
    scaled: bool
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype

    @property
    def compute(self) -> Any:
        """The type of the arithmetic."""
        return DOUBLE if self.param == torch.float64 else FLOAT


class Elements:
    """The elements of one tensor: what they move along, and where that is stored."""

    def __init__(
        self,
        kind: Kind,
        addresses: Value,
        grads: Value,
        row: Pointer,
        tensor: Value,
        tensors: Value,
    ) -> None:
        slots = Pointer(addresses, torch.int64)
        self.kind, self.start, self.row = kind, tensor * ROW.value, row
        self.params = Pointer(slots[tensor], kind.param)
        self.grads = Pointer(Pointer(grads, torch.int64)[tensor], kind.grad)
        self.states = [
            Pointer(slots[tensors * (i + 1) + tensor], kind.state) for i in range(kind.states)
        ]
        self.scale, self.l1, self.l2 = map(self.number, (ROW_SCALE, ROW_L1, ROW_L2))
        self.scalars = tuple(
            row[self.start + ROW_RULE.value + i].to(kind.compute) for i in range(kind.rule.width)
        )

    def number(self, column: Any) -> Value:
        """A number of the tensor's row."""
        return self.row[self.start + column.value]

    def direction(self, i: Value) -> tuple[Value, Value, Any, tuple[Value, ...]]:
        """What one element moves along: w, direction, gain and new states."""
        compute, kind = self.kind.compute, self.kind
        w, g = self.params[i].to(compute), self.grads[i]
        if kind.scaled:
            # In float64: a float32 factor below 1.2e-38 would be subnormal.
            g = (g.to(DOUBLE) * self.scale).to(compute)
        else:
            g = g.to(compute) * self.scale.to(compute)  # 1, or -1 to maximize
        if kind.subgradient is not None:
            g = device(kind.subgradient)(g, w, self.l1.to(compute))
        if kind.coupled is not None:
            g = device(kind.coupled)(g, w, self.l2.to(compute))
        old = tuple(state[i].to(compute) for state in self.states)
        return w, *device(kind.rule.tile)(g, old, self.scalars)


@cache
def step_loop(
    kind: Kind, counts: tuple[torch.dtype, ...], decoupled: Any, prox: Any, trust: Any
) -> Any:
    """Steps every chunk of the tensors that have a gradient; see launch.py for the arguments.

    Whoever takes the first chunk of a tensor stores its counts.
    """
    compute = kind.compute

    def step(work: Value) -> None:
        numbers = _numbers(work, 9)
        chunks, addresses, grads, numels, first_chunks, owners, rows, squares, tensors = numbers
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            row = Pointer(rows, torch.float64)
            with when(row[tensor * ROW.value + ACTIVE.value] != 0.0):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                elements = Elements(kind, addresses, grads, row, tensor, tensors)
                lr, decay, threshold = map(elements.number, (ROW_LR, ROW_DECAY, ROW_THRESHOLD))
                rate = lr
                if trust is not None:
                    sums = Pointer(squares, torch.float64)
                    ratio = device(trust)(sums[tensor * 2], sums[tensor * 2 + 1])
                    rate, threshold = lr * ratio, threshold * ratio
                keep, rate = (1.0 - rate * decay).to(compute), rate.to(compute)
                lr, threshold = lr.to(compute), threshold.to(compute)

                with count(begin, end) as i:
                    w, direction, gain, new = elements.direction(i)
                    if decoupled is not None:
                        w = device(decoupled)(w, keep)
                    w = w - rate * direction
                    if prox is not None:
                        w = device(prox)(w, threshold, gain)
                    with when(lr != 0.0):  # lr = 0 must leave every bit, of -0.0 and inf too
                        elements.params[i] = w
                    for state, number in zip(elements.states, new, strict=True):
                        state[i] = number

                with when(begin == 0):
                    places = _places(addresses, tensors, tensor, kind.states, len(counts))
                    first = elements.start + ROW_RULE.value + kind.rule.width
                    for i, (place, dtype) in enumerate(zip(places, counts, strict=True)):
                        with when(place != 0):
                            Pointer(place, dtype)[0] = row[first + i]

    return built(step)


# ---- layerwise -----------------------------------------------------------------------------------


@cache
def squares_loop(kind: Kind) -> Any:
    """Writes the sums of squares of each chunk of w and of its update; 0 where nothing moves."""

    def squares(work: Value) -> None:
        numbers = _numbers(work, 9)
        chunks, addresses, grads, numels, first_chunks, owners, rows, partials, tensors = numbers
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            row, out = Pointer(rows, torch.float64), Pointer(partials, torch.float64)
            sums = [Variable(work.constant(0.0)) for _ in range(2)]
            with when(row[tensor * ROW.value + ACTIVE.value] != 0.0):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                elements = Elements(kind, addresses, grads, row, tensor, tensors)
                decay = elements.number(ROW_DECAY).to(kind.compute)
                with count(begin, end) as i:
                    w, direction, _, _ = elements.direction(i)
                    update = direction + decay * w
                    for total, x in zip(sums, (w.to(DOUBLE), update.to(DOUBLE)), strict=True):
                        total.add_in_any_order(x * x)
            for k, total in enumerate(sums):
                out[chunk * 2 + k] = total.get()

    return built(squares)


@cache
def fold_loop() -> Any:
    """Writes the sums over the chunks of each tensor, in their order."""

    def fold(work: Value) -> None:
        tensors, chunks, partials, first_chunks, squares = _numbers(work, 5)
        firsts, parts = Pointer(first_chunks, torch.int32), Pointer(partials, torch.float64)
        with count(tensors.like(0), tensors) as tensor:
            last = tensor + 1 == tensors
            end = Variable(chunks)
            with when(last == 0):
                end.set(firsts[tensor + 1])
            sums = [Variable(work.constant(0.0)) for _ in range(2)]
            with count(firsts[tensor], end.get()) as chunk:
                for k, total in enumerate(sums):
                    total.set(total.get() + parts[chunk * 2 + k])
            for k, total in enumerate(sums):
                Pointer(squares, torch.float64)[tensor * 2 + k] = total.get()

    return built(fold)
