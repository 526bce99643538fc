"""AdamW."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.optimizer import Options
from fusedreg.optimizers.adam import Adam, Betas


class AdamW(Adam, torch.optim.AdamW):  # type: ignore[override]  # a property
    r"""Adam with decoupled weight decay: :class:`Adam` with `decoupled_weight_decay=True`.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        w = w * (1 - lr * weight_decay)
        w = w * (1 - lr/decay_lr * weight_decay)  if lr_independent_decay, instead
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        x = max(x, v)                             if amsgrad
        d = sqrt(v) / sqrt(1 - beta2^t) + eps     x in the place of v if amsgrad
        w = w - lr * m / d / (1 - beta1^t)
        w = S(w, lr * l1 / d)                     if l1_mode == "prox", where v (x) is not 0
        w = S(w, lr * l1)                         if l1_mode == "decoupled"

    The moments never see the decay, whatever a checkpoint says. It is not an L2 penalty: on a full
    batch AdamW solves the problem under |w_i| <= 1/weight_decay.

    Args:
        params, lr, betas, eps, amsgrad: as in :class:`Adam`, like all that follow.
        weight_decay: >= 0; w loses the fraction lr * weight_decay in a step.
        decoupled_weight_decay: must be True.
        lr_independent_decay: w loses the fraction weight_decay * lr / decay_lr; see :class:`Adam`.
        decay_lr: as in :class:`Adam`.
        maximize, foreach, capturable, differentiable, fused: as in :class:`Adam`.
        l1, l1_mode, max_grad_norm, skip_nonfinite, state_dtype, process_group: as in
            :class:`Adam`. With `l1_mode="prox"` and a decay the fixed point is not scikit-learn's
            elastic net (Adam's coupled decay has that).

    State and errors: as in :class:`Adam`.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> optimizer = AdamW([w], lr=0.1, weight_decay=0.5)
    >>> w.grad = torch.zeros(2)
    >>> optimizer.step()
    >>> [round(x, 4) for x in w.tolist()]
    [0.95, -1.9]

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (2019), algorithm 2, with
    torch's lr * weight_decay in the place of their schedule multiplier times weight_decay.

    Differs from torch.optim.AdamW: as :class:`Adam` from torch.optim.Adam.
    """

    fixed_options = MappingProxyType({"decoupled_weight_decay": True})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        if not options.get("decoupled_weight_decay", True):
            raise ValueError(
                "Invalid decoupled_weight_decay value: False (AdamW is Adam with a decoupled "
                "decay: use Adam for a coupled one)"
            )
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **options,
        )
