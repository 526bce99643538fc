"""The global gradient norm: one partial norm for each chunk, in a fixed order, without atomics.

`rows.py` folds the partials where it needs the total. Squares are summed in float64, so those of a
narrower dtype neither overflow nor vanish; float64 gradients are divided by the largest entry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels.gpu.memory import load, pointer

TINY = tl.constexpr(2.2250738585072014e-308)
LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def scaled_norm(largest, squares):
    """largest * sqrt(squares), where the squares are of entries over `largest`."""
    return largest * tl.sqrt(squares)


@triton.jit
def finite_scale(largest):
    """A divisor that keeps 0/0 and inf/inf out and lets an infinite entry through to the norm."""
    return tl.minimum(tl.maximum(largest, TINY), LARGEST)


@triton.jit(do_not_specialize=["first"])
def norm_kernel(
    grads,
    numels,
    first_chunks,
    owners,
    partials,
    first,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[first + chunk] = L2 norm of that chunk; 0 where there is no gradient."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    norm = tl.full((), 0.0, tl.float64)
    if tl.load(grads + tensor) != 0:
        numel = tl.load(numels + tensor)
        begin = (chunk - tl.load(first_chunks + tensor)).to(tl.int64) * CHUNK
        grad_ptr = pointer(grads + tensor, GRAD, ALIGNED)
        size = tl.minimum(numel - begin, CHUNK).to(tl.int32)
        full = size // BLOCK * BLOCK
        block = tl.arange(0, BLOCK)
        largest = tl.full((), 1.0, tl.float64)
        if GRAD == tl.float64:
            entries = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, size, BLOCK):
                g = load(grad_ptr, begin + start + block, numel, False)
                entries = tl.maximum(entries, tl.abs(g))
            largest = finite_scale(tl.max(entries, 0))
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, full, BLOCK):
            g = load(grad_ptr, begin + start + block, numel, True).to(tl.float64) / largest
            squares += g * g
        if full < size:
            g = load(grad_ptr, begin + full + block, numel, False).to(tl.float64) / largest
            squares += g * g
        norm = scaled_norm(largest, tl.sum(squares, 0))
    tl.store(partials + first + chunk, norm)


@triton.jit
def fold(partials, count, BLOCK: tl.constexpr):
    """L2 norm of `count` partial norms."""
    largest = tl.zeros((BLOCK,), tl.float64)
    start = tl.full((), 0, tl.int64)
    while start < count:
        offsets = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(partials + offsets, mask=offsets < count, other=0.0))
        start += BLOCK
    scale = finite_scale(tl.max(largest, 0))
    squares = tl.zeros((BLOCK,), tl.float64)
    start = tl.full((), 0, tl.int64)
    while start < count:
        offsets = start + tl.arange(0, BLOCK)
        part = tl.load(partials + offsets, mask=offsets < count, other=0.0) / scale
        squares += part * part
        start += BLOCK
    return scaled_norm(scale, tl.sum(squares, 0))
