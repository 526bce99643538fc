"""The numbers of a step: one row of float64 scalars for each tensor, formed on the device.

One program takes a block of tensors. It folds the partial norms into the total (every program for
itself: the same sum in the same order), forms the clip factor, decides whether the step is skipped,
advances what the rule counts, and writes the rows that engine.py reads. Who fills in these numbers
is all that clipping, loss scaling, graph capture and distribution change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusedreg.kernels.norms import fold

# What the host sends: a header, then one line for each param group.
MAX_NORM = tl.constexpr(0)  # inf: clip nothing
SCALE = tl.constexpr(1)  # multiplies every gradient
SKIP = tl.constexpr(2)  # not 0: change nothing
SKIP_NONFINITE = tl.constexpr(3)
HEADER = tl.constexpr(4)

LR = tl.constexpr(0)
SIGN = tl.constexpr(1)  # -1 to maximize
COUPLED = tl.constexpr(2)  # weight_decay, in one of the two
DECOUPLED = tl.constexpr(3)
SUBGRADIENT = tl.constexpr(4)  # l1, in one of the three
PROX = tl.constexpr(5)
SHRINK = tl.constexpr(6)
OPTIONS = tl.constexpr(7)  # the rule's own

# A row.
ACTIVE = tl.constexpr(0)  # 0: this tensor does not move
ROW_SCALE = tl.constexpr(1)
ROW_LR = tl.constexpr(2)
ROW_L1 = tl.constexpr(3)
ROW_L2 = tl.constexpr(4)
ROW_DECAY = tl.constexpr(5)
ROW_THRESHOLD = tl.constexpr(6)
ROW_RULE = tl.constexpr(7)
ROW = tl.constexpr(16)


def header(*, max_norm: float, scale: Any, skip: Any, skip_nonfinite: float) -> list[Any]:
    """What the host says once for all groups."""
    return [max_norm, scale, skip, skip_nonfinite]


def line(
    *,
    lr: Any,
    maximize: bool,
    coupled: Any,
    decoupled: Any,
    subgradient: Any,
    prox: Any,
    shrink: Any,
    options: Iterable[Any],
) -> list[Any]:
    """What the host says of one param group."""
    sign = -1.0 if maximize else 1.0
    return [lr, sign, coupled, decoupled, subgradient, prox, shrink, *options]


def penalties(lines: Iterable[Sequence[Any]]) -> dict[str, bool]:
    """Which hooks of the step kernel any of these groups needs; a tensor counts as not 0."""
    hooks = {
        "subgradient": (SUBGRADIENT,),
        "coupled": (COUPLED,),
        "decoupled": (DECOUPLED,),
        "prox": (PROX, SHRINK),
    }
    lines = list(lines)
    return {
        hook: any(
            isinstance(one[c.value], Tensor) or one[c.value] != 0 for one in lines for c in columns
        )
        for hook, columns in hooks.items()
    }


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
    COUNTS: tl.constexpr,
    COUNT_DTYPE: tl.constexpr,
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
    for i in tl.static_range(COUNTS):
        address = tl.load(addresses + (1 + STATES + i) * tensors + tensor, mask=inside, other=0)
        ptr = address.to(tl.pointer_type(COUNT_DTYPE))
        counts = counts + (tl.load(ptr, mask=address != 0, other=1.0).to(tl.float64),)
    gain, scalars, new = SCALARS(options, counts)

    lr = tl.load(line + LR)
    row = rows + tensor * ROW
    threshold = lr * tl.load(line + PROX) * gain + lr * tl.load(line + SHRINK)
    tl.store(row + ACTIVE, active.to(tl.float64), mask=inside)
    tl.store(row + ROW_SCALE, tl.load(line + SIGN) * scale, mask=inside)
    tl.store(row + ROW_LR, lr, mask=inside)
    tl.store(row + ROW_L1, tl.load(line + SUBGRADIENT), mask=inside)
    tl.store(row + ROW_L2, tl.load(line + COUPLED), mask=inside)
    tl.store(row + ROW_DECAY, 1.0 - lr * tl.load(line + DECOUPLED), mask=inside)
    tl.store(row + ROW_THRESHOLD, threshold, mask=inside)
    for i in tl.static_range(COUNT):
        tl.store(row + ROW_RULE + i, scalars[i] + tl.zeros((BLOCK,), tl.float64), mask=inside)
    for i in tl.static_range(COUNTS):
        address = tl.load(addresses + (1 + STATES + i) * tensors + tensor, mask=inside, other=0)
        ptr = address.to(tl.pointer_type(COUNT_DTYPE))
        tl.store(ptr, new[i].to(COUNT_DTYPE), mask=active & (address != 0))
