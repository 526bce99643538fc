"""Who computes it: fusedreg, torch.optim and other libraries, each as their users write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from math import inf
from typing import Any

import torch
from jobs import LR, METHODS, SCALE, Groups, Method
from torch import nn

import fusedreg

ParamGroups = list[dict[str, Any]]


@dataclass
class Contender:
    """An optimizer, and the calls that make one step, in their order."""

    optimizer: Any
    parts: dict[str, Callable[[], object]]
    verdict: Any = None
    host: float = 0.0  # seconds that a GPU's step takes of the host

    @property
    def backend(self) -> str | None:
        return getattr(self.optimizer, "backend", None)

    def step(self) -> None:
        for part in self.parts.values():
            part()


@dataclass(frozen=True)
class Task:
    """What is to be computed."""

    method: Method
    max_norm: float | None
    scaled: bool = False  # whether the gradients are those of a loss times SCALE


Maker = Callable[[ParamGroups, Task], Contender]


def make_groups(shapes: Groups, dtype: torch.dtype, device: torch.device) -> ParamGroups:
    """Param groups with random values and gradients, each with a learning rate of its own."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, dtype=dtype, device=device, generator=generator)
    groups = []
    for index, group in enumerate(shapes):
        params = [nn.Parameter(random(shape)) for shape in group]
        for param in params:
            param.grad = random(param.shape)
            # Where no gradient was ever seen, fusedreg applies no threshold; nobody else has to.
            param.grad.masked_fill_(param.grad == 0, 1.0)
        groups.append({"params": params, "lr": LR / (index + 1)})
    return groups


def own(groups: ParamGroups, task: Task, **options: Any) -> Contender:
    """fusedreg, where all of it is in the step."""
    kwargs = {**task.method.kwargs, "max_grad_norm": task.max_norm, **options}
    optimizer = getattr(fusedreg, task.method.cls)(list(map(dict, groups)), **kwargs)
    if task.scaled:  # as torch.amp.GradScaler gives them to an optimizer that unscales by itself
        device = groups[0]["params"][0].device
        optimizer.grad_scale, optimizer.found_inf = torch.tensor([SCALE, 0.0], device=device)
    return Contender(optimizer, {"step": optimizer.step})


def theirs(cls: Any, groups: ParamGroups, task: Task, **options: Any) -> Contender:
    """Somebody else's optimizer, with what it leaves to the user before and after its step."""
    kwargs = {name: value for name, value in task.method.kwargs.items() if name != "l1"}
    # An optimizer adds to the groups that it is given.
    optimizer = cls(list(map(dict, groups)), **{**kwargs, **options})
    params = [param for group in groups for param in group["params"]]
    parts: dict[str, Callable[[], object]] = {}
    if task.scaled:  # what torch.amp.GradScaler.unscale_ computes, without what it does on the host
        found_inf, inverse = torch.tensor([0.0, 1 / SCALE], device=params[0].device)
        unscale_ = torch._amp_foreach_non_finite_check_and_unscale_
        parts["unscale"] = partial(unscale_, [p.grad for p in params], found_inf, inverse)
    if task.max_norm is not None:
        parts["clip"] = partial(nn.utils.clip_grad_norm_, params, task.max_norm)
    parts["step"] = optimizer.step
    if task.method.l1:
        parts["threshold"] = soft_threshold_(optimizer, task.method.l1)
    return Contender(optimizer, parts)


def soft_threshold_(optimizer: torch.optim.Optimizer, l1: float) -> Callable[[], None]:
    """The exact proximal L1 after a step of torch's Adam or AdamW, which have none.

    S(w, s) = w - clamp(w, -s, s) with s = lr l1 / (sqrt(v_hat) + eps), the moments being torch's.
    The number of steps is counted here, because torch's may lie on the device.
    """
    numbers = count(1)

    @torch.no_grad()
    def threshold() -> None:
        steps = next(numbers)
        for group in optimizer.param_groups:
            params = group["params"]
            root = (1 - group["betas"][1] ** steps) ** 0.5
            s = list(torch._foreach_sqrt([optimizer.state[p]["exp_avg_sq"] for p in params]))
            torch._foreach_add_(s, group["eps"] * root)
            torch._foreach_reciprocal_(s)
            torch._foreach_mul_(s, group["lr"] * l1 * root)
            clamped = torch._foreach_maximum(params, torch._foreach_neg(s))
            torch._foreach_minimum_(clamped, s)
            torch._foreach_sub_(params, clamped)

    return threshold


def of_torch(groups: ParamGroups, task: Task, **options: Any) -> Contender:
    return theirs(getattr(torch.optim, task.method.cls), groups, task, **options)


REFERENCE = "fusedreg reference"  # with fused=False
TORCH: dict[str, Maker] = {
    "torch fused": partial(of_torch, fused=True),
    "torch foreach": partial(of_torch, foreach=True),
    "torch for-loop": partial(of_torch, foreach=False),
}
USUAL = ("AdamW", "Adam", "SGD", "Lion")
# Libraries, where their optimizers are, and what they call those of ours. None has proximal L1.
# Not here are those of other formulas: LAMB of bitsandbytes, which limits the norm of the update,
# and of pytorch-optimizer, without bias correction and with norms of at most 10.
OTHERS: dict[str, tuple[str, dict[str, str]]] = {
    "optimi": ("optimi", {cls: cls for cls in USUAL}),
    "bitsandbytes 32 bit": ("bitsandbytes.optim", {cls: f"{cls}32bit" for cls in USUAL}),
    "torchao 8 bit": ("torchao.optim", {"AdamW": "AdamW8bit", "Adam": "Adam8bit"}),
    "timm legacy": ("timm.optim", {"AdamW": "AdamWLegacy"}),
    "timm": ("timm.optim", {"Lion": "Lion", "LAMB": "Lamb"}),
    "lion-pytorch": ("lion_pytorch", {"Lion": "Lion"}),
    "pytorch-optimizer": ("pytorch_optimizer", {"Lion": "Lion"}),
    "apex": ("apex.optimizers", {"LAMB": "FusedLAMB"}),
}
# Both clip by themselves, by another formula.
OPTIONS_OF_OTHERS = {"Lamb": {"max_grad_norm": None}, "FusedLAMB": {"max_grad_norm": inf}}


def contenders(method: Method) -> tuple[dict[str, Maker], dict[str, str]]:
    """Who computes a method, the most important first, and why others do not."""
    found: dict[str, Maker] = {"fusedreg": own}
    found |= {f"torch {way}": TORCH[f"torch {way}"] for way in method.ways_of_torch}
    missing = {}
    for name, (module, classes) in OTHERS.items():
        if method.l1 or method.cls not in classes:
            continue
        try:
            cls = getattr(import_module(module), classes[method.cls])
        except Exception as error:  # an installation can be broken in any way
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        options = {"weight_decay": method.kwargs.get("weight_decay", 0.0), "lr": LR}
        options |= OPTIONS_OF_OTHERS.get(classes[method.cls], {})
        found[name] = partial(theirs, cls, **options)
    # The readable path, for what torch lacks and for one other method.
    if not method.ways_of_torch or method is METHODS["AdamW"]:
        found[REFERENCE] = partial(own, fused=False)
    return found, missing
