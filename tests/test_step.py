"""One step: what it touches, what it must not touch, and what must not matter to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedreg

from cases import CASES, DTYPES, PATHS, Case, by_id, parameters, run, set_grads, tensors
from compare import assert_close, default_dtype, frozen, parameters_of, snapshot
from oracle import Oracle, Slot, one_step

CLASSES = [fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW]
SHAPES = [(0,), (5, 3), (), (17,)]
# Where the formula does not matter: one case of each class, with all it has.
SOME = [
    case
    for case in CASES
    if case.penalty == "elastic_net" and case.rule in ("sgd_nesterov", "adam_amsgrad", "adamw")
]


def results(optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Parameters and state, bit by bit."""
    seen = snapshot(optimizer)
    return seen["params"], seen["state"]


def torchs_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The state without the momentum mass, which also exists where a first step may be skipped."""
    states = [optimizer.state.get(param, {}) for param in parameters_of(optimizer)]
    return [frozen({n: s for n, s in each.items() if n != "momentum_mass"}) for each in states]


# ---- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(CASES))
def test_grad_is_bitwise_unchanged(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5, skip_nonfinite=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    for seed in range(2):
        set_grads(parameters_of(optimizer), seed)
        grads = [param.grad for param in parameters_of(optimizer)]
        before = frozen(grads)
        optimizer.step()
        assert frozen(grads) == before
        assert all(p.grad is g for p, g in zip(parameters_of(optimizer), grads, strict=True))


@pytest.mark.parametrize("case", **by_id(SOME))
def test_step_without_any_grad_does_nothing(case: Case, path: str) -> None:
    optimizer = case.make(parameters(), path, max_grad_norm=1.0)
    before = results(optimizer)
    optimizer.step()
    assert results(optimizer) == before
    assert len(optimizer.state) == 0
    assert optimizer.grad_norm == 0


@pytest.mark.parametrize("case", **by_id(CASES))
def test_parameter_without_grad_waits_for_its_own_first_step(case: Case, path: str) -> None:
    (early,), (late,) = parameters(0, shapes=[(5,)]), parameters(1, shapes=[(5,)])
    (alone,) = parameters(1, shapes=[(5,)])
    together, apart = case.make([late, early], path), case.make([alone], path)
    before = frozen(late)
    for seed in range(2):
        set_grads([early], seed)
        together.step()
    assert frozen(late) == before
    assert late not in together.state
    for seed in range(2):
        set_grads([early, late], seed)
        alone.grad = late.grad.clone()
        together.step()
        apart.step()
    assert frozen(late) == frozen(alone)
    assert frozen(together.state.get(late)) == frozen(apart.state.get(alone))


# ---- lr = 0 ------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1e-310, 5e-324, -2.5, 1e300]


@pytest.mark.parametrize("case", **by_id(CASES))
def test_lr_zero_changes_no_bit_of_a_parameter(case: Case, path: str) -> None:
    eps = {} if case.cls is fusedreg.SGD else {"eps": 0.0}
    for lr, dtype in zip(
        [0.0, -0.0, torch.tensor(0.0), torch.tensor([[-0.0]])], DTYPES, strict=True
    ):
        param = nn.Parameter(torch.tensor(SPECIAL, dtype=torch.float64).to(dtype))
        optimizer = case.make([param], path, **eps)
        # In torch a tensor lr and foreach=True exclude each other, so it comes in afterwards.
        optimizer.param_groups[0]["lr"] = lr
        before = frozen(param)
        for grad in (0.0, 1.0, math.inf):
            param.grad = torch.full_like(param, grad)
            optimizer.step()
            assert frozen(param) == before


@pytest.mark.parametrize("case", **by_id(SOME))
def test_lr_zero_still_moves_the_state(case: Case, path: str) -> None:
    """As in torch; a warm-up from lr = 0 collects momentum and counts steps."""
    optimizer, usual = (case.make(parameters(shapes=SHAPES), path) for _ in range(2))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, 1)
    run(usual, 1)
    assert torchs_state(optimizer) == torchs_state(usual)


@pytest.mark.parametrize("case", **by_id([case for case in CASES if case.penalty == "none"]))
def test_zero_gradients_and_no_penalty_move_nothing(case: Case, path: str) -> None:
    optimizer = case.make(parameters(), path)
    before = results(optimizer)[0]
    for param in parameters_of(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert results(optimizer)[0] == before
    optimizer.zero_grad()
    assert all(param.grad is None for param in parameters_of(optimizer))


# ---- skipped steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(CASES))
def test_skipped_step_is_as_if_never_called(case: Case, path: str) -> None:
    """GradScaler's found_inf may be any number but 0; a norm of inf or NaN skips likewise."""
    for found_inf, grad in [(1.0, 1.0), (2.0, math.inf), (0.5, math.nan), (0.0, math.inf)]:
        optimizer, usual = (
            case.make(parameters(shapes=SHAPES), path, skip_nonfinite=found_inf == 0.0)
            for _ in range(2)
        )
        for seed in range(2):  # also the very first step
            optimizer.found_inf = torch.tensor(found_inf)
            for param in parameters_of(optimizer):
                param.grad = torch.full_like(param, grad)
            before = frozen(parameters_of(optimizer))
            optimizer.step()
            assert frozen(parameters_of(optimizer)) == before
            del optimizer.found_inf
            run(optimizer, 1, seed)
            run(usual, 1, seed)
        assert frozen(parameters_of(optimizer)) == frozen(parameters_of(usual))
        assert torchs_state(optimizer) == torchs_state(usual)
        assert optimizer.skipped_steps == 2


