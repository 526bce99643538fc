r"""The penalties, usable by themselves: L1, L2 and their sum, the elastic net.

.. math::  R(w) = l1 \, \|w\|_1 + \tfrac12 \, weight\_decay \, \|w\|_2^2

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
    r"""Shrink every entry towards 0 by `threshold` and stop there.

    .. math::  S_\tau(x) = \mathrm{sign}(x) \, \max(|x| - \tau, 0)

    Args:
        x: any shape, any floating or complex dtype (a complex entry keeps its phase).
        threshold: tau >= 0, a number or a tensor that broadcasts against `x`.

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
    r"""The penalty itself, a 0-dim tensor through which autograd differentiates.

    .. math::  R(w) = l1 \sum_i |w_i| + \tfrac12 \, weight\_decay \sum_i |w_i|^2

    >>> value(torch.tensor([3.0, -4.0]), l1=1.0, weight_decay=2.0).item()
    32.0
    """
    return l1 * w.abs().sum() + 0.5 * weight_decay * (w.abs() ** 2).sum()


def subgradient(w: Tensor, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    r"""The subgradient that autograd takes: 0 where `w` is 0.

    .. math::  l1 \, \mathrm{sign}(w) + weight\_decay \, w

    Descending along it never reaches an exact zero: it crosses 0 and comes back.

    >>> subgradient(torch.tensor([3.0, 0.0, -4.0]), l1=1.0, weight_decay=0.5).tolist()
    [2.5, 0.0, -3.0]
    """
    return l1 * torch.sgn(w) + weight_decay * w


def prox(v: Tensor, step: Number, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    r"""The proximal operator of `step * R`.

    .. math::  \arg\min_w \; step \, R(w) + \tfrac12 \|w - v\|^2
               = \frac{S_{step \cdot l1}(v)}{1 + step \cdot weight\_decay}

    Args:
        v: the point, any shape.
        step: >= 0, a number or a tensor that broadcasts against `v` (one step per coordinate).

    >>> prox(torch.tensor([3.0, -0.5]), 0.5, l1=2.0, weight_decay=2.0).tolist()
    [1.0, 0.0]

    Source: Parikh and Boyd, Proximal Algorithms (2014), sections 2.2 and 6.5.
    """
    return soft_threshold(v, step * l1) / (1 + step * weight_decay)


def kkt_distance(w: Tensor, grad: Tensor, *, l1: float = 0.0, weight_decay: float = 0.0) -> Tensor:
    r"""How far each coordinate is from being optimal for loss + R.

    .. math::
        r_i = \begin{cases}
            |g_i + weight\_decay \, w_i + l1 \, \mathrm{sign}(w_i)| & w_i \ne 0 \\
            \max(|g_i| - l1, 0) & w_i = 0
        \end{cases}

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
