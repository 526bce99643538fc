"""The hooks of the penalties: pure functions on registers, each for one stage of a step.

    gradient(g, w, numbers) -> g                  adds to the gradient of the loss
    decay(w, direction, numbers) -> coefficient   w is multiplied by 1 - rate * coefficient
    prox(w, rate, mass, gain, numbers) -> w       after the step

`numbers` (a tuple, float64) is what the penalty says of a param group, `rate` (float64) is lr times
the trust ratio, `mass` (float64) and `gain` (of each element) are the two factors of the gain; see
rules.py. What follows from float64 numbers alone is formed in float64, once for a tensor, and
converted by `.to(w.dtype)`.

A hook whose numbers are all 0 leaves every bit of its argument: a select, because 0 * inf is NaN
and -0.0 + 0.0 is 0.0. So one launch serves groups with and without a penalty.
"""

from __future__ import annotations

from fusedreg.kernels.contract import DeviceFunction
from fusedreg.kernels.device.language import tl, triton


@triton.jit
def l1_subgradient(g, w, numbers):
    """g + l1 * sign(w), as if the norm stood in the loss."""
    l1 = numbers[0].to(w.dtype)
    sign = tl.where(w > 0.0, 1.0, tl.where(w < 0.0, -1.0, w * 0.0))
    return tl.where(l1 == 0.0, g, g + l1 * sign)


@triton.jit
def l2_gradient(g, w, numbers):
    """g + weight_decay * w: the gradient of weight_decay/2 * ||w||^2."""
    weight_decay = numbers[0].to(w.dtype)
    return tl.where(weight_decay == 0.0, g, g + weight_decay * w)


@triton.jit
def l2_decay(w, direction, numbers):
    """weight_decay, which the host has divided by decay_lr where lr shall not matter."""
    return numbers[0]


@triton.jit
def l2_decay_over_lr(w, direction, numbers):
    """weight_decay / decay_lr, where one of the two is on the device."""
    return tl.where(numbers[0] == 0.0, 0.0, numbers[0] / numbers[1])


@triton.jit
def soft_threshold(w, threshold):
    """Towards 0 by `threshold`, and exactly 0 within it; NaN stays NaN."""
    small = tl.where(w == w, 0.0, w)
    return tl.where(w > threshold, w - threshold, tl.where(w < -threshold, w + threshold, small))


@triton.jit
def l1_prox(w, rate, mass, gain, numbers):
    """The proximal step of rate * l1 * gain * |w|, with the gain of each element."""
    threshold = (rate * numbers[0] * mass).to(w.dtype)
    return tl.where(threshold == 0.0, w, soft_threshold(w, threshold * gain))


@triton.jit
def l1_shrink(w, rate, mass, gain, numbers):
    """The same with the threshold rate * l1 for all elements."""
    threshold = (rate * numbers[0]).to(w.dtype)
    return tl.where(threshold == 0.0, w, soft_threshold(w, threshold))


def resolve(function: DeviceFunction | str) -> DeviceFunction:
    """A hook of this module by its name, any other as it is."""
    found = globals().get(function) if isinstance(function, str) else function
    if not hasattr(found, "fn"):
        raise TypeError(f"Invalid hook: {function!r} (expected a @triton.jit function)")
    hook: DeviceFunction = found
    return hook