# ---- what must not matter ----------------------------------------------------------------------


def odd_layouts(dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors whose memory is not in the order of their indices."""
    return [
        torch.randn(5, 4).to(dtype).t(),
        torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 2, 2, 2).to(dtype).to(memory_format=torch.channels_last_3d),
        torch.randn(2, 3, 4).to(dtype).permute(2, 0, 1),
        torch.randn(6, 8).to(dtype)[1:5, ::3],
        torch.randn(40).to(dtype)[3:],
        torch.randn(4).to(dtype)[2],
        torch.randn(3, 0).to(dtype).t(),
    ]


def reordered(grad: torch.Tensor) -> torch.Tensor:
    """The same gradient with the last dimension slowest."""
    order = tuple(range(grad.dim()))[::-1]
    return grad.permute(order).contiguous().permute(order)


def with_gaps(grad: torch.Tensor) -> torch.Tensor:
    """The same gradient in every second place of its memory."""
    return torch.stack([grad, grad], dim=-1)[..., 0]


@pytest.mark.parametrize("case", **by_id(CASES))
def test_layout_does_not_matter(case: Case, path: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        odd = [nn.Parameter(value) for value in odd_layouts(dtype)]
        usual = [nn.Parameter(value.detach().clone().contiguous()) for value in odd]
        optimizers = case.make(odd, path), case.make(usual, path)
        for seed, laid_out in enumerate([reordered, with_gaps]):
            set_grads(usual, seed)
            for param, plain in zip(odd, usual, strict=True):
                param.grad = laid_out(plain.grad)
            for optimizer in optimizers:
                optimizer.step()
        for param, plain in zip(odd, usual, strict=True):
            plain.grad = torch.full_like(plain, 0.5)
            param.grad = torch.tensor(0.5, dtype=dtype).expand(param.shape)  # of sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        assert results(optimizers[0]) == results(optimizers[1])


@pytest.mark.parametrize("case", **by_id(CASES))
def test_dtypes_may_be_mixed_in_a_group(case: Case, path: str) -> None:
    mixed = [parameters(i, dtype, SHAPES)[1] for i, dtype in enumerate(DTYPES)]
    alone = [[nn.Parameter(param.detach().clone())] for param in mixed]
    optimizers = [case.make(mixed, path), *(case.make(params, path) for params in alone)]
    for seed in range(2):
        set_grads(mixed, seed)
        for param, (single,) in zip(mixed, alone, strict=True):
            single.grad = param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    together, *apart = (results(optimizer) for optimizer in optimizers)
    for index, (params, state) in enumerate(apart):
        assert [together[0][index]] == params
        assert [together[1][index]] == state


@pytest.mark.parametrize("case", **by_id(CASES))
def test_splitting_and_reordering_do_not_matter(case: Case, path: str) -> None:
    # Clipped, too: the norm is summed in another order, but in float64, and float32 is compared.
    (whole,) = parameters(dtype=torch.float32, shapes=[(60,)])
    sizes, order = [7, 0, 32, 21], [2, 0, 3, 1]
    pieces = [nn.Parameter(piece.clone()) for piece in whole.detach().split(sizes)]
    groups = [{"params": [pieces[i] for i in some]} for some in (order[:1], order[1:])]
    optimizers = [case.make(params, path, max_grad_norm=0.5) for params in ([whole], groups)]
    for seed in range(3):
        set_grads([whole], seed)
        for piece, grad in zip(pieces, whole.grad.split(sizes), strict=True):
            piece.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert frozen(torch.cat(pieces)) == frozen(whole.detach())
    assert optimizers[0].grad_norm == optimizers[1].grad_norm


@pytest.mark.parametrize("case", **by_id(SOME))
def test_same_inputs_give_the_same_bits_under_any_default_dtype(case: Case, path: str) -> None:
    seen = []
    for default in (torch.float32, torch.float32, torch.float64, torch.bfloat16):
        with default_dtype(default):
            optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5)
            run(optimizer, 2)
        seen.append(frozen([*parameters_of(optimizer), optimizer.grad_norm]))
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize("case", **by_id(CASES))
def test_low_precision_is_float32_arithmetic_rounded_once(case: Case, path: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        optimizer = case.make(parameters(dtype=dtype, shapes=SHAPES), path)
        run(optimizer, 2)
        params = parameters_of(optimizer)
        wide = [nn.Parameter(param.detach().float()) for param in params]
        twin = case.make(wide, path)
        twin.load_state_dict(optimizer.state_dict())  # which widens the states
        set_grads(params, seed=5)
        for param, single in zip(params, wide, strict=True):
            single.grad = param.grad.float()
        optimizer.step()
        twin.step()
        for param, single in zip(params, wide, strict=True):
            assert frozen(param) == frozen(single.to(dtype))
            exact = twin.state.get(single, {})
            for name, state in optimizer.state.get(param, {}).items():
                assert frozen(state) == frozen(exact[name].to(state.dtype))


# Few digits, so that shrunken examples can be read.
rates = st.sampled_from([1e-3, 0.1, 0.5])
shares = st.sampled_from([0.0, 0.5, 0.9])
weights = st.sampled_from([0.0, 0.01, 0.7])
modes = st.sampled_from(["prox", "decoupled", "subgradient"])
common = {"lr": rates, "weight_decay": weights, "l1": weights, "l1_mode": modes}
sgd = {
    "momentum": shares,
    "dampening": shares,
    "maximize": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
}
adam = {
    "betas": st.tuples(shares, st.sampled_from([0.0, 0.9, 0.999])),
    "eps": st.sampled_from([1e-8, 1e-2]),
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
}
any_case = st.one_of(
    st.builds(Case, st.just("sgd"), st.just("any"), st.just(fusedreg.SGD), kwargs)
    if cls is fusedreg.SGD
    else st.builds(Case, st.just("adam"), st.just("any"), st.just(cls), kwargs)
    for cls, kwargs in [
        (fusedreg.SGD, st.fixed_dictionaries(common | sgd)),
        (fusedreg.Adam, st.fixed_dictionaries(common | adam)),
        (fusedreg.AdamW, st.fixed_dictionaries(common | adam)),
    ]
)


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of up to three dimensions, any of them permuted, cut or stepped over."""
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    order = draw(st.permutations(range(len(shape))))
    seed = draw(st.integers(0, 99))
    (base,) = tensors(seed, shapes=[tuple(n * s for n, s in zip(shape, steps, strict=True))])
    return base[tuple(slice(None, None, step) for step in steps)].permute(order)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `path` is one for all examples
)
@given(
    case=any_case, params=st.lists(strided(), min_size=1, max_size=4), grad_seed=st.integers(0, 99)
)
def test_any_shape_stride_and_option_equals_the_oracle(
    path: str, case: Case, params: list[torch.Tensor], grad_seed: int
) -> None:
    params = [nn.Parameter(param) for param in params]
    optimizer = case.make(params, path)
    oracle = Oracle(case, [param.detach().numpy().copy() for param in params])
    for seed in range(grad_seed, grad_seed + 3):
        set_grads(params, seed)
        oracle.step([param.grad.numpy() for param in params])
        optimizer.step()
    # 2 ulp a step as in test_oracle.
    assert_close(params, [torch.from_numpy(np.asarray(w)) for w in oracle.values], ulps=3 * 2)


