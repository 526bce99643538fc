"""The numbers of a step: one row of float64 scalars for each tensor, formed on the device.

One program takes a block of tensors. It folds the partial norms into the total (every program for
itself: the same sum in the same order), forms the clip factor, decides whether the step is skipped,
and writes the rows that engine.py reads. Who fills in these numbers is all that clipping, loss
scaling, graph capture and distribution change.

New counts go into the row too. The step kernel stores them, so that a tensor and its counts change
in one launch: an exception between two launches leaves all of it as it was.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels.gpu.norms import fold
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
    STATES: tl.constexpr,
    COUNT_DTYPES: tl.constexpr,
    OPTION_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
):
    """Write the rows of a block of tensors; see launch.py for the arguments."""
    scale = tl.load(numbers + SCALE)
    if grad_scale is not None:
        scale = scale / tl.load(grad_scale).to(tl.float64)
    skip = tl.load(numbers + SKIP) != 0.0
    if found_inf is not None:
        skip = skip | (tl.load(found_inf).to(tl.float64) != 0.0)
    if partials is not None:
        norm = fold(partials, parts, FOLD) * scale
        nonfinite = (norm == float("inf")) | (norm != norm)
        skip = skip | ((tl.load(numbers + SKIP_NONFINITE) != 0.0) & nonfinite)
        max_norm = tl.load(numbers + MAX_NORM)
        factor = max_norm / (norm + 1e-6)
        factor = tl.where(factor > 1.0, 1.0, factor)  # a NaN stays one
        scale = tl.where(max_norm < float("inf"), scale * factor, scale)
        if grad_norm is not None:
            tl.store(grad_norm, norm.to(tl.float32), mask=tl.program_id(0) == 0)
    if skipped is not None:
        count = tl.load(skipped, mask=tl.program_id(0) == 0, other=0) + skip.to(tl.int64)
        tl.store(skipped, count, mask=tl.program_id(0) == 0)

    tensor = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    group = tl.load(groups + tensor, mask=inside, other=0)
    line = numbers + HEADER + group * (OPTIONS + OPTION_COUNT)
    active = tl.where(skip, 0, tl.load(grads + tensor, mask=inside, other=0)) != 0
    options = ()
    for i in tl.static_range(OPTION_COUNT):
        options = options + (tl.load(line + OPTIONS + i),)
    counts = ()
    for i in tl.static_range(len(COUNT_DTYPES)):
        address = tl.load(addresses + (1 + STATES + i) * tensors + tensor, mask=inside, other=0)
        ptr = address.to(tl.pointer_type(COUNT_DTYPES[i]))
        counts = counts + (tl.load(ptr, mask=address != 0, other=1.0).to(tl.float64),)
    gain, scalars, new = SCALARS(options, counts)
    tl.static_assert(len(scalars) == COUNT, "the rule returns more or fewer scalars than its width")
    tl.static_assert(
        len(new) == len(COUNT_DTYPES), "the rule returns more or fewer counts than scalar_states"
    )

    lr = tl.load(line + LR)
    row = rows + tensor * ROW
    threshold = lr * tl.load(line + PROX) * gain + lr * tl.load(line + SHRINK)
    decay = tl.load(line + DECOUPLED) / tl.load(line + DECAY_LR)
    tl.store(row + ACTIVE, active.to(tl.float64), mask=inside)
    tl.store(row + ROW_SCALE, tl.load(line + SIGN) * scale, mask=inside)
    tl.store(row + ROW_LR, lr, mask=inside)
    tl.store(row + ROW_L1, tl.load(line + SUBGRADIENT), mask=inside)
    tl.store(row + ROW_L2, tl.load(line + COUPLED), mask=inside)
    tl.store(row + ROW_DECAY, decay, mask=inside)
    tl.store(row + ROW_THRESHOLD, threshold, mask=inside)
    for i in tl.static_range(COUNT):
        tl.store(row + ROW_RULE + i, scalars[i] + tl.zeros((BLOCK,), tl.float64), mask=inside)
    for i in tl.static_range(len(COUNT_DTYPES)):
        tl.store(row + ROW_RULE + COUNT + i, new[i] + tl.zeros((BLOCK,), tl.float64), mask=inside)
