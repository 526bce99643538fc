"""The kernels that walk all elements of a table: the step, and the sums of a layerwise rule.

A program takes one chunk of one tensor: `owners[program]` is the tensor. Its addresses are in the
table, its numbers in its row (rows.py writes them just before) and among the scalars of its group.
Full blocks are loaded and stored without a mask, because only that gives 16-byte accesses; the last
block of a tensor is masked. All offsets are int64. What a step does is in device/step.py.

A layerwise rule needs two sums over each tensor before anything of it moves. squares_kernel walks
the same table for them and stores nothing else. The direction is then computed twice, which moves
11 numbers for each parameter of LAMB; storing it would move 10 and take memory of its size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedreg.kernels import layout
from fusedreg.kernels.device.step import loss_gradient, moved, penalised, trust_ratio, update_of
from fusedreg.kernels.gpu.memory import load, pointer, store

ACTIVE, SCALE, GAIN = map(tl.constexpr, layout.ROW)
SCALARS = tl.constexpr(len(layout.ROW))
STEP_SCALARS = tl.constexpr(len(layout.STEP_SCALARS))
LR = tl.constexpr(layout.GROUP_SCALARS.lr)


@triton.jit
def pointers(
    addresses, grads, tensor, tensors,
    STATES: tl.constexpr, PLANES: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Where a tensor, its gradient and the planes of its states are."""
    state_ptrs = ()
    for i in tl.static_range(STATES):
        for k in tl.static_range(len(PLANES)):
            slot = addresses + (1 + i * len(PLANES) + k) * tensors + tensor
            state_ptrs = state_ptrs + (pointer(slot, PLANES[k], ALIGNED),)
    param_ptr = pointer(addresses + tensor, PARAM, ALIGNED)
    grad_ptr = pointer(grads + tensor, GRAD, ALIGNED)
    return param_ptr, grad_ptr, state_ptrs