# ---- hyper-parameters are read afresh ----------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(CASES))
def test_options_edited_between_steps_count_at_once(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path)
    group = optimizer.param_groups[0]
    slots = [Slot(param.detach().numpy().copy()) for param in group["params"]]
    for seed in range(3):
        options = {"lr": 0.1 / (1 + seed), "weight_decay": 0.1 * seed}
        if "l1" in case.kwargs:
            options["l1"] = 0.3 / (1 + seed)
        group.update(options)
        set_grads(group["params"], seed)
        for slot, param in zip(slots, group["params"], strict=True):
            name = case.cls.__name__
            one_step(slot, param.grad.numpy(), name, **{**case.kwargs, **options})
        optimizer.step()
    # 2 ulp a step as in test_oracle.
    assert_close(group["params"], [torch.from_numpy(np.asarray(s.w)) for s in slots], ulps=3 * 2)


@pytest.mark.parametrize("case", **by_id(CASES))
def test_tensor_lr_is_live(case: Case, path: str) -> None:
    if path == "foreach" and case.cls is not fusedreg.SGD:
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            case.make(parameters(), path, lr=torch.tensor(0.1))
        return
    for shape in [(), (1, 1)]:
        lr = torch.full(shape, 0.25)
        live, fixed = (case.make(parameters(shapes=SHAPES), path, lr=rate) for rate in (lr, 1.0))
        for seed in range(2):
            lr.mul_(0.5)
            fixed.param_groups[0]["lr"] = lr.item()
            run(live, 1, seed)
            run(fixed, 1, seed)
        assert live.param_groups[0]["lr"] is lr
        assert frozen(parameters_of(live)) == frozen(parameters_of(fixed))
        assert torchs_state(live) == torchs_state(fixed)


