"""L1 and elastic net in the step: the exact minimiser, exact zeros, and what is not a Lasso."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from fusedreg.penalty import kkt_distance

from cases import CASES, FEW_PATHS, Case, each_case, parameters, run, set_grads
from problems import (
    PROX,
    SOLVABLE,
    STEPS,
    TOLERANCE,
    adaptive,
    differences,
    elementwise,
    family,
    loss_gradient,
    minimise,
    minimising,
    normal_equations,
    objective,
    remembers_variances,
    same_bits,
    snapshot,
    solution,
    start,
    tolerance,
    waits_for_gradient,
    with_eps,
)

PENALISED = [case for case in CASES if case.options["l1"]]
SPARSE = [case for case in SOLVABLE if case.options["l1"]]
LASSO = [case for case in SPARSE if case.penalty == "l1_prox"]
DECOUPLED = [case for case in PENALISED if case.options["l1_mode"] == "decoupled"]
SUBGRADIENT = [case for case in PENALISED if case.options["l1_mode"] == "subgradient"]


def assert_is_solution(w: Tensor, case: Case, l1: float, weight_decay: float) -> None:
    expected = solution(l1, weight_decay)
    torch.testing.assert_close(w.double(), expected, rtol=0, atol=tolerance(case, w.dtype))
    assert ((w == 0) == (expected == 0)).all()


# ---- the Lasso and the elastic net ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@each_case(SPARSE, paths=FEW_PATHS, all_on=("reference",))
def test_fixed_point_is_the_solution_of_scikit_learn(
    case: Case, dtype: torch.dtype, path: str
) -> None:
    """Coefficients and support; and the threshold comes last, so zeros outlive every step."""
    optimizer = case.make([start(dtype)], path)
    w = minimise(optimizer, STEPS[dtype])
    assert_is_solution(w, case, *objective(case))
    zero = w == 0
    assert not w[zero].signbit().any()  # +0.0
    assert torch.equal(minimise(optimizer, 1) == 0, zero)


@each_case(
    [case for case in minimising(PROX) if case not in SPARSE],
    paths=FEW_PATHS,
    all_on=("reference",),
)
def test_elastic_net_with_decoupled_decay_has_the_documented_fixed_point(
    case: Case, path: str
) -> None:
    """Decoupled decay is no penalty of the loss: g + l1 s + weight_decay (sqrt(v) + eps) w = 0.

    There v = g^2, or in AMSGrad its largest value so far; s is sign(w), or within [-1, 1] at 0.
    """
    options = case.options
    # The default 0.999 would remember the way here for thousands of steps.
    optimizer = case.make([start()], path, betas=(0.9, 0.9))
    w = minimise(optimizer, STEPS[torch.float64])
    g = loss_gradient(w)
    v = optimizer.state[optimizer.param_groups[0]["params"][0]].get("max_exp_avg_sq", g**2)
    residual = kkt_distance(
        w, g + options["weight_decay"] * (v.sqrt() + options["eps"]) * w, l1=0.3
    )
    assert 0 < (w == 0).sum() < len(w)
    # w is TOLERANCE away or less, and the residual changes by at most 2 + 0.9 * 4.6 times that.
    assert (residual <= 7 * TOLERANCE[torch.float64]).all()


@each_case(
    [c for c in elementwise(minimising(PROX)) if not remembers_variances(c)],
    paths=FEW_PATHS,
    all_on=("reference",),
)
def test_largest_gradient_at_zero_is_where_sparsity_ends(case: Case, path: str) -> None:
    """From lambda_max = max |gradient at 0| on all is exactly 0, and just below it one is not.

    Not for LAMB, whose steps get shorter with w, so that it never arrives, nor where a buffer has
    gradients near l1 over other variances, which pass the threshold now and then.
    """
    _, c = normal_equations(torch.float64)
    lambda_max = c.abs().max().item()
    # At lambda_max itself the last coefficient falls to 0 geometrically, that is never.
    w = minimise(case.make([start()], path, l1=1.01 * lambda_max), 300)
    assert (w == 0).all()
    w = minimise(case.make([start()], path, l1=0.99 * lambda_max), 300)
    assert (w != 0).sum() == 1


SCHEDULERS: dict[str, Callable[..., Any]] = {
    # For ever up and down: only a threshold that follows the momentum of every step converges.
    "cyclic": lambda o, lr, cycle_momentum: CyclicLR(
        o,
        base_lr=lr,
        max_lr=2 * lr,
        step_size_up=7,
        base_momentum=0.7,
        max_momentum=0.9,
        cycle_momentum=cycle_momentum,
    ),
    "one_cycle": lambda o, lr, cycle_momentum: OneCycleLR(
        o,
        max_lr=3 * lr,
        total_steps=601,
        base_momentum=0.7,
        max_momentum=0.9,
        cycle_momentum=cycle_momentum,
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@each_case(LASSO, all_on=("reference",))
def test_scheduled_momentum_still_reaches_the_lasso(case: Case, scheduler: str) -> None:
    """Also of an SGD that was constructed without momentum: these schedulers turn it on."""
    optimizer = case.make([start()])
    has_momentum = bool({"momentum", "betas"} & case.options.keys())
    schedule = SCHEDULERS[scheduler](optimizer, case.options["lr"], has_momentum)
    # Rates and forgetting are at least those of the table for most steps: its tolerance holds.
    assert_is_solution(minimise(optimizer, 600, each=schedule.step), case, 0.3, 0.0)


@each_case(LASSO, paths=FEW_PATHS, all_on=("reference",))
def test_l1_may_be_turned_on_and_off_during_a_run(case: Case, path: str) -> None:
    optimizer = case.make([start()], path, l1=0.0)
    (group,) = optimizer.param_groups
    assert (minimise(optimizer, 20) != 0).all()  # the momentum buffer is warm
    group["l1"] = 0.3
    assert_is_solution(minimise(optimizer, STEPS[torch.float64]), case, 0.3, 0.0)
    group["l1"] = 0.0
    assert (minimise(optimizer, 20) != 0).all()


@each_case(
    [case for case in CASES if case.penalty == "none"], paths=FEW_PATHS, all_on=("reference",)
)
def test_turning_on_a_vanishing_l1_changes_no_step(case: Case, path: str) -> None:
    """The threshold needs a state that the run has not had so far; the buffer must not notice."""
    params, others = parameters(), parameters()
    plain, optimizer = case.make(params, path), case.make(others, path)
    for l1 in (0.0, 1e-300, 0.0, 1e-300):
        optimizer.param_groups[0]["l1"] = l1
        run(plain, steps=2)
        run(optimizer, steps=2)
        assert not differences(snapshot(optimizer), snapshot(plain))


@each_case([c for c in elementwise(PROX) if c in SPARSE], all_on=("reference",))
def test_kkt_conditions_hold_at_the_end_of_a_logistic_regression(case: Case) -> None:
    """Not quadratic, through autograd, and with an intercept in a group without penalty.

    Which LAMB never settles: its steps are as long as lr times the intercept.
    """
    X, noise = torch.randn(60, 6, dtype=torch.float64), torch.randn(60, dtype=torch.float64)
    y = (2 * X[:, 0] - X[:, 1] + noise > -0.5).double()
    X *= 3  # so that the Hessian is about 1
    w = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    groups = [{"params": [w]}, {"params": [b], "l1": 0.0, "weight_decay": 0.0}]
    # The gradient of the intercept vanishes; a large eps lets the adaptive ones settle there.
    optimizer = case.make(groups, lr=max(0.3, case.options["lr"]), **with_eps(case, 1.0))
    for _ in range(600):
        optimizer.zero_grad()
        binary_cross_entropy_with_logits(X @ w + b, y).backward()
        optimizer.step()
    assert w.grad is not None
    assert b.grad is not None
    distance = kkt_distance(w, w.grad, l1=0.3, weight_decay=case.options["weight_decay"])
    assert 0 < (w == 0).sum() < 6
    # The tolerance of `minimise`: as many steps, and rates at least as good.
    assert (distance <= tolerance(case, w.dtype)).all()
    assert b.grad.abs() <= tolerance(case, w.dtype)


# ---- what is left alone --------------------------------------------------------------------------


@each_case(CASES, all_on=("reference",))
def test_learning_rate_zero_leaves_every_bit(case: Case, path: str) -> None:
    """Of -0.0, infinities and NaN too; with and without gradient and history."""
    special = [-0.0, 0.0, 1.5, -math.inf, math.nan, 5e-324, 1.7e308]
    for lr in (0.0, torch.tensor(0.0)):
        for warm_steps in (0, 2):
            w = torch.nn.Parameter(torch.ones(7, dtype=torch.float64))
            optimizer = case.make([w], path)
            run(optimizer, warm_steps)
            w.data.copy_(torch.tensor(special, dtype=torch.float64))
            before = w.detach().clone()
            optimizer.param_groups[0]["lr"] = lr
            for grad in (torch.zeros_like(w), torch.randn_like(w)):
                w.grad = grad
                optimizer.step()
                assert same_bits(w, before)


@each_case([case for case in LASSO if waits_for_gradient(case)], all_on=("reference", "default"))
def test_rows_of_an_embedding_without_gradient_are_not_wiped_out(case: Case, path: str) -> None:
    """Their second moment is 0, and lr l1 / (sqrt(0) + eps) would be a threshold of millions."""
    embedding = torch.nn.Embedding(40, 3)
    before = embedding.weight.detach().clone()
    optimizer = case.make(embedding.parameters(), path, lr=1e-3, l1=1e-6)
    seen = torch.tensor([3, 5, 8])
    for _ in range(3):
        optimizer.zero_grad()
        embedding(seen).square().sum().backward()
        optimizer.step()
    changed = (embedding.weight != before).any(1)
    assert changed.nonzero().flatten().tolist() == seen.tolist()


@each_case(PENALISED, all_on=("reference",))
def test_nan_does_not_become_zero(case: Case, path: str) -> None:
    w = torch.tensor([0.1, 0.1, 5.0], dtype=torch.float64, requires_grad=True)
    w.grad = torch.tensor([math.nan, 0.1, 0.1], dtype=torch.float64)
    case.make([w], path).step()
    # One NaN makes the norm of its tensor NaN.
    assert w.isnan().tolist() == [True, case.cls.layerwise, case.cls.layerwise]


@pytest.mark.parametrize("mode", ["decoupled", "subgradient"])
@each_case(
    [case for case in CASES if not case.options["l1"]], paths=FEW_PATHS, all_on=("reference",)
)
def test_without_l1_its_mode_changes_nothing(case: Case, mode: str, path: str) -> None:
    params, others = parameters(), parameters()
    plain, optimizer = case.make(params, path), case.make(others, path, l1_mode=mode)
    run(plain, steps=2)
    run(optimizer, steps=2)
    assert not differences(snapshot(optimizer), snapshot(plain))


def scaled(case: Case, c: float) -> dict[str, Any]:
    """Options with which a loss c times as large has the same iterates."""
    options = case.options
    if family(case) == "linear":
        factors = {"lr": 1 / c, "weight_decay": c, "l1": c}
    else:  # lr is the length of a step, and what is decoupled knows nothing of the loss
        factors = {
            "weight_decay": 1.0 if options["decoupled_weight_decay"] else c,
            "l1": 1.0 if options["l1_mode"] == "decoupled" else c,
            "initial_accumulator_value": c**2,
        }
    return {name: factor * options[name] for name, factor in factors.items() if name in options}


@each_case(CASES, all_on=("reference",))
def test_scaling_the_objective_changes_no_iterate(case: Case, path: str) -> None:
    """For eps = 0. Not one bit, because the factor is a power of 2."""
    c = 2.0**10
    eps = with_eps(case, 0.0)
    params, others = parameters(), parameters()
    plain = case.make(params, path, **eps)
    times_c = case.make(others, path, **eps, **scaled(case, c))
    for seed in range(3):
        for optimizer, factor in ((plain, 1.0), (times_c, c)):
            set_grads(optimizer.param_groups[0]["params"], seed)
            for w in optimizer.param_groups[0]["params"]:
                w.grad *= factor
            optimizer.step()
    assert all(same_bits(w, other) for w, other in zip(params, others, strict=True))


# ---- the other modes are not the Lasso -----------------------------------------------------------


def noisy_gradient() -> Callable[[Tensor], Tensor]:
    """The gradient of the regression plus noise of variance 1, here +1 and -1 in turn."""
    sign = 1.0

    def gradient(w: Tensor) -> Tensor:
        nonlocal sign
        sign = -sign
        return loss_gradient(w) + sign

    return gradient


ADAM = [case for case in adaptive(minimising(DECOUPLED)) if case.options.get("amsgrad") is False]


@each_case(elementwise(ADAM), paths=FEW_PATHS, all_on=("reference",))
def test_decoupled_l1_of_adam_thresholds_the_signal_to_noise_ratio(case: Case, path: str) -> None:
    """|E g| / sqrt(E g^2) is l1 where w is not 0, and at most l1 where it is."""
    optimizer = case.make([start()], path, lr=0.03, betas=(0.9, 0.99))
    w = minimise(optimizer, 1200, gradient=noisy_gradient())
    g = loss_gradient(w)
    ratio = g.abs() / (g**2 + 1).sqrt()
    assert 0 < (w == 0).sum() < len(w)
    # The noise swings the first moment by (1 - 0.9) / (1 + 0.9) = 0.053, hence w by 0.03 * 0.053,
    # and g, with a Hessian up to 2, by 1% of 0.31. sqrt(v) swings by 0.15% of itself, and still
    # knows the first 300 steps, in which v fell from 20 to 1, by 0.99 ** 900 * 20 / 2 = 0.1%.
    on = ratio[w != 0]
    torch.testing.assert_close(on, torch.full_like(on, 0.3), rtol=0.013, atol=0)
    assert (ratio[w == 0] < 0.3).all()


def longest(case: Case) -> float:
    """At least the largest step over lr: of one gradient after zeros, or of equal ones for ever."""
    options = case.options
    kept = options.get("alpha", 0.0)  # RMSprop corrects no bias
    return 1 / (1 - kept) ** 0.5 / (1 - options.get("momentum", 0.0))


# Where a variance vanishes only eps limits a step, and LAMB's get shorter with w.
BOUNDED = [
    case
    for case in elementwise(DECOUPLED)
    if family(case) != "linear" and not case.options.get("centered")
]


@each_case(BOUNDED, all_on=("reference",))
def test_decoupled_l1_above_the_largest_direction_beats_every_step(case: Case, path: str) -> None:
    """As lr l1 then exceeds the largest step: its strength does not depend on the loss."""
    sign = -1000 if case.options["maximize"] else 1000
    optimizer = case.make([start()], path, l1=2 * longest(case))
    assert (minimise(optimizer, 40, gradient=lambda w: sign * loss_gradient(w)) == 0).all()


@each_case(minimising(SUBGRADIENT), paths=FEW_PATHS, all_on=("reference",))
def test_subgradient_crosses_zero_and_never_stays(case: Case, path: str) -> None:
    optimizer = case.make([start()], path)
    minimise(optimizer, 200)
    (w,) = optimizer.param_groups[0]["params"]
    signs: list[Tensor] = []
    minimise(optimizer, 100, each=lambda: signs.append(w.detach().sign()))
    assert (torch.stack(signs) != 0).all()
    crossings = (torch.stack(signs).diff(dim=0) != 0).sum(0)
    assert crossings[solution(0.3, 0.0) == 0].any()


@each_case(SUBGRADIENT, all_on=("reference",))
def test_subgradient_of_zero_is_zero(case: Case, path: str) -> None:
    w = torch.zeros(3, requires_grad=True)
    optimizer = case.make([w], path)
    w.grad = torch.zeros(3)
    optimizer.step()
    assert (w == 0).all()
