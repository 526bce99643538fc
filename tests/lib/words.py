"""An optimizer whose rule says every word that both compilers know, of computed and plain numbers.

It says them twice: for each tensor, of an option, and for each element, of the gradient. What comes
out is kept in counts and states, one for each word.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

import fusedreg
from fusedreg.kernels.device.rules import (
    Rule,
    average,
    divide,
    power,
    reciprocal,
    square_root,
    where,
)
from fusedreg.scalars import Count


@triton.jit
def words(x):
    return (
        divide(x, x + 1.0),
        divide(1.0, x),
        divide(x, 3.0),
        x * divide(1.0, 3.0),
        square_root(x),
        x * square_root(2.0),
        reciprocal(x),
        x * reciprocal(3.0),
        power(x, x),
        power(0.96, x),
        power(x, 2.0),
        x * power(0.96, 2.0),
        average(x, x + 1.0, divide(x, 4.0)),
        average(x, 0.0, 0.1),
        average(0.0, x, 0.1),
        average(x, 0.3, 0.9),
        x * average(1.0, 3.0, 0.1),
        where(True, x, 0.1),
        where(False, x, 0.1) * x,
        tl.where(x > 1.0, x, 0.1),
        tl.where(x > 1.0, 0.1, x),
        tl.maximum(x, x * x, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(x, 1.5, propagate_nan=tl.PropagateNan.ALL),
        tl.maximum(1.5, x, propagate_nan=tl.PropagateNan.ALL),
    )


WORDS: dict[str, Any] = {
    "divide": lambda x: x / (x + 1),
    "divide a number": lambda x: 1 / x,
    "divide by a number": lambda x: x / 3,
    "divide numbers": lambda x: x * (1 / 3),
    "root": lambda x: x.sqrt(),
    "root of a number": lambda x: x * 2**0.5,
    "reciprocal": lambda x: 1 / x,
    "reciprocal of a number": lambda x: x * (1 / 3),
    "power": lambda x: x**x,
    "power of a number": lambda x: 0.96**x,
    "power by a number": lambda x: x**2,
    "power of numbers": lambda x: x * 0.96**2,
    "average": lambda x: x + x / 4,
    "average with a number": lambda x: 0.9 * x,
    "average of a number": lambda x: 0.1 * x,
    "average near its end": lambda x: 0.1 * x + 0.9 * 0.3,
    "average of numbers": lambda x: x * 1.2,
    "where True": lambda x: x,
    "where False": lambda x: 0.1 * x,
    "where": lambda x: torch.where(x > 1, x, 0.1),
    "where a number": lambda x: torch.where(x > 1, 0.1, x),
    "maximum": lambda x: torch.maximum(x, x * x),
    "maximum with a number": lambda x: x.clamp(min=1.5),
    "maximum of a number": lambda x: x.clamp(min=1.5),
}
"""What each word of `words` is, in torch operations."""


@triton.jit
def words_of_tensor(options, counts):
    return 1.0, (), words(options[0])


@triton.jit
def words_of_elements(g, states, scalars):
    return g, 1.0, words(g)


class Words(fusedreg.FusedOptimizer):
    """u = g."""

    tensor_states = tuple(WORDS)
    counts = MappingProxyType({f"{name} of x": Count(wide=True) for name in WORDS})
    device_options = ("x",)

    def __init__(self, params: Any, x: float = 3.1, **options: Any) -> None:
        super().__init__(params, {"lr": 0.1, "x": x}, **options)

    def device_rule(self, group: Any) -> Any:
        return Rule(words_of_tensor, words_of_elements, 0)
