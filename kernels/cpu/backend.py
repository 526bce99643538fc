"""LLVM's backend: the loops of a step, on the threads of torch."""

from __future__ import annotations

import ctypes
from _thread import start_new_thread
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import repeat
from time import sleep
from typing import Any, final

import torch
from torch import Tensor

from fusedreg.kernels import table as tables
from fusedreg.kernels.contract import Arrays, Call, DeviceFunction, Program, Rule
from fusedreg.kernels.cpu.compiler import Loop
from fusedreg.kernels.cpu.loops import (
    CHUNK,
    check,
    fold_loop,
    norm_loop,
    rows_loop,
    squares_loop,
    step_loop,
)
from fusedreg.kernels.device import penalties, rules
from fusedreg.kernels.table import Table

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


def on_threads(loop: Loop, table: Table, *args: Tensor | int | None) -> Call:
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


def on_caller(loop: Loop, *args: Tensor | int | None) -> Call:
    """A loop over tensors on the thread that calls."""
    work = _work(*args)

    def call() -> None:
        loop(work.buffer_info()[0])

    return call


def _work(*args: Tensor | int | None) -> array[int]:
    """What a loop takes: the count of chunks taken, then numbers and addresses, 0 for None."""
    return array("q", [0, *(arg if isinstance(arg, int) else _address(arg) for arg in args)])


def _on_new_threads(others: int, loop: Loop, address: int, kept: object) -> None:
    """Do a loop on this thread and `others`, which hold what is `kept` and end before this does."""
    started: list[int] = []
    ended: list[None] = []

    def share(kept: object) -> None:
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


def _finish(loop: Loop, address: int, started: Sequence[int], ended: Sequence[None]) -> None:
    """Do all chunks that are left and wait for the threads, however often this is interrupted."""
    try:
        loop(address)  # where none is left, it does nothing
        # Each is at its last chunk. A lock could be lost to an interrupt just after it is taken.
        while len(ended) < len(started):
            sleep(0)
    except BaseException:
        _finish(loop, address, started, ended)
        raise


def _address(value: Tensor | None) -> int:
    """Where a tensor is, 0 for none."""
    return 0 if value is None else value.data_ptr()


@final
class LLVM:
    """LLVM's kernels, on a CPU; see contract.Backend, which documents the methods."""

    name = "llvm"
    alignment = 1

    def rule(self, rule: Rule | str, *, states: int, counts: int, options: int) -> Rule:
        """The device functions of a rule, checked."""
        found = rules.resolve(rule)
        check(found, states, counts, options)
        return found

    def hook(self, function: DeviceFunction | str) -> DeviceFunction:
        """The device function of a penalty."""
        return penalties.resolve(function)

    def build(
        self,
        addresses: Sequence[Sequence[int]],
        numels: Sequence[int],
        groups: Sequence[int],
        device: torch.device,
    ) -> Table:
        """The table of some tensors."""
        return tables.build(addresses, numels, groups, device, CHUNK)

    def norms(
        self, program: Program, table: Table, grads: Tensor, partials: Tensor, first: int
    ) -> Call:
        """Writes the norm of every chunk of the gradients."""
        return on_threads(
            norm_loop(program.grad),
            table,
            grads,
            table.numels,
            table.first_chunks,
            table.owners,
            partials,
            first,
        )

    def rows(
        self,
        program: Program,
        arrays: Arrays,
        *,
        partials: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> Call:
        """Writes the row of every tensor, with its new counts, which `step` stores."""
        assert (grad_scale, found_inf) == (None, None), "the host reads them, so `numbers` has them"
        return on_caller(
            rows_loop(program, partials is not None),
            arrays.table.tensors,
            arrays.table.addresses,
            arrays.grads,
            arrays.table.groups,
            arrays.numbers,
            arrays.rows,
            partials,
            0 if partials is None else partials.numel(),
            grad_norm,
            skipped,
        )

    def squares(self, program: Program, arrays: Arrays, *, scaled: bool) -> list[Call]:
        """Writes the sums of squares of every tensor and of its update; changes nothing else."""
        table, partials = arrays.table, arrays.partials
        of_chunks = _walk(squares_loop(program, scaled), arrays, partials)
        of_tensors = on_caller(
            fold_loop(), table.tensors, table.chunks, partials, table.first_chunks, arrays.squares
        )
        return [of_chunks, of_tensors]

    def step(self, program: Program, arrays: Arrays, *, scaled: bool) -> Call:
        """Steps every tensor that has a gradient, and its counts with it."""
        return _walk(step_loop(program, scaled), arrays, arrays.squares)


def _walk(loop: Loop, arrays: Arrays, sums: Tensor) -> Call:
    """A loop over all chunks."""
    return on_threads(loop, arrays.table, *arrays.walked(sums))


BACKEND = LLVM()
