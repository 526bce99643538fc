"""Weight decay: where it is a penalty of the loss, and what it is where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import lsq_linear
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR

import fusedreg

from cases import (
    CASES,
    CLASSES,
    FEW_PATHS,
    PATHS,
    SOME,
    Case,
    each_case,
    parameters,
    run,
    set_grads,
    ulp,
)
from problems import (
    SOLVABLE,
    STEPS,
    elementwise,
    family,
    minimise,
    minimising,
    objective,
    regression,
    same_bits,
    solution,
    start,
    tolerance,
    waits_for_gradient,
    with_eps,
)


def without_decay(case: Case) -> Case:
    return replace(case, kwargs={**case.kwargs, "weight_decay": 0.0})


DECAYED = [case for case in CASES if case.options["weight_decay"]]
COUPLED = [case for case in DECAYED if not case.options["decoupled_weight_decay"]]
DECOUPLED = [case for case in DECAYED if case.options["decoupled_weight_decay"]]
# With zero gradients nothing else moves, and in LAMB the trust ratio undoes what it does.
DECOUPLED_ALONE = [case for case in elementwise(DECOUPLED) if not case.options["l1"]]


# ---- coupled: the gradient of weight_decay / 2 |w|^2 ---------------------------------------------


@each_case(COUPLED, all_on=("reference",))
def test_coupled_decay_is_half_the_squared_norm_in_the_loss(case: Case, path: str) -> None:
    """Hence the factor 2: a penalty of lambda |w|^2 is weight_decay = 2 lambda."""
    params, others = parameters(), parameters()
    inside, outside = case.make(params, path), without_decay(case).make(others, path)
    lambda_ = case.options["weight_decay"] / 2
    sign = -1 if case.options["maximize"] else 1  # maximise f - penalty
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


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@each_case([c for c in SOLVABLE if not c.options["l1"]], paths=FEW_PATHS, all_on=("reference",))
def test_decay_reaches_the_ridge_solution(case: Case, dtype: torch.dtype, path: str) -> None:
    """Also decoupled in SGD, where with momentum mu it is the ridge of (1 - mu) weight_decay."""
    # At a smooth minimum Adam divides 0 by 0 and circles for ever; a large eps, on which the
    # minimum does not depend, lets it settle.
    w = minimise(case.make([start(dtype)], path, **with_eps(case, 1.0)), STEPS[dtype])
    expected = solution(*objective(case))
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=tolerance(case, dtype))


@each_case([case for case in COUPLED if family(case) != "linear"], all_on=("reference",))
def test_first_coupled_step_ignores_the_strength_of_decay(case: Case, path: str) -> None:
    """With no gradient it is along sign(w), because decay / sqrt(decay^2) = 1."""
    options = {**case.options, **with_eps(case, 1e-13), "l1": 0.0}
    options = {name: options[name] for name in {*case.kwargs, "l1", *with_eps(case, 0)}}
    if "initial_accumulator_value" in options:
        options["initial_accumulator_value"] = 0.0
    moved = []
    for weight_decay in (1e-4, 1e-2, 1.0):
        w = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
        before = w.detach().clone()
        optimizer = case.make([w], path, **{**options, "weight_decay": weight_decay})
        w.grad = torch.zeros_like(w)
        optimizer.step()
        moved.append((before - w.detach()) * before.sign())
    # eps is at most 2e-9 of weight_decay |w|, and RMSprop's root 1 / sqrt(10) of that.
    length = moved[0][0].expand(3)
    assert length[0] >= 0.99 * case.options["lr"]
    for each in moved:
        torch.testing.assert_close(each, length, rtol=3e-8, atol=0)


@each_case([case for case in COUPLED if family(case) != "linear"], all_on=("reference",))
def test_coupled_decay_depends_on_the_scale_of_the_loss(case: Case, path: str) -> None:
    """As the decoupled one does not: see test_l1.test_scaling_the_objective_changes_no_iterate."""
    params, others = parameters(), parameters()
    run(case.make(params, path, **with_eps(case, 0.0)), steps=3)
    scaled = case.make(others, path, **with_eps(case, 0.0))
    for seed in range(1000, 1003):
        set_grads(others, seed)
        for w in others:
            w.grad *= 2.0**10
        scaled.step()
    assert (params[1] - others[1]).abs().max() > 0.1 * case.options["lr"]  # a tenth of one step


# ---- decoupled: a factor on the weight -----------------------------------------------------------


@each_case(DECOUPLED, all_on=("reference",))
def test_decoupled_decay_never_enters_the_moments(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    decayed, plain = case.make(params, path), without_decay(case).make(others, path)
    run(decayed, steps=3)
    run(plain, steps=3)
    # The trust ratio makes the step of a single element as long as it is, with decay or without.
    least = 2 if case.cls.layerwise else 1
    for w, other in zip(params, others, strict=True):
        assert w.numel() < least or not torch.equal(w, other)
        for name in plain.state[other]:
            assert same_bits(decayed.state[w][name], plain.state[other][name]), name


@each_case(DECOUPLED_ALONE, all_on=("reference",))
def test_decoupled_decay_multiplies_by_the_scheduled_factors(case: Case, path: str) -> None:
    """With zero gradients the weight is w prod(1 - lr_t weight_decay), and the moments stay 0."""
    w = torch.tensor([1.0, -3.0], dtype=torch.float64, requires_grad=True)
    optimizer = case.make([w], path, lr=0.1, weight_decay=0.5)
    scheduler = CosineAnnealingLR(optimizer, T_max=10)
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
    start = case.options.get("initial_accumulator_value", 0.0)
    assert all((moment == start).all() for moment in moments.values()), moments


@each_case([c for c in CASES if c.cls is fusedreg.AdamW], all_on=("reference",))
def test_without_decay_adamw_is_adam(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    adamw = without_decay(case)
    run(adamw.make(params, path), steps=5)
    run(replace(adamw, cls=fusedreg.Adam).make(others, path), steps=5)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


# 0 / 0 at a smooth minimum: steps stay of size lr_t, 0.025 (pi k / 400)^2 at k steps before the
# end. Those of the last ten, the memory of both betas, add up to 6e-4. Lion's sign needs as many
# again to turn: 4e-3.
@pytest.mark.parametrize(("cls", "atol"), [(fusedreg.AdamW, 6e-4), (fusedreg.Lion, 4e-3)])
def test_full_batch_adamw_and_lion_solve_a_box_constrained_problem(
    cls: Any, atol: float, path: str
) -> None:
    """A step is at most lr, so its decay lr weight_decay w balances it at |w| = 1 / weight_decay.

    The coefficients outside of that box stop at its faces; the others are not shrunk at all.
    """
    box = 1 / 0.9
    optimizer = cls([start()], lr=0.1, betas=(0.9, 0.9), weight_decay=1 / box, **PATHS[path])
    scheduler = CosineAnnealingLR(optimizer, T_max=400)
    w = minimise(optimizer, 400, each=scheduler.step)
    X, y = regression()
    exact = lsq_linear(X.numpy(), y.numpy(), bounds=(-box, box), tol=1e-12, method="bvls").x
    assert sum(abs(exact) > box - 1e-9) == 2
    torch.testing.assert_close(w, torch.from_numpy(exact), rtol=0, atol=atol)


def test_lion_never_leaves_the_box(path: str) -> None:
    """|w| (1 - lr weight_decay) + lr is at most 1 / weight_decay where |w| is, whatever lr."""
    params = parameters()
    optimizer = fusedreg.Lion(params, lr=0.3, weight_decay=0.2, **PATHS[path])
    start = max(w.detach().abs().max().item() for w in params if w.numel())
    run(optimizer, steps=1)
    assert start < 5
    for seed in range(12):
        for w in params:
            w.grad = torch.ones_like(w)  # always in one direction
        set_grads(params[:2], seed)
        optimizer.step()
        assert all((w.abs() <= 5).all() for w in params)
    assert max(w.detach().abs().max().item() for w in params if w.numel()) > start


# ---- independent of lr ---------------------------------------------------------------------------

# Every rule of a class has the decay in the same place.
INDEPENDENT = {
    case.cls: replace(case, kwargs={**case.kwargs, "lr_independent_decay": True})
    for case in reversed(DECOUPLED)
    if not case.options["l1"]
}
INDEPENDENT_CASES = list(INDEPENDENT.values())
INDEPENDENT_ALONE = elementwise(INDEPENDENT_CASES)  # where nothing else moves, as above
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "warm-up": lambda o: LinearLR(o, start_factor=0.1, total_iters=4),
    # This one writes over torch's initial_lr.
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=8, cycle_momentum=False),
}


def test_every_class_has_an_independent_decay() -> None:
    assert set(INDEPENDENT) == set(CLASSES)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case(INDEPENDENT_CASES, all_on=("reference",))
def test_independent_decay_is_decoupled_decay_over_the_first_lr(
    case: Case, scheduler: str, path: str
) -> None:
    """Whatever a scheduler makes of lr: lion_pytorch's decoupled_weight_decay."""
    params, others = parameters(), parameters()
    lr, weight_decay = case.options["lr"], 0.3 * case.options["lr"]
    usual = {"lr_independent_decay": False, "weight_decay": weight_decay / lr}
    optimizers = [
        case.make(params, path, weight_decay=weight_decay),
        case.make(others, path, **usual),
    ]
    for optimizer in optimizers:
        schedule = SCHEDULERS[scheduler](optimizer)
        for seed in range(5):
            set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
            schedule.step()
    assert optimizers[0].param_groups[0]["decay_lr"] == lr
    for w, other in zip(params, others, strict=True):
        # One quotient and its product in 5 steps, each half an ulp; LAMB's norms add one more.
        bound = 5 * 2 * ulp(w.dtype, max([1.0, *other.detach().abs().flatten().tolist()]))
        torch.testing.assert_close(w, other, rtol=0, atol=bound)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case(INDEPENDENT_ALONE, all_on=("reference",))
