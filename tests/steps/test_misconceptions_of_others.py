"""Tables of docs/misconceptions.md: RMSprop, Adagrad, Lion, LAMB and lr_independent_decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim import Optimizer

import fusedreg

from claims import Numbers, descend, measures, towards, weight


@measures
def test_lr_independent_decay() -> Numbers:
    def left(lr: float, **decay: float) -> float:
        return descend(fusedreg.AdamW([weight(1.0)], lr=lr, **decay), 1000, torch.zeros_like).item()

    forms = {"": {"weight_decay": 0.1}}
    forms["`lr_independent_decay`, "] = {"weight_decay": 0.001, "lr_independent_decay": True}
    return {
        f"{form}`weight_decay={decay['weight_decay']}`, lr {lr}": left(lr, **decay)
        for form, decay in forms.items()
        for lr in (0.01, 0.005)
    }


@measures
def test_other_boxes() -> Numbers:
    def solve(make: Callable[..., Optimizer], **options: object) -> list[float]:
        # Not from 0: where weights are small, so are LAMB's steps.
        optimizer = make([weight(0.1, 0.1)], **{"weight_decay": 1.0, **options})
        return descend(optimizer, 1500, towards(3.0, 0.5), cosine=True).tolist()

    lion = solve(fusedreg.Lion, lr=0.02)
    rmsprop = partial(fusedreg.RMSprop, alpha=0.9, decoupled_weight_decay=True)
    coupled = solve(fusedreg.Lion, lr=0.02, decoupled_weight_decay=False)
    return {
        "`Lion`, best at 3": lion[0],
        "`Lion`, best at 0.5": lion[1],
        "`RMSprop`, decoupled, best at 3": solve(rmsprop, lr=0.02)[0],
        "`RMSprop`, decoupled, momentum 0.9, best at 3": solve(
            rmsprop, lr=0.005, momentum=0.9, weight_decay=5.0
        )[0],
        "`LAMB`, best at 3": solve(fusedreg.LAMB, lr=0.02, betas=(0.9, 0.9))[0],
        "`Lion`, coupled, best at 3": coupled[0],
        "`Lion`, coupled, best at 0.5": coupled[1],
    }


@measures
def test_adagrad_and_decay() -> Numbers:
    def solve(steps: int, decoupled: bool) -> float:
        optimizer = fusedreg.Adagrad(
            [weight(0.0)], lr=0.5, weight_decay=0.1, decoupled_weight_decay=decoupled
        )
        return descend(optimizer, steps, towards(3.0)).item()

    return {
        "decoupled, after 400 steps": solve(400, True),
        "decoupled, after 4000 steps": solve(4000, True),
        "coupled, after 4000 steps": solve(4000, False),
    }


@measures
def test_length_of_lambs_step() -> Numbers:
    def length(make: Callable[..., Optimizer], weight_decay: float) -> float:
        w = weight(3.0, -4.0)
        start = w.detach().clone()
        optimizer = make([w], lr=0.1, weight_decay=weight_decay)
        end = descend(optimizer, 1, lambda w: torch.tensor([2.0, 1.0], dtype=w.dtype))
        return ((end - start).norm() / start.norm()).item()

    coupled = partial(fusedreg.LAMB, decoupled_weight_decay=False)
    return {
        "`AdamW`, `weight_decay=0`": length(fusedreg.AdamW, 0),
        "`AdamW`, `weight_decay=10`": length(fusedreg.AdamW, 10),
        "`LAMB`, `weight_decay=0`": length(fusedreg.LAMB, 0),
        "`LAMB`, `weight_decay=10`": length(fusedreg.LAMB, 10),
        "`LAMB`, coupled, `weight_decay=10`": length(coupled, 10),
    }


@measures
def test_centered_rmsprop() -> Numbers:
    def length(centered: bool = True, eps: float = 1e-8) -> float:
        optimizer = fusedreg.RMSprop([weight(0.0)], lr=0.01, alpha=0.9, eps=eps, centered=centered)
        before = descend(optimizer, 99, torch.ones_like).item()
        return (before - descend(optimizer, 1, torch.ones_like).item()) / 0.01

    def outcome(cls: Callable[..., Optimizer]) -> str:
        # Of 1,000 different gradients some round down; torch makes NaN of about half of them.
        gradients = torch.randn(1000)
        optimizer = cls([nn.Parameter(torch.zeros(1000))], alpha=0.9, centered=True)
        w = descend(optimizer, 300, lambda w: gradients)
        return "finite" if w.isfinite().all() else "NaN" if w.isnan().any() else "infinite"

    return {
        "not centered": length(centered=False),
        "centered": length(),
        "centered, `eps=0.5`": length(eps=0.5),
        "`torch.optim.RMSprop`, 1,000 weights": outcome(torch.optim.RMSprop),
        "`fusedreg.RMSprop`, 1,000 weights": outcome(fusedreg.RMSprop),
    }
