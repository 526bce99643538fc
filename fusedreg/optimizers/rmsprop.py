"""RMSprop."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.checks import check_number
from fusedreg.contract import Options
from fusedreg.optimizer import FusedOptimizer
from fusedreg.optimizers.momentum import (
    MASS,
    average,
    check_mass_is_finite,
    create_mass,
    needs_mass,
)
from fusedreg.scalars import Count, Number, is_zero
from fusedreg.types import ParamGroup, Settings, State, Update


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop with momentum, centering, weight decay, proximal L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        w = w * (1 - lr * weight_decay)           if decoupled_weight_decay
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay too
        v = alpha * v + (1 - alpha) * g^2
        a = alpha * a + (1 - alpha) * g           if centered
        d = sqrt(v) + eps                         if not centered
        d = sqrt(max(v - a^2, 0)) + eps           if centered
        b = momentum * b + g / d
        w = w - lr * b
        w = S(w, lr * l1 * c / d)                 if l1_mode == "prox", where v and d are not 0
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    c is the momentum mass, what a constant direction of 1 has made of b: c = momentum * c + 1 from
    0 on, so 1 without momentum, and 1/(1 - momentum) in the limit. Nothing is bias-corrected: v
    begins at 0, so the first step has the length lr / sqrt(1 - alpha). The threshold divides by the
    d of this step, and b has those of the steps before: the two belong together once d has settled.
    Centered and with momentum it may go on swinging where nearly all weights are 0.

    Args:
        params: tensors, named tensors, or dicts that define param groups. Every option below up to
            `l1_mode` may differ between groups and is read afresh in every step.
        lr: learning rate, >= 0; a float or a one-element tensor (read on its device).
        alpha: how much of v stays in a step, in [0, 1).
        eps: >= 0, in the units of a gradient; added outside the root.
        weight_decay: >= 0. Coupled, it is the gradient of weight_decay/2 * ||w||^2, which d then
            divides.
        momentum: >= 0; with `l1_mode="prox"` and l1 > 0 also < 1.
        centered: divide by the standard deviation of the gradient. Where that does not change any
            more it is 0, and eps alone limits the step: choose one that suits.
        foreach, fused, capturable: accepted as torch accepts them; fused=False always means the
            reference path.
        maximize: ascend the loss; penalties still shrink.
        differentiable: must be False.
        decoupled_weight_decay: shrink w instead of adding to g.
        lr_independent_decay, decay_lr, l1, l1_mode, max_grad_norm, skip_nonfinite, process_group:
            as in :class:`fusedreg.Adam`.
        state_dtype: dtype of `square_avg`, `momentum_buffer` and `grad_avg`; None is the
            parameter's own, as torch's.

    State: `step` (0-dim float32, float64 if that is the default dtype), `square_avg` v,
    `momentum_buffer` b where momentum > 0 and `grad_avg` a if centered; shape of the parameter,
    dtype `state_dtype` or the parameter's, so 4 to 12 bytes per float32 parameter. `momentum_mass`
    c (0-dim float64) only where a threshold needs it.

    Raises:
        ValueError: an option is negative, NaN, out of range or unknown; l1 > 0 for a complex
            parameter; lr_independent_decay without decoupled_weight_decay.
        TypeError: an option is not a number.
        RuntimeError: `fused` and `foreach` together, `fused` and `differentiable` together.
        NotImplementedError: differentiable=True.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = RMSprop([w], lr=0.1, alpha=0.75)
    >>> w.grad = torch.tensor([3.0, -0.5])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.8, -1.8]

    Source: Tieleman and Hinton, Lecture 6.5, RMSProp (2012); for `centered` and the momentum
    Graves, Generating sequences with recurrent neural networks (2013), equations 38 to 41, with eps
    outside the root as torch has it; for the threshold Yun, Lozano and Yang, Adaptive proximal
    gradient methods for structured neural networks (2021).

    Differs from torch.optim.RMSprop: the variance v - a^2 is at least 0 (torch takes the root of
    what rounding made negative, which is NaN), alpha >= 1 is refused, float16 and bfloat16 are
    stepped in float32 and rounded once. All differences are in docs/differences.md.
    """

    tensor_states = ("square_avg", "momentum_buffer", "grad_avg")
    counts = MappingProxyType({"step": Count(), "momentum_mass": MASS})
    late_states = ("momentum_buffer", "grad_avg", "momentum_mass")
    device_options = ("alpha", "eps", "momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Check the options of this class; see the base class."""
        check_number("eps", group["eps"], read_device=read_device)
        check_number("momentum", group["momentum"], read_device=read_device)
        check_number("alpha", group["alpha"], below=1.0, read_device=read_device)
        check_mass_is_finite(self, group, "momentum")

    def states(self, group: Settings) -> tuple[str, ...]:
        """The mean square, the buffer where there is momentum, the mean where it is centered."""
        buffer = () if is_zero(group["momentum"]) else ("momentum_buffer",)
        return ("square_avg", *buffer, *(("grad_avg",) if group["centered"] else ()))

    def counts_of(self, group: Settings) -> tuple[str, ...]:
        """The step, and the momentum mass where a threshold needs it."""
        mass = ("momentum_mass",) if needs_mass(self, group) else ()
        return (*super().counts_of(group), *mass)

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what is missing, and the momentum mass where a threshold needs it."""
        create_mass(self, group, param, state)
        super().init_state(group, param, state)

    def device_rule(self, group: Settings) -> str:
        """Name of this rule in `fusedreg.kernels.device.rules`."""
        momentum = "" if is_zero(group["momentum"]) else "_momentum"
        return "rmsprop" + ("_centered" if group["centered"] else "") + momentum

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The update rule; see the class docstring and the base class."""
        alpha, momentum = settings["alpha"], settings["momentum"]
        # ((1 - alpha) g) g: the square alone overflows sooner.
        v = square = alpha * state["square_avg"] + (1 - alpha) * grad * grad
        new: State = {"step": state["step"] + 1, "square_avg": v}
        if settings["centered"]:
            a = new["grad_avg"] = average(state["grad_avg"], grad, 1 - alpha)
            # Rounding may leave less than 0 of a gradient that does not change.
            variance = (v - a * a).clamp(min=0)
            square = torch.where(v.isinf(), v, variance)  # where a^2 overflows too
        denominator = square.sqrt() + settings["eps"]
        # Where no gradient was ever seen, nothing moves, although 0/0 is NaN, and there is no
        # threshold: lr * l1 / eps would set unused weights to zero.
        direction = torch.where(denominator == 0, 0.0, grad / denominator)
        mass: Number = 1.0
        if not is_zero(momentum):
            direction = new["momentum_buffer"] = momentum * state["momentum_buffer"] + direction
            if "momentum_mass" in state:
                mass = new["momentum_mass"] = momentum * state["momentum_mass"] + 1
        gain = torch.where((v == 0) | (denominator == 0), 0.0, mass / denominator)
        return direction, gain, new
