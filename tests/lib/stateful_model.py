"""What a step must give, in intervals around float64: the formulas of fusedreg/cases.py and
the step around them, sharing no code with the package.

A model of one optimizer would drift from it, rounding by rounding. So a step is judged alone: it
begins with the stored values, and each result must be within what the roundings of one step can do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.cases import FORMULAS, shrink

from intervals import Count, Interval, Precision, precision

Options = Mapping[str, Any]


def real(x: Tensor) -> Tensor:
    """A float64 copy; of complex numbers their pairs."""
    x = x.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64, copy=True)


def plain(option: Any) -> Any:
    """An option as Python's number, whatever kind of number it is."""
    if isinstance(option, (tuple, list)):
        return tuple(map(plain, option))
    return float(option) if isinstance(option, Tensor) or hasattr(option, "__float__") else option


def options_of(group: Options) -> dict[str, Any]:
    return {name: plain(value) for name, value in group.items() if name != "params"}


class Wholly(NamedTuple):
    """What belongs to all gradients together."""

    norm: float
    scale: float
    skip: bool
    slack: float
    """Relative error of the norm, and of a scale that clips, in float64."""


def wholly(
    grads: list[Tensor],
    max_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: float,
    found_inf: float,
) -> Wholly:
    """Norm of all gradients, what multiplies each, and whether the step is skipped."""
    numbers = torch.cat([torch.zeros(1, dtype=torch.float64), *(real(g).flatten() for g in grads)])
    largest = float(numbers.abs().max())
    if largest == 0 or not math.isfinite(largest):
        norm = largest
    else:
        norm = largest * float((numbers / largest).square().sum().sqrt())
    if bool(numbers.isnan().any()):
        norm = math.nan
    # Ours and theirs sum n squares in any order: n / 2 roundings each, after the root; and a few
    # for the root, the largest number, the two quotients, the 1e-6 and the product.
    slack = (numbers.numel() + 12) * 2.0**-53
    norm, scale = norm / grad_scale, 1 / grad_scale
    skip = found_inf != 0 or (skip_nonfinite and not math.isfinite(norm))
    if max_norm is not None and max_norm != math.inf:
        scale *= math.nan if math.isnan(norm) else min(1.0, max_norm / (norm + 1e-6))
    return Wholly(norm, scale, skip, slack)


class Expected(NamedTuple):
    """One parameter after a step."""

    w: Interval
    moved: dict[str, Any]
    """The states that a step of these options moves: intervals, and counts as numbers."""


def is_thresholded(options: Options) -> bool:
    return options["l1_mode"] == "prox" and options["l1"] != 0


def names_of(cls: Any, options: Options) -> tuple[str, ...]:
    """The moments that a step of these options moves."""
    momentum = options.get("momentum", 0) != 0
    wanted = {
        "momentum_buffer": momentum,
        "grad_avg": options.get("centered"),
        "max_exp_avg_sq": options.get("amsgrad"),
    }
    return tuple(name for name in cls.tensor_states if wanted.get(name, True))


def always_counted(cls: Any) -> set[str]:
    """The counts that every parameter has after its first step."""
    return {*cls.counts} - {*cls.late_states}


def initial(cls: Any, options: Options, state: Options) -> dict[str, float]:
    """What a step creates where the state lacks it; a moment is filled with its number."""
    found: dict[str, float] = {}
    for name in names_of(cls, options):
        if name not in state:
            found[name] = options["initial_accumulator_value"] if name == "sum" else 0.0
    for name in always_counted(cls) - state.keys():
        found[name] = cls.counts[name].first
    if "momentum_mass" in cls.counts and "momentum_mass" not in state:
        momentum, dampening = options["momentum"], options.get("dampening", 0.0)
        buffer = state.get("momentum_buffer")
        if momentum and (is_thresholded(options) or (buffer is None and dampening)):
            # A buffer that is older than its mass counts as warm.
            warm = buffer is not None and bool(buffer.any())
            found["momentum_mass"] = (1 - dampening) / (1 - momentum) if warm else 0.0
    return found


def step(
    cls: Any, options: Options, w: Tensor, grad: Tensor, state: Options, wholly: Wholly
) -> Expected:
    """One parameter that has a gradient, from its stored value, gradient and state."""
    kind = precision(w.dtype)
    start, g = Interval.of(real(w), kind), _read(grad, kind)
    if wholly.scale != 1:
        ends = [wholly.scale * (1 + side * wholly.slack) for side in (-1, 1)]
        low, high = torch.tensor(ends, dtype=torch.float64)
        g = g * Interval(low, high, kind)
    names = names_of(cls, options)
    complete = {**initial(cls, options, state), **state}
    history: dict[str, Any] = defaultdict(float)
    for name in names:
        moment = complete[name]
        number = not isinstance(moment, Tensor)
        history[name] = Interval.of(moment, kind) if number else _read(moment, kind)
    for name in always_counted(cls):
        history[name] = Count(complete[name])
    keeps_mass = "momentum_mass" in complete and options["momentum"] != 0
    if keeps_mass:
        history["momentum_mass"] = float(complete["momentum_mass"])
    elif "momentum_buffer" in state:
        history["momentum_mass"] = 1.0  # any but 0, which means a first step
    if "sum" in names:  # the formula begins again with step 0
        options = {**options, "initial_accumulator_value": history["sum"]}

    w_new = _around(cls, options, start, g, history, kind)
    moved = {name: history[name] for name in names}
    for name in always_counted(cls):
        moved[name] = float(history[name])
    if keeps_mass:
        moved["momentum_mass"] = float(history["momentum_mass"])
    # A moment that is too large for its dtype is infinite, and what that does to w is not said.
    sizes = [torch.maximum(m.low.abs(), m.high.abs()) for m in moved.values() if _spans(m)]
    lost = sum((~(size <= kind.largest) for size in sizes), torch.zeros_like(start.low)) > 0
    moved = {name: _in_range(m, kind) if _spans(m) else m for name, m in moved.items()}
    if cls.layerwise:
        lost = lost.any()
    low, high = (torch.where(lost, torch.nan, end) for end in (w_new.low, w_new.high))
    if options["lr"] == 0:
        low = high = start.low
    return Expected(Interval(low, high, kind), moved)


