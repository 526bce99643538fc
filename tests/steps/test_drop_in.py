"""Around a step all is as in torch.optim: hooks, groups, loss scaling, compilers, defaults."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedreg

from cases import (
    CLASSES,
    PATHS,
    SOME,
    TORCH_CASES,
    TORCH_CLASSES,
    Case,
    by_id,
    each_case,
    parameters,
    run,
    set_grads,
    tensors,
)
from compare import assert_close, beyond_torch, frozen, parameters_of, refused, results, snapshot

SHAPES = [(0,), (5, 3), (), (17,)]


def torchs(cls: type) -> type[torch.optim.Optimizer]:
    """The namesake, or any other of torch's: around the step they are alike."""
    return getattr(torch.optim, cls.__name__, torch.optim.SGD)


# ---- hooks, names, zero_grad ---------------------------------------------------------------------


def calls_of_hooks(cls: type) -> list[Any]:
    """Every hook that there is, twice, and what each was given, in the order of the calls."""
    calls: list[Any] = []
    optimizer = cls(parameters(shapes=SHAPES))
    set_grads(parameters_of(optimizer), 0)

    def note(name: str) -> Callable[..., None]:
        def hook(of: Any, *given: Any) -> None:
            shown = [sorted(each) if isinstance(each, dict) else len(each) for each in given]
            calls.append((name, of is optimizer, shown))

        return hook

    handles = []
    for turn in (0, 1):
        handles += [
            optimizer.register_step_pre_hook(note(f"step_pre {turn}")),
            optimizer.register_step_post_hook(note(f"step_post {turn}")),
            register_optimizer_step_pre_hook(note(f"global_pre {turn}")),
            register_optimizer_step_post_hook(note(f"global_post {turn}")),
        ]
        for kind in ("state_dict", "load_state_dict"):
            for when in ("pre", "post"):
                register = getattr(optimizer, f"register_{kind}_{when}_hook")
                handles.append(register(note(f"{kind}_{when} {turn}"), prepend=bool(turn)))

    def life() -> None:
        calls.append(optimizer.step(lambda: calls.append("closure") or 7.0))
        optimizer.load_state_dict(optimizer.state_dict())

    try:
        life()
    finally:
        for handle in handles:
            handle.remove()
    calls.append("removed")
    life()
    return calls


@pytest.mark.parametrize("cls", CLASSES)
def test_hooks_are_called_when_and_with_what_torch_calls_them(cls: type) -> None:
    calls = calls_of_hooks(cls)
    assert calls == calls_of_hooks(torchs(cls))
    assert calls[-3:] == ["removed", "closure", 7.0]


