"""Adam."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.checks import check_betas, check_number
from fusedreg.optimizer import FusedOptimizer, Options
from fusedreg.optimizers.momentum import average
from fusedreg.scalars import Count, pair
from fusedreg.types import ParamGroup, Settings, State, Update

Betas = tuple[float | Tensor, float | Tensor]


class Adam(FusedOptimizer, torch.optim.Adam):  # type: ignore[override]  # a property
    r"""Adam with weight decay, proximal L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        w = w * (1 - lr * weight_decay)           if decoupled_weight_decay
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay too
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        x = max(x, v)                             if amsgrad
        d = sqrt(v) / sqrt(1 - beta2^t) + eps     x in the place of v if amsgrad
        w = w - lr * m / d / (1 - beta1^t)
        w = S(w, lr * l1 / d)                     if l1_mode == "prox", where v (x) is not 0
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    Where the second moment is exactly 0, as where no gradient was ever seen, the threshold would be
    lr * l1 / eps and wipe, say, the unused rows of an embedding, so there it is not applied.

    Args:
        params: tensors, named tensors, or dicts that define param groups. Every option below up to
            `l1_mode` may differ between groups and is read afresh in every step.
        lr: learning rate, >= 0; a float or a one-element tensor (read on its device).
        betas: (beta1, beta2), each in [0, 1): any sequence or array of two numbers, or two
            one-element tensors. It becomes a tuple.
        eps: >= 0, in the units of a gradient; added after the bias correction, outside the root.
        weight_decay: >= 0. Coupled, it is the gradient of weight_decay/2 * ||w||^2, which the
            moments then normalise away: the first step of a zero loss gradient is lr * sign(w).
        amsgrad: divide by the largest second moment so far, as torch before bias correction.
        foreach, fused, capturable: accepted as torch accepts them; fused=False always means the
            reference path.
        maximize: ascend the loss; penalties still shrink.
        differentiable: must be False.
        decoupled_weight_decay: shrink w instead of adding to g, which is AdamW.
        lr_independent_decay: shrink w by the fraction weight_decay * lr / decay_lr, where the
            group's `decay_lr` is the lr that it was added with; needs decoupled_weight_decay. So
            the decay follows the schedule of lr, but not its size.
        decay_lr: another lr to divide by there, > 0; None takes the lr of each group.
        l1: weight of the L1 penalty, >= 0, in the units of the loss per unit of weight.
        l1_mode: what l1 does. "prox": the fixed point minimises loss + l1 * ||w||_1, with exact
            zeros. "decoupled": shrinks by lr * l1 whatever the gradients are; not an L1 penalty of
            the loss. "subgradient": what adding the norm to the loss does; no exact zeros.
        max_grad_norm: clip the global L2 norm of the loss gradients of all groups to this; None
            computes no norm, float("inf") computes `grad_norm` and clips nothing.
        skip_nonfinite: a step whose gradient norm is inf or NaN changes nothing, and
            `skipped_steps` counts it.
        state_dtype: dtype of the moments, e.g. torch.float32 for bfloat16 parameters; None is
            torch's, the parameter's own. A checkpoint does not change it.
        process_group: ranks over which the squared gradient norm is summed, where each has other
            parameters as plain tensors (ZeRO, FSDP1, pipeline stages); DTensors need none.

    State: `step` (0-dim float32, float64 if that is the default dtype), `exp_avg` m, `exp_avg_sq`
    v, and `max_exp_avg_sq` x if amsgrad; shape of the parameter, dtype `state_dtype` or the
    parameter's, so 8 (12) bytes per float32 parameter.

    Raises:
        ValueError: an option is negative, NaN, out of range or unknown; l1 > 0 for a complex
            parameter; a tensor lr or betas with foreach=True and capturable=False.
        TypeError: an option is not a number.
        RuntimeError: `fused` and `foreach` together, `fused` and `differentiable` together.
        NotImplementedError: differentiable=True.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 0.05]))
    >>> optimizer = Adam([w], lr=0.1, l1=1.0)
    >>> w.grad = torch.tensor([2.0, 0.5])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.85, 0.0]

    Source: Kingma and Ba, Adam (2015), algorithm 1; Reddi, Kale and Kumar, On the convergence of
    Adam and beyond (2018), algorithm 2; for the threshold Yun, Lozano and Yang, Adaptive proximal
    gradient methods for structured neural networks (2021).

    Differs from torch.optim.Adam: float16 and bfloat16 are stepped in float32 and rounded once, the
    step count lies on the parameter's device, lr = 0 leaves every bit of a parameter. All
    differences are in docs/differences.md.
    """

    tensor_states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts = MappingProxyType({"step": Count()})
    late_states = ("max_exp_avg_sq",)
    device_options = ("betas", "eps")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        betas = checked_betas(lr, betas, foreach_only=bool(foreach) and not capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Check the options of this class; see the base class."""
        check_number("eps", group["eps"], read_device=read_device)
        check_betas(group["betas"], read_device=read_device)

    def states(self, group: Settings) -> tuple[str, ...]:
        """Both moments, and the largest second one under amsgrad."""
        return self.tensor_states if group.get("amsgrad") else self.tensor_states[:2]

    def device_rule(self, group: Settings) -> str:
        """Name of this rule in `fusedreg.kernels.device.rules`."""
        return "adam_amsgrad" if group.get("amsgrad") else "adam"

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The update rule; see the class docstring and the base class."""
        beta1, beta2 = settings["betas"]
        step = state["step"] + 1
        m = average(state["exp_avg"], grad, 1 - beta1)
        # ((1 - beta2) g) g: the square alone overflows sooner.
        v = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
        new: State = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        if settings.get("amsgrad"):
            v = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], v)
        # The root of each: v / (1 - beta2^t) may overflow where v does not.
        denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + settings["eps"]
        # The quotient first: m / (1 - beta1^t) may overflow where the direction does not.
        direction = m / denominator / (1 - beta1**step)
        # Where no gradient was ever seen, nothing moves, although 0/0 is NaN, and there is no
        # threshold: lr * l1 / eps would set every unused row of an embedding to zero.
        direction = torch.where(denominator == 0, 0.0, direction)
        return direction, torch.where(v == 0, 0.0, 1 / denominator), new


def checked_betas(lr: object, betas: Betas, foreach_only: bool) -> Betas:
    """Betas of any sequence as a tuple.

    Raises by torch's rules on which of lr and betas may be tensors, in its order and words.
    """
    if isinstance(lr, Tensor) and foreach_only:
        raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
    numbers = pair(betas)
    check_betas(numbers, read_device=True)
    tensors = [isinstance(beta, Tensor) for beta in numbers]
    if any(tensors) and not all(tensors):
        raise ValueError("betas must be either both floats or both Tensors")
    if any(tensors) and foreach_only:
        raise ValueError(
            "betas[0] as a Tensor is not supported for capturable=False and foreach=True"
        )
    first, second = numbers
    return first, second
