"""The order of a step, for one parameter, in ordinary torch operations on any device.

    unscale and clip -> maximize sign -> coupled penalties -> decoupled decay -> moments and step
    -> L1 threshold

This is what the device code is tested against, so it is written to be read. Low precision is
stepped in float32 and rounded once, at the store; every operation is elementwise, so strides and
memory formats do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedreg.penalty import soft_threshold, subgradient
from fusedreg.scalars import Flag, Number, is_zero, number, store, wide_dtype

Settings = Mapping[str, Any]
"""A param group without its parameters, each number where the arithmetic needs it."""

State = dict[str, Any]
"""The state of one parameter, read for the arithmetic: moments widened, scalars as numbers."""


class Rule(Protocol):
    """The part of an optimizer that an update needs; see FusedOptimizer, which documents it."""

    scalar_states: tuple[str, ...]
    tensor_states: tuple[str, ...]
    layerwise: bool

    def direction(self, settings: Settings, state: State, grad: Tensor) -> tuple[Tensor, State]:
        """What lr multiplies, and the new state."""

    def gain(self, settings: Settings, state: State) -> Number:
        """The displacement per unit of a constant gradient, over lr."""


def compute_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64 and complex128, else float32."""
    return torch.float64 if param.dtype in (torch.float64, torch.complex128) else torch.float32


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, sharing its memory; a real one as it is."""
    return torch.view_as_real(x) if x.is_complex() else x.detach()


def loss_gradient(param: Tensor, grad: Tensor, scale: Number) -> Tensor:
    """The gradient times clip factor over loss scale, in the dtype of the arithmetic.

    The product is formed in the widest dtype: a float32 factor below 1.2e-38 would be subnormal.
    """
    grad, dtype = as_real(grad.resolve_conj()), compute_dtype(param)
    if not isinstance(scale, Tensor) and scale == 1:
        return grad.to(dtype)
    return (grad.to(wide_dtype(grad.device)) * scale).to(dtype)


class Move(NamedTuple):
    """What a parameter moves along, before lr comes in."""

    w: Tensor
    direction: Tensor
    decay: Number
    """Decoupled, without lr."""
    state: State


def move(
    rule: Rule,
    settings: Settings,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    scale: Number,
) -> Move:
    """The direction of a step and the new state; arguments as for `update`. Changes nothing."""
    l1, weight_decay = settings["l1"], settings["weight_decay"]
    decoupled = settings["decoupled_weight_decay"]
    dtype = compute_dtype(param)
    w = as_real(param).to(dtype)
    g = loss_gradient(param, grad, scale)

    if settings["maximize"]:
        g = -g
    if settings["l1_mode"] == "subgradient" and not is_zero(l1):
        g = g + subgradient(w, l1=l1)
    if not (decoupled or is_zero(weight_decay)):
        g = g + weight_decay * w

    old = _read(rule, state, param.device, dtype)
    direction, new = rule.direction(settings, old, g)
    if settings["lr_independent_decay"]:
        weight_decay = weight_decay / settings["decay_lr"]
    return Move(w, direction, weight_decay if decoupled else 0.0, new)


def update(
    rule: Rule,
    settings: Settings,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    scale: Number,
    skip: Flag,
    squares: Tensor | None,
) -> None:
    """Step one parameter that has a gradient, in place.

    Args:
        rule: the optimizer.
        settings: the numbers of its param group.
        param: the parameter.
        grad: its gradient, read and never written.
        state: its state, complete.
        scale: what multiplies the gradient of the loss.
        skip: True where this step must change nothing.
        squares: what `squares_of` gives, summed over the ranks that have parts of the parameter;
            None where all of it is here.
    """
    lr, l1, l1_mode = settings["lr"], settings["l1"], settings["l1_mode"]
    moved = move(rule, settings, param, grad, state, scale)
    rate = lr
    if rule.layerwise:
        rate = lr * trust_ratio(*(squares_of(moved) if squares is None else squares))
    w = moved.w
    if not is_zero(moved.decay):
        w = w * (1 - rate * moved.decay)
    w = w - rate * moved.direction

    if l1_mode == "prox" and not is_zero(l1):
        w = soft_threshold(w, rate * l1 * rule.gain(settings, moved.state))
    if l1_mode == "decoupled" and not is_zero(l1):
        w = soft_threshold(w, rate * l1)

    for name, value in moved.state.items():
        store(as_real(state[name]), value, skip)
    # lr = 0 must leave every bit, of -0.0 and inf too: select, do not trust w - 0 * direction.
    store(as_real(param), w, skip | (lr == 0))


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


def _read(rule: Rule, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> State:
    scalars = {name: number(state[name], device) for name in rule.scalar_states if name in state}
    tensors = {name: as_real(state[name]).to(dtype) for name in rule.tensor_states if name in state}
    return scalars | tensors
