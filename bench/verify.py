"""Whether an implementation computes what it is timed for, asked before it is timed.

Three steps are taken with the very objects and tensors that are then timed. A sample of the
parameters is compared with the oracle of `fusedreg check`, on intervals that know how far roundings
can take its formulas. A norm of all gradients is formed over all of them, in float64.
"""

from __future__ import annotations

import sys
from bisect import bisect
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import Contender, Task, make_groups
from jobs import CLIP_SHARE, SCALE, Groups, Method
from torch import Tensor

from fusedreg.check import oracle

sys.path.append(str(Path(__file__).parents[1] / "tests/lib"))
import intervals  # what the tests judge random programs by
from intervals import Interval, Precision

# Each step's gradient: so much of the first gradient, plus so much of the first parameter.
MIXTURES = ((1.0, 0.0), (-0.5, 0.25), (0.75, 0.5))
SAMPLE = 2**20
# Half ulp that one operation of a formula stands for. Most are one operation of torch as well, but
# a product with a number rounds the number too, and an average as m + (1 - beta) * (g - m) rounds
# the difference of two numbers that the formula multiplies one by one. An interval counts more,
# because the tests judge float64 as well, which is the dtype that the ends are computed in.
ROUNDINGS = 2
# Relative, of 1 - 0.999 formed in float32, as kernels form it that are given betas as float32.
ERROR_OF_CONSTANTS = 1.3e-5
ERROR_OF_NORM = 1e-4  # relative, of a norm accumulated in float32, as torch accumulates it
# Norms of tensors, their norm, quotient and product, where each is stored in the dtype.
ROUNDINGS_OF_CLIPPING = 5


def around(x: Tensor, error: Any, dtype: torch.dtype) -> Interval:
    """What is within an error of a float64 tensor; operations round it to a dtype."""
    limits = torch.finfo(dtype)
    unit, tiny = limits.eps / 2, limits.smallest_normal * limits.eps / 2
    share = ROUNDINGS / intervals.ROUNDINGS
    return Interval(x - error, x + error, Precision(share * unit, share * tiny, limits.max))


def middle(x: Interval) -> Tensor:
    return (x.low + x.high) / 2


def error(x: Interval) -> Tensor:
    """Half the width, infinite where nothing is known."""
    return ((x.high - x.low) / 2).nan_to_num(nan=torch.inf, posinf=torch.inf)


def one_step(slot: Any, grad: Interval, lr: Interval, method: Method) -> None:
    """A step of the oracle; the norms of a trust ratio are those of the middles, about."""
    before, norm = slot.w, torch.linalg.vector_norm
    oracle.one_step(slot, grad, method.case, lr=lr)
    if method.layerwise:
        moved = middle(slot.w) - middle(before)
        relative = norm(error(before)) / norm(middle(before)) + norm(error(slot.w)) / norm(moved)
        more = (relative + 2 * ERROR_OF_NORM) * moved.abs()
        slot.w = Interval(slot.w.low - more, slot.w.high + more, slot.w.precision)


intervals.FUNCTIONS[torch.linalg.norm] = lambda x: torch.linalg.norm(middle(x))


class Verdict(NamedTuple):
    """The largest error over its bound, and by how much results differ that are out of bounds."""

    of_bound: float
    text: str

    @property
    def matches(self) -> bool:
        return not self.text