def lr_schedulers() -> dict[str, Callable[[Any], Any]]:
    """Every scheduler of torch, over six steps."""
    one = lr_scheduler
    return {
        "LambdaLR": lambda o: one.LambdaLR(o, lambda epoch: 0.9**epoch),
        "MultiplicativeLR": lambda o: one.MultiplicativeLR(o, lambda epoch: 0.8),
        "StepLR": lambda o: one.StepLR(o, 2, gamma=0.3),
        "MultiStepLR": lambda o: one.MultiStepLR(o, [1, 3]),
        "ConstantLR": lambda o: one.ConstantLR(o, total_iters=3),
        "LinearLR": lambda o: one.LinearLR(o, start_factor=0.2, total_iters=4),
        "ExponentialLR": lambda o: one.ExponentialLR(o, 0.7),
        "PolynomialLR": lambda o: one.PolynomialLR(o, total_iters=5, power=2.0),
        "CosineAnnealingLR": lambda o: one.CosineAnnealingLR(o, 4),
        "CosineAnnealingWarmRestarts": lambda o: one.CosineAnnealingWarmRestarts(o, 2),
        "SequentialLR": lambda o: one.SequentialLR(
            o, [one.ConstantLR(o, total_iters=2), one.ExponentialLR(o, 0.7)], milestones=[2]
        ),
        "ChainedScheduler": lambda o: one.ChainedScheduler(
            [one.LinearLR(o, total_iters=3), one.ExponentialLR(o, 0.9)], optimizer=o
        ),
        "ReduceLROnPlateau": lambda o: one.ReduceLROnPlateau(o, patience=1),
        "CyclicLR": lambda o: one.CyclicLR(o, 0.01, 0.1, step_size_up=2),
        "OneCycleLR": lambda o: one.OneCycleLR(o, 0.1, total_steps=8),
    }


def test_table_of_schedulers_is_complete() -> None:
    assert {*lr_schedulers(), "LRScheduler"} >= set(lr_scheduler.__all__)