@pytest.mark.parametrize("cls", CLASSES)
def test_zero_grad_clears_or_fills(cls: type, path: str) -> None:
    optimizer = cls(parameters(shapes=SHAPES), **PATHS[path])
    run(optimizer, 1)
    grads = [param.grad for param in parameters_of(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g for p, g in zip(parameters_of(optimizer), grads, strict=True))
    assert not any(grad.any() for grad in grads)
    optimizer.zero_grad()
    assert all(param.grad is None for param in parameters_of(optimizer))


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_profiler_calls_a_step_as_torch_does(cls: type) -> None:
    seen = []
    for make in (cls, torchs(cls)):
        optimizer = make(parameters(shapes=SHAPES))
        with torch.autograd.profiler.profile() as profile:
            run(optimizer, 1)
            optimizer.zero_grad()
        seen.append({event.name for event in profile.function_events if "#" in event.name})
    name = cls.__name__
    assert seen[0] == seen[1]
    assert seen[0] == {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"}


BAD_GROUPS: dict[str, Callable[[nn.Parameter, nn.Parameter], Any]] = {
    "no_dict": lambda old, new: [new],
    "no_params": lambda old, new: {"lr": 0.1},
    "set": lambda old, new: {"params": {new}},
    "number": lambda old, new: {"params": [new, 1.0]},
    "no_leaf": lambda old, new: {"params": [2 * new]},
    "already_there": lambda old, new: {"params": [new, old]},
    "named_among_unnamed": lambda old, new: {"params": [("new", new)]},
    "half_named": lambda old, new: {"params": [("new", new), nn.Parameter(torch.ones(1))]},
}


@pytest.mark.parametrize("bad", BAD_GROUPS.values(), ids=BAD_GROUPS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_bad_group_is_refused_in_torchs_words(cls: type, bad: Callable[..., Any]) -> None:
    (new,) = parameters(9, shapes=[(2,)])
    theirs = torchs(cls)(parameters(shapes=SHAPES))
    with pytest.raises(Exception) as expected:  # noqa: PT011  # whatever torch says
        theirs.add_param_group(bad(parameters_of(theirs)[1], new))
    optimizer = cls(parameters(shapes=SHAPES))
    run(optimizer, 1)
    with refused(optimizer, expected.type, f"^{re.escape(str(expected.value))}$"):
        optimizer.add_param_group(bad(parameters_of(optimizer)[1], new))


# ---- copies --------------------------------------------------------------------------------------


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def public_attributes(optimizer: Any) -> dict[str, Any]:
    cls = type(optimizer)
    names = (name for name in dir(cls) if not name.startswith("_"))
    own = [name for name in names if isinstance(inspect.getattr_static(cls, name), property)]
    return frozen({name: getattr(optimizer, name) for name in own})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_has_every_public_attribute_of_its_own(
    cls: type, duplicate: Callable[[Any], Any], path: str
) -> None:
    options = {"max_grad_norm": 0.5, "skip_nonfinite": True, **PATHS[path]}
    optimizer = cls(parameters(shapes=SHAPES), **options)
    run(optimizer, 1)
    set_grads(parameters_of(optimizer), 1)
    parameters_of(optimizer)[1].grad[0, 0] = torch.inf
    optimizer.step()
    before = public_attributes(optimizer)
    assert {"max_grad_norm", "skip_nonfinite", "skipped_steps", "grad_norm", "backend"} < {*before}
    twin = duplicate(optimizer)
    assert public_attributes(twin) == before
    assert twin._step_supports_amp_scaling == (path == "fused")
    twin.max_grad_norm, twin.skip_nonfinite = None, False
    twin.skipped_steps.add_(1)
    twin.grad_norm.fill_(3.0)
    assert public_attributes(optimizer) == before


# ---- loss scaling --------------------------------------------------------------------------------

SCALE = 2.0**12  # a power of 2, as GradScaler keeps it: scaling rounds nothing


def scaled(optimizer: torch.optim.Optimizer, seed: int) -> GradScaler:
    """Gradients of a scaled loss, and the scaler to step with."""
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.ones(()))  # makes its scale a tensor
    set_grads(parameters_of(optimizer), seed)
    for param in parameters_of(optimizer):
        param.grad *= SCALE
    return scaler


@each_case([c for c in TORCH_CASES if c.penalty == "decay"])
def test_clipping_inside_is_unscaling_and_clipping_before_torchs_step(
    case: Case, path: str
) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=1.0)
    theirs = case.torch_cls(parameters(shapes=SHAPES), **case.torch_kwargs)
    for seed in range(3):
        scaled(optimizer, seed).step(optimizer)
        scaler = scaled(theirs, seed)
        scaler.unscale_(theirs)
        assert clip_grad_norm_(parameters_of(theirs), 1.0) > 2  # it does clip
        scaler.step(theirs)
    # About 10 roundings a step in either, as in test_oracle, and a factor that is a few ulp off
    # times a step of 0.1.
    assert_close(parameters_of(optimizer), parameters_of(theirs), ulps=3 * 3)


def moved(optimizer: Any) -> Any:
    """All that a step may move, and the gradients: but the counter and the norm."""
    return {name: seen for name, seen in snapshot(optimizer).items() if name != "own"}


@pytest.mark.parametrize("found_inf", [1.0, 2.0, 0.5])
@each_case(SOME)
def test_a_step_skipped_by_its_flag_leaves_the_gradients(
    case: Case, found_inf: float, path: str
) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=1.0)
    run(optimizer, 1)
    parameters_of(optimizer)[1].grad[0] = torch.tensor([torch.inf, -torch.nan, -0.0])
    before = moved(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(SCALE), torch.tensor(found_inf)
    optimizer.step()
    assert moved(optimizer) == before
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("stage", ["ready", "unscaled"])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_a_step_skipped_by_its_scaler_leaves_the_gradients(case: Case, stage: str) -> None:
    """With fused=True; without it, the scaler itself unscales what the user did not."""
    optimizer = case.make(parameters(shapes=SHAPES), "fused", max_grad_norm=1.0)
    run(optimizer, 1)
    scaler = scaled(optimizer, 1)
    parameters_of(optimizer)[1].grad[0] = torch.tensor([torch.inf, -torch.nan, -0.0])
    if stage == "unscaled":
        scaler.unscale_(optimizer)
    before = moved(optimizer)
    scaler.step(optimizer)
    assert moved(optimizer) == before
    assert optimizer.skipped_steps == 1


def test_clipping_before_the_step_and_in_it_is_clipping_twice_in_torch(path: str) -> None:
    """So that a clip left in the training loop does no harm."""
    for magnitude in (1e-3, 1.0, 1e3):
        (ours,), (theirs,) = parameters(shapes=[(17,)]), parameters(shapes=[(17,)])
        for param in (ours, theirs):
            nn.init.zeros_(param)
            param.grad = tensors(1, shapes=[(17,)])[0] * magnitude
            clip_grad_norm_([param], 1.0)
        once = theirs.grad.clone()
        clip_grad_norm_([theirs], 1.0)
        fusedreg.SGD([ours], lr=1.0, max_grad_norm=1.0, **PATHS[path]).step()
        # The norms and factors of the two are a few ulp apart.
        assert_close([-ours], [theirs.grad], ulps=4)
        # Clipped gradients have a norm just below 1; the 1e-6 in the factor takes that much again.
        torch.testing.assert_close(-ours.detach(), once, rtol=1e-6, atol=0)


# ---- compilers -----------------------------------------------------------------------------------


def train(compile_model: Callable[[Any], Any] = lambda model: model) -> Any:
    """The optimizer after three steps of a small network."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = compile_model(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double())
    optimizer = fusedreg.AdamW(model.parameters(), lr=0.1, l1=0.01, max_grad_norm=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        model(*tensors(seed, shapes=[(5, 4)])).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_stepped_as_an_eager_one(backend: str) -> None:
    compiled = train(lambda model: torch.compile(model, backend=backend))
    assert snapshot(compiled) == snapshot(train())


# ---- defaults ------------------------------------------------------------------------------------


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def life(case: Case, path: str) -> Any:
    """Construction, steps, a skipped step, a checkpoint and a copy, on the CPU by all means."""
    with torch.device("cpu"):
        params, later = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
        grads = [tensors(seed, shapes=SHAPES) for seed in range(4)]
        grads[1][1][0, 0] = torch.inf
    optimizer = case.make(params, path, max_grad_norm=0.5, skip_nonfinite=True)
    resumed = case.make(later, path, max_grad_norm=0.5, skip_nonfinite=True)
    for turn in range(3):
        for param, grad in zip(params, grads[turn], strict=True):
            param.grad = grad
        optimizer.step()
    with torch.no_grad():
        for param, other in zip(params, later, strict=True):
            other.copy_(param)
            other.grad = param.grad
    resumed.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    ends = []
    for each in (optimizer, resumed, twin):
        each.step()
        ends.append([results(each), frozen([each.grad_norm, each.skipped_steps])])
    return ends


@each_case(SOME)
def test_default_device_matters_to_nothing(case: Case, path: str) -> None:
    expected = life(case, path)
    for device in ("cpu", "meta"):
        with default_device(device):
            assert life(case, path) == expected
    assert torch.get_default_device() == torch.device("cpu")


# ---- to torch, and what only one class has -------------------------------------------------------


@each_case([case for case in SOME if case.torch_cls is not None])
def test_torch_goes_on_from_a_file_with_l1_and_takes_it_for_its_own(case: Case) -> None:
    optimizer = case.make(parameters(shapes=SHAPES))
    run(optimizer, 2)
    saved = optimizer.state_dict()
    bare = copy.deepcopy(saved)
    known = {*case.torch_cls(parameters()).param_groups[0]}
    for state in bare["state"].values():
        for name in beyond_torch(optimizer):
            state.pop(name, None)
    for group in bare["param_groups"]:
        for name in group.keys() - known:
            del group[name]
    ends = []
    for file in (saved, bare):
        params = [nn.Parameter(param.detach().clone()) for param in parameters_of(optimizer)]
        theirs = case.torch_cls(params)
        theirs.load_state_dict(file)
        run(theirs, 2)
        ends.append(frozen(params))
    assert ends[0] == ends[1]


def test_adagrad_moves_its_sums_into_shared_memory(path: str) -> None:
    options = {"initial_accumulator_value": 0.25, **PATHS[path]}
    early, late, plain = (fusedreg.Adagrad(parameters(shapes=SHAPES), **options) for _ in range(3))
    early.share_memory()
    assert all((early.state[param]["sum"] == 0.25).all() for param in parameters_of(early))
    for optimizer in (early, late, plain):
        run(optimizer, 1)
    late.share_memory()  # of state that has been stepped: the next step goes on there
    for optimizer in (early, late, plain):
        run(optimizer, 1)
    assert results(early) == results(late) == results(plain)
    for optimizer in (early, late):
        assert all(optimizer.state[param]["sum"].is_shared() for param in parameters_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_sums_of_adagrad_begin_where_torchs_do_whenever_a_parameter_comes(
    dtype: torch.dtype, path: str
) -> None:
    runs = []
    for make, options in (fusedreg.Adagrad, PATHS[path]), (torch.optim.Adagrad, {}):
        params = [nn.Parameter(value.to(dtype)) for value in tensors(0, shapes=[(5,), (3,), (2,)])]
        optimizer = make(params[:1], lr=0.1, initial_accumulator_value=0.5, **options)
        run(optimizer, 2)
        optimizer.add_param_group({"params": params[1:2]})
        run(optimizer, 1)
        # torch creates the state at once, fusedreg in the first step, both by the constructor's.
        optimizer.add_param_group({"params": params[2:]})
        run(optimizer, 2)
        runs.append([*params, *(optimizer.state[param]["sum"] for param in params)])
    # 2 ulp a step as in test_oracle.
    assert_close(*runs, ulps=5 * 2)


# ---- training loops ------------------------------------------------------------------------------


@each_case(SOME)
def test_accumulated_gradients_are_those_of_the_large_batch(case: Case, path: str) -> None:
    ends = []
    for parts in (1, 4):
        optimizer = case.make(parameters(shapes=[(5,)]), path, max_grad_norm=0.5)
        (w,) = parameters_of(optimizer)
        for seed in range(2):
            # Integers, and a loss linear in w: every sum of gradients is exact, in any order.
            X = tensors(seed, shapes=[(8, 5)])[0].mul(8).round()
            optimizer.zero_grad()
            for x in X.chunk(parts):
                ((x @ w).mean() / parts).backward()
            assert w.grad.norm() > 0.5  # one clip, of the sum
            optimizer.step()
        ends.append(snapshot(optimizer))
    assert ends[0] == ends[1]


@each_case([c for c in TORCH_CASES if c.penalty == "decay"])
def test_a_frozen_parameter_stands_still_and_goes_on_when_thawed(case: Case, path: str) -> None:
    runs = []
    for make in (lambda p: case.make(p, path), lambda p: case.torch_cls(p, **case.torch_kwargs)):
        w, v = params = parameters(shapes=[(5,), (5,)])
        optimizer = make(params)
        for needs_grad in (True, False, True):
            w.requires_grad_(needs_grad)
            before = frozen([w, optimizer.state.get(w)])
            optimizer.zero_grad()
            (w.square() * v.exp()).sum().backward()
            optimizer.step()
            assert (frozen([w, optimizer.state.get(w)]) == before) == (not needs_grad)
        runs.append(params)
    # 2 ulp a step as in test_oracle, each of which changes the next gradients by as much: the
    # second derivatives are below 10.
    assert_close(runs[0], runs[1], ulps=2 * 3 * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@each_case(SOME)
def test_a_module_may_change_its_dtype_between_steps(
    case: Case, dtype: torch.dtype, path: str
) -> None:
    """The state keeps its own, and the step is that of an optimizer which loads it."""
    model = nn.Linear(5, 3)
    optimizer = case.make(model.parameters(), path)
    run(optimizer, 2)
    model.to(dtype)
    assert parameters_of(optimizer)[0].dtype == dtype
    twin = case.make(copy.deepcopy(model).parameters(), path)
    twin.load_state_dict(optimizer.state_dict())
    run(optimizer, 1)
    run(twin, 1)
    for param, other in zip(parameters_of(optimizer), parameters_of(twin), strict=True):
        assert frozen(param) == frozen(other)
        for name, state in optimizer.state[param].items():
            wide = name in optimizer.counts and optimizer.counts[name].wide
            assert state.dtype == (torch.float64 if wide else torch.float32)
            # Loading widened it; here the same number is rounded into what was there.
            assert frozen(state) == frozen(twin.state[other][name].to(state.dtype))
