"""Weight decay: where it is a penalty of the loss, and what it is where it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import lsq_linear

import fusedreg

from cases import CASES, PATHS, Case, by_id, parameters, run, set_grads, ulp
from problems import (
    SOLVABLE,
    STEPS,
    TOLERANCE,
    few_paths,
    minimise,
    objective,
    regression,
    same_bits,
    solution,
    start,
)


def is_decoupled(case: Case) -> bool:
    return case.kwargs.get("decoupled_weight_decay", case.cls is fusedreg.AdamW)


def without_decay(case: Case) -> Case:
    return replace(case, kwargs={**case.kwargs, "weight_decay": 0.0})


DECAYED = [case for case in CASES if case.kwargs["weight_decay"]]
COUPLED = [case for case in DECAYED if not is_decoupled(case)]
DECOUPLED = [case for case in DECAYED if is_decoupled(case)]
ADAPTIVE_COUPLED = [case for case in COUPLED if not issubclass(case.cls, fusedreg.SGD)]


# ---- coupled: the gradient of weight_decay / 2 |w|^2 ---------------------------------------------


@pytest.mark.parametrize("case", **by_id(COUPLED))
def test_coupled_decay_is_half_the_squared_norm_in_the_loss(case: Case, path: str) -> None:
    """Hence the factor 2: a penalty of lambda |w|^2 is weight_decay = 2 lambda."""
    params, others = parameters(), parameters()
    inside, outside = case.make(params, path), without_decay(case).make(others, path)
    lambda_ = case.kwargs["weight_decay"] / 2
    sign = -1 if case.kwargs.get("maximize") else 1  # maximise f - penalty
    for seed in range(10):
        set_grads(params, seed)
        set_grads(others, seed)
        sum(sign * lambda_ * (w * w).sum() for w in others).backward()
        inside.step()
        outside.step()
    for w, other in zip(params, others, strict=True):
        # Autograd adds lambda w twice, exactly 2 lambda w; a fused product may round otherwise.
        bound = 10 * 2 * ulp(w.dtype, max([1.0, *w.detach().abs().flatten().tolist()]))
        torch.testing.assert_close(w, other, rtol=0, atol=bound)


@few_paths
@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("case", **by_id([c for c in SOLVABLE if "l1" not in c.kwargs]))
def test_decay_reaches_the_ridge_solution(case: Case, dtype: torch.dtype, path: str) -> None:
    """Also decoupled in SGD, where with momentum mu it is the ridge of (1 - mu) weight_decay."""
    # At a smooth minimum Adam divides 0 by 0 and circles for ever; a large eps, on which the
    # minimum does not depend, lets it settle.
    eps = {} if issubclass(case.cls, fusedreg.SGD) else {"eps": 1.0}
    w = minimise(case.make([start(dtype)], path, **eps), STEPS[dtype])
    expected = solution(*objective(case))
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("weight_decay", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("case", **by_id(ADAPTIVE_COUPLED))
def test_first_coupled_adaptive_step_ignores_the_strength_of_decay(
    case: Case, weight_decay: float, path: str
) -> None:
    """With no gradient the step is lr sign(w), because decay / sqrt(decay^2) = 1."""
    w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    before = w.detach().clone()
    optimizer = case.make([w], path, weight_decay=weight_decay, l1=0.0, eps=1e-12)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    # eps is at most 2e-8 of weight_decay |w|.
    expected = before - case.kwargs["lr"] * before.sign()
    torch.testing.assert_close(w.detach(), expected, rtol=3e-8, atol=0)


@pytest.mark.parametrize("case", **by_id(ADAPTIVE_COUPLED))
def test_coupled_adaptive_decay_depends_on_the_scale_of_the_loss(case: Case, path: str) -> None:
    """As the decoupled one does not: see test_l1.test_scaling_the_objective_changes_no_iterate."""
    params, others = parameters(), parameters()
    run(case.make(params, path, eps=0.0), steps=3)
    scaled = case.make(others, path, eps=0.0)
    for seed in range(1000, 1003):
        set_grads(others, seed)
        for w in others:
            w.grad *= 2.0**10
        scaled.step()
    assert (params[1] - others[1]).abs().max() > 0.01  # a tenth of one step


# ---- decoupled: a factor on the weight -----------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(DECOUPLED))
def test_decoupled_decay_never_enters_the_moments(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    decayed, plain = case.make(params, path), without_decay(case).make(others, path)
    run(decayed, steps=3)
    run(plain, steps=3)
    for w, other in zip(params, others, strict=True):
        assert w.numel() == 0 or not torch.equal(w, other)
        for name in plain.state[other]:
            assert same_bits(decayed.state[w][name], plain.state[other][name]), name


@pytest.mark.parametrize("case", **by_id([case for case in DECOUPLED if "l1" not in case.kwargs]))
def test_decoupled_decay_multiplies_by_the_scheduled_factors(case: Case, path: str) -> None:
    """With zero gradients the weight is w prod(1 - lr_t weight_decay), and the moments stay 0."""
    w = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    optimizer = case.make([w], path, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    expected = w.detach().clone()
    for _ in range(10):
        expected *= 1 - scheduler.get_last_lr()[0] * 0.5
        w.grad = torch.zeros_like(w)
        optimizer.step()
        scheduler.step()
    # A factor and a product are rounded in each of 10 steps.
    torch.testing.assert_close(w.detach(), expected, rtol=20 * torch.finfo(w.dtype).eps, atol=0)
    assert w[0].item() == pytest.approx(0.755429522204664, rel=1e-14)
    moments = {name: state for name, state in optimizer.state[w].items() if state.dim()}
    assert all((moment == 0).all() for moment in moments.values()), moments


@pytest.mark.parametrize("case", **by_id([c for c in CASES if c.cls is fusedreg.AdamW]))
def test_without_decay_adamw_is_adam(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    adamw = without_decay(case)
    run(adamw.make(params, path), steps=5)
    run(replace(adamw, cls=fusedreg.Adam).make(others, path), steps=5)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


def test_full_batch_adamw_solves_a_box_constrained_problem(path: str) -> None:
    """A step is at most lr, so its decay lr weight_decay w balances it at |w| = 1 / weight_decay.

    The coefficients outside of that box stop at its faces; the others are not shrunk at all.
    """
    box = 1 / 0.9
    optimizer = fusedreg.AdamW(
        [start()], lr=0.1, betas=(0.9, 0.9), weight_decay=1 / box, **PATHS[path]
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=400)
    w = minimise(optimizer, 400, each=scheduler.step)
    X, y = regression()
    exact = lsq_linear(X.numpy(), y.numpy(), bounds=(-box, box), tol=1e-12, method="bvls").x
    assert sum(abs(exact) > box - 1e-9) == 2
    # 0 / 0 at a smooth minimum: steps stay of size lr_t, 0.025 (pi k / 400)^2 at k steps before the
    # end. Those of the last ten, the memory of both betas, add up to 6e-4.
    torch.testing.assert_close(w, torch.from_numpy(exact), rtol=0, atol=6e-4)


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **by_id([c for c in CASES if not c.kwargs.get("maximize")]))
def test_maximising_is_minimising_the_negative(case: Case, path: str) -> None:
    """The penalty shrinks in both: only the sign of the loss changes, and nothing else."""
    params, others = parameters(), parameters()
    down, up = case.make(params, path), case.make(others, path, maximize=True)
    for seed in range(4):
        set_grads(params, seed)
        for w, other in zip(params, others, strict=True):
            other.grad = -w.grad
        down.step()
        up.step()
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


@pytest.mark.parametrize("case", **by_id([case for case in CASES if case.penalty != "none"]))
def test_penalty_shrinks_whatever_the_direction(case: Case, path: str) -> None:
    w = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = case.make([w], path)
    for _ in range(3):
        before = w.detach().abs()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        # Adam's exact L1 threshold waits for the first gradient: test_l1 says why.
        waits = case.penalty == "l1_prox" and not issubclass(case.cls, fusedreg.SGD)
        assert ((w.abs() == before) if waits else (w.abs() < before)).all()


@few_paths
@pytest.mark.parametrize("name", ["weight_decay", "l1"])
@pytest.mark.parametrize("case", **by_id(CASES))
def test_no_penalty_is_ignored(case: Case, name: str, path: str) -> None:
    """A weight that is accepted and unused would pass many a comparison."""
    if not case.kwargs.get(name):
        case = replace(case, kwargs={**case.kwargs, name: 0.5})
    params, others = parameters(), parameters()
    run(case.make(params, path), steps=2)
    run(case.make(others, path, **{name: 1.5 * case.kwargs[name]}), steps=2)
    assert not all(torch.equal(w, other) for w, other in zip(params, others, strict=True))


@pytest.mark.parametrize("case", **by_id([c for c in DECOUPLED if "l1" not in c.kwargs]))
def test_parameters_of_several_dtypes_are_each_decayed_once(case: Case, path: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32)
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    for w in params:
        w.grad = torch.zeros_like(w)
    case.make(params, path, lr=0.5, weight_decay=0.5).step()
    assert all((w == 0.75).all() for w in params)  # exact in every dtype


@pytest.mark.parametrize("case", **by_id([c for c in DECAYED if c.cls is fusedreg.SGD]))
def test_weight_decay_may_be_a_tensor(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    decay = torch.tensor(case.kwargs["weight_decay"], dtype=torch.float64)
    run(case.make(params, path), steps=2)
    run(case.make(others, path, weight_decay=decay), steps=2)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))
