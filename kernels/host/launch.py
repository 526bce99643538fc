"""Norms, rows and step on the host: the interface of ../launch.py, on the threads of torch."""

from __future__ import annotations

import ctypes
import os
from array import array
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fusedreg.kernels import penalty
from fusedreg.kernels import table as tables
from fusedreg.kernels.columns import HEADER as HEADER_WIDTH
from fusedreg.kernels.columns import OPTIONS as LINE_WIDTH
from fusedreg.kernels.columns import ROW as ROW_WIDTH
from fusedreg.kernels.columns import header, line, penalties, with_lr
from fusedreg.kernels.host.engine import (
    CHUNK,
    Kind,
    check,
    fold_loop,
    norm_loop,
    rows_loop,
    squares_loop,
    step_loop,
)
from fusedreg.kernels.rules import Rule, known, trust_ratio
from fusedreg.kernels.table import Table, Walk, constants, send

__all__ = [
    "ALIGNMENT", "HEADER", "NAME", "ROW", "Walk", "build", "constants", "header", "line", "norms",
    "penalties", "rows", "rule_of", "send", "squares", "step", "with_lr",
]  # fmt: skip

NAME = "llvm"
ALIGNMENT = 1
"""Bytes of which a CPU needs addresses to be multiples: any will do."""
HEADER: int = HEADER_WIDTH.value
ROW: int = ROW_WIDTH.value

build = partial(tables.build, chunk=CHUNK)
SHARE = 32768
"""Elements that are worth another thread."""


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


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fusedreg")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # where none of its threads is left


def run(loop: Any, table: Table, *args: int) -> None:
    """Do a loop over all chunks on as many threads as torch uses, this one among them."""
    threads = min(torch.get_num_threads(), table.chunks, table.elements // SHARE)
    work = array("q", [0, table.chunks, *args])  # the first counts those that are taken
    address, _ = work.buffer_info()
    if threads <= 1:
        loop(address)
    elif (parallel := _openmp()) is not None:
        parallel(ctypes.cast(loop, ctypes.c_void_p), address, threads, 0)
    else:
        pool = _pool(threads - 1)
        others = [pool.submit(loop, address) for _ in range(threads - 1)]
        try:
            loop(address)
        finally:  # they use `work`, even if this thread is interrupted
            wait(others)


def rule_of(rule: Rule | str, *, states: int, counts: int, line: int) -> Rule:
    """The device functions of a rule, checked; arguments as in ../launch.py."""
    found = known(rule)
    check(found, states, counts, line - LINE_WIDTH.value)
    return found


def norms(
    table: Table, grads: Tensor, partials: Tensor, first: int, grad: torch.dtype, aligned: bool
) -> None:
    """Write the norm of every chunk of the gradients; arguments as in ../launch.py."""
    run(
        norm_loop(grad),
        table,
        grads.data_ptr(),
        table.numels.data_ptr(),
        table.first_chunks.data_ptr(),
        table.owners.data_ptr(),
        partials.data_ptr(),
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
) -> None:
    """Write the row of every tensor and advance its counts; arguments as in ../launch.py."""
    assert (grad_scale, found_inf) == (None, None), "the host reads them, so `numbers` has them"
    loop = rows_loop(rule, states, counts, line - LINE_WIDTH.value, partials is not None)
    work = array(
        "q",
        [
            0,
            table.tensors,
            table.addresses.data_ptr(),
            grads.data_ptr(),
            table.groups.data_ptr(),
            numbers.data_ptr(),
            out.data_ptr(),
            _address(partials),
            0 if partials is None else partials.numel(),
            _address(grad_norm),
            _address(skipped),
        ],
    )
    loop(work.buffer_info()[0])


def squares(
    table: Table, grads: Tensor, rows: Tensor, partials: Tensor, out: Tensor, walk: Walk
) -> None:
    """Write the sums of squares of every tensor and of its update; arguments as in ../launch.py."""
    run(
        squares_loop(_kind(walk)),
        table,
        table.addresses.data_ptr(),
        grads.data_ptr(),
        table.numels.data_ptr(),
        table.first_chunks.data_ptr(),
        table.owners.data_ptr(),
        rows.data_ptr(),
        partials.data_ptr(),
        table.tensors,
    )
    work = array(
        "q",
        [
            0,
            table.tensors,
            table.chunks,
            partials.data_ptr(),
            table.first_chunks.data_ptr(),
            out.data_ptr(),
        ],
    )
    fold_loop()(work.buffer_info()[0])


def step(
    table: Table,
    grads: Tensor,
    rows: Tensor,
    squares: Tensor | None,
    walk: Walk,
    *,
    decoupled: bool,
    prox: bool,
    shrink: bool,
) -> None:
    """Step every tensor that has a gradient; arguments as in ../launch.py."""
    loop = step_loop(
        _kind(walk),
        penalty.decoupled if decoupled else None,
        (penalty.shrink if shrink else penalty.prox) if prox else None,
        None if squares is None else trust_ratio,
    )
    run(
        loop,
        table,
        table.addresses.data_ptr(),
        grads.data_ptr(),
        table.numels.data_ptr(),
        table.first_chunks.data_ptr(),
        table.owners.data_ptr(),
        rows.data_ptr(),
        _address(squares),
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
