"""Whether an implementation computes what it is timed for, asked before it is timed.

Every implementation takes three steps from the same start, with the very objects and tensors that
are then timed. A sample of the parameters is compared with fusedreg's reference path in float64 on
the same values. All of a step is elementwise but the norm of the gradients, which is formed in
float64 over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
from contenders import Contender, ParamGroups, Task, params_of
from methods import CLIP_SHARE, SCALE
from torch import Tensor, nn

import fusedreg

MIXTURES = ((1.0, 0.0), (-0.5, 0.25), (0.75, 0.5))
"""Each step's gradient: so much of the first gradient, plus so much of the first parameter."""
STEPS = len(MIXTURES)
SAMPLE = 2**20

ROUNDINGS_OF_PARAM = 4
"""In a step, where every operation rounds: the factor of the decay, its product, the step, the
threshold's difference."""
ROUNDINGS_OF_THRESHOLD = 8
"""Of the second moment in three steps (two each, halved by the root), then root, eps, reciprocal,
product and a constant. A threshold larger than the parameter makes it 0 in any case."""
ROUNDINGS_OF_UPDATE = 18
"""The gradient and its decay; moments, two each in three steps; root, bias corrections, eps,
quotient, product and the constants."""
ERROR_OF_CONSTANTS = 1.3e-5
"""Relative, of 1 - 0.999 formed in float32, as kernels form it that are given betas as float32."""
ERROR_OF_NORM = 1e-4
"""Relative, of a norm accumulated in float32, as torch accumulates it."""


@dataclass
class Start:
    """Parameters and gradients as all begin with them, and which elements are compared."""

    params: list[Tensor]
    grads: list[Tensor]
    scale: float
    stride: int
    norms: dict[int, float] = field(default_factory=dict)
    """Of the gradients of steps, once they were needed."""

    def sample(self, tensors: list[Tensor]) -> list[Tensor]:
        """Elements at equal distances of each tensor, the last one among them, as float64."""
        k = self.stride
        return [t.detach().flatten()[(t.numel() - 1) % k :: k].double() for t in tensors]

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
    every = sum(param.numel() for param in params) // SAMPLE
    return Start(
        params=[param.detach().clone() for param in params],
        grads=[grad.clone() for grad in grads],
        scale=SCALE if task.scaled else 1.0,
        stride=every | 1,  # odd, so that every position in a vector or block is met
    )


def expected(begin: Start, groups: ParamGroups, task: Task) -> Expected:
    """The float64 reference after the steps, and the bound for the dtype of the parameters."""
    method = task.method
    params = [w.requires_grad_() for w in begin.sample(begin.params)]
    rates = [group["lr"] for group in groups for _ in group["params"]]
    by_rate = groupby(zip(rates, params, strict=True), key=lambda pair: pair[0])
    optimizer = getattr(fusedreg, method.cls)(
        [{"params": [w for _, w in pairs], "lr": lr} for lr, pairs in by_rate],
        **method.kwargs,
        l1=method.l1,
        fused=False,
    )
    coupled = method.kwargs.get("weight_decay", 0.0) if method.cls == "Adam" else 0.0
    first = torch.cat(params).detach().abs()
    largest, reach = torch.zeros_like(first), torch.zeros_like(first)
    grads = [param.grad for param in params_of(groups)]
    for step in range(STEPS):
        begin.set_grads_of_step(step, params_of(groups))
        factor = 1 / begin.scale
        if task.max_norm is not None:
            begin.norms[step] = begin.norms.get(step) or norm(grads)
            factor *= min(1.0, task.max_norm / (begin.norms[step] / begin.scale + 1e-6))
        for param, grad in zip(params, begin.sample(grads), strict=True):
            param.grad = grad * factor
        sizes = [param.grad.abs() + coupled * param.detach().abs() for param in params]
        largest = torch.maximum(largest, torch.cat(sizes))
        optimizer.step()
        reach += largest * unit_step(optimizer, method.cls, params, step + 1)
    set_grads(params_of(groups), begin.grads)
    lr = torch.cat([torch.full_like(w, r) for w, r in zip(params, rates, strict=True)]).detach()
    reach *= lr
    clip = task.max_norm is not None
    bound = bounds(first, reach, begin.params[0].dtype, clip=clip, l1=method.l1 > 0)
    return Expected(torch.cat(params).detach(), bound)


def unit_step(
    optimizer: torch.optim.Optimizer, cls: str, params: list[Tensor], steps: int
) -> Tensor | float:
    """What a gradient of 1 can contribute to a step, over lr, before anything cancels.

    A momentum buffer has at most all gradients so far. Adam divides by the root of the second
    moment, which is small where a coupled decay cancels the gradient: there the roundings of both
    are large beside it.
    """
    if cls == "SGD":
        return float(steps)
    beta2 = optimizer.param_groups[0]["betas"][1]
    second = torch.cat([optimizer.state[param]["exp_avg_sq"] for param in params])
    return 1 / ((second / (1 - beta2**steps)).sqrt() + optimizer.param_groups[0]["eps"])


def bounds(first: Tensor, reach: Tensor, dtype: torch.dtype, clip: bool, l1: bool) -> Tensor:
    """What roundings can make of parameters of such sizes, to which steps add numbers so large.

    Every operation on the way may round to the dtype, as torch's for-loop and foreach do; who
    computes in float32 and rounds to bfloat16 once needs less.
    """
    unit = torch.finfo(dtype).eps / 2
    of_param = ROUNDINGS_OF_PARAM * unit
    of_update = ROUNDINGS_OF_UPDATE * unit + ERROR_OF_CONSTANTS
    if l1:
        of_param += ROUNDINGS_OF_THRESHOLD * unit + ERROR_OF_CONSTANTS
    if clip:  # norms of tensors, their norm, quotient and product are rounded too
        of_clip = ERROR_OF_NORM + 5 * unit
        of_update += 2 * of_clip  # in the first moment and in the root of the second
        of_param += of_clip if l1 else 0.0
    return STEPS * of_param * (first + reach) + of_update * reach


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
