"""The loops of a step on the host, over the tables that the kernels of a GPU walk.

Each is compiled for one rule and one set of dtypes. It takes the address of int64 numbers. The
first of them counts the chunks that are taken. So threads share a loop, each taking chunks until
all are done, and results do not depend on who did which.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from fusedreg.kernels.contract import SLOTS, DeviceFunction, Program, Rule
from fusedreg.kernels.cpu.compiler import Loop, compiled_loop, device, module_of
from fusedreg.kernels.cpu.values import (
    DOUBLE,
    FLOAT,
    Pointer,
    Value,
    Variable,
    count,
    intrinsic,
    repeat,
    select,
    when,
)
from fusedreg.kernels.device import step as device_step
from fusedreg.kernels.layout import GROUP_SCALARS, ROW, STEP_SCALARS

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
    return begin, select(begin + CHUNK < numel, begin + CHUNK, numel)


# ---- norms ---------------------------------------------------------------------------------------


def _norm(elements: Pointer, begin: Value, end: Value, wide: bool) -> Value:
    """The norm of some elements, which are `wide` if their squares may overflow or vanish."""
    squares = Variable(begin.constant(0.0))
    with count(begin, end) as i:
        g = elements[i].to(DOUBLE)
        squares.add_in_any_order(g * g)
    norm = Variable(intrinsic("sqrt", squares.get()))
    if wide:
        # No relation holds for a NaN, which stays one.
        with when((squares.get() < SMALL) | (squares.get() == INFINITY)):
            largest = Variable(begin.constant(TINY))
            with count(begin, end) as i:
                g = intrinsic("fabs", elements[i])
                largest.set(select(g > largest.get(), g, largest.get()))
            # The limits keep 0/0 and inf/inf out and let an infinite element through to the norm.
            scale = select(largest.get() > LARGEST, LARGEST, largest.get())
            ratios = Variable(begin.constant(0.0))
            with count(begin, end) as i:
                ratio = elements[i] / scale
                ratios.set(ratios.get() + ratio * ratio)
            norm.set(scale * intrinsic("sqrt", ratios.get()))
    return norm.get()


@cache
def norm_loop(grad: torch.dtype) -> Loop:
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

    return compiled_loop(norms)


# ---- rows ----------------------------------------------------------------------------------------


@cache
def check(rule: Rule, states: int, counts: int, options: int) -> None:
    """Raise where a rule does not return what its optimizer says, or cannot be compiled."""

    def run(work: Value) -> None:
        number = work.constant(1.0)
        _, scalars, new = _returned(rule.scalars, (number,) * options, (number,) * counts)
        _check_length(rule.scalars, "scalars", scalars, rule.width, "the width of the Rule")
        _check_length(rule.scalars, "counts", new, counts, "`counts`")
        _, _, new = _returned(rule.tile, number, (number,) * states, scalars)
        _check_length(rule.tile, "states", new, states, "states(group)")

    module_of(run)


def _returned(function: DeviceFunction, *args: object) -> tuple[object, object, object]:
    returned = device(function)(*args)
    if not (isinstance(returned, tuple) and len(returned) == 3):
        raise TypeError(f"{function.fn.__name__} does not return three things: see rules.py")
    return returned


def _check_length(
    function: DeviceFunction, what: str, found: object, expected: int, by: str
) -> None:
    if not isinstance(found, tuple) or len(found) != expected:
        number = len(found) if isinstance(found, tuple) else "no tuple of"
        raise ValueError(
            f"{function.fn.__name__} returns {number} {what}, but {by} says {expected}"
        )


def _addresses_of_counts(
    addresses: Value, tensors: Value, tensor: Value, first_slot: int, counts: int
) -> list[Value]:
    """Where the counts of a tensor are, 0 for one that it does not have."""
    slots = Pointer(addresses, torch.int64)
    return [slots[tensors * (first_slot + i) + tensor] for i in range(counts)]


def _count(address: Value, dtype: torch.dtype) -> Value:
    """A count, and 1 where a parameter has none."""
    count = Variable(address.constant(1.0))
    with when(address != 0):
        count.set(Pointer(address, dtype)[0].to(DOUBLE))
    return count.get()


def _group_scalars(groups: Value, tensor: Value, width: int) -> Value:
    """Where the numbers of a tensor's param group begin."""
    return Pointer(groups, torch.int32)[tensor] * width + len(STEP_SCALARS)


def rows_loop(program: Program, norm: bool) -> Loop:
    """Writes the row of every tensor, with its new counts; see contract.py for the arguments.

    The address of what is not given is 0.
    """
    p = program
    return _rows_loop(p.rule, p.row, p.first_count, p.counts, p.first_option, p.group_width, norm)


