"""Loads and stores of one block of a tensor through its address in a pointer table."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that a table entry stands for; `ALIGNED` promises a multiple of 16 bytes."""
    ptr = tl.load(address).to(tl.pointer_type(dtype))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load(ptr, offsets, numel, FULL: tl.constexpr):
    """One block; what lies beyond the tensor reads 0. Only without a mask it takes 16 bytes."""
    if FULL:
        return tl.load(ptr + offsets)
    else:
        return tl.load(ptr + offsets, mask=offsets < numel, other=0.0)


@triton.jit
def store(ptr, offsets, numel, value, FULL: tl.constexpr):
    """One block, rounded once to the stored dtype, to nearest even."""
    value = value.to(ptr.dtype.element_ty)
    if FULL:
        tl.store(ptr + offsets, value)
    else:
        tl.store(ptr + offsets, value, mask=offsets < numel)
