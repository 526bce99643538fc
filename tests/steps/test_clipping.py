"""Clipping inside the step: one norm of the loss gradient, exact at every magnitude."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

import fusedreg

from cases import (
    CASES,
    DTYPES,
    FEW_PATHS,
    PATHS,
    TORCH_CASES,
    Case,
    each_case,
    parameters,
    set_grads,
    ulp,
)
from problems import differences, few_paths, quick, same_bits, snapshot

F32 = torch.finfo(torch.float32)


def sgd(params: Any, path: str, **options: Any) -> fusedreg.SGD:
    return fusedreg.SGD(params, **{"lr": 1.0, **PATHS[path], **options})


def after_one_step(grads: list[Tensor], path: str, **options: Any) -> tuple[list[Tensor], Tensor]:
    """What the step made of the gradients, and their norm: SGD from 0 with lr = -1, as it were."""
    params = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer = sgd(params, path, maximize=True, **options)
    optimizer.step()
    assert optimizer.grad_norm is not None
    return [param.detach() for param in params], optimizer.grad_norm


def norm_of(grads: list[Tensor]) -> float:
    """In float64, scaled: right at every magnitude."""
    real = (torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads)
    return math.hypot(*(entry for grad in real for entry in grad.double().flatten().tolist()))


def assert_clipped(grads: list[Tensor], max_grad_norm: float, path: str) -> None:
    """min(1, max_grad_norm / (norm + 1e-6)) is the factor, and grad_norm the norm."""
    norm = norm_of(grads)
    factor = min(1.0, max_grad_norm / (norm + 1e-6))
    moved, grad_norm = after_one_step(grads, path, max_grad_norm=max_grad_norm)
    for actual, grad in zip(moved, grads, strict=True):
        expected = (grad.double() * factor).to(grad.dtype)
        limits = torch.finfo(grad.dtype)
        # Norm, factor and product in float64, 4 ulp; then perhaps float32; and the store.
        rtol = limits.eps if grad.dtype != torch.float64 else 4 * limits.eps
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=limits.smallest_normal * rtol)
    expected = torch.tensor(norm, dtype=torch.float32)
    torch.testing.assert_close(grad_norm, expected, rtol=F32.eps, atol=F32.tiny * F32.eps)


# ---- the formula ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case(TORCH_CASES)
def test_clipping_is_torchs_clip_and_then_the_step(
    case: Case, dtype: torch.dtype, path: str
) -> None:
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = case.make(params, path, max_grad_norm=1.0)
    reference = case.torch_cls(others, **case.torch_kwargs)
    for seed in range(3):
        set_grads(params, seed)
        set_grads(others, seed)
        norm = clip_grad_norm_(others, 1.0)
        assert norm > 2  # it does clip
        reference.step()
        optimizer.step()
        # Torch's norm of 114 entries is a sum in `dtype`; both are rounded to float32.
        torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=4 * F32.eps, atol=0)
    for w, other in zip(params, others, strict=True):
        # About 10 roundings a step in either, as in test_oracle, and a factor that is a few ulp off
        # times a step of 0.1.
        bound = 3 * 3 * ulp(dtype, max([1.0, *other.detach().abs().flatten().tolist()]))
        torch.testing.assert_close(w, other, rtol=0, atol=bound)


@pytest.mark.parametrize("max_grad_norm", [5e-7, 1.0, 5.0, 5.000001, 100.0])
@pytest.mark.parametrize("gradient", [[3.0, -4.0], [3e-7, -4e-7], [0.0, -0.0]], ids=str)
def test_factor_is_torchs_below_at_and_above_the_norm(
    gradient: list[float], max_grad_norm: float, path: str
) -> None:
    """Also at norm == max_grad_norm, where the 1e-6 scales a little, and near 1e-6, much."""
    grad = torch.tensor(gradient, dtype=torch.float64)
    ((moved,), _) = after_one_step([grad.clone()], path, max_grad_norm=max_grad_norm)
    other = torch.nn.Parameter(torch.zeros_like(grad))
    other.grad = grad
    clip_grad_norm_([other], max_grad_norm)
    torch.testing.assert_close(moved, other.grad, rtol=4 * ulp(torch.float64), atol=0)


@few_paths
@quick
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.floats(-1, 1),
    max_grad_norm=st.floats(1e-9, 1e3),
    seed=st.integers(0, 99),
)
def test_factor_is_right_for_any_sizes_and_magnitudes(
    sizes: list[int],
    dtype: torch.dtype,
    magnitude: float,
    max_grad_norm: float,
    seed: int,
    path: str,
) -> None:
    # Almost the whole range of the dtype; float16 is left a factor of 4 for the normal entries.
    decades = {torch.float64: 300, torch.float32: 36, torch.bfloat16: 36, torch.float16: 4}[dtype]
    generator = torch.Generator().manual_seed(seed)
    entries = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    grads = [(x * 10.0 ** (magnitude * decades)).to(dtype) for x in entries]
    assert_clipped(grads, max_grad_norm, path)


EXTREMES = {
    "float32 squares overflow": (torch.float32, 3e38, 8),
    "float32 squares vanish": (torch.float32, 1e-25, 8),
    "float32 subnormal": (torch.float32, 1e-44, 8),
    "float64 squares overflow": (torch.float64, 1e200, 8),
    "float64 squares vanish": (torch.float64, 1e-200, 8),
    "bfloat16 squares overflow": (torch.bfloat16, 3e38, 8),
    "float16 norm overflows": (torch.float16, 6e4, 100),
}


@pytest.mark.parametrize("relative", [0.5, 2.0])
@pytest.mark.parametrize(("dtype", "entry", "count"), EXTREMES.values(), ids=EXTREMES)
def test_finite_gradients_of_any_magnitude_are_clipped_and_not_lost(
    dtype: torch.dtype, entry: float, count: int, relative: float, path: str
) -> None:
    grads = [torch.full((count // 2,), entry, dtype=dtype) for _ in range(2)]
    assert_clipped(grads, 1.0, path)
    assert_clipped(grads, relative * norm_of(grads), path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_have_a_float32_norm(dtype: torch.dtype, path: str) -> None:
    grads = [torch.randn(300).to(dtype) for _ in range(3)]
    moved, norm = after_one_step(grads, path, max_grad_norm=1.0)
    assert norm.item() == pytest.approx(norm_of(grads), rel=F32.eps)
    # Each entry is rounded once, by at most half an ulp.
    assert norm_of(moved) == pytest.approx(1.0, rel=torch.finfo(dtype).eps / 2)


# ---- which gradients -----------------------------------------------------------------------------


def test_there_is_one_norm_over_all_groups(path: str) -> None:
    """Per group, [3, 0] would become [1, 0] and [0, 0.4] would stay."""
    params = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    params[0].grad = torch.tensor([3.0, 0.0], dtype=torch.float64)
    params[1].grad = torch.tensor([0.0, 0.4], dtype=torch.float64)
    groups = [{"params": params[:1], "lr": 1.0}, {"params": params[1:], "lr": 10.0}]
    sgd(groups, path, max_grad_norm=1.0).step()
    factor = 1 / (math.hypot(3, 0.4) + 1e-6)
    assert factor == pytest.approx(0.3304, abs=1e-4)
    # Norm, factor, product and step are rounded once each.
    assert params[0].tolist() == pytest.approx([-3 * factor, 0], rel=4 * ulp(torch.float64))
    assert params[1].tolist() == pytest.approx([0, -4 * factor], rel=4 * ulp(torch.float64))


def test_there_is_one_norm_over_all_dtypes(path: str) -> None:
    grads = [torch.randn(50).to(dtype) for dtype in (*DTYPES, torch.complex64, torch.complex128)]
    moved, norm = after_one_step(grads, path, max_grad_norm=1.0)
    assert norm.item() == pytest.approx(norm_of(grads), rel=F32.eps)
    for actual, grad in zip(moved, grads, strict=True):
        expected = (grad * (1 / (norm_of(grads) + 1e-6))).to(grad.dtype)
        # Pairs of reals: each part is rounded by itself, and once more in float32.
        rtol = 2 * torch.finfo(grad.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


@each_case(CASES, paths=FEW_PATHS)
def test_order_and_grouping_do_not_matter(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    turned = others[::-1]
    together = case.make(params, path, max_grad_norm=1.0)
    apart = case.make([{"params": turned[:3]}, {"params": turned[3:]}], path, max_grad_norm=1.0)
    for seed in range(3):
        set_grads(params, seed)
        set_grads(others, seed)
        together.step()
        apart.step()
    for w, other in zip(params, others, strict=True):
        # The norm is a sum in another order: its last bit moves a step of 0.1 by less than an ulp.
        bound = 3 * ulp(w.dtype, max([1.0, *w.detach().abs().flatten().tolist()]))
        torch.testing.assert_close(w, other, rtol=0, atol=bound)


def test_thousands_of_tensors_have_one_exact_norm_in_every_run(path: str) -> None:
    count = 300 if path == "fused" else 2000  # interpreted, each takes milliseconds
    grads = [torch.randn(1 + index % 13) * 10.0 ** (index % 5) for index in range(count)]
    grads[::7] = [grad.to(torch.bfloat16) for grad in grads[::7]]
    grads[0] = grads[count // 2] = grads[-1] = torch.zeros(0)
    assert_clipped(grads, 1.0, path)
    moved, norm = after_one_step(grads, path, max_grad_norm=1.0)
    again, norm_again = after_one_step(grads, path, max_grad_norm=1.0)
    assert same_bits(norm, norm_again)
    assert all(same_bits(a, b) for a, b in zip(moved, again, strict=True))


def test_a_parameter_listed_twice_counts_once(path: str) -> None:
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    w.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = sgd([w, w], path, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 5
    assert w.tolist() == pytest.approx([-3 / 5.000001, -4 / 5.000001], rel=4 * ulp(torch.float64))


@each_case(CASES, paths=FEW_PATHS)
def test_a_parameter_without_gradient_neither_counts_nor_moves(case: Case, path: str) -> None:
    params = parameters(shapes=[(3,), (2,)])
    params[0].grad = torch.full_like(params[0], 2.0)
    still = params[1].detach().clone()
    optimizer = case.make(params, path, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(12), rel=F32.eps)
    assert same_bits(params[1], still)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_no_gradient_and_empty_gradients_have_norm_zero(option: dict[str, Any], path: str) -> None:
    params = parameters(shapes=[(0,), (2, 0), ()])
    optimizer = sgd(params, path, **option)
    before = snapshot(optimizer)
    optimizer.step()
    assert optimizer.grad_norm.tolist() == 0
    for param in params[:2]:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.grad_norm.tolist() == 0
    assert not differences(snapshot(optimizer), before)


def test_gradients_of_a_closure_are_clipped(path: str) -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = sgd([w], path, max_grad_norm=1.0)
    w.grad = torch.full_like(w, 1e9)  # left over

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (w * w).sum() / 2
        loss.backward()
        return loss

    assert optimizer.step(closure) == 12.5
    assert optimizer.grad_norm == 5
    expected = [3 - 3 / 5.000001, 4 - 4 / 5.000001]
    assert w.tolist() == pytest.approx(expected, rel=4 * ulp(torch.float64))


# ---- clip and penalty ----------------------------------------------------------------------------

PENALISED_STEPS = {
    "coupled": ({"weight_decay": 0.5}, [9.5, -0.1]),
    "decoupled": ({"weight_decay": 0.5, "decoupled_weight_decay": True}, [9.5, -0.1]),
    "l1_prox": ({"l1": 0.5}, [9.95, -0.05]),
    "l1_decoupled": ({"l1": 0.5, "l1_mode": "decoupled"}, [9.95, -0.05]),
    "l1_subgradient": ({"l1": 0.5, "l1_mode": "subgradient"}, [9.95, -0.1]),
    "elastic_net": ({"weight_decay": 0.5, "l1": 0.5}, [9.45, -0.05]),
}


@pytest.mark.parametrize(("options", "after"), PENALISED_STEPS.values(), ids=PENALISED_STEPS)
def test_clipping_is_of_the_loss_gradient_alone(
    options: dict[str, Any], after: list[float], path: str
) -> None:
    """With the penalty in the clipped gradient, L2 would give [9.907, -0.037] instead."""
    w = torch.nn.Parameter(torch.tensor([10.0, 0.0], dtype=torch.float64))
    w.grad = torch.tensor([0.0, 2.0], dtype=torch.float64)
    sgd([w], path, lr=0.1, max_grad_norm=1.0, **options).step()
    # The 1e-6 makes the clipped gradient 0.9999995, and 0.1 of that is 5e-8 short.
    assert w.tolist() == pytest.approx(after, abs=1e-7)


@each_case(CASES, paths=FEW_PATHS)
def test_infinite_max_grad_norm_only_measures(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    measured, plain = case.make(params, path, max_grad_norm=math.inf), case.make(others, path)
    for seed, last in enumerate((1.0, 2.0, math.inf)):  # and repairs nothing
        for each, optimizer in ((params, measured), (others, plain)):
            set_grads(each, seed)
            each[5].grad[-1] = last
            optimizer.step()
        norm = norm_of([w.grad for w in params])
        assert measured.grad_norm.item() == pytest.approx(norm, rel=F32.eps)
    assert not differences(snapshot(measured), snapshot(plain))


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["free", "clipped"])
@each_case(CASES)
def test_no_bit_of_a_gradient_changes(case: Case, max_grad_norm: float | None, path: str) -> None:
    params = parameters()
    optimizer = case.make(params, path, max_grad_norm=max_grad_norm)
    for seed in range(2):  # nesterov of torch spoils them from the second step on
        set_grads(params, seed)
        grads = [w.grad for w in params]
        before = [grad.clone() for grad in grads]
        optimizer.step()
        assert all(w.grad is grad for w, grad in zip(params, grads, strict=True))
        assert all(same_bits(w.grad, grad) for w, grad in zip(params, before, strict=True))


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clipping_does_not_repair_what_is_not_finite(bad: float, path: str) -> None:
    """As in torch: the norm is infinite or NaN, so the factor is 0 or NaN."""
    grads = [torch.tensor([bad, 1.0]), torch.tensor([2.0])]
    moved, norm = after_one_step([grad.clone() for grad in grads], path, max_grad_norm=1.0)
    others = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for other, grad in zip(others, grads, strict=True):
        other.grad = grad
    torch.testing.assert_close(norm, clip_grad_norm_(others, 1.0), equal_nan=True)
    for actual, other in zip(moved, others, strict=True):
        torch.testing.assert_close(actual, other.grad, rtol=0, atol=0, equal_nan=True)


# ---- the attributes ------------------------------------------------------------------------------


def test_norm_is_none_unless_it_is_asked_for(path: str) -> None:
    params = parameters(shapes=[(2,)])
    set_grads(params, 0)
    plain = sgd(params, path)
    plain.step()
    assert plain.grad_norm is None
    for option in ({"max_grad_norm": 1.0}, {"max_grad_norm": math.inf}, {"skip_nonfinite": True}):
        optimizer = sgd(params, path, **option)
        assert optimizer.grad_norm is None
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(norm_of([params[0].grad]), rel=F32.eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_a_float32_scalar_on_the_device(dtype: torch.dtype, path: str) -> None:
    _, norm = after_one_step([torch.ones(4, dtype=dtype)], path, max_grad_norm=1.0)
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float32, (), "cpu")
    assert norm == 2
    assert not norm.requires_grad


def test_norm_beyond_float32_reads_infinite_and_clips_right(path: str) -> None:
    (moved,), norm = after_one_step([torch.full((4,), 3e38)], path, max_grad_norm=1.0)
    assert norm == math.inf
    assert moved.tolist() == pytest.approx([0.5] * 4, rel=F32.eps)


def test_max_grad_norm_may_change_at_any_time(path: str) -> None:
    w = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = sgd([w], path)
    expected = torch.zeros_like(w)
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for max_grad_norm in (None, 2.0, math.inf, 1.0, None, 0.5):
        optimizer.max_grad_norm = max_grad_norm
        assert optimizer.max_grad_norm == max_grad_norm
        w.grad = grad.clone()
        optimizer.step()
        expected -= grad * min(
            1.0, (math.inf if max_grad_norm is None else max_grad_norm) / 5.000001
        )
    # Norm, factor, product and sum in 6 steps, of at most 13.6.
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=6 * 4 * ulp(w.dtype, 13.6))


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_negative_or_nan_max_grad_norm_is_refused(value: float, path: str) -> None:
    """Torch's clip would turn the gradient round, or into NaN."""
    with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
        sgd(parameters(), path, max_grad_norm=value)
    optimizer = sgd(parameters(), path, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="Invalid max_grad_norm value"):
        optimizer.max_grad_norm = value
    assert optimizer.max_grad_norm == 1.0
