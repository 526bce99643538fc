"""The three loops of a step on the host, over the tables that the kernels of a GPU walk.

Each is compiled for one rule and one set of dtypes, takes integers (addresses, and the first and
last of the chunks or tensors it shall do), and lets go of the interpreter's lock, so that threads
share a step. Results do not depend on who does which chunk.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

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
from fusedreg.kernels.host.language import compiled
from fusedreg.kernels.host.memory import (
    count_loader,
    count_storer,
    loader,
    row_loader,
    row_storer,
    storer,
)
from fusedreg.kernels.host.translate import device, loop, shared

CHUNK = 65536
"""Elements of one chunk: large, because each starts its vectors and its norm anew."""
TINY, LARGEST = 2.2250738585072014e-308, 1.7976931348623157e308
NUMPY: dict[torch.dtype, Any] = {torch.float64: np.float64, torch.float32: np.float32}

_float64 = row_loader(torch.float64, torch.float64, 1)
_int64 = row_loader(torch.int64, torch.int64, 1)
_int32 = row_loader(torch.int32, torch.int64, 1)


@compiled
def _range(chunk, tensor, numels, first_chunks):
    """The first element of a chunk and the one after its last."""
    begin = (chunk - _int32(first_chunks, tensor, 0)[0]) * CHUNK
    return begin, min(begin + CHUNK, _int64(numels, tensor, 0)[0])


# ---- norms -------------------------------------------------------------------------------------


@cache
def _norm_of(dtype: torch.dtype) -> Any:
    """A function (address, begin, end) -> the norm of those elements."""
    load = loader(dtype, torch.float64, 1)

    # In an order that LLVM chooses, which makes vectors of it.
    @njit(error_model="numpy", fastmath={"reassoc"})
    def sum_of_squares(address, begin, end):
        squares = 0.0
        for i in range(begin, end):
            g = load((address,), i)[0]
            squares += g * g
        return squares

    @compiled
    def norm(address, begin, end):
        squares = sum_of_squares(address, begin, end)
        if not (squares < 1e-280 or squares == np.inf):  # which is no question for NaN
            return math.sqrt(squares)
        # Of float64 squares may overflow or vanish, so divide by the largest element. The limits
        # keep 0/0 and inf/inf out and let an infinite element through to the norm.
        largest = TINY
        for i in range(begin, end):
            largest = max(largest, abs(load((address,), i)[0]))
        largest = min(largest, LARGEST)
        squares = 0.0
        for i in range(begin, end):
            ratio = load((address,), i)[0] / largest
            squares += ratio * ratio
        return largest * math.sqrt(squares)

    return norm


@cache
def norm_loop(grad: torch.dtype) -> Any:
    """Writes the norm of each of some chunks; 0 where there is no gradient."""
    norm_of, put = _norm_of(grad), row_storer(1)

    def norms(grads, numels, first_chunks, owners, partials, first, chunk, stop):
        for k in range(chunk, stop):
            tensor = _int32(owners, k, 0)[0]
            grad = _int64(grads, tensor, 0)[0]
            norm = 0.0
            if grad != 0:
                begin, end = _range(k, tensor, numels, first_chunks)
                norm = norm_of(grad, begin, end)
            put(partials, first + k, (norm,))

    return shared(norms)


# ---- rows --------------------------------------------------------------------------------------


@cache
def rows_loop(
    scalars_of: Any, width: int, states: int, counts: int, count: torch.dtype, options: int
) -> Any:
    """Writes the row of every tensor and advances its counts; see launch.py for the arguments.

    An address is 0 for what is not given.
    """
    rule, fold = device(scalars_of, np.float64), _norm_of(torch.float64)
    load_addresses = row_loader(torch.int64, torch.int64, counts)
    load_counts, put_counts = count_loader(count, counts), count_storer(count, counts)
    load_line = row_loader(torch.float64, torch.float64, OPTIONS.value)
    load_options = row_loader(torch.float64, torch.float64, options)
    put, put_scalars = row_storer(ROW_RULE.value), row_storer(width)
    put_norm = storer(torch.float32, 1)
    load_skipped, put_skipped = loader(torch.int64, torch.int64, 1), storer(torch.int64, 1)

    def rows(
        addresses, grads, groups, numbers, out, partials, parts,
        grad_norm, skipped, tensors,
    ):  # fmt: skip
        scale = _float64(numbers, SCALE, 0)[0]
        skip = _float64(numbers, SKIP, 0)[0] != 0.0
        if partials != 0:
            norm = fold(partials, 0, parts) * scale
            if not abs(norm) < np.inf and _float64(numbers, SKIP_NONFINITE, 0)[0] != 0.0:
                skip = True
            max_norm = _float64(numbers, MAX_NORM, 0)[0]
            if max_norm < np.inf:
                factor = max_norm / (norm + 1e-6)
                scale *= 1.0 if factor > 1.0 else factor  # a NaN stays one
            if grad_norm != 0:
                put_norm((grad_norm,), 0, (norm,))
        if skip and skipped != 0:
            put_skipped((skipped,), 0, (load_skipped((skipped,), 0)[0] + 1,))
        for tensor in range(tensors):
            active = not skip and _int64(grads, tensor, 0)[0] != 0
            line = HEADER + _int32(groups, tensor, 0)[0] * (OPTIONS + options)
            places = load_addresses(addresses, (1 + states) * tensors + tensor, tensors)
            gain, scalars, new = rule(
                load_options(numbers, line + OPTIONS, 1), load_counts(places)
            )
            lr, sign, coupled, decoupled, subgradient, prox, shrink = load_line(numbers, line, 1)
            row = tensor * ROW
            moves = 1.0 if active else 0.0
            keep, threshold = 1.0 - lr * decoupled, lr * prox * gain + lr * shrink
            put(out, row, (moves, sign * scale, lr, subgradient, coupled, keep, threshold))
            put_scalars(out, row + ROW_RULE, scalars)
            if active:
                put_counts(places, new)

    return loop(rows)


# ---- steps -------------------------------------------------------------------------------------


@compiled
def _leave(x, w, number):
    """The hook of a penalty that no group has."""
    return x


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
    """Steps some chunks of the tensors that have a gradient; see launch.py for the arguments."""
    compute = torch.float64 if param == torch.float64 else torch.float32
    narrow = NUMPY[compute]
    rule = device(tile, narrow)
    subgradient, coupled, decoupled, prox = (hook and device(hook, narrow) for hook in hooks)
    load_row = row_loader(torch.float64, compute, ROW_RULE.value)
    load_scalars = row_loader(torch.float64, compute, width)
    load_addresses = row_loader(torch.int64, torch.int64, states)
    load_w, put_w = loader(param, compute, 1), storer(param, 1)
    load_g = loader(grad, torch.float64 if scaled else compute, 1)
    load_states, put_states = loader(state, compute, states), storer(state, states)

    @compiled
    def elements(param, grad, moments, row, scale, scalars, begin, end):
        _, sign, lr, l1, l2, keep, threshold = row
        for i in range(begin, end):
            w = load_w((param,), i)[0]
            g = load_g((grad,), i)[0]
            if scaled:
                g = narrow(g * scale)  # a float32 factor below 1.2e-38 would be subnormal
            else:
                g = g * sign
            if subgradient is not None:
                g = subgradient(g, w, l1)
            if coupled is not None:
                g = coupled(g, w, l2)
            if decoupled is not None:
                w = decoupled(w, keep)
            direction, gain, moved = rule(g, load_states(moments, i), scalars)
            w = w - lr * direction
            if prox is not None:
                w = prox(w, threshold, gain)
            if lr != 0:  # lr = 0 must leave every bit, of -0.0 and inf too
                put_w((param,), i, (w,))
            put_states(moments, i, moved)

    def step(addresses, grads, numels, first_chunks, owners, rows, tensors, chunk, stop):
        for k in range(chunk, stop):
            tensor = _int32(owners, k, 0)[0]
            row = tensor * ROW
            if _float64(rows, row + ACTIVE, 0)[0] != 0.0:
                begin, end = _range(k, tensor, numels, first_chunks)
                elements(
                    _int64(addresses, tensor, 0)[0],
                    _int64(grads, tensor, 0)[0],
                    load_addresses(addresses, tensors + tensor, tensors),
                    load_row(rows, row, 1),
                    _float64(rows, row + ROW_SCALE, 0)[0],
                    load_scalars(rows, row + ROW_RULE, 1),
                    begin,
                    end,
                )

    return shared(step)
