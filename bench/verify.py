"""Whether an implementation computes what it is timed for, asked before it is timed.

Every implementation takes three steps from the same start, with the very objects and tensors that
are then timed. A sample of the parameters is compared with fusedreg's reference path in float64 on
the same values. All of a step is elementwise but norms: that of the gradients, which is formed in
float64 over all of them, and those of single tensors in a layerwise method, whose sample therefore
consists of whole tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
from bounds import Bound, roundings
from contenders import Contender, ParamGroups, Task, params_of
from methods import CLIP_SHARE, SCALE
from torch import Tensor, nn

import fusedreg

MIXTURES = ((1.0, 0.0), (-0.5, 0.25), (0.75, 0.5))
"""Each step's gradient: so much of the first gradient, plus so much of the first parameter."""
STEPS = len(MIXTURES)
SAMPLE = 2**20


@dataclass
class Start:
    """Parameters and gradients as all begin with them, and which elements are compared."""

    params: list[Tensor]
    grads: list[Tensor]
    scale: float
    stride: int
    compared: list[int]
    """Which tensors."""
    norms: dict[int, float] = field(default_factory=dict)
    """Of the gradients of steps, once they were needed."""

    def sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Elements at equal distances of tensors, their last ones among them, as float64."""
        k, some = self.stride, [tensors[i].detach().flatten() for i in self.compared]
        return [t[(t.numel() - 1) % k :: k].double() for t in some]

    def set_grads_of_step(self, step: int, params: list[nn.Parameter]) -> None:
        """In place, as memory is slow to get; those of the first step are those that are timed."""
        set_grads(params, self.grads)
        of_grad, of_param = MIXTURES[step]
        if of_param:
            grads = [param.grad for param in params]
            torch._foreach_mul_(grads, of_grad)
            torch._foreach_add_(grads, self.params, alpha=of_param * self.scale)


@dataclass
class Expected:
    """What the sample must be, and how far from it each element may be."""

    values: Tensor
    bound: Tensor


@dataclass
class Verdict:
    """The error and its bound, where the error is the largest part of it."""

    error: float
    bound: float

    @property
    def of_bound(self) -> float:
        return self.error / self.bound

    @property
    def matches(self) -> bool:
        return self.of_bound <= 1  # and not NaN

    def __str__(self) -> str:
        if self.matches:
            return ""
        return f"results differ: by {self.error:.1e}, where {self.bound:.1e} is allowed"


def max_norm(groups: ParamGroups) -> float:
    """Where clipping halves the gradients."""
    return CLIP_SHARE * norm([param.grad for param in params_of(groups)])


def norm(grads: list[Tensor]) -> float:
    """Of all gradients, in float64."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def start(groups: ParamGroups, task: Task) -> Start:
    """Remember where all begin; scale the gradients as the task has it."""
    params = params_of(groups)
    grads = [param.grad for param in params]
    if task.scaled:
        torch._foreach_mul_(grads, SCALE)
    sizes = [param.numel() for param in params]
    every = 1 if task.method.layerwise else sum(sizes) // SAMPLE
    return Start(
        params=[param.detach().clone() for param in params],
        grads=[grad.clone() for grad in grads],
        scale=SCALE if task.scaled else 1.0,
        stride=every | 1,  # odd, so that every position in a vector or block is met
        compared=fitting(sizes) if task.method.layerwise else list(range(len(sizes))),
    )


def fitting(sizes: list[int]) -> list[int]:
    """Those of which a sample has room for all elements, in turn; the smallest, if for none.

    >>> fitting([2**19, 2**20, 2**18, 2**19, 5])
    [0, 2, 4]
    """
    found, room = [], SAMPLE
    for index, size in enumerate(sizes):
        if size <= room:
            found.append(index)
            room -= size
    return found or [sizes.index(min(sizes))]


def expected(begin: Start, groups: ParamGroups, task: Task) -> Expected:
    """The float64 reference after the steps, and the bound for the dtype of the parameters."""
    method = task.method
    params = [w.requires_grad_() for w in begin.sample(begin.params)]
    of_all = [group["lr"] for group in groups for _ in group["params"]]
    rates = [of_all[i] for i in begin.compared]
    by_rate = groupby(zip(rates, params, strict=True), key=lambda pair: pair[0])
    optimizer = getattr(fusedreg, method.cls)(
        [{"params": [w for _, w in pairs], "lr": lr} for lr, pairs in by_rate],
        **method.kwargs,
        l1=method.l1,
        fused=False,
    )
    lr = torch.cat([torch.full_like(w, r) for w, r in zip(params, rates, strict=True)]).detach()
    errors = roundings(method, begin.params[0].dtype, clip=task.max_norm is not None)
    bound = Bound(optimizer, params, lr, errors)
    grads = [param.grad for param in params_of(groups)]
    for step in range(STEPS):
        begin.set_grads_of_step(step, params_of(groups))
        factor = 1 / begin.scale
        if task.max_norm is not None:
            begin.norms[step] = begin.norms.get(step) or norm(grads)
            factor *= min(1.0, task.max_norm / (begin.norms[step] / begin.scale + 1e-6))
        for param, grad in zip(params, begin.sample(grads), strict=True):
            param.grad = grad * factor
        bound.step()
    set_grads(params_of(groups), begin.grads)
    return Expected(torch.cat(params).detach(), bound.error)


def check(contender: Contender, groups: ParamGroups, begin: Start, must_be: Expected) -> Verdict:
    """Take the steps and compare; the gradients are then those to be timed."""
    params = params_of(groups)
    with torch.no_grad():
        torch._foreach_copy_(params, begin.params)
    for step in range(STEPS):
        begin.set_grads_of_step(step, params)
        contender.step()
    set_grads(params, begin.grads)
    error = (torch.cat(begin.sample(params)) - must_be.values).abs()
    worst = int((error / must_be.bound).nan_to_num(nan=torch.inf).argmax())
    return Verdict(float(error[worst]), float(must_be.bound[worst]))


def set_grads(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """In place, before every step that is compared: clip_grad_norm_ rewrites them."""
    torch._foreach_copy_([param.grad for param in params], grads)
