"""The trust ratio ||w|| / ||u|| of each tensor: of LAMB and of any class with `layerwise`."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedreg
from fusedreg.cases import adam

from cases import DTYPES, PATHS, parameters, run, set_grads, ulp
from compare import frozen, parameters_of
from problems import same_bits

NO_MOMENTS: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 0.0}
"""So the direction is the sign of the gradient."""


class LayerwiseSGD(fusedreg.SGD):
    """LARS without its coefficient: a user's class over a rule that is there."""

    layerwise = True


def lamb(params: Any, path: str, **options: Any) -> fusedreg.LAMB:
    return fusedreg.LAMB(params, **{"lr": 0.1, **PATHS[path], **options})


def norm(x: Tensor) -> float:
    return math.hypot(*x.detach().double().flatten().tolist())


def trust(w: Tensor, update: Tensor) -> float:
    lengths = norm(w), norm(update)
    return lengths[0] / lengths[1] if all(lengths) else 1.0


def by_formula(w: Tensor, g: Tensor, history: dict[str, Any], **options: Any) -> Tensor:
    """You et al. (2020), algorithm 2, in float64."""
    move, _ = adam(history, g.double(), {"amsgrad": False, **options})
    update = move + options["weight_decay"] * w
    return w - options["lr"] * trust(w, update) * update


# ---- the ratio -----------------------------------------------------------------------------------

SHAPES = [(0,), (5, 3), (), (1,), (67,), (0,)]
CHUNKS = {"fused": 2_048, "default": 65_536}
"""Elements of a chunk: of triton's kernels where interpreted (on a GPU 8,192), and of LLVM's."""


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clipped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_those_of_the_formula(dtype: torch.dtype, clip: float | None, path: str) -> None:
    """From the stored weight and moments each time: only one step's rounding is left."""
    shapes = [*SHAPES, (CHUNKS.get(path, 300) + 1,)]
    options = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.5}
    params = parameters(dtype=dtype, shapes=shapes)
    optimizer = lamb(params, path, max_grad_norm=clip, **options)
    for step in range(3):
        set_grads(params, step)
        factor = 1.0
        if clip is not None:
            total = math.hypot(*(norm(w.grad) for w in params))
            factor = min(1.0, clip / (total + 1e-6))
        expected = []
        for w in params:
            state = optimizer.state.get(w, {})
            history = {
                n: state[n].double() if n in state else 0.0 for n in ("exp_avg", "exp_avg_sq")
            }
            history["step"] = step
            g = w.grad.double() * factor
            expected.append(by_formula(w.detach().double(), g, history, **options))
        optimizer.step()
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        for w, exact in zip(params, expected, strict=True):
            largest = max([1.0, *exact.abs().flatten().tolist()])
            # As in `fusedreg check`: 16 roundings, in float64 also sums of squares in another
            # order, sqrt(n) / 3 ulp of a step, which is a tenth; and the store.
            sums = 0.1 * math.sqrt(w.numel()) if dtype == torch.float64 else 0.0
            atol = (16 + sums) * ulp(compute, largest) + ulp(dtype, largest) / 2
            torch.testing.assert_close(w.detach().double(), exact, rtol=0, atol=atol)


def test_a_step_is_as_long_as_the_tensor_times_lr(path: str) -> None:
    """With the decay inside of the ratio, whatever that is; but its direction is another."""
    ends = []
    for weight_decay in (0.0, 0.1, 10.0):
        params = parameters(shapes=[(67,), (5, 3)])
        before = [w.detach().clone() for w in params]
        set_grads(params, 1)
        lamb(params, path, weight_decay=weight_decay).step()
        for w, old in zip(params, before, strict=True):
            # Norms, ratio, product and difference.
            assert norm(w - old) == pytest.approx(0.1 * norm(old), rel=1e-14)
        ends.append(torch.cat([w.detach().flatten() for w in params]))
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(ends))


def test_the_papers_decay_and_the_coupled_one_are_two(path: str) -> None:
    """Inside the ratio it adds to the direction; coupled, the moments normalise it away."""
    w = torch.tensor([3.0, 4.0], dtype=torch.float64)
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = {True: g.sign() + 0.5 * w, False: (g + 0.5 * w).sign()}
    for decoupled, update in expected.items():
        param = nn.Parameter(w.clone())
        param.grad = g.clone()
        options = {"weight_decay": 0.5, "decoupled_weight_decay": decoupled, **NO_MOMENTS}
        lamb([param], path, **options).step()
        exact = w - 0.1 * trust(w, update) * update
        # Eight roundings of numbers of 4 and less.
        torch.testing.assert_close(param.detach(), exact, rtol=0, atol=8 * ulp(w.dtype, 4.0))
    # 2 g + w is 0 in the second coordinate, so coupled it stays; decoupled it moves.
    assert param[1] == 4


