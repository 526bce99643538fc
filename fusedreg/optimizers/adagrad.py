"""Adagrad."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.checks import check_number
from fusedreg.contract import Options
from fusedreg.formats import planes_of
from fusedreg.optimizer import FusedOptimizer
from fusedreg.scalars import Count, Number
from fusedreg.types import ParamGroup, Settings, State, Update


class Adagrad(FusedOptimizer, torch.optim.Adagrad):  # type: ignore[override]  # a property
    r"""Adagrad with weight decay, proximal L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        w = w * (1 - lr * weight_decay)           if decoupled_weight_decay
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay too
        t = t + 1
        s = s + g^2                               from initial_accumulator_value on
        d = (sqrt(s) + eps) * (1 + (t - 1) * lr_decay)
        w = w - lr * g / d
        w = S(w, lr * l1 / d)                     if l1_mode == "prox", where s is not 0
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    lr_decay slows the steps along gradients and their threshold, not what is decoupled. Nor does s:
    a decoupled decay or l1 leads to 0 in the long run.

    Args:
        params: tensors, named tensors, or dicts that define param groups. Every option below up to
            `l1_mode` may differ between groups and is read afresh in every step.
        lr: learning rate, >= 0; a float or a one-element tensor (read on its device).
        lr_decay: >= 0; after t steps lr is divided by 1 + t * lr_decay.
        weight_decay: >= 0. Coupled, it is the gradient of weight_decay/2 * ||w||^2, which d then
            divides.
        initial_accumulator_value: >= 0, where s begins; read when the state of a parameter is
            created, in its first step.
        eps: >= 0, in the units of a gradient; added outside the root.
        foreach, fused: accepted as torch accepts them; fused=False always means the reference path.
        maximize: ascend the loss; penalties still shrink.
        differentiable: must be False.
        decoupled_weight_decay: shrink w instead of adding to g.
        lr_independent_decay, decay_lr, l1, l1_mode, max_grad_norm, skip_nonfinite, process_group:
            as in :class:`fusedreg.Adam`.
        state_dtype: dtype of `sum`; None is the parameter's own, as torch's.

    State: `step` (0-dim float32, float64 if that is the default dtype) and `sum` s (shape of the
    parameter, dtype `state_dtype` or the parameter's), so 4 bytes per float32 parameter.

    Raises:
        ValueError: an option is negative, NaN or unknown; l1 > 0 for a complex parameter;
            lr_independent_decay without decoupled_weight_decay.
        TypeError: an option is not a number.
        RuntimeError: `fused` and `foreach` together, `fused` and `differentiable` together; a
            gradient is sparse.
        NotImplementedError: differentiable=True.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = Adagrad([w], lr=0.1)
    >>> w.grad = torch.tensor([3.0, -0.5])
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.9, -1.9]

    Source: Duchi, Hazan and Singer, Adaptive subgradient methods for online learning and stochastic
    optimization (2011), figure 1, composite mirror descent with diagonal matrices, whose
    proximal step is the threshold.

    Differs from torch.optim.Adagrad: state is created in the first step, not in the constructor;
    sparse gradients are refused; float16 and bfloat16 are stepped in float32 and rounded once. All
    differences are in docs/differences.md.
    """

    tensor_states = ("sum",)
    counts = MappingProxyType({"step": Count()})
    device_options = ("lr_decay", "eps")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Check the options of this class; see the base class."""
        for name in ("lr_decay", "eps"):
            check_number(name, group[name], read_device=read_device)
        name = "initial_accumulator_value"
        check_number(name, group[name], below=float("inf"), read_device=read_device)

    def first_value(self, group: Settings, name: str) -> Number:
        """Where the sum begins."""
        value: Number = group["initial_accumulator_value"]
        return value

    def share_memory(self) -> None:
        """Move `sum` of every parameter into shared memory, for processes that train together."""
        self._stepper.create_states(self, self.param_groups, self.state)
        for group in self.param_groups:
            for param in group["params"]:
                for name in planes_of(self.state_format(group, param), self.tensor_states):
                    self.state[param][name].share_memory_()

    def device_rule(self, group: Settings) -> str:
        """Name of this rule in `fusedreg.kernels.device.rules`."""
        return "adagrad"

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The update rule; see the class docstring and the base class."""
        step, total = state["step"] + 1, state["sum"] + grad * grad
        root = total.sqrt() + settings["eps"]
        slowed = 1 + (step - 1) * settings["lr_decay"]
        # d is the product of the two. It is not formed, because it may overflow where g / d does
        # not. Where no gradient was ever seen, nothing moves, although 0/0 is NaN, and there is no
        # threshold: lr * l1 / eps would set unused weights to zero.
        direction = torch.where(root == 0, 0.0, grad / root / slowed)
        gain = torch.where(total == 0, 0.0, 1 / root / slowed)
        return direction, gain, {"step": step, "sum": total}
