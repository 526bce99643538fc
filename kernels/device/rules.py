"""The update rules: pure functions on registers, from the penalised gradient to the direction.

A rule is two device functions. `NAME_scalars` runs once per tensor, in float64: it advances what is
counted (steps, momentum mass) and forms every number that the elements share. `NAME` runs on a tile
of elements in the dtype of the arithmetic: it advances the moments. Neither sees a pointer, a mask,
a stored dtype, a learning rate or a penalty. Both compilers inline both, so each formula exists
once.

    scalars(options, counts) -> (gain, scalars, counts)
        options  what the class lists in `device_options`, in that order
        counts   its `counts` in order; 1 where a parameter has none
        gain     displacement per unit of a constant gradient, over lr, where elements share it
    rule(g, states, scalars) -> (direction, gain, states)
        g        the penalised gradient
        states   its tensor states in order
        gain     what is left of the gain for each element; 1 where `scalars` knew all of it
"""

from __future__ import annotations

from fusedreg.kernels.contract import Rule
from fusedreg.kernels.device.language import tl, triton

INFINITY = tl.constexpr(float("inf"))


# These words take Python numbers too. A number has the dtype of the computed operand that it meets,
# but triton makes a float32 of it where it is assigned to a name first, or given to tl.log.


@triton.jit
def where(condition, chosen, otherwise):
    """`tl.where`, also where the condition is one of Python."""
    if isinstance(condition, tl.tensor):
        return tl.where(condition, chosen, otherwise)
    elif condition:
        return chosen
    else:
        return otherwise


