"""The order of a step, for one parameter, in ordinary torch operations on any device.

    unscale and clip -> maximize sign -> coupled penalties -> decoupled decay -> moments and step
    -> L1 threshold

This is what the device code is tested against, so it is written to be read. Low precision is
stepped in float32 and rounded once, at the store; every operation is elementwise, so strides and
memory formats do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

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


def update(
    rule: Rule,
    settings: Settings,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    scale: Number,
    skip: Flag,
    total: Callable[[Tensor], Tensor],
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
        total: sums over the ranks of which each has a part of the parameter.
    """
    lr, l1, weight_decay = settings["lr"], settings["l1"], settings["weight_decay"]
    l1_mode, decoupled = settings["l1_mode"], settings["decoupled_weight_decay"]
    dtype = compute_dtype(param)
    w = as_real(param).to(dtype)
    g = loss_gradient(param, grad, scale)

    if settings["maximize"]:
        g = -g
    if l1_mode == "subgradient" and not is_zero(l1):
        g = g + subgradient(w, l1=l1)
    if not (decoupled or is_zero(weight_decay)):
        g = g + weight_decay * w

    old = _read(rule, state, param.device, dtype)
    direction, new = rule.direction(settings, old, g)
    if settings["lr_independent_decay"]:
        weight_decay = weight_decay / settings["decay_lr"]
    rate = lr
    if rule.layerwise:
        update = direction + weight_decay * w if decoupled else direction
        rate = lr * trust_ratio(*total(torch.stack([_squares(w), _squares(update)])))
    if decoupled and not is_zero(weight_decay):
        w = w * (1 - rate * weight_decay)
    w = w - rate * direction

    if l1_mode == "prox" and not is_zero(l1):
        w = soft_threshold(w, rate * l1 * rule.gain(settings, new))
    if l1_mode == "decoupled" and not is_zero(l1):
        w = soft_threshold(w, rate * l1)

    for name, moved in new.items():
        store(as_real(state[name]), moved, skip)
    # lr = 0 must leave every bit, of -0.0 and inf too: select, do not trust w - 0 * direction.
    store(as_real(param), w, skip | (lr == 0))


def trust_ratio(w_squares: Tensor, update_squares: Tensor) -> Number:
    """||w|| / ||update||, and 1 where either is 0, from the sums of their squares."""
    either = (w_squares == 0) | (update_squares == 0)
    ratio = torch.where(either, 1.0, w_squares.sqrt() / update_squares.sqrt())
    trust: Number = number(ratio, ratio.device)
    return trust


def _squares(x: Tensor) -> Tensor:
    wide = x.to(wide_dtype(x.device))
    return (wide * wide).sum()


def _read(rule: Rule, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> State:
    scalars = {name: number(state[name], device) for name in rule.scalar_states if name in state}
    tensors = {name: as_real(state[name]).to(dtype) for name in rule.tensor_states if name in state}
    return scalars | tensors
