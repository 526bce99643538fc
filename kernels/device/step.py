"""The order of a step, once for both compilers.

    unscale and clip -> maximize sign -> penalties on the gradient -> moments and direction
    -> decay of the parameter -> step -> proximal penalties

Nothing here sees a pointer, a mask or a stored dtype. Arguments in upper case are known when a
kernel is compiled. A hook of a penalty (see penalties.py) is a device function, or None where its
slot is free; `numbers`, float64, is what the group scalars have for it.
"""

from __future__ import annotations

from fusedreg.kernels.device.language import tl, triton


@triton.jit
def clipped(scale, norm, max_norm):
    """scale * min(1, max_norm / (norm + 1e-6)); max_norm = inf clips nothing."""
    factor = max_norm / (norm + 1e-6)
    factor = tl.where(factor > 1.0, 1.0, factor)  # a NaN stays one
    return tl.where(max_norm < float("inf"), scale * factor, scale)


@triton.jit
def is_nonfinite(norm):
    """Whether a norm is infinite or NaN."""
    return (norm != norm) | (norm == float("inf"))


@triton.jit
def row(active, scale, sign, options, counts, SCALARS: tl.constexpr):
    """The numbers of one tensor, as layout.py lists them: the record, scalars and new counts."""
    gain, scalars, counts = SCALARS(options, counts)
    return (active, sign * scale, gain), scalars, counts


@triton.jit
def loss_gradient(g, scale, SCALED: tl.constexpr, COMPUTE: tl.constexpr):
    """The gradient of the loss, in the dtype of the arithmetic."""
    if SCALED:
        # In float64: a float32 factor below 1.2e-38 would be subnormal.
        return (g.to(tl.float64) * scale).to(COMPUTE)
    else:
        return g.to(COMPUTE) * scale.to(COMPUTE)  # 1, or -1 to maximize


@triton.jit
def penalised(g, w, numbers1, numbers2, GRADIENT1: tl.constexpr, GRADIENT2: tl.constexpr):
    """The gradient with what penalties add to it."""
    if GRADIENT1 is not None:
        g = GRADIENT1(g, w, numbers1)
    if GRADIENT2 is not None:
        g = GRADIENT2(g, w, numbers2)
    return g


@triton.jit
def moved(
    w, direction, gain, rate, mass, numbers_of_decay, numbers1, numbers2,
    DECAY: tl.constexpr, PROX1: tl.constexpr, PROX2: tl.constexpr,
):  # fmt: skip
    """The parameter after decay, step and prox.

    `rate` is lr times the trust ratio. `mass` and `gain` are the two factors of the gain: that of
    the tensor, and that of each element.
    """
    if DECAY is not None:
        keep = (1.0 - rate * DECAY(w, direction, numbers_of_decay)).to(w.dtype)
        w = tl.where(keep == 1.0, w, w * keep)
    w = w - rate.to(w.dtype) * direction
    if PROX1 is not None:
        w = PROX1(w, rate, mass, gain, numbers1)
    if PROX2 is not None:
        w = PROX2(w, rate, mass, gain, numbers2)
    return w


@triton.jit
def update_of(w, direction, numbers, DECAY: tl.constexpr):
    """What the rate multiplies: the direction, and the decay where there is one."""
    if DECAY is not None:
        return direction + DECAY(w, direction, numbers).to(w.dtype) * w
    else:
        return direction


@triton.jit
def trust_ratio(param_squares, update_squares):
    """||w|| / ||update||, and 1 where either is 0, from the sums of their squares.

    At most 2**120, so that the product with lr is finite in float32: a gradient that stays 0 leaves
    an update that fades to nothing.
    """
    ratio = tl.sqrt(param_squares) / tl.sqrt(update_squares)  # float64, where both are IEEE's
    ratio = tl.where(ratio > 1.329227995784916e36, 1.329227995784916e36, ratio)  # a NaN stays one
    return tl.where((param_squares == 0.0) | (update_squares == 0.0), 1.0, ratio)
