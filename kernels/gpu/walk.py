"""The step kernel: it walks a pointer table, calls rule and hooks on registers, and stores.

A program takes one chunk of one tensor: `owners[program]` is the tensor, whose addresses stand in
the table and whose numbers stand in its row (rows.py writes them just before). Full blocks are
loaded and stored without a mask, because only that gives 16-byte accesses; the last block of a
tensor is masked. All offsets are int64.

A layerwise rule needs two sums over each tensor before anything of it moves. squares_kernel walks
the same table for them and stores nothing else. The direction is then computed twice, which moves
11 numbers for each parameter of LAMB; storing it would move 10 and take memory of its size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels.gpu.memory import load, pointer, store
from fusedreg.kernels.layout import (
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


@triton.jit
def direction_block(
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
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """What one block of elements moves along: w, direction, gain and new states."""
    w = load(param_ptr, offsets, numel, FULL).to(COMPUTE)
    g = load(grad_ptr, offsets, numel, FULL)
    states = ()
    for i in tl.static_range(len(state_ptrs)):
        states = states + (load(state_ptrs[i], offsets, numel, FULL).to(COMPUTE),)
    scalars = ()
    for i in tl.static_range(COUNT):
        scalars = scalars + (tl.load(row + ROW_RULE + i).to(COMPUTE),)

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
    direction, gain, moved = RULE(g, states, scalars)
    tl.static_assert(
        len(moved) == len(state_ptrs), "the rule returns more or fewer states than states(group)"
    )
    return w, direction, gain, moved


@triton.jit
def step_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    row,
    trust,
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
    w, direction, gain, states = direction_block(
        param_ptr, grad_ptr, state_ptrs, row, offsets, numel,
        RULE, COUNT, SUBGRADIENT, COUPLED, SCALED, COMPUTE, FULL,
    )  # fmt: skip
    lr = tl.load(row + ROW_LR)
    rate = lr * trust
    if DECOUPLED is not None:
        w = DECOUPLED(w, (1.0 - rate * tl.load(row + ROW_DECAY)).to(COMPUTE))
    w = w - rate.to(COMPUTE) * direction
    if PROX is not None:
        w = PROX(w, (tl.load(row + ROW_THRESHOLD) * trust).to(COMPUTE), gain)

    if lr.to(COMPUTE) != 0.0:  # lr = 0 must leave every bit, of -0.0 and inf too
        store(param_ptr, offsets, numel, w, FULL)
    for i in tl.static_range(len(state_ptrs)):
        store(state_ptrs[i], offsets, numel, states[i], FULL)


@triton.jit
def pointers(
    addresses, grads, tensor, tensors,
    STATES: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where a tensor, its gradient and its states are."""
    state_ptrs = ()
    for i in tl.static_range(STATES):
        slot = addresses + (i + 1) * tensors + tensor
        state_ptrs = state_ptrs + (pointer(slot, STATE, ALIGNED),)
    param_ptr = pointer(addresses + tensor, PARAM, ALIGNED)
    grad_ptr = pointer(grads + tensor, GRAD, ALIGNED)
    return param_ptr, grad_ptr, state_ptrs


@triton.jit
def store_counts(
    addresses, row, tensor, tensors, first,
    COUNT: tl.constexpr, STATES: tl.constexpr, COUNT_DTYPES: tl.constexpr,
):  # fmt: skip
    """Store a tensor's new counts, which follow the rule's scalars in its row, in one program."""
    for i in tl.static_range(len(COUNT_DTYPES)):
        address = tl.load(addresses + (1 + STATES + i) * tensors + tensor)
        ptr = address.to(tl.pointer_type(COUNT_DTYPES[i]))
        new = tl.load(row + ROW_RULE + COUNT + i)
        tl.store(ptr, new.to(COUNT_DTYPES[i]), mask=first & (address != 0))


