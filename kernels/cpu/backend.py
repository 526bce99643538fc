"""Norms, rows and step on the host: the interface of ../launch.py, on the threads of torch."""

from __future__ import annotations

import ctypes
from _thread import start_new_thread
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import repeat
from time import sleep
from typing import Any

import torch
from torch import Tensor

from fusedreg.kernels import table as tables
from fusedreg.kernels.cpu.loops import (
    CHUNK,
    Kind,
    check,
    fold_loop,
    norm_loop,
    rows_loop,
    squares_loop,
    step_loop,
)
from fusedreg.kernels.device import penalties as penalty
from fusedreg.kernels.device.rules import Rule, known, trust_ratio
from fusedreg.kernels.layout import HEADER as HEADER_WIDTH
from fusedreg.kernels.layout import OPTIONS as LINE_WIDTH
from fusedreg.kernels.layout import ROW as ROW_WIDTH
from fusedreg.kernels.layout import header, line, penalties, with_lr
from fusedreg.kernels.table import Call, Table, Walk, constants, move, send

__all__ = [
    "ALIGNMENT", "HEADER", "NAME", "ROW", "Walk", "build", "constants", "header", "line", "move",
    "norms", "penalties", "rows", "rule_of", "send", "squares", "step", "with_lr",
]  # fmt: skip

NAME = "llvm"
ALIGNMENT = 1
"""Bytes of which a CPU needs addresses to be multiples: any will do."""
HEADER: int = HEADER_WIDTH.value
ROW: int = ROW_WIDTH.value

build = partial(tables.build, chunk=CHUNK)
SHARE = 32768
"""Elements that are worth another thread of OpenMP, which is there already."""
START = 131072
"""Elements that are worth a thread of our own, which takes some 40 microseconds to start."""


@cache
def _openmp() -> Any:
    """GNU's entry into the OpenMP that torch itself runs on, which LLVM's may have too, or None.

    Other threads would have to wait for torch's: after each parallel operation those spin for some
    milliseconds before they let go of their cores.
    """
    try:
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def on_threads(loop: Any, table: Table, *args: Tensor | int | None) -> Call:
    """A loop over all chunks on as many threads as torch uses, the caller's among them.

    Where that thread is interrupted, as by Ctrl-C, either nothing of the loop has happened or all
    of it, and the other threads have ended, before the exception goes on.
    """
    work = _work(table.chunks, *args)
    address, _ = work.buffer_info()
    entry = ctypes.cast(loop, ctypes.c_void_p)
    most = min(table.chunks, table.elements // SHARE)

    def call() -> None:
        work[0] = 0
        if most <= 1 or (threads := min(most, torch.get_num_threads())) <= 1:
            loop(address)
        elif (parallel := _openmp()) is not None:
            parallel(entry, address, threads, 0)
        elif (threads := min(threads, table.elements // START)) <= 1:
            loop(address)
        else:
            _on_new_threads(threads - 1, loop, address, (work, args))

    return call


def on_caller(loop: Any, *args: Tensor | int | None) -> Call:
    """A loop over tensors on the thread that calls."""
    work = _work(*args)

    def call() -> None:
        loop(work.buffer_info()[0])

    return call


def _work(*args: Tensor | int | None) -> array[int]:
    """What a loop takes: the count of chunks taken, then numbers and addresses, 0 for None."""
    return array("q", [0, *(arg if isinstance(arg, int) else _address(arg) for arg in args)])


def _on_new_threads(others: int, loop: Any, address: int, kept: Any) -> None:
    """Do a loop on this thread and `others`, which hold what is `kept` and end before this does."""
    started: list[int] = []
    ended: list[Any] = []

    def share(kept: Any) -> None:
        loop(address)
        ended.append(None)

    try:
        # In one call, before or after which an interrupt comes: so it is known what has started.
        with suppress(RuntimeError):  # there may be no more threads; fewer take all chunks too
            started.extend(map(start_new_thread, repeat(share, others), repeat((kept,))))
        _finish(loop, address, started, ended)
    except BaseException:  # also one that comes as that function begins
        _finish(loop, address, started, ended)
        raise


def _finish(loop: Any, address: int, started: Sequence[Any], ended: Sequence[Any]) -> None:
    """Do all chunks that are left and wait for the threads, however often this is interrupted."""
    try:
        loop(address)  # where none is left, it does nothing
        # Each is at its last chunk. A lock could be lost to an interrupt just after it is taken.
        while len(ended) < len(started):
            sleep(0)
    except BaseException:
        _finish(loop, address, started, ended)
        raise


def rule_of(rule: Rule | str, *, states: int, counts: int, line: int) -> Rule:
    """The device functions of a rule, checked; arguments as in ../launch.py."""
    found = known(rule, counts)
    check(found, states, counts, line - LINE_WIDTH.value)
    return found


def norms(
    table: Table, grads: Tensor, partials: Tensor, first: int, grad: torch.dtype, aligned: bool
) -> Call:
    """Writes the norm of every chunk of the gradients; arguments as in ../launch.py."""
    return on_threads(
        norm_loop(grad),
        table,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        partials,
        first,
    )


def rows(
    table: Table,
    grads: Tensor,
    numbers: Tensor,
    out: Tensor,
    *,
    rule: Rule,
    states: int,
    counts: tuple[torch.dtype, ...],
    line: int,
    partials: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Call:
    """Writes the row of every tensor, with its new counts; arguments as in ../launch.py."""
    assert (grad_scale, found_inf) == (None, None), "the host reads them, so `numbers` has them"
    loop = rows_loop(rule, states, counts, line - LINE_WIDTH.value, partials is not None)
    return on_caller(
        loop,
        table.tensors,
        table.addresses,
        grads,
        table.groups,
        numbers,
        out,
        partials,
        0 if partials is None else partials.numel(),
        grad_norm,
        skipped,
    )


def squares(
    table: Table, grads: Tensor, rows: Tensor, partials: Tensor, out: Tensor, walk: Walk
) -> tuple[Call, Call]:
    """Writes the sums of squares of every tensor and its update; arguments as in ../launch.py."""
    of_chunks = on_threads(
        squares_loop(_kind(walk)),
        table,
        table.addresses,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        rows,
        partials,
        table.tensors,
    )
    of_tensors = on_caller(
        fold_loop(), table.tensors, table.chunks, partials, table.first_chunks, out
    )
    return of_chunks, of_tensors


def step(
    table: Table,
    grads: Tensor,
    rows: Tensor,
    squares: Tensor | None,
    walk: Walk,
    *,
    counts: tuple[torch.dtype, ...],
    decoupled: bool,
    prox: bool,
    shrink: bool,
) -> Call:
    """Steps every tensor that has a gradient, and its counts; arguments as in ../launch.py."""
    loop = step_loop(
        _kind(walk),
        counts,
        penalty.decoupled if decoupled else None,
        (penalty.shrink if shrink else penalty.prox) if prox else None,
        None if squares is None else trust_ratio,
    )
    return on_threads(
        loop,
        table,
        table.addresses,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        rows,
        squares,
        table.tensors,
    )


def _kind(walk: Walk) -> Kind:
    """What the loops over elements are compiled for."""
    return Kind(
        walk.rule,
        walk.states,
        penalty.l1_subgradient if walk.subgradient else None,
        penalty.coupled if walk.coupled else None,
        walk.scaled,
        walk.param,
        walk.grad,
        walk.state,
    )


def _address(value: Tensor | None) -> int:
    """Where a tensor is, 0 for none."""
    return 0 if value is None else value.data_ptr()