def _in_range(moment: Interval, kind: Precision) -> Interval:
    """A moment as the arithmetic has it, whose numbers end before those of a wider state."""
    low = torch.where(moment.low < -kind.largest, -torch.inf, moment.low)
    high = torch.where(moment.high > kind.largest, torch.inf, moment.high)
    return Interval(low, high, kind)


def _around(
    cls: Any, options: Options, w: Interval, g: Interval, history: dict[str, Any], kind: Precision
) -> Interval:
    """The order of a step, with the formula of the class in its middle."""
    lr, decay, l1, mode = (options[n] for n in ("lr", "weight_decay", "l1", "l1_mode"))
    decoupled = options["decoupled_weight_decay"]
    if options["maximize"]:
        g = -g
    if mode == "subgradient" and l1:
        g = g + l1 * torch.sign(w)  # type: ignore[arg-type]  # as the formulas do
    if decay and not decoupled:
        g = g + decay * w
    formula = next(FORMULAS[base] for base in cls.__mro__ if base in FORMULAS)
    move, gain = formula(history, g, dict(options))  # type: ignore[arg-type]
    if options["lr_independent_decay"]:
        decay = decay / options["decay_lr"]
    rate = lr
    if cls.layerwise:
        rate = lr * _trust_ratio(w, move + decay * w if decoupled else move, kind)
    if decay and decoupled:
        w = w * (1 - rate * decay)
    w = w - rate * move
    if mode == "prox" and l1:
        w = shrink(w, rate * l1 * gain)
    if mode == "decoupled" and l1:
        w = shrink(w, rate * l1)
    return w


def _trust_ratio(w: Interval, update: Interval, kind: Precision) -> Interval:
    """||w|| / ||update||, and 1 where either is 0; at most 2**120."""
    (w_low, w_high), (low, high) = _lengths(w), _lengths(update)
    if w_high == 0 or high == 0:
        return Interval.of(1.0, kind)
    ends = torch.tensor([w_low / high, w_high / low if low else math.inf], dtype=torch.float64)
    if low == 0:
        ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    ends = ends.clamp(max=2.0**120)
    return Interval(ends[0], ends[1], kind).rounded()


def _lengths(x: Interval) -> tuple[float, float]:
    sizes = torch.stack([x.low.abs(), x.high.abs()])
    least = torch.where((x.low < 0) & (x.high > 0), 0.0, sizes.amin(0))
    # Sums in float64, in any order: relative 2^-52 for each term.
    slack = 1 + 2.0**-52 * (x.low.numel() + 4)
    return float(least.norm()) / slack, float(sizes.amax(0).norm()) * slack


def _read(x: Tensor, kind: Precision) -> Interval:
    """A stored tensor; one wider than the arithmetic is rounded."""
    exact = Interval.of(real(x), kind)
    return exact.rounded() if precision(x.dtype).unit < kind.unit else exact


def _spans(x: Any) -> bool:
    return isinstance(x, Interval)


# ---- whether a result is right -------------------------------------------------------------------


def outside(actual: Tensor, expected: Interval) -> Tensor:
    """Where a stored result is none that roundings explain; NaN in the interval says nothing."""
    stored = actual.dtype.to_real() if actual.is_complex() else actual.dtype
    found = real(actual)
    low, high = (end.to(stored).to(torch.float64).expand_as(found) for end in
                 (expected.low, expected.high))  # fmt: skip
    unknown = low.isnan() | high.isnan()
    return ~((low <= found) & (found <= high)) & ~unknown


def number_is_wrong(actual: Tensor, expected: float) -> bool:
    """Whether a count is not what it must be, as its dtype stores it."""
    if not actual.is_floating_point():
        return float(actual) != expected
    ends = torch.tensor([1 - 2.0**-51, 1 + 2.0**-51], dtype=torch.float64) * expected
    low, high = (float(end) for end in ends.to(actual.dtype))
    return not low <= float(actual) <= high


def is_judged(expected: Interval) -> Tensor:
    """Where the interval says anything: it is no wider than a hundredth of a step of size 1."""
    size = 1 + torch.maximum(expected.low.abs(), expected.high.abs())
    return expected.high - expected.low <= 1e-2 * size
