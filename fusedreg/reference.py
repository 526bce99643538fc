"""The order of a step, for one parameter, in ordinary torch operations on any device.

    unscale and clip -> maximize sign -> penalties on the gradient -> moments and direction
    -> decay of the parameter -> step -> proximal penalties

This is what the device code is tested against, so it is written to be read. Low precision is
stepped in float32 and rounded once, at the store; every operation is elementwise, so strides and
memory formats do not matter.

A step first computes all new values and then writes them, so that an exception leaves a parameter
and its state either as they were or stepped. On a CPU it goes through large tensors block by block,
because temporaries as large as a parameter would go through main memory in every operation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.contract import UpdateRule
from fusedreg.formats import Format, as_real, planes_in, planes_of
from fusedreg.scalars import Flag, Number, is_zero, number, select, wide_dtype
from fusedreg.types import Settings, State


class Block(NamedTuple):
    """A parameter, its gradient and its state, or the same part of each."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    """By name: the planes of its tensor states, and its counts."""
    format: Format
    """How its tensor states are stored."""


Writes = list[tuple[Tensor, Number]]
"""Tensors, and what is to be written into each."""

BLOCK_BYTES = 768 * 1024
"""How much of a parameter is stepped at once on a CPU, in the dtype of the arithmetic.

A few temporaries of this size stay in the caches of a core, and each operation is long enough for
two threads of torch, which are used from 32,768 elements for each.
"""


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 and complex128, else float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def loss_gradient(param: Tensor, grad: Tensor, scale: Number) -> Tensor:
    """The gradient times clip factor over loss scale, in the dtype of the arithmetic.

    The product is formed in the widest dtype: a float32 factor below 1.2e-38 would be subnormal.
    """
    grad, dtype = grad.resolve_conj(), compute_dtype(param)
    if not isinstance(scale, Tensor) and scale == 1:
        return _read(grad, dtype)
    grad = as_real(grad)
    return (grad.to(wide_dtype(grad.device)) * scale).to(dtype)


class Move(NamedTuple):
    """What a parameter moves along, before lr comes in."""

    w: Tensor
    direction: Tensor
    gain: Number
    decay: Number
    """Decoupled, without lr."""
    state: State


def move(rule: UpdateRule, settings: Settings, block: Block, scale: Number) -> Move:
    """The direction of a step and the new state; arguments as for `update`. Changes nothing."""
    param, grad, state, storage = block
    dtype = compute_dtype(param)
    w = _read(param, dtype)
    g = loss_gradient(param, grad, scale)

    if settings["maximize"]:
        g = -g
    for penalty in rule.penalties:
        g = penalty.gradient(settings, g, w)

    old = {name: number(state[name], param.device) for name in rule.counts if name in state}
    for name in rule.tensor_states:
        planes = planes_in(storage, state, name)
        if planes is not None:
            old[name] = storage.load(planes, dtype)
    direction, gain, new = rule.update(settings, old, g)
    # What a rule hands on as it is, perhaps under another name, is memory that a step writes.
    handed_on = {id(value) for value in old.values() if isinstance(value, Tensor)}
    new = {name: x.clone() if id(x) in handed_on else x for name, x in new.items()}
    decay: Number = 0.0
    for penalty in rule.penalties:
        decay = decay + penalty.decay(settings, w, direction)
    return Move(w, direction, gain, decay, new)


def update(
    rule: UpdateRule,
    settings: Settings,
    block: Block,
    scale: Number,
    skip: Flag,
    squares: Tensor | None,
) -> None:
    """Step one parameter that has a gradient, in place.

    Args:
        rule: the optimizer.
        settings: the numbers of its param group.
        block: the parameter, its gradient, which is read and never written, and its state.
        scale: what multiplies the gradient of the loss.
        skip: True where this step must change nothing.
        squares: what `squares_of` gives, summed over the ranks that have parts of the parameter;
            None where all of it is here.
    """
    if skip is True:
        return
    blocks = _blocks(rule, settings, block)
    if rule.layerwise and squares is None and len(blocks) > 1:
        moves = (move(rule, settings, block, scale) for block in blocks)
        squares = torch.stack([squares_of(moved) for moved in moves]).sum(0)

    # An exception, such as a KeyboardInterrupt, may come at any time. Before the values of the
    # first block are there, nothing has changed, and nothing will. From then on the step is
    # finished before the exception goes on. The last block is then written once more, which does no
    # harm, because values do not depend on what they replace. The index and the values are assigned
    # together, so that they always belong to the same block.
    begun: tuple[int, Writes] | None = None
    try:
        for index, part in enumerate(blocks):
            begun = index, _new_values(rule, settings, part, scale, skip, squares)
            _write(begun[1])
    except BaseException:
        if begun is not None:
            index, values = begun
            _write(values)
            for part in blocks[index + 1 :]:
                _write(_new_values(rule, settings, part, scale, skip, squares))
        raise


def _new_values(
    rule: UpdateRule,
    settings: Settings,
    block: Block,
    scale: Number,
    skip: Flag,
    squares: Tensor | None,
) -> Writes:
    """What a step makes of a block: what to write, and where. Changes nothing."""
    lr = settings["lr"]
    param, _, state, storage = block
    moved = move(rule, settings, block, scale)
    rate = lr
    if rule.layerwise:
        rate = lr * trust_ratio(*(squares_of(moved) if squares is None else squares))
    w = moved.w
    if not is_zero(moved.decay):
        w = w * (1 - rate * moved.decay)
    w = w - rate * moved.direction

    for penalty in rule.penalties:
        w = penalty.prox(settings, w, rate, moved.gain)

    stepped: list[tuple[Any, Number, Flag]] = []
    for name, value in moved.state.items():
        if name in rule.counts:
            stepped.append((state[name], value, skip))
        else:
            planes = planes_in(storage, state, name) or []
            new = storage.store(value, planes)
            stepped += [(plane, x, skip) for plane, x in zip(planes, new, strict=True)]
    # lr = 0 must leave every bit, of -0.0 and inf too: select, do not trust w - 0 * direction.
    stepped.append((param, w, skip | (lr == 0)))
    writes = [
        (as_real(target), value, keep)
        for target, value, keep in stepped
        if keep is not True and isinstance(target, Tensor)
    ]
    return [(target, select(keep, target, value)) for target, value, keep in writes]


def _write(values: Writes) -> None:
    """Write every value, rounded once, to its place."""
    for target, value in values:
        if isinstance(value, Tensor):
            target.copy_(value)
        else:
            target.fill_(value)


def _blocks(rule: UpdateRule, settings: Settings, whole: Block) -> list[Block]:
    """The parameter in parts that are stepped one after the other, or in one.

    Parts are vectors in the order of memory, so all tensors must be laid out alike, without gaps. A
    step counts once: all parts but the last have numbers in the place of counts.
    """
    param, grad, state, storage = whole
    size = BLOCK_BYTES // compute_dtype(param).itemsize
    # On an accelerator blocks would be nothing but more launches.
    small = as_real(param).numel() <= size
    if small or param.device.type != "cpu" or rule.kernel_rule(settings) is None:
        return [whole]
    planes = planes_of(storage, rule.tensor_states)
    tensors = {name: state[name] for name in planes if name in state}
    counts = {name: state[name] for name in rule.counts if name in state}
    together = param, grad.resolve_conj(), *tensors.values()
    if not all(_is_plain(x) and x.shape == param.shape for x in together):
        return [whole]
    # Dimensions from the largest stride to the smallest.
    order = sorted(range(param.dim()), key=param.stride, reverse=True)
    in_order = [x.detach().permute(order) for x in together]
    if not all(x.is_contiguous() for x in in_order):
        return [whole]
    numbers = {name: number(count, param.device) for name, count in counts.items()}
    parts = zip(*(torch.split(as_real(x).view(-1), size) for x in in_order), strict=True)
    blocks = [
        Block(p, g, {**numbers, **dict(zip(tensors, moments, strict=True))}, storage)
        for p, g, *moments in parts
    ]
    blocks[-1].state.update(counts)
    return blocks


def _is_plain(x: Tensor) -> bool:
    """Whether `x` is memory, and no subclass of Tensor that dispatches by itself."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__ and x.layout is torch.strided


def squares_of(moved: Move) -> Tensor:
    """Sums of squares of a parameter and of its update, in the widest dtype of the device."""
    u = moved.direction + moved.decay * moved.w
    both = (x.to(wide_dtype(x.device)) for x in (moved.w, u))
    return torch.stack([(x * x).sum() for x in both])


def trust_ratio(w_squares: Tensor, update_squares: Tensor) -> Number:
    """||w|| / ||update||, and 1 where either is 0, from the sums of their squares.

    At most 2**120, so that the product with lr is finite in float32: a gradient that stays 0 leaves
    an update that fades to nothing.
    """
    either = (w_squares == 0) | (update_squares == 0)
    ratio = (w_squares.sqrt() / update_squares.sqrt()).clamp(max=2.0**120)
    ratio = torch.where(either, 1.0, ratio)
    trust: Number = number(ratio, ratio.device)
    return trust


def _read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor for the arithmetic, its own memory where that has the dtype."""
    x = as_real(x)
    return x if x.dtype == dtype else x.to(dtype)  # which would take longer to find out
