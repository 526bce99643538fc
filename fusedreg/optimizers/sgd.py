"""SGD with momentum."""

from __future__ import annotations

import math
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.checks import check_number
from fusedreg.contract import Options
from fusedreg.optimizer import FusedOptimizer
from fusedreg.optimizers.momentum import MASS, check_mass_is_finite, create_mass, needs_mass
from fusedreg.scalars import Flag, Number, is_zero
from fusedreg.types import ParamGroup, Settings, State, Update


class SGD(FusedOptimizer, torch.optim.SGD):  # type: ignore[override]  # a property
    r"""Stochastic gradient descent with momentum, weight decay, proximal L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        w = w * (1 - lr * weight_decay)           if decoupled_weight_decay
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay too
        b = g                                     first step of this parameter
        b = momentum * b + (1 - dampening) * g    later
        u = g                                     if momentum == 0
        u = g + momentum * b                      if nesterov
        u = b                                     otherwise
        w = w - lr * u
        w = S(w, lr * l1 * k)                     if l1_mode == "prox"
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    k is the value of u if every gradient so far was 1. Without momentum k = 1. With it, k is the
    momentum mass c, or 1 + momentum * c if nesterov: c = 1 in the first step, and later
    c = momentum * c + (1 - dampening), whose limit is (1 - dampening)/(1 - momentum). With
    lr * l1 alone, momentum 0.9 would solve the problem of l1/10.

    Args:
        params: tensors, named tensors, or dicts that define param groups. Every option below up to
            `l1_mode` may differ between groups and is read afresh in every step.
        lr: learning rate, >= 0; a float or a one-element tensor (read on its device).
        momentum: >= 0; with `l1_mode="prox"` and l1 > 0 also < 1.
        dampening: what the later gradients lose before they enter the buffer, usually in [0, 1].
        weight_decay: >= 0. Coupled, it is the gradient of weight_decay/2 * ||w||^2.
        nesterov: look-ahead momentum; needs momentum > 0 and dampening 0.
        maximize: ascend the loss; penalties still shrink.
        foreach, fused: accepted as torch accepts them; fused=False always means the reference path.
        differentiable: must be False.
        decoupled_weight_decay: shrink w instead of adding to g. With momentum its fixed point is
            that of a ridge penalty of weight_decay * (1 - momentum) / (1 - dampening).
        lr_independent_decay: shrink w by the fraction weight_decay * lr / decay_lr, where the
            group's `decay_lr` is the lr that it was added with; needs decoupled_weight_decay. So
            the decay follows the schedule of lr, but not its size.
        decay_lr: another lr to divide by there, > 0; None takes the lr of each group.
        l1: weight of the L1 penalty, >= 0, in the units of the loss per unit of weight.
        l1_mode: what l1 does. "prox": the fixed point minimises loss + l1 * ||w||_1, with exact
            zeros. "decoupled": shrinks by lr * l1, so with momentum the fixed point is that of
            l1 * (1 - momentum) / (1 - dampening). "subgradient": what adding the norm to the loss
            does; no exact zeros.
        max_grad_norm: clip the global L2 norm of the loss gradients of all groups to this; None
            computes no norm, float("inf") computes `grad_norm` and clips nothing.
        skip_nonfinite: a step whose gradient norm is inf or NaN changes nothing, and
            `skipped_steps` counts it.
        state_dtype: dtype of `momentum_buffer`, e.g. torch.float32 for bfloat16 parameters; None is
            torch's, the parameter's own. A checkpoint does not change it.
        process_group: ranks over which the squared gradient norm is summed, where each has other
            parameters as plain tensors (ZeRO, FSDP1, pipeline stages); DTensors need none.

    State: `momentum_buffer` (shape of the parameter, dtype `state_dtype` or the parameter's) where
    momentum > 0, so 4 bytes per float32 parameter, else none. `momentum_mass` (0-dim float64),
    which is c above, only where dampening, or l1_mode == "prox" with l1 > 0, needs it.

    Raises:
        ValueError: an option is negative, NaN or unknown; l1 > 0 for a complex parameter.
        TypeError: an option is not a number.
        RuntimeError: `fused` and `foreach` together, `fused` and `differentiable` together.
        NotImplementedError: differentiable=True.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
    >>> optimizer = SGD([w], lr=0.1, l1=1.0)
    >>> w.grad = torch.tensor([2.0, 0.0])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.7, 0.0]

    Source: Sutskever, Martens, Dahl and Hinton, On the importance of initialization and momentum in
    deep learning (2013), equations 1 and 2, in torch's form (lr outside the buffer); for the
    threshold Yun, Lozano and Yang, Adaptive proximal gradient methods for structured neural
    networks (2021).

    Differs from torch.optim.SGD: `.grad` is never written (torch: foreach with nesterov does),
    float16 and bfloat16 are stepped in float32 and rounded once, sparse gradients are refused. All
    differences are in docs/differences.md.
    """

    tensor_states = ("momentum_buffer",)
    counts = MappingProxyType({"momentum_mass": MASS})
    late_states = ("momentum_buffer", "momentum_mass")
    device_options = ("momentum", "dampening")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Check the options of this class; see the base class."""
        check_number("momentum", group["momentum"], read_device=read_device)
        dampening = group["dampening"]
        if not isinstance(dampening, (Real, Tensor)):
            raise TypeError(f"Invalid dampening value: {dampening!r} (expected a number)")
        if not isinstance(dampening, Tensor) and math.isnan(dampening):
            raise ValueError(f"Invalid dampening value: {dampening} (expected a number)")
        if group["nesterov"] and (is_zero(group["momentum"]) or not is_zero(group["dampening"])):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        check_mass_is_finite(self, group, "momentum", "dampening")

    def states(self, group: Settings) -> tuple[str, ...]:
        """The buffer where there is momentum."""
        return () if is_zero(group["momentum"]) else self.tensor_states

    def counts_of(self, group: Settings) -> tuple[str, ...]:
        """The momentum mass where a threshold needs it."""
        mass = ("momentum_mass",) if needs_mass(self, group) else ()
        return (*super().counts_of(group), *mass)

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create the buffer, and the momentum mass where it is needed."""
        create_mass(self, group, param, state, group["dampening"])
        super().init_state(group, param, state)

    def device_rule(self, group: Settings) -> str:
        """Name of this rule in `fusedreg.kernels.device.rules`."""
        if is_zero(group["momentum"]):
            return "sgd"
        return "sgd_nesterov" if group["nesterov"] else "sgd_momentum"

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The update rule; see the class docstring and the base class."""
        momentum, dampening = settings["momentum"], settings["dampening"]
        if is_zero(momentum):
            return grad, 1.0, {}
        new: State = {}
        mass: Number = 1.0
        first: Flag = False
        if "momentum_mass" in state:
            first = state["momentum_mass"] == 0
            mass = _select(first, 1.0, momentum * state["momentum_mass"] + (1 - dampening))
            new["momentum_mass"] = mass
        damped = momentum * state["momentum_buffer"] + (1 - dampening) * grad
        buffer = new["momentum_buffer"] = _select(first, grad, damped)
        if settings["nesterov"]:
            return grad + momentum * buffer, 1 + momentum * mass, new
        return buffer, mass, new


def _select(condition: Flag, chosen: Any, otherwise: Any) -> Any:
    """`chosen if condition else otherwise`, also where the condition is on a device."""
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, otherwise)
    return chosen if condition else otherwise
