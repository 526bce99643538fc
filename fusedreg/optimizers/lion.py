"""Lion."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.checks import check_betas
from fusedreg.contract import Options
from fusedreg.optimizer import FusedOptimizer
from fusedreg.optimizers.momentum import average
from fusedreg.scalars import pair
from fusedreg.types import ParamGroup, Settings, State, Update


class Lion(FusedOptimizer):
    r"""Lion, which steps by the sign of a momentum, with weight decay, L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        w = w * (1 - lr * weight_decay)           if decoupled_weight_decay
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay too
        u = sign(beta1 * m + (1 - beta1) * g)
        w = w - lr * u
        m = beta2 * m + (1 - beta2) * g
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    Every weight moves by lr, whatever its gradient; where that and m are 0 it stays. The decay is
    no ridge penalty: on a full batch Lion solves the problem under |w_i| <= 1/weight_decay. Nor can
    any threshold solve the Lasso: that asks whether |gradient| is above l1, and u does not depend
    on its size. So l1_mode="prox" is refused.

    Args:
        params: tensors, named tensors, or dicts that define param groups. Every option below up to
            `l1_mode` may differ between groups and is read afresh in every step.
        lr: learning rate, >= 0; a float or a one-element tensor (read on its device). About a tenth
            of AdamW's, as every step has this length.
        betas: (beta1, beta2), each in [0, 1); beta1 mixes the gradient into the step, beta2 into m.
        weight_decay: >= 0; w loses the fraction lr * weight_decay in a step.
        foreach, fused, capturable: accepted as torch accepts them; fused=False always means the
            reference path.
        maximize: ascend the loss; penalties still shrink.
        differentiable: must be False.
        decoupled_weight_decay: False adds weight_decay * w to g: on a full batch the ridge, as lr
            falls to 0.
        l1: weight of the L1 penalty, >= 0.
        l1_mode: "decoupled" shrinks by lr * l1, with exact zeros: from l1 = 1 on, no step gets away
            from 0. "subgradient" does what adding the norm to the loss does; no exact zeros.
        lr_independent_decay, decay_lr, max_grad_norm, skip_nonfinite, process_group: as in
            :class:`fusedreg.Adam`.
        state_dtype: dtype of `exp_avg`; None is the parameter's own.

    State: `exp_avg` m (shape of the parameter, dtype `state_dtype` or the parameter's), so 4 bytes
    per float32 parameter.

    Raises:
        ValueError: an option is negative, NaN, out of range or unknown; l1_mode="prox"; l1 > 0 for
            a complex parameter; lr_independent_decay without decoupled_weight_decay.
        TypeError: an option is not a number.
        RuntimeError: `fused` and `foreach` together, `fused` and `differentiable` together.
        NotImplementedError: differentiable=True.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Lion([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.5])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.9, -1.9]

    Source: Chen et al., Symbolic discovery of optimization algorithms (2023), algorithm 2.

    Differs from torch.optim: it has no Lion. lion_pytorch.Lion and timm.optim.Lion are this with
    l1 = 0; what lion_pytorch calls decoupled_weight_decay is lr_independent_decay here.
    """

    tensor_states = ("exp_avg",)
    device_options = ("betas",)
    option_defaults = MappingProxyType({"decoupled_weight_decay": True, "l1_mode": "decoupled"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        betas = pair(betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Check the options of this class; see the base class."""
        check_betas(group["betas"], read_device=read_device)
        if group.get("l1_mode") == "prox":
            raise ValueError(
                "Invalid l1_mode value: 'prox' for Lion: the length of its step does not depend on "
                "that of the gradient, so no threshold solves the Lasso. l1_mode='decoupled' "
                "shrinks by lr * l1"
            )

    def device_rule(self, group: Settings) -> str:
        """Name of this rule in `fusedreg.kernels.device.rules`."""
        return "lion"

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The update rule; see the class docstring and the base class."""
        beta1, beta2 = settings["betas"]
        mixed = beta1 * state["exp_avg"] + (1 - beta1) * grad
        new = {"exp_avg": average(state["exp_avg"], grad, 1 - beta2)}
        # There is no gain, and nothing asks for it: l1_mode="prox" is refused.
        return torch.where(mixed.isnan(), mixed, mixed.sign()), 1.0, new