def test_independent_decay_is_inside_the_ratio(path: str) -> None:
    params, others = parameters(), parameters()
    ours = lamb(params, path, lr=0.25, weight_decay=0.125, lr_independent_decay=True)
    usual = lamb(others, path, lr=0.25, weight_decay=0.5)
    for optimizer in (ours, usual):
        for seed, lr in enumerate((0.25, 0.0625)):
            optimizer.param_groups[0]["lr"] = lr
            run(optimizer, steps=1, first_seed=seed)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


def test_each_tensor_has_its_own(path: str) -> None:
    """Whatever is in its group, its bucket and its chunk; large and tiny norms side by side."""
    params, alone = parameters(), parameters()
    for each in (params, alone):
        for index, w in enumerate(each):
            w.data *= 10.0 ** (8 * (index % 3) - 8)
    together = lamb([{"params": params[:3]}, {"params": params[3:]}], path)
    apart = [lamb([w], path) for w in alone]
    for seed in range(2):
        set_grads(params, seed)
        for w, other in zip(params, alone, strict=True):
            other.grad = w.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(same_bits(w, other) for w, other in zip(params, alone, strict=True))


def test_groups_have_their_own_rates(path: str) -> None:
    params, others = parameters(shapes=[(4,), (5,)]), parameters(shapes=[(4,), (5,)])
    groups = [{"params": params[:1], "lr": 0.2}, {"params": params[1:], "weight_decay": 0.0}]
    lone = [lamb(others[:1], path, lr=0.2), lamb(others[1:], path, weight_decay=0.0)]
    optimizer = lamb(groups, path)
    for seed in range(2):
        set_grads(params, seed)
        for w, other in zip(params, others, strict=True):
            other.grad = w.grad.clone()
        for each in (optimizer, *lone):
            each.step()
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_where_a_norm_is_zero_the_ratio_is_one(dtype: torch.dtype, path: str) -> None:
    w, still = (nn.Parameter(torch.tensor(x, dtype=dtype)) for x in ([0.0, 0.0], [1.0, -2.0]))
    w.grad, still.grad = torch.tensor([0.5, -1.0], dtype=dtype), torch.zeros(2, dtype=dtype)
    lamb([w, still], path, lr=0.5, weight_decay=0.0, **NO_MOMENTS).step()
    assert w.tolist() == [-0.5, 0.5]
    assert still.tolist() == [1, -2]


def test_squares_neither_overflow_nor_vanish_in_float32(path: str) -> None:
    for size in (1e30, 1e-30):
        w = nn.Parameter(torch.tensor([3 * size, -4 * size]))
        before = w.detach().double()
        w.grad = torch.ones(2)
        lamb([w], path, lr=0.5, weight_decay=0.0, **NO_MOMENTS).step()
        # r = 5 size / sqrt(2); step and difference are rounded once each.
        exact = before - 0.5 * 5 * size / math.sqrt(2)
        torch.testing.assert_close(w.detach().double(), exact, rtol=3e-7, atol=0)


def test_a_gradient_that_vanishes_leaves_finite_weights(path: str) -> None:
    """The ratio is beyond float32 there. Weights are the same after a step, or a step away."""
    w = nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer = lamb([w], path, lr=0.5, weight_decay=0.0, l1=1e-3, eps=1.0, betas=(0.0, 0.0))
    for size in (1e-30, 1e-38, 1e-40, 1e-45):
        before = w.detach().clone()
        w.grad = torch.tensor([size, 0.0])
        optimizer.step()
        assert w.isfinite().all()
        # A weight without gradient has no gain, so no threshold; the other moves by half of |w|.
        assert w[1] == before[1]
        assert abs(w[0] - before[0]) <= 0.5 * before.norm() * (1 + 1e-6) or w[0] == 0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_spoils_its_tensor_alone(bad: float, path: str) -> None:
    params, others = parameters(shapes=[(5,), (3,)]), parameters(shapes=[(5,), (3,)])
    set_grads(params, 0)
    others[1].grad = params[1].grad.clone()
    params[0].grad[2] = bad
    lamb(params, path).step()
    lamb(others, path).step()
    assert params[0].isnan().any()
    assert same_bits(params[1], others[1])


# ---- around it -----------------------------------------------------------------------------------


def test_skipped_steps_and_missing_gradients_leave_all(path: str) -> None:
    params = parameters()
    optimizer = lamb(params, path, skip_nonfinite=True)
    run(optimizer, steps=2)
    params[1].grad = None
    params[5].grad[3] = math.nan
    before = frozen([params, [optimizer.state[w] for w in params]])
    optimizer.step()
    assert frozen([params, [optimizer.state[w] for w in params]]) == before
    assert optimizer.skipped_steps == 1
    waits = frozen([params[1], optimizer.state[params[1]]])
    params[5].grad[3] = 1.0
    optimizer.step()
    assert frozen([params[1], optimizer.state[params[1]]]) == waits
    assert frozen(params[5]) != before[0][5]