@triton.jit(do_not_specialize=["tensors"])
def step_kernel(
    addresses,
    grads,
    numels,
    first_chunks,
    owners,
    rows,
    squares,
    tensors,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    COUNT_DTYPES: tl.constexpr,
    SUBGRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PROX: tl.constexpr,
    TRUST: tl.constexpr,
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
        store_counts(addresses, row, tensor, tensors, begin == 0, COUNT, STATES, COUNT_DTYPES)
        param_ptr, grad_ptr, state_ptrs = pointers(
            addresses, grads, tensor, tensors, STATES, PARAM, GRAD, STATE, ALIGNED
        )
        trust = 1.0
        if TRUST is not None:
            trust = TRUST(tl.load(squares + 2 * tensor), tl.load(squares + 2 * tensor + 1))
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            if begin + start + BLOCK <= numel:
                step_block(
                    param_ptr, grad_ptr, state_ptrs, row, trust, offsets, numel,
                    RULE, COUNT, SUBGRADIENT, COUPLED, DECOUPLED, PROX, SCALED, COMPUTE, True,
                )  # fmt: skip
        rest = begin + tl.minimum(numel - begin, CHUNK) // BLOCK * BLOCK
        if rest < tl.minimum(begin + CHUNK, numel):
            step_block(
                param_ptr, grad_ptr, state_ptrs, row, trust, rest + tl.arange(0, BLOCK), numel,
                RULE, COUNT, SUBGRADIENT, COUPLED, DECOUPLED, PROX, SCALED, COMPUTE, False,
            )  # fmt: skip


# ---- layerwise -----------------------------------------------------------------------------------


@triton.jit
def squares_of_block(
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
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Squares of one block of w and of its update, direction + weight_decay * w."""
    w, direction, _, _ = direction_block(
        param_ptr, grad_ptr, state_ptrs, row, offsets, numel,
        RULE, COUNT, SUBGRADIENT, COUPLED, SCALED, COMPUTE, FULL,
    )  # fmt: skip
    update = (direction + tl.load(row + ROW_DECAY).to(COMPUTE) * w).to(tl.float64)
    if not FULL:
        update = tl.where(offsets < numel, update, 0.0)
    w = w.to(tl.float64)
    return w * w, update * update


@triton.jit(do_not_specialize=["tensors"])
def squares_kernel(
    addresses,
    grads,
    numels,
    first_chunks,
    owners,
    rows,
    partials,
    tensors,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    SUBGRADIENT: tl.constexpr,
    COUPLED: tl.constexpr,
    SCALED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[2 * chunk], partials[2 * chunk + 1] = sums of squares; 0 where nothing moves."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    row = rows + tensor * ROW
    # One reduction for each chunk: a sum of every block would make the threads wait for each other.
    of_param = tl.zeros((BLOCK,), tl.float64)
    of_update = tl.zeros((BLOCK,), tl.float64)
    if tl.load(row + ACTIVE) != 0.0:
        numel = tl.load(numels + tensor)
        begin = (chunk - tl.load(first_chunks + tensor)).to(tl.int64) * CHUNK
        param_ptr, grad_ptr, state_ptrs = pointers(
            addresses, grads, tensor, tensors, STATES, PARAM, GRAD, STATE, ALIGNED
        )
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            if begin + start + BLOCK <= numel:
                first, second = squares_of_block(
                    param_ptr, grad_ptr, state_ptrs, row, offsets, numel,
                    RULE, COUNT, SUBGRADIENT, COUPLED, SCALED, COMPUTE, True,
                )  # fmt: skip
                of_param += first
                of_update += second
        rest = begin + tl.minimum(numel - begin, CHUNK) // BLOCK * BLOCK
        if rest < tl.minimum(begin + CHUNK, numel):
            first, second = squares_of_block(
                param_ptr, grad_ptr, state_ptrs, row, rest + tl.arange(0, BLOCK), numel,
                RULE, COUNT, SUBGRADIENT, COUPLED, SCALED, COMPUTE, False,
            )  # fmt: skip
            of_param += first
            of_update += second
    tl.store(partials + 2 * chunk, tl.sum(of_param, 0))
    tl.store(partials + 2 * chunk + 1, tl.sum(of_update, 0))


@triton.jit
def fold_kernel(
    partials, numels, first_chunks, squares, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """squares[2 * tensor], squares[2 * tensor + 1] = sums over the chunks of a tensor, in order."""
    tensor = tl.program_id(0)
    first = partials + 2 * tl.load(first_chunks + tensor).to(tl.int64)
    chunks = tl.cdiv(tl.load(numels + tensor), CHUNK)
    of_param = tl.zeros((BLOCK,), tl.float64)
    of_update = tl.zeros((BLOCK,), tl.float64)
    start = tl.full((), 0, tl.int64)
    while start < chunks:
        chunk = start + tl.arange(0, BLOCK)
        of_param += tl.load(first + 2 * chunk, mask=chunk < chunks, other=0.0)
        of_update += tl.load(first + 2 * chunk + 1, mask=chunk < chunks, other=0.0)
        start += BLOCK
    tl.store(squares + 2 * tensor, tl.sum(of_param, 0))
    tl.store(squares + 2 * tensor + 1, tl.sum(of_update, 0))