@cache
def _rows_loop(
    rule: Rule,
    width: int,
    first_count: int,
    count_dtypes: tuple[torch.dtype, ...],
    first_option: int,
    group_width: int,
    norm: bool,
) -> Loop:
    """The same of what the code depends on, which several programs share."""

    def rows(work: Value) -> None:
        (
            tensors, addresses, grads, groups, numbers, rows, partials, parts, grad_norm, skipped,
        ) = _numbers(work, 10)  # fmt: skip
        sent = Pointer(numbers, torch.float64)
        scale, skip = sent[STEP_SCALARS.scale], sent[STEP_SCALARS.skip] != 0.0
        first = tensors.like(0)
        if norm:
            total = _norm(Pointer(partials, torch.float64), first, parts, wide=True) * scale
            nonfinite = device(device_step.is_nonfinite)(total)
            skip = skip | ((sent[STEP_SCALARS.skip_nonfinite] != 0.0) & nonfinite)
            scale = device(device_step.clipped)(scale, total, sent[STEP_SCALARS.max_norm])
            with when(grad_norm != 0):
                Pointer(grad_norm, torch.float32)[0] = total
        with when(skip & (skipped != 0)):
            counter = Pointer(skipped, torch.int64)
            counter[0] = counter[0] + 1

        with count(first, tensors) as tensor:
            active = (skip == 0) & (Pointer(grads, torch.int64)[tensor] != 0)
            group = _group_scalars(groups, tensor, group_width)
            options = tuple(sent[group + i] for i in range(first_option, group_width))
            at = _addresses_of_counts(addresses, tensors, tensor, first_count, len(count_dtypes))
            record, scalars, new = device(device_step.row)(
                select(active, work.constant(1.0), 0.0),
                scale,
                sent[group + GROUP_SCALARS.sign],
                options,
                tuple(map(_count, at, count_dtypes)),
                device(rule.scalars),
            )
            out = Pointer(rows, torch.float64)
            for i, number in enumerate((*record, *scalars, *new)):
                out[tensor * width + i] = scale.like(number)

    return compiled_loop(rows)


# ---- steps ---------------------------------------------------------------------------------------


class Elements:
    """The elements of one tensor: what they move along, and where that is stored."""

    def __init__(
        self,
        program: Program,
        scaled: bool,
        table: tuple[Value, ...],
        tensor: Value,
    ) -> None:
        addresses, grads, groups, numbers, rows, tensors = table
        slots = Pointer(addresses, torch.int64)
        self.program, self.scaled = program, scaled
        self.compute = DOUBLE if program.param == torch.float64 else FLOAT
        self.params = Pointer(slots[tensor], program.param)
        self.grads = Pointer(Pointer(grads, torch.int64)[tensor], program.grad)
        planes = [plane for _ in range(program.states) for plane in program.planes]
        self.planes = [
            Pointer(slots[tensors * (i + 1) + tensor], plane) for i, plane in enumerate(planes)
        ]
        row, first = Pointer(rows, torch.float64), tensor * program.row
        self.row = [row[first + i] for i in range(program.row)]
        self.scalars = tuple(
            scalar.to(self.compute) for scalar in self.row[len(ROW) : len(ROW) + program.rule.width]
        )
        sent, group = (
            Pointer(numbers, torch.float64),
            _group_scalars(groups, tensor, program.group_width),
        )
        self.lr = sent[group + GROUP_SCALARS.lr]
        # Of a slot that is free there are no numbers, and its hook is None.
        slots_ = {stage: program.slots(stage) for stage in SLOTS}
        self.hooks = {
            stage: [None if one is None else device(one.function) for one in slots_[stage]]
            for stage in SLOTS
        }
        self.numbers = {
            stage: [
                () if one is None else tuple(sent[group + one.first + i] for i in range(one.width))
                for one in slots_[stage]
            ]
            for stage in SLOTS
        }

    def direction(self, i: Value) -> tuple[Value, Value, Value, tuple[Value, ...]]:
        """What one element moves along: w, direction, gain and new states."""
        w = self.params[i].to(self.compute)
        scale = self.row[ROW.scale]
        g = device(device_step.loss_gradient)(self.grads[i], scale, self.scaled, self.compute)
        g = device(device_step.penalised)(g, w, *self.numbers["gradient"], *self.hooks["gradient"])
        old = tuple(self._state(k, i) for k in range(self.program.states))
        return w, *device(self.program.rule.tile)(g, old, self.scalars)

    def _planes(self, state: int) -> list[Pointer]:
        size = len(self.program.planes)
        return self.planes[state * size : (state + 1) * size]

    def _state(self, state: int, i: Value) -> Value:
        """One state of one element."""
        stored = tuple(plane[i] for plane in self._planes(state))
        codec = self.program.codec
        value = stored[0] if codec is None else device(codec.decode)(stored, state)
        widened: Value = value.to(self.compute)
        return widened

    def store_state(self, state: int, i: Value, value: Value) -> None:
        """Store it, rounded once."""
        codec = self.program.codec
        stored = (value,) if codec is None else device(codec.encode)(value, state)
        for plane, number in zip(self._planes(state), stored, strict=True):
            plane[i] = number

    def moved(self, w: Value, direction: Value, gain: Value, rate: Value) -> Value:
        """The parameter after the step."""
        after: Value = device(device_step.moved)(
            w, direction, gain, rate, self.row[ROW.gain],
            *self.numbers["decay"], *self.numbers["prox"],
            *self.hooks["decay"], *self.hooks["prox"],
        )  # fmt: skip
        return after

    def update(self, w: Value, direction: Value) -> Value:
        """What the rate multiplies."""
        update: Value = device(device_step.update_of)(
            w, direction, *self.numbers["decay"], *self.hooks["decay"]
        )
        return update


