"""The penalties, usable by themselves: L1, L2 and their sum, the elastic net.

All functions are about::

    R(w) = l1 * ||w||_1 + weight_decay / 2 * ||w||_2^2

Every function takes both weights as keywords and both default to 0, so L1 is `l1=...`, L2 is
`weight_decay=...` and the elastic net is both. The factor 1/2 makes `weight_decay` what every
optimizer here calls by that name: the gradient of the L2 part is `weight_decay * w`. scikit-learn's
`ElasticNet(alpha, l1_ratio)` is `l1=alpha*l1_ratio, weight_decay=alpha*(1-l1_ratio)` with the loss
`mean((y - Xw)**2) / 2`.

Complex tensors are penalised by their modulus, `|w|`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedreg.scalars import Number

__all__ = ["kkt_distance", "prox", "soft_threshold", "subgradient", "value"]


def soft_threshold(x: Tensor, threshold: Number) -> Tensor:
    """Shrink every entry towards 0 by `threshold` and stop there.

    It is written S in the formulas of the optimizers::

        S(x, threshold) = sign(x) * max(|x| - threshold, 0)

    Args:
        x: any shape, any floating or complex dtype (a complex entry keeps its phase).
        threshold: >= 0, a number or a tensor that broadcasts against `x`.

    Entries with `|x| <= threshold` become exactly 0. NaN stays NaN and infinities stay infinite.

    >>> soft_threshold(torch.tensor([-3.0, -0.5, 0.0, 2.0]), 1.0).tolist()
    [-2.0, 0.0, 0.0, 1.0]

    Source: Parikh and Boyd, Proximal Algorithms (2014), section 6.5. Differs from
    `torch.nn.functional.softshrink`: `threshold` may be a tensor, and x may be complex.
    """
    modulus = x.abs()
    if x.is_complex():
        # Scale both parts: torch.sgn of a complex infinity is NaN. And divide tensors: torch makes
        # 0.0 / tensor a product with 1 / tensor.
        threshold = torch.as_tensor(threshold, dtype=modulus.dtype, device=x.device)
        kept = torch.where(modulus <= threshold, 0.0, 1 - threshold / modulus)
        return torch.view_as_complex(torch.view_as_real(x.resolve_conj()) * kept[..., None]) + 0.0
    # + 0.0 turns the -0.0 that sign * 0 leaves for a negative x into +0.0.
    return torch.sgn(x) * (modulus - threshold).clamp(min=0) + 0.0


def value(w: Tensor, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    """The penalty itself, a 0-dim tensor through which autograd differentiates.

    That is::

        R(w) = l1 * sum(|w|) + weight_decay / 2 * sum(|w|^2)

    >>> value(torch.tensor([3.0, -4.0]), l1=1.0, weight_decay=2.0).item()
    32.0
    """
    return l1 * w.abs().sum() + 0.5 * weight_decay * (w.abs() ** 2).sum()


def subgradient(w: Tensor, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    """The subgradient that autograd takes: 0 where `w` is 0.

    That is::

        l1 * sign(w) + weight_decay * w

    Descending along it never reaches an exact zero: it crosses 0 and comes back.

    >>> subgradient(torch.tensor([3.0, 0.0, -4.0]), l1=1.0, weight_decay=0.5).tolist()
    [2.5, 0.0, -3.0]
    """
    # A weight of NaN has no sign, and the product with 0 would make NaN of an infinite one.
    signs = l1 * torch.where(w.isnan(), w, torch.sgn(w))
    return signs if weight_decay == 0 else signs + weight_decay * w


def prox(v: Tensor, step: Number, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    """The proximal operator of `step * R`.

    With S, the soft-threshold, it is::

        argmin over w of step * R(w) + ||w - v||^2 / 2
            = S(v, step * l1) / (1 + step * weight_decay)

    Args:
        v: the point, any shape.
        step: >= 0, a number or a tensor that broadcasts against `v` (one step per coordinate).

    >>> prox(torch.tensor([3.0, -0.5]), 0.5, l1=2.0, weight_decay=2.0).tolist()
    [1.0, 0.0]

    Source: Parikh and Boyd, Proximal Algorithms (2014), sections 2.2 and 6.5.
    """
    return soft_threshold(v, step * l1) / (1 + step * weight_decay)


def kkt_distance(w: Tensor, grad: Tensor, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    """How far each coordinate is from being optimal for loss + R.

    With g, the gradient of the loss, it is::

        |g + weight_decay * w + l1 * sign(w)|    where w is not 0
        max(|g| - l1, 0)                         where w is 0

    Args:
        w: the parameters.
        grad: gradient of the *loss alone* at `w`, same shape.

    Returns:
        The distances, shaped like `w`. All 0 exactly when 0 is a subgradient of loss + R at `w`,
        which for a convex loss means that `w` is a minimiser.

    >>> kkt_distance(torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 3.0]), l1=1.0).tolist()
    [0.0, 2.0]
    """
    inside = soft_threshold(grad, l1).abs()
    outside = (grad + subgradient(w, l1=l1, weight_decay=weight_decay)).abs()
    return torch.where(w == 0, inside, outside)
