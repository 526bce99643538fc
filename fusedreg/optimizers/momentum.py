"""Momentum: the average of gradients, and the mass of a momentum buffer.

The mass is what a buffer has made of a constant direction of 1. It is the gain of a rule with
momentum, and grows from the first step on: mass = momentum * mass + (1 - dampening). It cannot be
told from a step count, because schedules change the momentum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedreg.contract import UpdateRule
from fusedreg.dist import whole
from fusedreg.formats import planes_in
from fusedreg.penalties.base import needs_gain
from fusedreg.scalars import Count, Number, is_zero
from fusedreg.types import Settings

MASS = Count(wide=True, least=-math.inf)
"""The momentum mass. A dampening above 1 makes it negative."""


def average(old: Tensor, new: Tensor, weight: Number) -> Tensor:
    """(1 - weight) * old + weight * new, whose two factors, rounded, would not sum to 1.

    >>> average(torch.tensor([1.0, -(2.0**127)]), torch.tensor([2.0, 2.0**127]), 0.25)
    tensor([ 1.2500e+00, -8.5071e+37])
    """
    # From the nearer end, so that nothing is left of an `old` that has no weight. At half the size,
    # because the difference may be twice the largest number. Halves are exact.
    half, half_new = 0.5 * old, 0.5 * new
    if isinstance(weight, Tensor):
        base = torch.where(weight < 0.5, half, half_new)
        factor: Number = torch.where(weight < 0.5, weight, weight - 1)
    else:
        base, factor = (half, weight) if weight < 0.5 else (half_new, weight - 1)
    return 2.0 * (base + factor * (half_new - half))


def check_mass_is_finite(rule: UpdateRule, group: Settings, *names: str) -> None:
    """Raise ValueError where the mass sets a threshold and would grow for ever.

    Args:
        rule: the optimizer.
        group: the options.
        names: those that must then be below 1.
    """
    if not needs_mass(rule, group):
        return
    for name in names:
        if not group[name] < 1:
            raise ValueError(
                f"Invalid {name} value: {group[name]} (l1_mode='prox', or another proximal step, "
                "needs it below 1, because its threshold has the factor "
                "(1 - dampening) / (1 - momentum))"
            )


def needs_mass(rule: UpdateRule, group: Settings) -> bool:
    """Whether the momentum mass sets a threshold in this group."""
    return not is_zero(group["momentum"]) and needs_gain(rule.penalties, group)


def create_mass(
    rule: UpdateRule,
    group: Settings,
    param: Tensor,
    state: dict[str, Tensor],
    dampening: Number = 0.0,
) -> None:
    """Create the mass where it is needed, before the buffer is created.

    A threshold needs it. With dampening a new buffer needs it too: its first gradient is not
    damped, and only a mass of 0 tells which is the first.

    A buffer may be older than the mass, because l1 was turned on later. It counts as warmed up: the
    mass is then at its limit. A buffer of zeros does not, because its first step was skipped.
    """
    storage = rule.state_format(group, param)
    buffer = planes_in(storage, state, "momentum_buffer")
    if buffer is None:
        state.pop("momentum_mass", None)  # a buffer that was reset begins anew, and so its mass
    if "momentum_mass" in state or is_zero(group["momentum"]):
        return
    if not ((buffer is None and not is_zero(dampening)) or needs_mass(rule, group)):
        return
    mass = MASS.create(param)
    if buffer is not None:
        has_moved = whole(storage.load(buffer, torch.float32).any())
        limit = (1 - dampening) / (1 - group["momentum"])
        mass = torch.where(has_moved, mass + limit, mass)
    state["momentum_mass"] = mass
