"""Grid and launch options of the kernels.

With clipping a step is `norms`, `rows` and `step`, without it `rows` and `step`: whatever the
number of tensors and param groups, as long as their dtypes are the same. A layerwise rule has
`squares`, of two launches, before its `step`.

Each of these returns a call that may be made again, in any step with the same tables.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedreg.kernels.device import penalties as penalty
from fusedreg.kernels.device.rules import Rule, known, trust_ratio
from fusedreg.kernels.gpu.norms import norm_kernel
from fusedreg.kernels.gpu.rows import rows_kernel
from fusedreg.kernels.gpu.walk import fold_kernel, squares_kernel, step_kernel
from fusedreg.kernels.layout import HEADER as HEADER_WIDTH
from fusedreg.kernels.layout import OPTIONS as LINE_WIDTH
from fusedreg.kernels.layout import ROW as ROW_WIDTH
from fusedreg.kernels.layout import header, line, penalties, with_lr
from fusedreg.kernels.table import CHUNK, Call, Table, Walk, build, constants, move, send

__all__ = [
    "ALIGNMENT", "DTYPES", "HEADER", "NAME", "ROW", "Walk", "build", "constants", "header", "line",
    "move", "norms", "penalties", "rows", "rule_of", "run", "send", "squares", "step", "with_lr",
]  # fmt: skip

NAME = "triton"
ALIGNMENT = 16
"""Bytes of the widest access of a GPU."""
HEADER: int = HEADER_WIDTH.value
ROW: int = ROW_WIDTH.value

BLOCK = 1024
"""Elements of one iteration: 8 for each of 128 threads, so two 16-byte accesses of float32.

Half as many in float64, which needs two registers for each number, and where addresses are no
multiples of 16 bytes, so that each element has an address of its own in registers.
"""
ROWS_BLOCK = 128
FOLD_BLOCK = 2048
LAUNCH_OPTIONS: dict[str, Any] = {
    "num_warps": 4,
    # A product and a sum stay two roundings, as in torch.
    "enable_fp_fusion": False,
}
DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
"""Dtypes of parameters, gradients and states that the kernels take."""


def block_of(dtype: torch.dtype, aligned: bool) -> int:
    """Elements of one iteration for tensors of a dtype."""
    return BLOCK if aligned and dtype != torch.float64 else BLOCK // 2


def run(kernel: Any, programs: int, *args: Any, **constexprs: Any) -> None:
    """Launch `kernel` on the current device and stream. Every launch of the package goes here."""
    kernel[(programs,)](*args, **constexprs, **LAUNCH_OPTIONS)


def rule_of(rule: Rule | str, *, states: int, counts: int, line: int) -> Rule:
    """The device functions of a rule.

    Args:
        rule: they themselves, or their name in `RULES`.
        states, counts, line: how many states, counts and numbers of a group they take. Here
            triton's compiler sees to that, in the first launch.
    """
    return known(rule, counts)


def norms(
    table: Table, grads: Tensor, partials: Tensor, first: int, grad: torch.dtype, aligned: bool
) -> Call:
    """Writes the norm of every chunk of the gradients.

    Args:
        table: the tensors, with at least one chunk.
        grads: int64, (tensors,), addresses of their gradients, 0 where there is none.
        partials: float64, written from index `first` on, one entry for each chunk.
        grad: dtype of the gradients.
        aligned: whether every address is a multiple of 16 bytes.
    """
    return partial(
        run,
        norm_kernel,
        table.chunks,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        partials,
        first,
        GRAD=DTYPES[grad],
        ALIGNED=aligned,
        CHUNK=CHUNK,
        BLOCK=block_of(grad, aligned),
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
    """Writes the row of every tensor, with its new counts, which `step` stores.

    Args:
        table, grads: as for `norms`.
        numbers: float64, the header and a line for each group; see rows.py.
        out: float64, (tensors, ROW), written.
        rule: the device functions.
        states: how many tensor states the table has.
        counts: dtypes of the counts that follow them.
        line: numbers of a group.
        partials: norms of all chunks of this device, of other tables too; None computes no norm.
        grad_scale, found_inf: one-element tensors on this device, or None.
        grad_norm, skipped: 0-dim float32 and int64, written where given.
    """
    return partial(
        run,
        rows_kernel,
        triton.cdiv(table.tensors, ROWS_BLOCK),
        table.addresses,
        grads,
        table.groups,
        numbers,
        out,
        partials,
        0 if partials is None else partials.numel(),
        grad_scale,
        found_inf,
        grad_norm,
        skipped,
        table.tensors,
        SCALARS=rule.scalars,
        COUNT=rule.width,
        STATES=states,
        COUNT_DTYPES=tuple(DTYPES[count] for count in counts),
        OPTION_COUNT=line - LINE_WIDTH.value,
        BLOCK=ROWS_BLOCK,
        FOLD=FOLD_BLOCK,
    )


def squares(
    table: Table, grads: Tensor, rows: Tensor, partials: Tensor, out: Tensor, walk: Walk
) -> tuple[Call, Call]:
    """Writes the sums of squares of every tensor and of its update; changes nothing else.

    Args:
        table, grads, rows, walk: as for `step`.
        partials: float64, (chunks, 2), written.
        out: float64, (tensors, 2), written; 0 where there is no gradient.
    """
    of_chunks = partial(
        run,
        squares_kernel,
        table.chunks,
        table.addresses,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        rows,
        partials,
        table.tensors,
        **_constexprs(walk),
    )
    of_tensors = partial(
        run,
        fold_kernel,
        table.tensors,
        partials,
        table.numels,
        table.first_chunks,
        out,
        CHUNK=CHUNK,
        BLOCK=FOLD_BLOCK,
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
    """Steps every tensor that has a gradient, and its counts with it.

    Args:
        table, grads: as for `norms`.
        rows: what the function of that name wrote.
        squares: what the function of that name wrote, for a layerwise rule, summed over ranks;
            None for any other.
        walk: what the kernel is compiled for.
        counts: dtypes of the counts, as for `rows`.
        decoupled, prox: which further hooks any of the groups needs.
        shrink: whether the L1 threshold leaves out the gain of each element.
    """
    return partial(
        run,
        step_kernel,
        table.chunks,
        table.addresses,
        grads,
        table.numels,
        table.first_chunks,
        table.owners,
        rows,
        squares,
        table.tensors,
        COUNT_DTYPES=tuple(DTYPES[count] for count in counts),
        DECOUPLED=penalty.decoupled if decoupled else None,
        PROX=(penalty.shrink if shrink else penalty.prox) if prox else None,
        TRUST=None if squares is None else trust_ratio,
        **_constexprs(walk),
    )


def _constexprs(walk: Walk) -> dict[str, Any]:
    """The constants of a kernel that walks all elements."""
    return {
        "RULE": walk.rule.tile,
        "COUNT": walk.rule.width,
        "STATES": walk.states,
        "SUBGRADIENT": penalty.l1_subgradient if walk.subgradient else None,
        "COUPLED": penalty.coupled if walk.coupled else None,
        "SCALED": walk.scaled,
        "PARAM": DTYPES[walk.param],
        "GRAD": DTYPES[walk.grad],
        "STATE": DTYPES[walk.state],
        "COMPUTE": tl.float64 if walk.param == torch.float64 else tl.float32,
        "ALIGNED": walk.aligned,
        "CHUNK": CHUNK,
        "BLOCK": block_of(walk.param, walk.aligned),
    }