@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_memory_give_one_ratio(state_dtype: torch.dtype | None, path: str) -> None:
    values = torch.randn(2, 3, 4, 5)
    laid_out = [
        values.clone(),
        values.clone().to(memory_format=torch.channels_last),
        values.transpose(0, 3).contiguous().transpose(0, 3),
        torch.stack([values, values], dim=-1)[..., 0],  # gaps: the reference path
    ]
    params = [nn.Parameter(value) for value in laid_out]
    optimizer = lamb(params, path, state_dtype=state_dtype)
    for seed in range(2):
        set_grads(params[:1], seed)
        for index, w in enumerate(params[1:]):
            w.grad = params[0].grad.clone().to(memory_format=torch.channels_last)
            w.grad = w.grad if index else w.grad.contiguous()
        optimizer.step()
    for w in params[1:]:
        # The ratio is a float64, and sums in another order differ in its last bits: a float32 step
        # of a tenth differs in half an ulp at most, twice.
        torch.testing.assert_close(w, params[0], rtol=0, atol=2 * ulp(w.dtype, 2.0))


@pytest.mark.parametrize("count", [1, 100])
def test_launches_do_not_grow_with_tensors(count: int, path: str) -> None:
    """Rows, squares, their sums, step; and the norm before them where it clips."""
    params = parameters(shapes=[(3,)] * (count if path != "fused" else min(count, 20)))
    for clip in (None, 1.0):
        optimizer = lamb(params, path, max_grad_norm=clip)
        run(optimizer, steps=2)
        kernels = optimizer.backend != "reference"
        assert optimizer.launches == (4 + (clip is not None) if kernels else 0)


def test_loss_scale_and_clip_come_before(path: str) -> None:
    params, others = parameters(), parameters()
    scaled, plain = lamb(params, path, max_grad_norm=1.0), lamb(others, path, max_grad_norm=1.0)
    for seed in range(2):
        set_grads(params, seed)
        set_grads(others, seed)
        for w in params:
            w.grad *= 1024
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        scaled.step()
        plain.step()
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


def test_complex_parameters_have_one_ratio_of_their_moduli() -> None:
    z = nn.Parameter(torch.tensor([3 + 4j, 0j], dtype=torch.complex128))
    z.grad = torch.tensor([1 - 2j, 3 + 1j], dtype=torch.complex128)
    optimizer = lamb([z], "default", weight_decay=0.0, **NO_MOMENTS)
    optimizer.step()
    assert optimizer.backend == "reference"
    # As pairs of reals: u = (1, -1, 1, 1), so r = 5 / 2.
    expected = torch.tensor([2.75 + 4.25j, -0.25 - 0.25j], dtype=torch.complex128)
    torch.testing.assert_close(z.detach(), expected, rtol=0, atol=4 * ulp(torch.float64, 4.0))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clipped"])
def test_any_class_may_be_layerwise(momentum: float, clip: float | None, path: str) -> None:
    """w - lr ||w|| / ||b + weight_decay w|| (b + weight_decay w), on every path."""
    params = parameters()
    optimizer = LayerwiseSGD(
        params,
        lr=0.1,
        momentum=momentum,
        weight_decay=0.5,
        decoupled_weight_decay=True,
        max_grad_norm=clip,
        **PATHS[path],
    )
    expected = [w.detach().clone() for w in params]
    buffers = [torch.zeros_like(w) for w in expected]
    for seed in range(3):
        set_grads(params, seed)
        total = math.hypot(*(norm(w.grad) for w in params))
        factor = 1.0 if clip is None else min(1.0, clip / (total + 1e-6))
        for w, exact, b in zip(params, expected, buffers, strict=True):
            b.mul_(momentum).add_(factor * w.grad)
            update = b + 0.5 * exact
            exact.sub_(0.1 * trust(exact, update) * update)
        optimizer.step()
    kernels = optimizer.backend != "reference"
    assert optimizer.launches == (4 + (clip is not None) if kernels else 0)
    for w, exact in zip(params, expected, strict=True):
        largest = max([1.0, *exact.abs().flatten().tolist()])
        # In each of 3 steps, ten roundings and two sums of 67 squares.
        atol = 3 * (10 + 2 * math.sqrt(67) / 3) / 2 * ulp(w.dtype, largest)
        torch.testing.assert_close(w.detach(), exact, rtol=0, atol=atol)


def test_a_copy_is_layerwise_too(path: str) -> None:
    params, others = parameters(), parameters()
    optimizer, other = lamb(params, path), lamb(others, path)
    run(optimizer, steps=2)
    for w, twin in zip(params, others, strict=True):
        twin.data.copy_(w)
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        run(each, steps=1, first_seed=7)
    pairs = zip(parameters_of(optimizer), parameters_of(other), strict=True)
    assert all(same_bits(w, twin) for w, twin in pairs)
