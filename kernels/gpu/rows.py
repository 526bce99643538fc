"""The numbers of a step: one row of float64 scalars for each tensor, formed on the device.

One program takes a block of tensors. It folds the partial norms into the total (every program for
itself: the same sum in the same order), forms the clip factor, decides whether the step is skipped,
and writes the rows that walk.py reads. Clipping, loss scaling, graph capture and distribution
differ only in who fills in these numbers.

New counts go into the row too. The step kernel stores them, so that a tensor and its counts change
in one launch: an exception between two launches leaves all of it as it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels import layout
from fusedreg.kernels.device.step import clipped, is_nonfinite, row
from fusedreg.kernels.gpu.norms import fold

MAX_NORM, SCALE, SKIP, SKIP_NONFINITE = map(tl.constexpr, layout.STEP_SCALARS)
STEP_SCALARS = tl.constexpr(len(layout.STEP_SCALARS))
SIGN = tl.constexpr(layout.GROUP_SCALARS.sign)


@triton.jit(do_not_specialize=["tensors", "parts"])
def rows_kernel(
    addresses,
    grads,
    groups,
    numbers,
    rows,
    partials,
    parts,
    grad_scale,
    found_inf,
    grad_norm,
    skipped,
    tensors,
    SCALARS: tl.constexpr,
    COUNT: tl.constexpr,
    FIRST_COUNT: tl.constexpr,
    COUNT_DTYPES: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    FIRST_OPTION: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write the rows of a block of tensors; see contract.py for the arguments."""
    scale = tl.load(numbers + SCALE)
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    skip = tl.load(numbers + SKIP) != 0.0
    if found_inf is not None:
        skip = skip | (tl.load(found_inf).to(tl.float64) != 0.0)
    if partials is not None:
        norm = fold(partials, parts, FOLD) * scale
        skip = skip | ((tl.load(numbers + SKIP_NONFINITE) != 0.0) & is_nonfinite(norm))
        scale = clipped(scale, norm, tl.load(numbers + MAX_NORM))
        if grad_norm is not None:
            tl.store(grad_norm, norm.to(tl.float32), mask=tl.program_id(0) == 0)
    if skipped is not None:
        count = tl.load(skipped, mask=tl.program_id(0) == 0, other=0) + skip.to(tl.int64)
        tl.store(skipped, count, mask=tl.program_id(0) == 0)

    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    group = numbers + STEP_SCALARS + tl.load(groups + tensor, mask=inside, other=0) * GROUP_WIDTH
    active = tl.where(skip, 0, tl.load(grads + tensor, mask=inside, other=0)) != 0
    options = ()
    for i in tl.static_range(FIRST_OPTION, GROUP_WIDTH):
        options = options + (tl.load(group + i),)
    counts = ()
    for i in tl.static_range(len(COUNT_DTYPES)):
        address = tl.load(addresses + (FIRST_COUNT + i) * tensors + tensor, mask=inside, other=0)
        ptr = address.to(tl.pointer_type(COUNT_DTYPES[i]))
        counts = counts + (tl.load(ptr, mask=address != 0, other=1.0).to(tl.float64),)
    record, scalars, new = row(
        active.to(tl.float64), scale, tl.load(group + SIGN), options, counts, SCALARS
    )
    tl.static_assert(len(scalars) == COUNT, "the rule returns more or fewer scalars than its width")
    tl.static_assert(
        len(new) == len(COUNT_DTYPES), "the rule returns more or fewer counts than `counts` lists"
    )
    written = record + scalars + new
    for i in tl.static_range(len(written)):
        number = written[i] + tl.zeros((BLOCK,), tl.float64)
        tl.store(rows + tensor * ROW + i, number, mask=inside)
