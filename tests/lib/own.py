"""An optimizer as users write it in a module of their own, its rule beside it.

Its device functions bear names that the package has too, and call some of its rules.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

import fusedreg
from fusedreg.kernels.device import rules
from fusedreg.kernels.device.rules import Rule, adam_moments, square_root
from fusedreg.scalars import Count

FLOOR = tl.constexpr(0.25)


@triton.jit
def power(x):
    return x * x


@triton.jit
def divide(a, b):
    return tl.where(b == 0.0, 0.0, rules.divide(a, b))


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL) + FLOOR


@triton.jit
def own_scalars(options, counts):
    beta, eps = options
    t = counts[0] + 1.0
    return 1.0 - rules.power(beta, t), (1.0 - beta, beta, 0.5, eps), (t,)


@triton.jit
def own(g, states, scalars):
    m, v = adam_moments(g, states[0], states[1], scalars)
    d = square_root(maximum(v, power(m)))
    return (
        divide(m, d) + triton.language.where(g > 0.0, scalars[3], 0.0),
        rules.reciprocal(d),
        (m, v),
    )


class Own(fusedreg.FusedOptimizer):
    """u = m / sqrt(max(v, m^2) + 1/4), and eps more where g > 0."""

    tensor_states = ("exp_avg", "exp_avg_sq")
    counts = MappingProxyType({"step": Count()})
    device_options = ("beta", "eps")
    rule: Any = Rule(own_scalars, own, 4)

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "beta": 0.75, "eps": 0.125}, **options)

    def device_rule(self, group: Any) -> Any:
        return self.rule

    def update(self, settings: Any, state: Any, grad: Any) -> Any:
        beta, m, v = settings["beta"], state["exp_avg"], state["exp_avg_sq"]
        step = state["step"] + 1
        m = m + (1 - beta) * (grad - m)
        v = beta * v + 0.5 * grad * grad
        over_root = 1 / (torch.maximum(v, m.square()) + 0.25).sqrt()
        direction = m * over_root + torch.where(grad > 0, settings["eps"], 0.0)
        return (
            direction,
            (1 - beta**step) * over_root,
            {"step": step, "exp_avg": m, "exp_avg_sq": v},
        )
