"""fusedreg.penalty by itself: every function against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusedreg.penalty import kkt_distance, prox, soft_threshold, subgradient, value

from cases import DTYPES, ulp
from problems import quick, same_bits

WEIGHTS = {
    "none": {},
    "l1": {"l1": 0.7},
    "l2": {"weight_decay": 1.3},
    "elastic_net": {"l1": 0.7, "weight_decay": 1.3},
}
weights = pytest.mark.parametrize("kwargs", WEIGHTS.values(), ids=WEIGHTS)

# Subnormal products would have to be compared absolutely; 0 is drawn often.
numbers = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
vectors = st.lists(numbers, min_size=1, max_size=9).map(lambda x: torch.tensor(x).double())
positive = st.floats(1e-3, 1e3)


def eps(*magnitudes: Tensor | float) -> Tensor | float:
    """One rounding error, relative to the largest of what was added."""
    return torch.finfo(torch.float64).eps * sum(abs(m) for m in magnitudes)


# ---- soft threshold ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_threshold_on_every_special_value(dtype: torch.dtype) -> None:
    """|x| = tau and its neighbours, both zeros, infinities, NaN, tau = 0, largest and smallest."""
    limits = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    above, below = torch.nextafter(one, one + 1), torch.nextafter(one, one - 1)
    points = [0.0, 1.0, above, below, 2.5, limits.max, limits.tiny, limits.smallest_normal, 1e-40]
    x = torch.tensor([*map(float, points), math.inf], dtype=dtype)
    x = torch.cat([x, -x])
    for tau in (0.0, limits.tiny, 0.5, 1.0, limits.max):
        # Of numbers with at most 24 bits the float64 difference rounds to what the exact one would.
        x_, tau_ = x.double(), torch.tensor(tau, dtype=torch.float64)
        exact = torch.where(x_ > tau_, x_ - tau_, torch.where(x_ < -tau_, x_ + tau_, 0.0))
        for threshold in (tau, torch.tensor(tau, dtype=dtype), torch.full_like(x, tau)):
            assert same_bits(soft_threshold(x, threshold), exact.to(dtype))
        assert soft_threshold(torch.tensor(math.nan, dtype=dtype), tau).isnan()


@quick
@given(vectors, st.one_of(st.just(0.0), positive))
def test_soft_threshold_satisfies_its_optimality_condition(x: Tensor, tau: float) -> None:
    """x - z is in tau * (subdifferential of |z|), which makes z the argmin."""
    z = soft_threshold(x, tau)
    moved = x - z
    on = z != 0
    # x - tau and x - z are rounded once each.
    assert ((moved - tau * z.sign())[on].abs() <= eps(x, tau)[on]).all()
    assert (moved[~on].abs() <= tau).all()
    assert (z * x >= 0).all()


@quick
@given(vectors, vectors, positive)
def test_soft_threshold_is_nonexpansive(x: Tensor, y: Tensor, tau: float) -> None:
    size = min(len(x), len(y))
    x, y = x[:size], y[:size]
    apart = (soft_threshold(x, tau) - soft_threshold(y, tau)).abs()
    assert (apart <= (x - y).abs() + 2 * eps(x, y)).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_soft_threshold_shrinks_the_modulus(dtype: torch.dtype) -> None:
    z = soft_threshold(torch.tensor([3 + 4j, -0.6j, 0j], dtype=dtype), 1.0)
    expected = torch.tensor([2.4 + 3.2j, 0j, 0j], dtype=dtype)
    # Modulus, phase and product: three roundings of numbers below 4.
    assert ((z - expected).abs() <= 3 * ulp(dtype.to_real(), 3.2)).all()
    assert (z[1:] == 0).all()


@quick
@given(vectors, vectors, positive)
def test_complex_soft_threshold_keeps_the_phase(x: Tensor, y: Tensor, tau: float) -> None:
    size = min(len(x), len(y))
    x = torch.complex(x[:size], y[:size])
    z = soft_threshold(x, tau)
    # Optimality: x - z = tau z/|z|, and |x| <= tau where z = 0. Modulus, phase and product round.
    residual = torch.where(z == 0, (x.abs() - tau).clamp(min=0), (x - z - tau * z.sgn()).abs())
    # Where z is small, its own phase carries the rounding of the difference: relative to |x| / |z|.
    assert (residual <= 4 * eps(x, tau) * (1 + tau / z.abs().clamp(min=1e-300))).all()


def test_complex_soft_threshold_on_special_values() -> None:
    infinite = torch.tensor([complex(math.inf, 1), complex(2, -math.inf)])
    assert soft_threshold(infinite, 1.0).abs().isinf().all()
    assert soft_threshold(torch.tensor([complex(math.nan, 1)]), 1.0).isnan().all()
    # The modulus of the first exceeds the largest float32, one over that of the second does too.
    extreme = torch.tensor([3e38 + 3e38j, 1e-42 + 1e-42j, 0j])
    assert soft_threshold(extreme, 0.0).tolist() == extreme.tolist()


def test_threshold_may_differ_per_entry() -> None:
    x = torch.tensor([[3.0, -3.0, 0.5], [3.0, -3.0, 0.5]])
    thresholds = torch.tensor([[1.0], [2.0]])
    assert soft_threshold(x, thresholds).tolist() == [[2.0, -2.0, 0.0], [1.0, -1.0, 0.0]]


# ---- value and subgradient -----------------------------------------------------------------------


@weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_value_is_the_sum_it_says(kwargs: dict[str, float], dtype: torch.dtype) -> None:
    w = torch.randn(3, 4, dtype=dtype)
    moduli = [abs(entry) for entry in w.flatten().tolist()]
    l1, decay = kwargs.get("l1", 0.0), kwargs.get("weight_decay", 0.0)
    expected = math.fsum(l1 * m + decay / 2 * m * m for m in moduli)
    result = value(w, **kwargs)
    assert result.shape == ()
    # Each of 12 terms and each partial sum is rounded a few times.
    assert result.item() == pytest.approx(expected, rel=24 * torch.finfo(torch.float64).eps)
    assert value(w[:0], **kwargs) == 0


@weights
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_autograd_of_value_is_subgradient(kwargs: dict[str, float], dtype: torch.dtype) -> None:
    w = torch.randn(7, dtype=dtype)
    w[2:4] = 0.0  # where |w| has no derivative
    w.requires_grad_()
    (gradient,) = torch.autograd.grad(value(w, **kwargs), w)
    # Two products and a sum of at most 2 * (0.7 + 1.3 |w|), rounded once each in either.
    bound = 4 * ulp(torch.float64, 0.7 + 1.3 * w.abs().max().item())
    assert ((gradient - subgradient(w, **kwargs)).abs() <= bound).all()
    assert (gradient[2:4] == 0).all()


@weights
@quick
@given(w=vectors, u=vectors)
def test_subgradient_supports_the_value(kwargs: dict[str, float], w: Tensor, u: Tensor) -> None:
    """R(u) >= R(w) + <s, u - w> for all u: the definition."""
    size = min(len(w), len(u))
    w, u = w[:size], u[:size]
    s = subgradient(w, **kwargs)
    below = value(w, **kwargs) + s @ (u - w)
    slack = eps(value(w, **kwargs), value(u, **kwargs), s.abs() @ (u.abs() + w.abs()))
    assert value(u, **kwargs) >= below - 2 * size * slack  # a sum of `size` rounded terms


# ---- prox ----------------------------------------------------------------------------------------


@weights
@quick
@given(v=vectors, step=positive)
def test_prox_satisfies_its_optimality_condition(
    kwargs: dict[str, float], v: Tensor, step: float
) -> None:
    """(v - p) / step is a subgradient of R at p, so p minimises step R(p) + |p - v|^2 / 2."""
    p = prox(v, step, **kwargs)
    distance = kkt_distance(p, (p - v) / step, **kwargs)
    l1, decay = kwargs.get("l1", 0.0), kwargs.get("weight_decay", 0.0)
    # Threshold, division and difference are rounded, and the distance divides that by `step`.
    assert (distance <= 4 * eps(v / step, l1, p / step, decay * p)).all()


@weights
@pytest.mark.parametrize("step", [0.3, 2.0])
def test_prox_is_the_argmin(kwargs: dict[str, float], step: float) -> None:
    """Brute force, knowing nothing about the answer: no point of a fine grid is better."""
    l1, decay = kwargs.get("l1", 0.0), kwargs.get("weight_decay", 0.0)
    v = torch.linspace(-3, 3, 25, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)[:, None]

    def cost(w: Tensor) -> Tensor:
        return step * (l1 * w.abs() + decay / 2 * w**2) + (w - v) ** 2 / 2

    found, best = cost(prox(v, step, **kwargs)), cost(grid).amin(0)
    assert (found <= best + 4 * ulp(torch.float64, 16.0)).all()  # costs near a minimum are below 16
    # Nor is it better than a neighbour on the grid could be: half a spacing away, where the cost is
    # higher by its curvature and by at most the jump of its slope.
    apart = 0.001 / 2
    assert (best - found <= (1 + step * decay) * apart**2 / 2 + 2 * step * l1 * apart).all()


def test_prox_takes_one_step_per_coordinate() -> None:
    v, steps = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])
    together = prox(v, steps, l1=1.0, weight_decay=1.0)
    apart = [prox(x, s.item(), l1=1.0, weight_decay=1.0) for x, s in zip(v, steps, strict=True)]
    assert same_bits(together, torch.stack(apart))
    assert together[0] == 3.0


# ---- KKT distance --------------------------------------------------------------------------------


@weights
@quick
@given(w=vectors, g=vectors)
def test_kkt_distance_is_the_distance_to_the_subdifferential(
    kwargs: dict[str, float], w: Tensor, g: Tensor
) -> None:
    """min over s in [-1, 1] of |g + weight_decay w + l1 s|, with s = sign(w) where w is not 0."""
    size = min(len(w), len(g))
    w, g = w[:size], g[:size]
    l1, decay = kwargs.get("l1", 0.0), kwargs.get("weight_decay", 0.0)
    smooth = g + decay * w
    nearest = (-smooth / l1).clamp(-1, 1) if l1 else torch.zeros_like(g)
    s = torch.where(w == 0, nearest, w.sign())
    distance = kkt_distance(w, g, **kwargs)
    assert ((distance - (smooth + l1 * s).abs()).abs() <= 4 * eps(g, decay * w, l1)).all()


def test_kkt_distance_separates_minimisers_from_others() -> None:
    """(w - 2)^2 / 2 + |w| has its minimum at 1, (w - 0.5)^2 / 2 + |w| at 0."""
    w = torch.tensor([1.0, 1.01, 0.0, 0.0, 0.01])
    centre = torch.tensor([2.0, 2.0, 2.0, 0.5, 0.5])
    distance = kkt_distance(w, w - centre, l1=1.0)
    assert (distance == 0).tolist() == [True, False, False, True, False]


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_shape_and_input_are_kept(dtype: torch.dtype) -> None:
    w, g = torch.randn(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    before = w.clone(), g.clone()
    results = [
        soft_threshold(w, 0.5),
        prox(w, 0.5, l1=0.3, weight_decay=0.2),
        subgradient(w, l1=0.3, weight_decay=0.2),
        kkt_distance(w, g, l1=0.3, weight_decay=0.2),
    ]
    for result in results:
        assert (result.dtype, result.shape) == (w.dtype, w.shape)
    assert value(w, l1=0.3, weight_decay=0.2).dtype == dtype
    assert same_bits(w, before[0])
    assert same_bits(g, before[1])