@triton.jit
def load_numbers(group, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """What the scalars of a group have for one hook."""
    numbers = ()
    for i in tl.static_range(WIDTH):
        numbers = numbers + (tl.load(group + FIRST + i),)
    return numbers


@triton.jit
def load_states(
    state_ptrs, offsets, numel,
    STATES: tl.constexpr, PLANES: tl.constexpr, DECODE: tl.constexpr, COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The states of one block of elements."""
    states = ()
    for i in tl.static_range(STATES):
        planes = ()
        for k in tl.static_range(len(PLANES)):
            planes = planes + (load(state_ptrs[i * len(PLANES) + k], offsets, numel, FULL),)
        if DECODE is None:
            states = states + (planes[0].to(COMPUTE),)
        else:
            states = states + (DECODE(planes, i).to(COMPUTE),)
    return states


@triton.jit
def store_states(
    state_ptrs, offsets, numel, states,
    STATES: tl.constexpr, PLANES: tl.constexpr, ENCODE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Store the states of one block of elements."""
    for i in tl.static_range(STATES):
        if ENCODE is None:
            store(state_ptrs[i], offsets, numel, states[i], FULL)
        else:
            planes = ENCODE(states[i], i)
            for k in tl.static_range(len(PLANES)):
                store(state_ptrs[i * len(PLANES) + k], offsets, numel, planes[k], FULL)


@triton.jit
def store_counts(
    addresses, counts, tensor, tensors, first, FIRST_COUNT: tl.constexpr, COUNT_DTYPES: tl.constexpr
):  # fmt: skip
    """Store a tensor's new counts, which its row has, in one program."""
    for i in tl.static_range(len(COUNT_DTYPES)):
        address = tl.load(addresses + (FIRST_COUNT + i) * tensors + tensor)
        ptr = address.to(tl.pointer_type(COUNT_DTYPES[i]))
        new = tl.load(counts + i)
        tl.store(ptr, new.to(COUNT_DTYPES[i]), mask=first & (address != 0))


@triton.jit
def direction_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    row,
    group,
    offsets,
    numel,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    PLANES: tl.constexpr,
    DECODE: tl.constexpr,
    GRADIENT1: tl.constexpr,
    GRADIENT2: tl.constexpr,
    FIRSTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """What one block of elements moves along: w, direction, gain and new states."""
    w = load(param_ptr, offsets, numel, FULL).to(COMPUTE)
    g = load(grad_ptr, offsets, numel, FULL)
    states = load_states(state_ptrs, offsets, numel, STATES, PLANES, DECODE, COMPUTE, FULL)
    scalars = ()
    for i in tl.static_range(COUNT):
        scalars = scalars + (tl.load(row + SCALARS + i).to(COMPUTE),)
    g = loss_gradient(g, tl.load(row + SCALE), SCALED, COMPUTE)
    numbers1 = load_numbers(group, FIRSTS[0], WIDTHS[0])
    numbers2 = load_numbers(group, FIRSTS[1], WIDTHS[1])
    g = penalised(g, w, numbers1, numbers2, GRADIENT1, GRADIENT2)
    direction, gain, new = RULE(g, states, scalars)
    tl.static_assert(len(new) == STATES, "the rule returns more or fewer states than states(group)")
    return w, direction, gain, new


@triton.jit
def step_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    row,
    group,
    trust,
    offsets,
    numel,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    PLANES: tl.constexpr,
    DECODE: tl.constexpr,
    ENCODE: tl.constexpr,
    GRADIENT1: tl.constexpr,
    GRADIENT2: tl.constexpr,
    DECAY: tl.constexpr,
    PROX1: tl.constexpr,
    PROX2: tl.constexpr,
    FIRSTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """One step of one block of elements."""
    w, direction, gain, states = direction_block(
        param_ptr, grad_ptr, state_ptrs, row, group, offsets, numel,
        RULE, COUNT, STATES, PLANES, DECODE, GRADIENT1, GRADIENT2, FIRSTS, WIDTHS,
        SCALED, COMPUTE, FULL,
    )  # fmt: skip
    lr = tl.load(group + LR)
    w = moved(
        w, direction, gain, lr * trust, tl.load(row + GAIN),
        load_numbers(group, FIRSTS[2], WIDTHS[2]),
        load_numbers(group, FIRSTS[3], WIDTHS[3]),
        load_numbers(group, FIRSTS[4], WIDTHS[4]),
        DECAY, PROX1, PROX2,
    )  # fmt: skip
    if lr.to(COMPUTE) != 0.0:  # lr = 0 must leave every bit, of -0.0 and inf too
        store(param_ptr, offsets, numel, w, FULL)
    store_states(state_ptrs, offsets, numel, states, STATES, PLANES, ENCODE, FULL)


@triton.jit(do_not_specialize=["tensors"])
def step_kernel(
    addresses,
    grads,
    numels,
    groups,
    first_chunks,
    owners,
    numbers,
    rows,
    squares,
    tensors,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    PLANES: tl.constexpr,
    DECODE: tl.constexpr,
    ENCODE: tl.constexpr,
    FIRST_COUNT: tl.constexpr,
    COUNT_DTYPES: tl.constexpr,
    GRADIENT1: tl.constexpr,
    GRADIENT2: tl.constexpr,
    DECAY: tl.constexpr,
    PROX1: tl.constexpr,
    PROX2: tl.constexpr,
    FIRSTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    SCALED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step every tensor of a table; see the module and contract.py for the arguments."""
    chunk = tl.program_id(0)
    tensor = tl.load(owners + chunk)
    row = rows + tensor * ROW
    if tl.load(row + ACTIVE) != 0.0:
        numel = tl.load(numels + tensor)
        begin = (chunk - tl.load(first_chunks + tensor)).to(tl.int64) * CHUNK
        group = numbers + STEP_SCALARS + tl.load(groups + tensor) * GROUP_WIDTH
        store_counts(
            addresses, row + SCALARS + COUNT, tensor, tensors, begin == 0,
            FIRST_COUNT, COUNT_DTYPES,
        )  # fmt: skip
        param_ptr, grad_ptr, state_ptrs = pointers(
            addresses, grads, tensor, tensors, STATES, PLANES, PARAM, GRAD, ALIGNED
        )
        trust = 1.0
        if squares is not None:
            trust = trust_ratio(tl.load(squares + 2 * tensor), tl.load(squares + 2 * tensor + 1))
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            if begin + start + BLOCK <= numel:
                step_block(
                    param_ptr, grad_ptr, state_ptrs, row, group, trust, offsets, numel,
                    RULE, COUNT, STATES, PLANES, DECODE, ENCODE, GRADIENT1, GRADIENT2,
                    DECAY, PROX1, PROX2, FIRSTS, WIDTHS, SCALED, COMPUTE, True,
                )  # fmt: skip
        rest = begin + tl.minimum(numel - begin, CHUNK) // BLOCK * BLOCK
        if rest < tl.minimum(begin + CHUNK, numel):
            step_block(
                param_ptr, grad_ptr, state_ptrs, row, group, trust,
                rest + tl.arange(0, BLOCK), numel,
                RULE, COUNT, STATES, PLANES, DECODE, ENCODE, GRADIENT1, GRADIENT2,
                DECAY, PROX1, PROX2, FIRSTS, WIDTHS, SCALED, COMPUTE, False,
            )  # fmt: skip


# ---- layerwise -----------------------------------------------------------------------------------


@triton.jit
def squares_of_block(
    param_ptr,
    grad_ptr,
    state_ptrs,
    row,
    group,
    offsets,
    numel,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    PLANES: tl.constexpr,
    DECODE: tl.constexpr,
    GRADIENT1: tl.constexpr,
    GRADIENT2: tl.constexpr,
    DECAY: tl.constexpr,
    FIRSTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    SCALED: tl.constexpr,
    COMPUTE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Squares of one block of w and of its update."""
    w, direction, _, _ = direction_block(
        param_ptr, grad_ptr, state_ptrs, row, group, offsets, numel,
        RULE, COUNT, STATES, PLANES, DECODE, GRADIENT1, GRADIENT2, FIRSTS, WIDTHS,
        SCALED, COMPUTE, FULL,
    )  # fmt: skip
    numbers = load_numbers(group, FIRSTS[2], WIDTHS[2])
    update = update_of(w, direction, numbers, DECAY).to(tl.float64)
    if not FULL:
        update = tl.where(offsets < numel, update, 0.0)
    w = w.to(tl.float64)
    return w * w, update * update


@triton.jit(do_not_specialize=["tensors"])
def squares_kernel(
    addresses,
    grads,
    numels,
    groups,
    first_chunks,
    owners,
    numbers,
    rows,
    partials,
    tensors,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    STATES: tl.constexpr,
    PLANES: tl.constexpr,
    DECODE: tl.constexpr,
    GRADIENT1: tl.constexpr,
    GRADIENT2: tl.constexpr,
    DECAY: tl.constexpr,
    FIRSTS: tl.constexpr,
    WIDTHS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    SCALED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
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
        group = numbers + STEP_SCALARS + tl.load(groups + tensor) * GROUP_WIDTH
        param_ptr, grad_ptr, state_ptrs = pointers(
            addresses, grads, tensor, tensors, STATES, PLANES, PARAM, GRAD, ALIGNED
        )
        for start in range(0, CHUNK, BLOCK):
            offsets = begin + start + tl.arange(0, BLOCK)
            if begin + start + BLOCK <= numel:
                first, second = squares_of_block(
                    param_ptr, grad_ptr, state_ptrs, row, group, offsets, numel,
                    RULE, COUNT, STATES, PLANES, DECODE, GRADIENT1, GRADIENT2, DECAY,
                    FIRSTS, WIDTHS, SCALED, COMPUTE, True,
                )  # fmt: skip
                of_param += first
                of_update += second
        rest = begin + tl.minimum(numel - begin, CHUNK) // BLOCK * BLOCK
        if rest < tl.minimum(begin + CHUNK, numel):
            first, second = squares_of_block(
                param_ptr, grad_ptr, state_ptrs, row, group, rest + tl.arange(0, BLOCK), numel,
                RULE, COUNT, STATES, PLANES, DECODE, GRADIENT1, GRADIENT2, DECAY,
                FIRSTS, WIDTHS, SCALED, COMPUTE, False,
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