@triton.jit
def divide(a, b):
    """IEEE division, which `/` is not in float32."""
    if getattr(b, "dtype", getattr(a, "dtype", tl.float64)) == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    """IEEE square root, which `tl.sqrt` is not in float32."""
    if not isinstance(x, tl.tensor):
        return x**0.5
    elif x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def reciprocal(x):
    """1 / x, as IEEE has it."""
    return divide(1.0, x)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64: within 2 ulp near 1, where 1 - beta**t cancels."""
    if isinstance(base, tl.tensor):
        return tl.exp(exponent * tl.log(base))
    elif isinstance(exponent, tl.tensor):
        return tl.exp(exponent * tl.log(tl.full((), base, tl.float64)))
    else:
        return base**exponent


@triton.jit
def average(old, new, weight):
    """(1 - weight) * old + weight * new, whose two factors, rounded, would not sum to 1."""
    # From the nearer end, so that nothing is left of an `old` that has no weight. At half the size,
    # because the difference may be twice the largest number. Halves are exact.
    return 2.0 * (
        where(weight < 0.5, 0.5 * old, 0.5 * new)
        + where(weight < 0.5, weight, weight - 1.0) * (0.5 * new - 0.5 * old)
    )


# ---- SGD -----------------------------------------------------------------------------------------


@triton.jit
def sgd_scalars(options, counts):
    """Nothing to count."""
    return 1.0, (), counts


@triton.jit
def sgd(g, states, scalars):
    """u = g."""
    return g, 1.0, states


@triton.jit
def sgd_momentum_scalars(options, counts):
    """c = momentum * c + (1 - dampening): what b makes of a constant gradient of 1."""
    momentum, dampening = options
    mass = counts[0]
    # The first gradient takes the place of the buffer, undamped.
    first = mass == 0.0
    kept = tl.where(first, 0.0, momentum)
    complement = tl.where(first, 1.0, 1.0 - dampening)
    mass = momentum * mass + complement
    return mass, (kept, complement), (mass,)


@triton.jit
def sgd_momentum(g, states, scalars):
    """b = momentum * b + (1 - dampening) * g and u = b."""
    b = scalars[0] * states[0] + scalars[1] * g
    return b, 1.0, (b,)


@triton.jit
def sgd_nesterov_scalars(options, counts):
    """As sgd_momentum; the gain is 1 + momentum * c."""
    mass, scalars, counts = sgd_momentum_scalars(options, counts)
    return 1.0 + options[0] * mass, (scalars[0], scalars[1], options[0]), counts


@triton.jit
def sgd_nesterov(g, states, scalars):
    """u = g + momentum * b."""
    b, gain, states = sgd_momentum(g, states, scalars)
    return g + scalars[2] * b, gain, states


# ---- Adam ----------------------------------------------------------------------------------------


@triton.jit
def adam_scalars(options, counts):
    """t = t + 1, 1 - beta1**t and sqrt(1 - beta2**t)."""
    beta1, beta2, eps = options
    t = counts[0] + 1.0
    correction1 = 1.0 - power(beta1, t)
    correction2 = square_root(1.0 - power(beta2, t))
    return 1.0, (1.0 - beta1, beta2, 1.0 - beta2, correction1, correction2, eps), (t,)


@triton.jit
def adam_moments(g, m, v, scalars):
    """m = beta1 * m + (1 - beta1) * g and v = beta2 * v + (1 - beta2) * g**2."""
    m = average(m, g, scalars[0])
    # ((1 - beta2) g) g: the square alone overflows sooner.
    v = scalars[1] * v + scalars[2] * g * g
    return m, v


@triton.jit
def adam_direction(m, v, scalars):
    """m_hat / d and the gain 1 / d, with d = sqrt(v_hat) + eps.

    A coordinate that has never seen a gradient has neither: 0/0 with eps = 0, and a gain of 1/eps
    would wipe out every unused row of an embedding.
    """
    # m_hat and v_hat are not formed, because they may overflow where the direction does not.
    d = divide(square_root(v), scalars[4]) + scalars[5]
    direction = tl.where(d == 0.0, 0.0, divide(divide(m, d), scalars[3]))
    gain = tl.where(v == 0.0, 0.0, reciprocal(d))
    return direction, gain


@triton.jit
def adam(g, states, scalars):
    """u = m_hat / (sqrt(v_hat) + eps)."""
    m, v = adam_moments(g, states[0], states[1], scalars)
    direction, gain = adam_direction(m, v, scalars)
    return direction, gain, (m, v)


@triton.jit
def adam_amsgrad(g, states, scalars):
    """The same with the largest v so far in the place of v."""
    m, v = adam_moments(g, states[0], states[1], scalars)
    # A NaN must stay one.
    largest = tl.maximum(states[2], v, propagate_nan=tl.PropagateNan.ALL)
    direction, gain = adam_direction(m, largest, scalars)
    return direction, gain, (m, v, largest)


# ---- RMSprop -------------------------------------------------------------------------------------


@triton.jit
def rmsprop_scalars(options, counts):
    """t = t + 1; the mass of an unused momentum stays."""
    alpha, eps, momentum = options
    return 1.0, (alpha, 1.0 - alpha, eps, momentum), (counts[0] + 1.0, counts[1])


@triton.jit
def rmsprop_momentum_scalars(options, counts):
    """The same with c = momentum * c + 1: what b makes of a constant direction of 1."""
    _, scalars, counts = rmsprop_scalars(options, counts)
    mass = options[2] * counts[1] + 1.0
    return mass, scalars, (counts[0], mass)


@triton.jit
def mean_square(g, v, scalars):
    """v = alpha * v + (1 - alpha) * g**2."""
    return scalars[0] * v + scalars[1] * g * g


@triton.jit
def scaled_by_root(g, seen, square, eps):
    """g / (sqrt(square) + eps), and 1 / (sqrt(square) + eps) where anything was `seen`.

    Nothing moves where the root and eps are 0.
    """
    d = square_root(square) + eps
    direction = tl.where(d == 0.0, 0.0, divide(g, d))
    gain = tl.where((seen == 0.0) | (d == 0.0), 0.0, reciprocal(d))
    return direction, gain


@triton.jit
def rmsprop(g, states, scalars):
    """u = g / (sqrt(v) + eps)."""
    v = mean_square(g, states[0], scalars)
    direction, gain = scaled_by_root(g, v, v, scalars[2])
    return direction, gain, (v,)


@triton.jit
def rmsprop_momentum(g, states, scalars):
    """b = momentum * b + g / (sqrt(v) + eps) and u = b."""
    direction, gain, moved = rmsprop(g, states, scalars)
    b = scalars[3] * states[1] + direction
    return b, gain, (moved[0], b)


@triton.jit
def variance(g, v, a, scalars):
    """a = alpha * a + (1 - alpha) * g, and v - a**2, at least 0: rounded it may be less."""
    a = average(a, g, scalars[1])
    square = tl.maximum(v - a * a, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return a, tl.where(v == INFINITY, v, square)  # where a**2 overflows too


@triton.jit
def rmsprop_centered(g, states, scalars):
    """u = g / (sqrt(v - a**2) + eps)."""
    v = mean_square(g, states[0], scalars)
    a, square = variance(g, v, states[1], scalars)
    direction, gain = scaled_by_root(g, v, square, scalars[2])
    return direction, gain, (v, a)


@triton.jit
def rmsprop_centered_momentum(g, states, scalars):
    """b = momentum * b + g / (sqrt(v - a**2) + eps) and u = b."""
    direction, gain, moved = rmsprop_centered(g, (states[0], states[2]), scalars)
    b = scalars[3] * states[1] + direction
    return b, gain, (moved[0], b, moved[1])


# ---- Adagrad -------------------------------------------------------------------------------------


@triton.jit
def adagrad_scalars(options, counts):
    """t = t + 1 and 1 + (t - 1) * lr_decay, which divides lr."""
    lr_decay, eps = options
    return 1.0, (1.0 + counts[0] * lr_decay, eps), (counts[0] + 1.0,)


@triton.jit
def adagrad(g, states, scalars):
    """s = s + g**2 and u = g / (sqrt(s) + eps) / (1 + (t - 1) * lr_decay)."""
    slowed, eps = scalars
    s = states[0] + g * g
    direction, gain = scaled_by_root(g, s, s, eps)
    return divide(direction, slowed), divide(gain, slowed), (s,)


# ---- Lion ----------------------------------------------------------------------------------------


@triton.jit
def lion_scalars(options, counts):
    """The weights of both averages."""
    beta1, beta2 = options
    return 1.0, (beta1, 1.0 - beta1, 1.0 - beta2), counts


@triton.jit
def lion(g, states, scalars):
    """u = sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g."""
    beta1, complement1, complement2 = scalars
    m = states[0]
    u = beta1 * m + complement1 * g
    direction = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u * 0.0))  # of NaN: NaN
    return direction, 1.0, (average(m, g, complement2),)


RULES = {
    "sgd": Rule(sgd_scalars, sgd, 0),
    "sgd_momentum": Rule(sgd_momentum_scalars, sgd_momentum, 2),
    "sgd_nesterov": Rule(sgd_nesterov_scalars, sgd_nesterov, 3),
    "adam": Rule(adam_scalars, adam, 6),
    "adam_amsgrad": Rule(adam_scalars, adam_amsgrad, 6),
    "rmsprop": Rule(rmsprop_scalars, rmsprop, 4),
    "rmsprop_momentum": Rule(rmsprop_momentum_scalars, rmsprop_momentum, 4),
    "rmsprop_centered": Rule(rmsprop_scalars, rmsprop_centered, 4),
    "rmsprop_centered_momentum": Rule(rmsprop_momentum_scalars, rmsprop_centered_momentum, 4),
    "adagrad": Rule(adagrad_scalars, adagrad, 2),
    "lion": Rule(lion_scalars, lion, 3),
}


def resolve(rule: Rule | str) -> Rule:
    """A rule of this module by its name, any other as it is."""
    if isinstance(rule, str) and rule not in RULES:
        raise ValueError(f"Invalid device rule: {rule!r} (expected a Rule or one of {[*RULES]})")
    found = RULES[rule] if isinstance(rule, str) else rule
    if not (isinstance(found, Rule) and hasattr(found.scalars, "fn") and hasattr(found.tile, "fn")):
        raise TypeError(
            f"Invalid device rule: {found!r} (expected a Rule of two @triton.jit functions)"
        )
    if found.width < 0:
        raise ValueError(f"Invalid width value: {found.width} (expected a number of scalars)")
    return found
