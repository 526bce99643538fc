"""The update rules in float64, from the papers, sharing no code with the package.

Sources: Robbins and Monro (1951) with Polyak's heavy ball as Sutskever et al. (2013) and torch
write it; Kingma and Ba, Adam (2015), algorithm 1; Reddi et al., AMSGrad (2018), algorithm 2, in
torch's form (maximum of the uncorrected moment); Loshchilov and Hutter (2019), algorithm 2, with
torch's lr * weight_decay; Yun, Lozano and Yang, ProxGen (2021) for the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedreg.cases import Case

Value = Tensor | float


@dataclass
class Slot:
    """One parameter and its history."""

    w: Tensor
    t: int = 0
    m: Value = 0.0
    v: Value = 0.0
    v_max: Value = 0.0
    mass: float = 0.0


ATTRIBUTES = {
    "momentum_buffer": "m",
    "momentum_mass": "mass",
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "max_exp_avg_sq": "v_max",
    "step": "t",
}
"""Name of a state -> where a slot has it."""


@dataclass
class Oracle:
    """Steps float64 copies of the parameters of a case."""

    case: Case
    params: Iterable[Tensor]
    max_grad_norm: float | None = None
    slots: list[Slot] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [Slot(_copy(param)) for param in self.params]

    def step(self, grads: Iterable[Tensor]) -> None:
        """Step all of them."""
        clipped = clip(list(map(_copy, grads)), self.max_grad_norm)
        for slot, grad in zip(self.slots, clipped, strict=True):
            one_step(slot, grad, self.case.cls.__name__, **self.case.kwargs)

    @property
    def values(self) -> list[Tensor]:
        """The parameters."""
        return [slot.w for slot in self.slots]


def _copy(x: Tensor) -> Tensor:
    """In float64, without the memory of the original, which an optimizer steps in place."""
    return x.detach().to("cpu", torch.float64, copy=True)


def shrink(x: Tensor, threshold: Value) -> Tensor:
    """argmin over z of threshold |z| + (z - x)^2 / 2, case by case."""
    return torch.where(
        x > threshold, x - threshold, torch.where(x < -threshold, x + threshold, 0.0)
    )


def clip(grads: list[Tensor], max_norm: float | None) -> list[Tensor]:
    """All gradients times min(1, max_norm / (norm + 1e-6)) with one norm over all of them."""
    if max_norm is None:
        return grads
    norm = sum(float((g * g).sum()) for g in grads) ** 0.5
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in grads]


def one_step(slot: Slot, g: Tensor, name: str, **options: Any) -> None:
    """One step of SGD, Adam or AdamW on one parameter."""
    lr, decay, l1 = options["lr"], options["weight_decay"], options.get("l1", 0.0)
    mode = options.get("l1_mode", "prox")
    decoupled = options.get("decoupled_weight_decay", name == "AdamW")
    w = slot.w
    if options.get("maximize"):
        g = -g
    if mode == "subgradient":
        g = g + l1 * torch.sign(w)
    if decoupled:
        w = w - lr * decay * w
    else:
        g = g + decay * w
    move, per_unit = (sgd if name == "SGD" else adam)(slot, g, options)
    w = w - lr * move
    if mode == "prox" and l1:
        w = shrink(w, lr * l1 * per_unit)
    if mode == "decoupled":
        w = shrink(w, lr * l1)
    slot.w = w


def sgd(slot: Slot, g: Tensor, options: dict[str, Any]) -> tuple[Value, Value]:
    """What lr multiplies, and what a gradient of 1 has made of it."""
    mu, tau = options.get("momentum", 0.0), options.get("dampening", 0.0)
    slot.t += 1
    if mu == 0:
        return g, 1.0
    if slot.t == 1:
        slot.m, slot.mass = g, 1.0
    else:
        slot.m, slot.mass = mu * slot.m + (1 - tau) * g, mu * slot.mass + (1 - tau)
    if options.get("nesterov"):
        return g + mu * slot.m, 1 + mu * slot.mass
    return slot.m, slot.mass


def adam(slot: Slot, g: Tensor, options: dict[str, Any]) -> tuple[Value, Value]:
    """What lr multiplies, and what a gradient of 1 has made of it."""
    (b1, b2), eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    slot.t += 1
    slot.m = b1 * slot.m + (1 - b1) * g
    v = slot.v = b2 * slot.v + (1 - b2) * g**2
    if options.get("amsgrad"):
        v = slot.v_max = torch.where(v > slot.v_max, v, slot.v_max)
    root = torch.sqrt(v / (1 - b2**slot.t)) + eps
    return slot.m / (1 - b1**slot.t) / root, torch.where(v == 0, 0.0, 1 / root)