@pytest.mark.parametrize("name", lr_schedulers())
@pytest.mark.parametrize("cls", CLASSES)
def test_scheduler_moves_fusedreg_as_torch(cls: type, name: str, path: str) -> None:
    """Including momentum and betas, which CyclicLR and OneCycleLR write into the groups."""
    torch_cls = getattr(torch.optim, cls.__name__)
    no_tensors = path == "foreach" and cls is not fusedreg.SGD  # refused in torch, too
    for make_lr in (float,) if no_tensors else (float, torch.tensor):
        runs = []
        for make, options in (cls, PATHS[path]), (torch_cls, {}):
            params = parameters(dtype=torch.float32, shapes=SHAPES)
            optimizer = make(params, lr=make_lr(0.05), **options)
            scheduler = lr_schedulers()[name](optimizer)
            seen = []
            for seed in range(6):
                run(optimizer, 1, seed)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                written = ("lr", "momentum", "betas", "initial_lr")
                group = optimizer.param_groups[0]
                seen.append(frozen({key: group[key] for key in written if key in group}))
            runs.append((seen, params))
        (ours, params), (theirs, expected) = runs
        assert ours == theirs
        # A step of each side rounds by half an ulp, in the worst case always the other way.
        assert_close(params, expected, ulps=6)


# ---- the surroundings of a step ----------------------------------------------------------------


def test_hooks_run_in_torchs_order_and_see_final_parameters(path: str) -> None:
    seen: list[tuple[str, float]] = []
    optimizer = fusedreg.SGD([nn.Parameter(torch.ones(()))], lr=0.5, l1=10.0, **PATHS[path])
    (param,) = parameters_of(optimizer)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, param.item()))

    def closure() -> float:
        assert torch.is_grad_enabled()
        seen.append(("closure", param.item()))
        optimizer.zero_grad()
        (2 * param).backward()
        return 7.0

    handles = [
        register_optimizer_step_pre_hook(note("global_pre")),
        register_optimizer_step_post_hook(note("global_post")),
    ]
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    try:
        assert optimizer.step(closure) == 7.0
    finally:
        for handle in handles:
            handle.remove()
    before = [("global_pre", 1.0), ("pre", 1.0), ("closure", 1.0)]
    # The threshold is part of the step: a hook that averages parameters sees the exact zero.
    assert seen == [*before, ("post", 0.0), ("global_post", 0.0)]


def test_pre_hook_may_rewrite_the_arguments(path: str) -> None:
    optimizer = fusedreg.AdamW(parameters(), **PATHS[path])
    optimizer.register_step_pre_hook(lambda opt, *_: ((opt, lambda: 3.0), {}))
    assert optimizer.step(lambda: 1.0) == 3.0
    assert optimizer.step() == 3.0


@pytest.mark.parametrize("case", **by_id(SOME))
def test_closure_makes_the_gradients_that_are_clipped_and_used(case: Case, path: str) -> None:
    ends = []
    for with_closure in (False, True):
        optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5)
        params = parameters_of(optimizer)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023  # called in this turn of the loop only
            loss = sum(param.square().sum() for param in params)  # noqa: B023
            loss.backward()
            return loss

        with torch.no_grad():  # step enables grad for the closure
            for _ in range(2):
                if with_closure:
                    expected = sum(param.square().sum() for param in params)
                    assert torch.equal(optimizer.step(closure), expected)
                else:
                    with torch.enable_grad():
                        closure()
                    assert optimizer.step() is None
        ends.append(snapshot(optimizer))
    assert ends[0] == ends[1]


def test_gradients_are_not_recorded(path: str) -> None:
    optimizer = fusedreg.AdamW(parameters(), l1=0.1, max_grad_norm=1.0, **PATHS[path])
    run(optimizer, 1)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(value.requires_grad for value in [*states, optimizer.grad_norm])
    assert all(param.is_leaf and param.requires_grad for param in parameters_of(optimizer))


