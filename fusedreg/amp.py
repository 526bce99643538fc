"""Who unscales gradients under automatic mixed precision: the scaler, or the step."""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType

from fusedreg import dist
from fusedreg.types import ParamGroup

LIGHTNING = ("lightning_fabric.plugins.precision.amp", "lightning.fabric.plugins.precision.amp")
"""Where Lightning, under either name, asks whether an optimizer unscales gradients by itself."""


def supports_amp_scaling(groups: Sequence[ParamGroup], split: bool, asked_by: FrameType) -> bool:
    """Whether torch.amp.GradScaler shall leave unscaling and skipping to the step.

    Args:
        groups: all param groups.
        split: whether other ranks have other parameters as plain tensors.
        asked_by: the frame that asks.
    """
    if not any(group["fused"] for group in groups):
        return False
    # What overflowed here is not all that did. Only a scaler that unscales sums it over ranks,
    # and of the two only ShardedGradScaler does.
    if split:
        return False
    if dist.FLATTENED in (dist.sharding_of(param) for group in groups for param in group["params"]):
        return False
    # Lightning clips no gradients where it sees this, though GradScaler lets such an optimizer
    # step with gradients that were unscaled before. So it unscales and clips, and this skips.
    return asked_by.f_globals.get("__name__") not in LIGHTNING
