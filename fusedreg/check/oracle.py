"""A whole step in float64, from the papers, sharing no code with the package.

The formulas of classes and penalties are in `fusedreg.cases`; this is the step around it. Sources:
Loshchilov and Hutter (2019), algorithm 2, with torch's lr * weight_decay; Yun, Lozano and Yang,
ProxGen (2021) for the threshold; You et al. (2020), algorithm 2, for the trust ratio.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedreg.cases import FORMULAS, Case, History, penalised, proximal


@dataclass
class Slot:
    """One parameter and its history."""

    w: Tensor
    history: History = field(default_factory=lambda: defaultdict(float))


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
            one_step(slot, grad, self.case)

    @property
    def values(self) -> list[Tensor]:
        """The parameters."""
        return [slot.w for slot in self.slots]


def _copy(x: Tensor) -> Tensor:
    """In float64, without the memory of the original, which an optimizer steps in place."""
    return x.detach().to("cpu", torch.float64, copy=True)


def clip(grads: list[Tensor], max_norm: float | None) -> list[Tensor]:
    """All gradients times min(1, max_norm / (norm + 1e-6)) with one norm over all of them."""
    if max_norm is None:
        return grads
    norm = sum(float((g * g).sum()) for g in grads) ** 0.5
    return [g * min(1.0, max_norm / (norm + 1e-6)) for g in grads]


def one_step(slot: Slot, g: Tensor, case: Case, **changed: Any) -> None:
    """One step of a case on one parameter, with other options where they are given."""
    options = {**case.options, **changed}
    lr, w = options["lr"], slot.w
    g, decay = penalised(w, -g if options["maximize"] else g, options)
    formula = next(FORMULAS[cls] for cls in case.cls.__mro__ if cls in FORMULAS)
    move, per_unit = formula(slot.history, g, options)
    update = move + decay * w
    if case.cls.layerwise:
        lengths = float(torch.linalg.norm(w)), float(torch.linalg.norm(update))
        lr = lr * (lengths[0] / lengths[1] if all(lengths) else 1.0)
    slot.w = proximal(w - lr * update, lr, per_unit, options)
