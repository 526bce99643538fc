"""The one step kernel: it walks a pointer table, calls rule and hooks on registers, and stores.

A program takes one chunk of one tensor: `owners[program]` is the tensor, whose addresses stand in
the table and whose numbers stand in its row (rows.py writes them just before). Full blocks are
loaded and stored without a mask, because only that gives 16-byte accesses; the last block of a
tensor is masked. All offsets are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels.columns import (
    ACTIVE,
    ROW,
    ROW_DECAY,
    ROW_L1,
    ROW_L2,
    ROW_LR,
    ROW_RULE,
    ROW_SCALE,
    ROW_THRESHOLD,
)
from fusedreg.kernels.memory import load, pointer, store


@triton.jit
def step_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    row,
    offsets,
    numel,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    SUBGRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PROX: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """One step of one block of elements."""
    w = load(param_ptr, offsets, numel, FULL).to(COMPUTE)
    g = load(grad_ptr, offsets, numel, FULL)
    states = ()
    for i in tl.static_range(len(state_ptrs)):
        states = states + (load(state_ptrs[i], offsets, numel, FULL).to(COMPUTE),)
    scalars = ()
    for i in tl.static_range(COUNT):
        scalars = scalars + (tl.load(row + ROW_RULE + i).to(COMPUTE),)
    lr = tl.load(row + ROW_LR).to(COMPUTE)

    scale = tl.load(row + ROW_SCALE)
    if SCALED:
        # In float64: a float32 factor below 1.2e-38 would be subnormal.
        g = (g.to(tl.float64) * scale).to(COMPUTE)
    else:
        g = g.to(COMPUTE) * scale.to(COMPUTE)  # 1, or -1 to maximize
    if SUBGRADIENT is not None:
        g = SUBGRADIENT(g, w, tl.load(row + ROW_L1).to(COMPUTE))
    if COUPLED is not None:
        g = COUPLED(g, w, tl.load(row + ROW_L2).to(COMPUTE))
    if DECOUPLED is not None:
        w = DECOUPLED(w, tl.load(row + ROW_DECAY).to(COMPUTE))
    direction, gain, states = RULE(g, states, scalars)
    w = w - lr * direction
    if PROX is not None:
        w = PROX(w, tl.load(row + ROW_THRESHOLD).to(COMPUTE), gain)

    if lr != 0.0:  # lr = 0 must leave every bit, of -0.0 and inf too
        store(param_ptr, offsets, numel, w, FULL)
    for i in tl.static_range(len(state_ptrs)):
        store(state_ptrs[i], offsets, numel, states[i], FULL)


@triton.jit(do_not_specialize=["tensors"])
def step_kernel(
    addresses,
    grads,
    numels,
    first_chunks,
    owners,
    rows,
    tensors,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    SUBGRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PROX: tl.constexpr,
    SCALED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step every tensor of a table; see the module and launch.py for the arguments."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    row = rows + tensor * ROW
    if tl.load(row + ACTIVE) != 0.0:
        numel = tl.load(numels + tensor)
        begin = (chunk - tl.load(first_chunks + tensor)).to(tl.int64) * CHUNK
        param_ptr = pointer(addresses + tensor, PARAM, ALIGNED)
        grad_ptr = pointer(grads + tensor, GRAD, ALIGNED)
        state_ptrs = ()
        for i in tl.static_range(STATES):
            slot = addresses + (i + 1) * tensors + tensor
            state_ptrs = state_ptrs + (pointer(slot, STATE, ALIGNED),)
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            if begin + start + BLOCK <= numel:
                step_block(
                    param_ptr, grad_ptr, state_ptrs, row, offsets, numel,
                    RULE, COUNT, SUBGRADIENT, COUPLED, DECOUPLED, PROX, SCALED, COMPUTE, True,
                )  # fmt: skip
        rest = begin + tl.minimum(numel - begin, CHUNK) // BLOCK * BLOCK
        if rest < tl.minimum(begin + CHUNK, numel):
            step_block(
                param_ptr, grad_ptr, state_ptrs, row, rest + tl.arange(0, BLOCK), numel,
                RULE, COUNT, SUBGRADIENT, COUPLED, DECOUPLED, PROX, SCALED, COMPUTE, False,
            )  # fmt: skip
