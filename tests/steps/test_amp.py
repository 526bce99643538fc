"""Loss scaling by torch.amp.GradScaler, by its two attributes set by hand, and skipped steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.amp import GradScaler

import fusedreg

from cases import CASES, FEW_PATHS, PATHS, SOME, Case, each_case, parameters, run, set_grads
from compare import parameters_of
from problems import differences, same_bits, snapshot

SCALE = 2.0**12  # a power of 2, as GradScaler keeps it: scaling rounds nothing
SHAPES = [(0,), (5, 3), (), (7,)]

# Where a rule, a penalty or a clip could be treated differently by a skipped or scaled step.
FEW_CASES = [
    case
    for case in CASES
    if case.rule in {some.rule for some in SOME} and case.penalty in ("none", "elastic_net")
]


def few(case: Case, path: str, **options: Any) -> Any:
    return case.make(parameters(shapes=SHAPES), path, **options)


def set_scaled_grads(optimizer: torch.optim.Optimizer, seed: int, scale: float) -> None:
    set_grads(parameters_of(optimizer), seed)
    for param in parameters_of(optimizer):
        param.grad *= scale


def scaled_by_hand(optimizer: Any, grad_scale: Any = None, found_inf: Any = None) -> None:
    """One step with the attributes that GradScaler sets and deletes."""
    optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


# ---- GradScaler ----------------------------------------------------------------------------------


def scaler_of(scale: float = SCALE) -> GradScaler:
    scaler = GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.ones(()))  # makes its scale a tensor
    return scaler


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stage", ["ready", "unscaled"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=["free", "clipped"])
@each_case(FEW_CASES)
def test_steps_of_a_scaler_are_those_without_one(
    case: Case, max_grad_norm: float | None, stage: str, path: str
) -> None:
    """Bit for bit, whether or not the user unscaled before the step, and never unscaled twice."""
    optimizer = few(case, path, max_grad_norm=max_grad_norm)
    plain = few(case, path, max_grad_norm=max_grad_norm)
    scaler = scaler_of()
    for seed in range(3):
        set_scaled_grads(optimizer, seed, SCALE)
        if stage == "unscaled":
            scaler.unscale_(optimizer)
        before = [w.grad.clone() for w in parameters_of(optimizer)]
        scaler.step(optimizer)
        scaler.update()
        set_scaled_grads(plain, seed, 1.0)
        plain.step()
        if stage == "unscaled" or path == "fused":  # otherwise the scaler itself unscales them
            now = [w.grad for w in parameters_of(optimizer)]
            assert all(same_bits(a, b) for a, b in zip(now, before, strict=True))
    assert not differences(snapshot(optimizer), snapshot(plain))
    assert max_grad_norm is None or same_bits(optimizer.grad_norm, plain.grad_norm)


@pytest.mark.parametrize("stage", ["ready", "unscaled"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@each_case(FEW_CASES)
def test_a_scaler_that_finds_an_overflow_changes_nothing(
    case: Case, bad: float, stage: str, path: str
) -> None:
    optimizer = few(case, path)
    run(optimizer, steps=2)
    scaler = scaler_of()
    before = snapshot(optimizer)
    set_scaled_grads(optimizer, 7, SCALE)
    parameters_of(optimizer)[1].grad[2, 1] = bad
    if stage == "unscaled":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert snapshot(optimizer).keys() == before.keys()
    assert not differences(snapshot(optimizer), before)
    assert scaler.get_scale() == SCALE / 2
    # Without fused=True the scaler does not even call the step.
    assert optimizer.skipped_steps == (path == "fused")


def test_scaler_leaves_scaling_to_fused_optimizers_only() -> None:
    support = {
        name: getattr(fusedreg.SGD(parameters(), **options), "_step_supports_amp_scaling", False)
        for name, options in PATHS.items()
    }
    assert support == {name: bool(options.get("fused")) for name, options in PATHS.items()}


def test_scale_set_by_the_user_multiplies_that_of_the_scaler() -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = fusedreg.SGD([w], lr=1.0, fused=True)
    w.grad = torch.tensor([16.0, 32.0])
    optimizer.grad_scale = torch.tensor(8.0)
    scaler_of(2.0).step(optimizer)
    assert w.tolist() == [-1, -2]


def test_autocast_training_overflows_recovers_and_learns(path: str) -> None:
    """The loop of the torch documentation: a scale that is too large is halved until it fits."""
    model = torch.nn.Linear(8, 1)
    X = torch.randn(64, 8)
    y = X.sum(1, keepdim=True)
    optimizer = fusedreg.AdamW(model.parameters(), lr=0.05, max_grad_norm=1.0, **PATHS[path])
    scaler = GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.mse_loss(model(X).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    halvings = 127 - math.log2(scaler.get_scale())
    assert halvings >= 1
    assert losses[int(halvings)] == losses[0]  # the first gradient that fits comes after them
    assert losses[-1] < losses[0] / 4
    assert optimizer.state[model.weight]["step"] == 60 - halvings


# ---- the attributes by hand ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
@each_case(CASES)
def test_grad_scale_divides_and_never_writes_the_gradient(
    case: Case, kind: Callable[[float], Any], path: str
) -> None:
    optimizer, plain = few(case, path, max_grad_norm=1.0), few(case, path, max_grad_norm=1.0)
    for seed in range(2):
        set_scaled_grads(optimizer, seed, SCALE)
        before = [w.grad.clone() for w in parameters_of(optimizer)]
        scaled_by_hand(optimizer, grad_scale=kind(SCALE))
        after = [w.grad for w in parameters_of(optimizer)]
        assert all(same_bits(a, b) for a, b in zip(after, before, strict=True))
        set_scaled_grads(plain, seed, 1.0)
        plain.step()
    assert not differences(snapshot(optimizer), snapshot(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1e-3, 1e30])
def test_any_scale_divides_in_high_precision(scale: float, dtype: torch.dtype, path: str) -> None:
    w = torch.nn.Parameter(torch.zeros(9, dtype=dtype))
    w.grad = torch.randn(9).to(dtype)
    optimizer = fusedreg.SGD([w], lr=scale, **PATHS[path])  # takes back what the scale divides by
    scaled_by_hand(optimizer, grad_scale=torch.tensor(scale, dtype=torch.float64))
    # In float32 the quotient and its product are rounded once each; then the store.
    rtol = 2 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps * (dtype != torch.float32)
    torch.testing.assert_close(w.detach(), -w.grad, rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**16, 2.0**100])
@each_case(FEW_CASES)
def test_clip_threshold_does_not_depend_on_the_loss_scale(
    case: Case, scale: float, path: str
) -> None:
    """Clipping the scaled gradient would leave next to nothing of it."""
    optimizer, plain = few(case, path, max_grad_norm=1.0), few(case, path, max_grad_norm=1.0)
    set_scaled_grads(optimizer, 0, scale)
    scaled_by_hand(optimizer, grad_scale=torch.tensor(scale))
    set_scaled_grads(plain, 0, 1.0)
    plain.step()
    assert not differences(snapshot(optimizer), snapshot(plain))
    assert same_bits(optimizer.grad_norm, plain.grad_norm)
    assert optimizer.grad_norm > 2  # it does clip


# ---- skipped steps -------------------------------------------------------------------------------

FOUND = {
    "one": 1.0,
    "sum over two devices": torch.tensor(2.0),
    "tensor one": torch.tensor([1.0]),
    "half": 0.5,
    "tensor half": torch.tensor(0.5),
    "tensor nan": torch.tensor(math.nan),
}


def assert_skips(optimizer: Any, skipped_step: Callable[[], None]) -> None:
    """`skipped_step` changes no bit and no key of parameters and state, and is counted."""
    before, count = snapshot(optimizer), optimizer.skipped_steps.item()
    skipped_step()
    after = snapshot(optimizer)
    assert after.keys() == before.keys()
    assert not differences(after, before)
    assert optimizer.skipped_steps == count + 1


@each_case(CASES)
def test_found_inf_skips_parameters_moments_buffers_and_counts(case: Case, path: str) -> None:
    """2 is what GradScaler passes when two devices overflow, and what torch takes for 0."""
    optimizer = few(case, path, max_grad_norm=1.0)
    run(optimizer, steps=2)
    set_scaled_grads(optimizer, 5, math.inf)
    assert_skips(optimizer, lambda: scaled_by_hand(optimizer, found_inf=torch.tensor(2.0)))


@pytest.mark.parametrize("found_inf", FOUND.values(), ids=FOUND)
@each_case(FEW_CASES)
def test_any_nonzero_found_inf_skips(case: Case, found_inf: Any, path: str) -> None:
    optimizer = few(case, path)
    run(optimizer, steps=2)
    set_scaled_grads(optimizer, 5, 1.0)  # as finite as ever: only the flag counts
    for grad_scale in (None, torch.tensor(SCALE)):
        assert_skips(optimizer, lambda s=grad_scale: scaled_by_hand(optimizer, s, found_inf))


@pytest.mark.parametrize("found_inf", [None, 0, 0.0, torch.tensor(0.0)], ids=str)
@each_case(FEW_CASES, paths=FEW_PATHS)
def test_zero_found_inf_skips_nothing(case: Case, found_inf: Any, path: str) -> None:
    optimizer, plain = few(case, path), few(case, path)
    for seed in range(2):
        set_scaled_grads(optimizer, seed, 1.0)
        scaled_by_hand(optimizer, found_inf=found_inf)
        set_scaled_grads(plain, seed, 1.0)
        plain.step()
    assert not differences(snapshot(optimizer), snapshot(plain))
    assert optimizer.skipped_steps == 0


@each_case(CASES)
def test_after_a_skipped_first_step_all_is_as_if_it_never_was(case: Case, path: str) -> None:
    """No garbage in a new buffer, and the next gradient still enters it as the first."""
    optimizer, plain = few(case, path), few(case, path)
    set_scaled_grads(optimizer, 9, math.nan)
    before = [w.detach().clone() for w in parameters_of(optimizer)]
    scaled_by_hand(optimizer, found_inf=torch.tensor(1.0))
    assert all(same_bits(w, b) for w, b in zip(parameters_of(optimizer), before, strict=True))
    run(optimizer, steps=3)
    run(plain, steps=3)
    # A skipped step may have had to create own state that tells a first step from a later one.
    assert not differences(snapshot(optimizer), snapshot(plain))


@each_case([case for case in CASES if case.penalty == "none"])
def test_l1_turned_on_after_a_skipped_first_step_starts_cold(case: Case, path: str) -> None:
    """As where l1 is warmed up from 0 and the first loss scale overflows."""
    optimizer, plain = few(case, path), few(case, path)
    set_scaled_grads(optimizer, 9, math.nan)
    scaled_by_hand(optimizer, found_inf=torch.tensor(1.0))
    for each in (optimizer, plain):
        each.param_groups[0]["l1"] = 0.3
        run(each, steps=2)
    assert not differences(snapshot(optimizer), snapshot(plain))


@each_case(FEW_CASES)
def test_first_step_of_a_late_parameter_may_be_skipped_too(case: Case, path: str) -> None:
    """Then the one after it is its first, whatever the others have seen."""
    optimizer, plain = few(case, path), few(case, path)
    for each in (optimizer, plain):
        for seed in range(2):
            set_scaled_grads(each, seed, 1.0)
            parameters_of(each)[1].grad = None
            each.step()
    set_scaled_grads(optimizer, 5, math.nan)
    scaled_by_hand(optimizer, found_inf=torch.tensor(1.0))
    run(optimizer, steps=2)
    run(plain, steps=2)
    assert not differences(snapshot(optimizer), snapshot(plain))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@each_case(FEW_CASES)
def test_skip_nonfinite_skips_and_counts(case: Case, bad: float, path: str) -> None:
    """By itself, with clipping, and on top of a loss scale; also as the very first step."""
    options = [{}, {"max_grad_norm": 1.0}, {"max_grad_norm": math.inf}]
    for grad_scale, option in zip((None, SCALE, torch.tensor(SCALE)), options, strict=True):
        optimizer = few(case, path, skip_nonfinite=True, **option)
        plain = few(case, path, **option)
        for step in range(2):
            set_scaled_grads(optimizer, 5, 1.0)
            parameters_of(optimizer)[3].grad[4] = bad
            kept = [w.detach().clone() for w in parameters_of(optimizer)]
            scaled_by_hand(optimizer, grad_scale)
            assert all(same_bits(w, b) for w, b in zip(parameters_of(optimizer), kept, strict=True))
            assert not optimizer.grad_norm.isfinite()
            run(optimizer, steps=1, first_seed=step)
            run(plain, steps=1, first_seed=step)
            assert optimizer.skipped_steps == step + 1
        assert not differences(snapshot(optimizer), snapshot(plain))


@each_case(CASES, paths=FEW_PATHS)
def test_skip_nonfinite_changes_no_finite_step(case: Case, path: str) -> None:
    """Not even where the norm exceeds float32, which grad_norm shows as infinite."""
    optimizer = few(case, path, skip_nonfinite=True, max_grad_norm=1.0)
    plain = few(case, path, max_grad_norm=1.0)
    for seed, scale in enumerate((1.0, 2.0**200)):
        for each in (optimizer, plain):
            set_scaled_grads(each, seed, scale)
            each.step()
    assert optimizer.grad_norm == math.inf
    assert optimizer.skipped_steps == 0
    assert not differences(snapshot(optimizer), snapshot(plain))


def test_a_shallow_copy_counts_its_own_skipped_steps() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedreg.SGD([param], skip_nonfinite=True)
    param.grad = torch.full((2,), math.nan)
    optimizer.step()
    copy.copy(optimizer).step()
    assert optimizer.skipped_steps == 1


def test_skip_nonfinite_may_change_at_any_time(path: str) -> None:
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = fusedreg.SGD([w], lr=1.0, **PATHS[path])
    w.grad = torch.tensor([math.inf, 1.0])
    optimizer.skip_nonfinite = True
    assert_skips(optimizer, optimizer.step)
    optimizer.skip_nonfinite = False
    optimizer.step()
    assert w.tolist() == [-math.inf, -1]
    assert optimizer.skipped_steps == 1


def test_skipped_steps_is_an_integer_on_the_device(path: str) -> None:
    """Of both reasons to skip; a step that is skipped for both counts once."""
    w = torch.nn.Parameter(torch.zeros(2))
    optimizer = fusedreg.SGD([w], skip_nonfinite=True, **PATHS[path])
    for grad, found_inf in ((math.inf, 1.0), (math.nan, 0.0), (1.0, 2.0), (1.0, 0.0)):
        w.grad = torch.full_like(w, grad)
        scaled_by_hand(optimizer, found_inf=torch.tensor(found_inf))
    assert optimizer.skipped_steps == 3
    count = optimizer.skipped_steps
    assert (count.dtype, count.shape, count.device) == (torch.int64, (), w.device)
