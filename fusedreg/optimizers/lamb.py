"""LAMB."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fusedreg.optimizer import FusedOptimizer, Options
from fusedreg.optimizers.adam import Adam, Betas, checked_betas


class LAMB(Adam):
    r"""LAMB: Adam whose step is as long as each tensor times lr, with decay, L1 and clipping.

    One step of a parameter w, in this order, with S(x, s) = sign(x) * max(|x| - s, 0)::

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6))
        g = -g                                    if maximize
        g = g + l1 * sign(w)                      if l1_mode == "subgradient"
        g = g + weight_decay * w                  if not decoupled_weight_decay
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        d = sqrt(v) / sqrt(1 - beta2^t) + eps
        u = m / d / (1 - beta1^t)
        u = u + weight_decay * w                  if decoupled_weight_decay
        u = u + weight_decay / decay_lr * w       if lr_independent_decay, instead
        r = min(||w|| / ||u||, 2^120)             1 where either norm is 0
        w = w - lr * r * u
        w = S(w, lr * r * l1 / d)                 if l1_mode == "prox", where v is not 0
        w = S(w, lr * r * l1)                     if l1_mode == "decoupled"

    Norms are L2 norms of one tensor each, over all ranks where it is a DTensor; their squares are
    summed in float64, which fits norms between 1e-154 and 1e154. r is the trust ratio, with the
    identity in the place of the paper's phi. There are two forms of the decay, and neither is
    AdamW's:

    - the paper's, decoupled_weight_decay=True: it is part of the update whose norm divides. As r
      makes that as long as w, more decay turns the step towards -w, but does not lengthen it.
    - the coupled one, decoupled_weight_decay=False: the gradient of weight_decay/2 * ||w||^2, which
      the moments then normalise away.

    Args:
        params, lr, betas: as in :class:`fusedreg.Adam`, like all that is not listed here.
        eps: >= 0, in the units of a gradient; added after the bias correction, outside the root.
        weight_decay: >= 0, in one of the two forms.
        decoupled_weight_decay: the paper's form; False the coupled one.
        l1_mode: "prox", whose fixed point minimises loss + l1 * ||w||_1 as far as r has a limit
            above 0, "decoupled" or "subgradient".
        max_grad_norm: as in :class:`fusedreg.Adam`; None unlike apex and timm, where it is 1.0.

    State: as :class:`fusedreg.Adam`: `step`, `exp_avg` m and `exp_avg_sq` v.

    Raises also what :class:`fusedreg.Adam` raises.

    Raises:
        RuntimeError: parameters of FullyShardedDataParallel, which says of none where it ends.

    >>> w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = LAMB([w], lr=0.1, eps=0.0, weight_decay=0.0)
    >>> w.grad = torch.tensor([2.0, 1.0])
    >>> optimizer.step()  # u = (1, 1), r = 5 / sqrt(2)
    >>> [round(x, 4) for x in w.tolist()]
    [2.6464, -4.3536]

    Source: You et al., Large batch optimization for deep learning: training BERT in 76 minutes
    (2020), algorithm 2.

    Differs from torch.optim: it has no LAMB. timm.optim.Lamb and apex.optimizers.FusedLAMB leave r
    at 1 where weight_decay is 0, and clip without the 1e-6; timm's always_adapt=True is this. Its
    decoupled_decay=False, and apex's mode 1, are the paper's form, and its decoupled_decay=True,
    which decays outside the ratio, is not offered.
    """

    layerwise = True
    option_defaults = MappingProxyType({"decoupled_weight_decay": True})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        FusedOptimizer.__init__(self, params, defaults, **options)  # it has no amsgrad