@pytest.mark.parametrize("case", **by_id(SOME))
def test_named_parameters_step_as_unnamed_ones(case: Case, path: str) -> None:
    named = [(f"layer.{i}", param) for i, param in enumerate(parameters())]
    optimizers = case.make(named, path), case.make(parameters(), path)
    for optimizer in optimizers:
        run(optimizer, 2)
    assert results(optimizers[0]) == results(optimizers[1])
    assert optimizers[0].param_groups[0]["param_names"] == [name for name, _ in named]
    assert optimizers[0].state_dict()["param_groups"][0]["param_names"][0] == "layer.0"


@pytest.mark.parametrize("case", **by_id(SOME))
def test_duplicate_in_a_group_is_stepped_and_counted_once(case: Case, path: str) -> None:
    (once,), (twice,) = parameters(shapes=[(3,)]), parameters(shapes=[(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        double = case.make([twice, twice], path, max_grad_norm=0.5)
    single = case.make([once], path, max_grad_norm=0.5)
    for seed in range(2):
        set_grads([once], seed)
        twice.grad = once.grad.clone()
        single.step()
        double.step()
    assert frozen([twice, double.grad_norm]) == frozen([once, single.grad_norm])
    assert frozen(double.state.get(twice)) == frozen(single.state.get(once))


@pytest.mark.parametrize("case", **by_id(CASES))
def test_repr_shows_every_option_of_every_group(case: Case) -> None:
    params = parameters(shapes=[(1,), (2,)])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": torch.tensor(0.5)}]
    shown = repr(case.make(groups))
    assert shown.startswith(f"{case.cls.__name__} (\nParameter Group 0\n")
    assert "Parameter Group 1" in shown
    for name, value in case.kwargs.items():
        assert f"    {name}: {value}" in shown


def test_a_compiled_train_step_equals_the_eager_one(path: str) -> None:
    ends = []
    # What can break is Dynamo's tracing up to the step; aot_eager has it and needs no C++ compiler.
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        options = {"lr": 0.1, "l1": 0.01, "max_grad_norm": 0.5, **PATHS[path]}
        optimizer = fusedreg.AdamW(model.parameters(), **options)

        def train_step(x: torch.Tensor) -> None:
            optimizer.zero_grad()  # noqa: B023  # called in this turn of the loop only
            model(x).square().mean().backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        compiled = wrap(train_step)
        for seed in range(3):
            (x,) = tensors(seed, torch.float32, [(5, 4)])
            compiled(x)
        ends.append(snapshot(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW])
def test_numpy_scalars_are_numbers(cls: type, path: str) -> None:
    ends = []
    for kind in (float, np.float64):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = cls([param], lr=kind(0.1), l1=kind(0.01), weight_decay=kind(0.1), **PATHS[path])
        for lr in (0.1, 0.0):
            optimizer.param_groups[0]["lr"] = kind(lr)
            param.grad = torch.tensor([1.0, math.inf if lr == 0 else 1.0])
            optimizer.step()
        ends.append(frozen(param))
        assert param.isfinite().all()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW])
def test_keys_that_a_user_adds_to_a_group_are_left_alone(cls: type, path: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    mask = torch.ones(2)
    optimizer = cls([{"params": [param], "mask": mask}], **PATHS[path])
    optimizer.step()
    assert optimizer.param_groups[0]["mask"] is mask
    assert (param < 1).all()


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW])
def test_parameters_of_lazy_modules_are_taken(cls: type, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        layer = torch.nn.LazyLinear(3)
    optimizer = cls(layer.parameters(), lr=0.1, l1=0.01, **PATHS[path])
    layer(torch.ones(2, 4)).sum().backward()
    before = frozen(list(layer.parameters()))
    optimizer.step()
    assert frozen(list(layer.parameters())) != before


@pytest.mark.parametrize("path", ["device"], indirect=True)
def test_a_stateless_optimizer_looks_for_gradients_of_zeros_once(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That look costs a norm, and is there for the step that only creates state."""
    calls = []
    norm = fusedreg.optimizer.global_norm
    monkeypatch.setattr(
        fusedreg.optimizer, "global_norm", lambda *args: (calls.append(1), norm(*args))[1]
    )
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedreg.SGD([param], lr=torch.tensor(0.1), **PATHS[path])
    for _ in range(3):
        param.grad = torch.ones(2)
        optimizer.step()
    assert len(calls) == 1