def test_independent_decay_multiplies_by_the_schedule_alone(
    case: Case, scheduler: str, path: str
) -> None:
    """With zero gradients the weight is w prod(1 - weight_decay lr_t / decay_lr), in any group."""
    params = parameters(shapes=[(3,), (4,)])
    before = [w.detach().clone() for w in params]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.05}]
    optimizer = case.make(groups, path, lr=0.1, weight_decay=0.01)
    schedule = SCHEDULERS[scheduler](optimizer)
    factors = [1.0, 1.0]
    for _ in range(6):
        for index, group in enumerate(optimizer.param_groups):
            factors[index] *= 1 - 0.01 * group["lr"] / (0.1, 0.05)[index]
        for w in params:
            w.grad = torch.zeros_like(w)
        optimizer.step()
        schedule.step()
    assert [group["decay_lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    # Three roundings of a factor near 1 and one of a product in each of 6 steps.
    for w, first, factor in zip(params, before, factors, strict=True):
        torch.testing.assert_close(
            w.detach(), first * factor, rtol=24 * torch.finfo(w.dtype).eps, atol=0
        )


@each_case(INDEPENDENT_ALONE, all_on=("reference",))
def test_groups_with_other_rates_decay_alike(case: Case, path: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [w], "lr": lr} for w, lr in zip(params, (0.5, 2.0**-9, 8.0), strict=True)]
    optimizer = case.make(groups, path, weight_decay=0.25)
    for w in params:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    assert all((w == 0.75).all() for w in params)  # lr / decay_lr is exactly 1


@each_case(INDEPENDENT_CASES, all_on=("reference",))
def test_independent_decay_with_lr_zero_moves_nothing(case: Case, path: str) -> None:
    params = parameters()
    optimizer = case.make(params, path)
    before = [w.detach().clone() for w in params]
    for lr in (0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = lr
        run(optimizer, steps=1)
        assert all(same_bits(w, old) for w, old in zip(params, before, strict=True))


@each_case(INDEPENDENT_CASES, all_on=("reference",))
def test_independent_decay_takes_tensors(case: Case, path: str) -> None:
    """An lr that is written in place is another one; that of the beginning is not."""
    params, others = parameters(), parameters()
    lr = torch.tensor(case.options["lr"], dtype=torch.float64)
    decay = torch.tensor(case.options["weight_decay"], dtype=torch.float64)
    numbers = case.make(params, path)
    tensors = case.make(others, path)
    # In torch a tensor lr and foreach=True exclude each other, so it comes in afterwards.
    tensors.param_groups[0].update(lr=lr, decay_lr=lr.clone(), weight_decay=decay)
    for seed in range(3):
        for optimizer, each in ((numbers, params), (tensors, others)):
            set_grads(each, seed)
            optimizer.step()
        numbers.param_groups[0]["lr"] *= 0.5
        lr.mul_(0.5)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


@each_case(INDEPENDENT_CASES, all_on=("reference",))
def test_decay_lr_is_a_copy_and_outlives_a_checkpoint(case: Case) -> None:
    lr = torch.tensor(0.5)
    optimizer = case.make(parameters(), "default", lr=lr)
    lr.fill_(0.125)
    assert optimizer.param_groups[0]["decay_lr"] == 0.5
    optimizer.add_param_group({"params": parameters(shapes=[(2,)]), "lr": 0.25})
    assert [group["decay_lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    other = case.make([{"params": parameters()}, {"params": parameters(shapes=[(2,)])}])
    other.load_state_dict(optimizer.state_dict())
    assert [group["decay_lr"] for group in other.param_groups] == [0.5, 0.25]


# ---- all of them ---------------------------------------------------------------------------------


@each_case(minimising(CASES), all_on=("reference",))
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


@each_case([case for case in CASES if case.penalty != "none"], all_on=("reference",))
def test_penalty_shrinks_whatever_the_direction(case: Case, path: str) -> None:
    w = torch.tensor([2.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = case.make([w], path)
    for _ in range(3):
        before = w.detach().abs()
        w.grad = torch.zeros_like(w)
        optimizer.step()
        # Adam's exact L1 threshold waits for the first gradient: test_l1 says why.
        waits = case.penalty == "l1_prox" and waits_for_gradient(case)
        assert ((w.abs() == before) if waits else (w.abs() < before)).all()


@pytest.mark.parametrize("name", ["weight_decay", "l1"])
@each_case(CASES, paths=FEW_PATHS, all_on=("reference",))
def test_no_penalty_is_ignored(case: Case, name: str, path: str) -> None:
    """A weight that is accepted and unused would pass many a comparison."""
    if not case.options[name]:
        case = replace(case, kwargs={**case.kwargs, name: 0.5})
    params, others = parameters(), parameters()
    run(case.make(params, path), steps=2)
    run(case.make(others, path, **{name: 1.5 * case.kwargs[name]}), steps=2)
    assert not all(torch.equal(w, other) for w, other in zip(params, others, strict=True))


@each_case(DECOUPLED_ALONE, all_on=("reference",))
def test_parameters_of_several_dtypes_are_each_decayed_once(case: Case, path: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float32)
    params = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes]
    for w in params:
        w.grad = torch.zeros_like(w)
    case.make(params, path, lr=0.5, weight_decay=0.5).step()
    assert all((w == 0.75).all() for w in params)  # exact in every dtype


@each_case(SOME, all_on=("reference",))
def test_weight_decay_may_be_a_tensor(case: Case, path: str) -> None:
    params, others = parameters(), parameters()
    decay = torch.tensor(case.kwargs["weight_decay"], dtype=torch.float64)
    run(case.make(params, path), steps=2)
    run(case.make(others, path, weight_decay=decay), steps=2)
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))