class Setting:
    """Parameters and gradients as all contenders begin with them."""

    def __init__(self, shapes: Groups, dtype: Any, device: Any, scaled: bool = False) -> None:
        self.groups, self.dtype = make_groups(shapes, dtype, device), dtype
        self.params = [param for group in self.groups for param in group["params"]]
        self.scale = SCALE if scaled else 1.0
        self.values = [param.detach().clone() for param in self.params]
        self.grads = [self.scale * param.grad for param in self.params]
        self.norm, self.expected = cache(self._norm), cache(self._expected)

    def task(self, method: Method, clip: bool) -> Task:
        """With a limit that halves the gradients, where it clips."""
        limit = CLIP_SHARE * self.norm(0) / self.scale if clip else None
        return Task(method, limit, scaled=self.scale != 1)

    def set_grads(self, step: int = 0) -> None:
        """In place, as memory is slow to get; those of the first step are those that are timed."""
        grads = [param.grad for param in self.params]
        torch._foreach_copy_(grads, self.grads)
        of_grad, of_param = MIXTURES[step]
        if of_param:
            torch._foreach_mul_(grads, of_grad)
            torch._foreach_add_(grads, self.values, alpha=of_param * self.scale)

    def _norm(self, step: int) -> float:
        """Of all gradients, in float64."""
        self.set_grads(step)
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in self.params]
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def sample(self, tensors: list[Any], method: Method) -> list[Tensor]:
        """Elements as float64: all of the smallest tensors, if the method is layerwise; else some
        at equal distances, which are odd, so that every position in a vector or block is met."""
        k = 2 * sum(x.numel() for x in tensors) // SAMPLE | 1
        if method.layerwise:
            smallest = sorted(tensors, key=torch.numel)
            ends = list(accumulate(map(torch.numel, smallest)))
            k, tensors = 1, smallest[: max(1, bisect(ends, SAMPLE))]
        return [x.detach().flatten()[(x.numel() - 1) % k :: k].double() for x in tensors]

    def _expected(self, task: Task) -> tuple[Tensor, Tensor]:
        """The oracle after the steps, and how far from it each element of the sample may be."""
        method = task.method

        def read(tensors: list[Any], factor: float = 1.0, relative: float = 0.0) -> list[Interval]:
            parts: Any = [factor * x for x in self.sample(tensors, method)]
            # Where nothing is per tensor, in pieces whose intervals fit into a cache.
            parts = parts if method.layerwise else torch.cat(parts).split(2**14)
            return [around(x, relative * x.abs(), self.dtype) for x in parts]

        slots: list[Any] = [oracle.Slot(w) for w in read(self.values)]
        rates = [
            torch.tensor(group["lr"], dtype=torch.float64, device=w.device).expand(w.shape)
            for group in self.groups
            for w in group["params"]
        ]
        relative = ERROR_OF_CONSTANTS
        if task.max_norm is not None:
            relative += ERROR_OF_NORM + ROUNDINGS_OF_CLIPPING * torch.finfo(self.dtype).eps / 2
        for step in range(len(MIXTURES)):
            factor = 1 / self.scale
            if task.max_norm is not None:
                factor *= min(1.0, task.max_norm / (self.norm(step) / self.scale + 1e-6))
            self.set_grads(step)
            grads = read([param.grad for param in self.params], factor, relative)
            for slot, grad, lr in zip(slots, grads, read(rates), strict=True):
                one_step(slot, grad, lr, method)
        self.set_grads()
        bound = torch.cat([error(slot.w) for slot in slots])
        # A bound of 0, where the threshold has certainly been met, is no divisor.
        return torch.cat([middle(slot.w) for slot in slots]), bound.clamp(min=1e-300)

    def take_steps(self, contender: Contender) -> None:
        """From where all begin; the gradients are then those to be timed."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.values)
        for step in range(len(MIXTURES)):
            self.set_grads(step)
            contender.step()
        self.set_grads()

    def check(self, contender: Contender, task: Task) -> Verdict:
        self.take_steps(contender)
        sample = torch.cat(self.sample(self.params, task.method))
        value, bound = self.expected(task)
        off = torch.where(bound.isinf() & sample.isfinite(), 0.0, (sample - value).abs())
        worst = int((off / bound).nan_to_num(nan=torch.inf, posinf=torch.inf).argmax())
        of_bound = float(off[worst] / bound[worst])
        differ = f"results differ: by {off[worst]:.1e}, where {bound[worst]:.1e} is allowed"
        return Verdict(of_bound, "" if of_bound <= 1 else differ)  # also of a NaN
