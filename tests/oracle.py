"""The update rules in numpy float64, from the papers, sharing no code with the package.

Sources: Robbins and Monro (1951) with Polyak's heavy ball as Sutskever et al. (2013) and torch
write it; Kingma and Ba, Adam (2015), algorithm 1; Reddi et al., AMSGrad (2018), algorithm 2, in
torch's form (maximum of the uncorrected moment); Loshchilov and Hutter (2019), algorithm 2, with
torch's lr * weight_decay; Yun, Lozano and Yang, ProxGen (2021) for the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cases import Case

Array = np.ndarray


def shrink(x: Array, threshold: Array | float) -> Array:
    """argmin over z of threshold |z| + (z - x)^2 / 2, case by case."""
    return np.where(x > threshold, x - threshold, np.where(x < -threshold, x + threshold, 0.0))


def clip(grads: list[Array], max_norm: float | None) -> list[Array]:
    """All gradients times min(1, max_norm / (norm + 1e-6)) with one norm over all of them."""
    if max_norm is None:
        return grads
    norm = np.sqrt(sum(float((g * g).sum()) for g in grads))
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in grads]


@dataclass
class Slot:
    """One parameter and its history."""

    w: Array
    t: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0
    v_max: Array | float = 0.0
    mass: float = 0.0


@dataclass
class Oracle:
    """Steps float64 copies of the parameters of a case."""

    case: Case
    params: list[Array]
    max_grad_norm: float | None = None
    slots: list[Slot] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [Slot(np.array(p, dtype=np.float64)) for p in self.params]

    def step(self, grads: list[Array]) -> None:
        for slot, g in zip(self.slots, clip(grads, self.max_grad_norm), strict=True):
            one_step(slot, g, self.case.cls.__name__, **self.case.kwargs)

    @property
    def values(self) -> list[Array]:
        return [slot.w for slot in self.slots]


def one_step(slot: Slot, g: Array, name: str, **options: Any) -> None:
    """One step of SGD, Adam or AdamW on one parameter."""
    lr, decay, l1 = options["lr"], options["weight_decay"], options.get("l1", 0.0)
    mode = options.get("l1_mode", "prox")
    decoupled = options.get("decoupled_weight_decay", name == "AdamW")
    w = slot.w
    if options.get("maximize"):
        g = -g
    if mode == "subgradient":
        g = g + l1 * np.sign(w)
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


def sgd(slot: Slot, g: Array, options: dict[str, Any]) -> tuple[Array, Array | float]:
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


def adam(slot: Slot, g: Array, options: dict[str, Any]) -> tuple[Array, Array | float]:
    (b1, b2), eps = options.get("betas", (0.9, 0.999)), options.get("eps", 1e-8)
    slot.t += 1
    slot.m = b1 * slot.m + (1 - b1) * g
    slot.v = b2 * slot.v + (1 - b2) * g**2
    slot.v_max = np.maximum(slot.v_max, slot.v)
    v = slot.v_max if options.get("amsgrad") else slot.v
    root = np.sqrt(v / (1 - b2**slot.t)) + eps
    return slot.m / (1 - b1**slot.t) / root, np.where(v == 0, 0.0, 1 / root)
