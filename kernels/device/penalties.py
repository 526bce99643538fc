"""The penalties: hooks around a rule, each a pure function on registers.

A hook whose number is 0 leaves every bit of its argument: a select, because 0 * inf is NaN and
-0.0 + 0.0 is 0.0. So one launch serves groups with and without a penalty.
"""

from __future__ import annotations

from fusedreg.kernels.device.language import tl, triton


@triton.jit
def l1_subgradient(g, w, l1):
    """g + l1 * sign(w), as if the norm stood in the loss."""
    sign = tl.where(w > 0.0, 1.0, tl.where(w < 0.0, -1.0, w * 0.0))
    return tl.where(l1 == 0.0, g, g + l1 * sign)


@triton.jit
def coupled(g, w, weight_decay):
    """g + weight_decay * w: the gradient of weight_decay/2 * ||w||^2."""
    return tl.where(weight_decay == 0.0, g, g + weight_decay * w)


@triton.jit
def decoupled(w, keep):
    """w * (1 - lr * weight_decay)."""
    return tl.where(keep == 1.0, w, w * keep)


@triton.jit
def soft_threshold(w, threshold):
    """Towards 0 by `threshold`, and exactly 0 within it; NaN stays NaN."""
    small = tl.where(w == w, 0.0, w)
    return tl.where(w > threshold, w - threshold, tl.where(w < -threshold, w + threshold, small))


@triton.jit
def prox(w, threshold, gain):
    """The proximal step of lr * l1 * gain * |w|, with the gain of each element."""
    return tl.where(threshold == 0.0, w, soft_threshold(w, threshold * gain))


@triton.jit
def shrink(w, threshold, gain):
    """The same with one threshold for all elements."""
    return tl.where(threshold == 0.0, w, soft_threshold(w, threshold))