@cache
def step_loop(program: Program, scaled: bool) -> Loop:
    """Steps every chunk of the tensors that have a gradient; see contract.py for the arguments.

    The thread that takes the first chunk of a tensor stores its counts.
    """

    def step(work: Value) -> None:
        (
            chunks, addresses, grads, numels, groups, first_chunks, owners, numbers, rows, squares,
            tensors,
        ) = _numbers(work, 11)  # fmt: skip
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            with when(_is_active(program, rows, tensor)):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                table = (addresses, grads, groups, numbers, rows, tensors)
                elements = Elements(program, scaled, table, tensor)
                rate = elements.lr
                if program.layerwise:
                    sums = Pointer(squares, torch.float64)
                    trust = device(device_step.trust_ratio)
                    rate = rate * trust(sums[tensor * 2], sums[tensor * 2 + 1])
                moves = elements.lr.to(elements.compute) != 0.0

                with count(begin, end) as i:
                    w, direction, gain, new = elements.direction(i)
                    w = elements.moved(w, direction, gain, rate)
                    with when(moves):  # lr = 0 must leave every bit, of -0.0 and inf too
                        elements.params[i] = w
                    for k, value in enumerate(new):
                        elements.store_state(k, i, value)

                with when(begin == 0):
                    at = _addresses_of_counts(
                        addresses, tensors, tensor, program.first_count, len(program.counts)
                    )
                    counts = elements.row[len(ROW) + program.rule.width :]
                    for address, dtype, number in zip(at, program.counts, counts, strict=True):
                        with when(address != 0):
                            Pointer(address, dtype)[0] = number

    return compiled_loop(step)


def _is_active(program: Program, rows: Value, tensor: Value) -> Value:
    """Whether a tensor moves in this step."""
    active: Value = Pointer(rows, torch.float64)[tensor * program.row + ROW.active] != 0.0
    return active


# ---- layerwise -----------------------------------------------------------------------------------


@cache
def squares_loop(program: Program, scaled: bool) -> Loop:
    """Writes the sums of squares of each chunk of w and of its update; 0 where nothing moves."""

    def squares(work: Value) -> None:
        (
            chunks, addresses, grads, numels, groups, first_chunks, owners, numbers, rows, partials,
            tensors,
        ) = _numbers(work, 11)  # fmt: skip
        with _each_chunk(work, chunks) as chunk:
            tensor = Pointer(owners, torch.int32)[chunk]
            out = Pointer(partials, torch.float64)
            sums = [Variable(work.constant(0.0)) for _ in range(2)]
            with when(_is_active(program, rows, tensor)):
                begin, end = _bounds(chunk, tensor, numels, first_chunks)
                table = (addresses, grads, groups, numbers, rows, tensors)
                elements = Elements(program, scaled, table, tensor)
                with count(begin, end) as i:
                    w, direction, _, _ = elements.direction(i)
                    update = elements.update(w, direction)
                    for total, x in zip(sums, (w.to(DOUBLE), update.to(DOUBLE)), strict=True):
                        total.add_in_any_order(x * x)
            for k, total in enumerate(sums):
                out[chunk * 2 + k] = total.get()

    return compiled_loop(squares)


@cache
def fold_loop() -> Loop:
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

    return compiled_loop(fold)
