"""One step: what it touches, what it must not touch, and what must not matter to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fusedreg
from fusedreg.backend import is_dense
from fusedreg.check.oracle import Oracle

from cases import CASES, CLASSES, DTYPES, SOME, Case, each_case, parameters, run, set_grads, tensors
from compare import (
    assert_close,
    assert_rounds_once,
    default_dtype,
    frozen,
    parameters_of,
    results,
    torchs_state,
)
from problems import elementwise, with_eps

SHAPES = [(0,), (5, 3), (), (17,)]
# ---- gradients ---------------------------------------------------------------------------------


@each_case(CASES)
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


@each_case(SOME)
def test_step_without_any_grad_does_nothing(case: Case, path: str) -> None:
    optimizer = case.make(parameters(), path, max_grad_norm=1.0)
    before = results(optimizer)
    optimizer.step()
    assert results(optimizer) == before
    assert len(optimizer.state) == 0
    assert optimizer.grad_norm == 0


@each_case(CASES)
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


@each_case(CASES)
def test_lr_zero_changes_no_bit_of_a_parameter(case: Case, path: str) -> None:
    for lr, dtype in zip(
        [0.0, -0.0, torch.tensor(0.0), torch.tensor([[-0.0]])], DTYPES, strict=True
    ):
        param = nn.Parameter(torch.tensor(SPECIAL, dtype=torch.float64).to(dtype))
        optimizer = case.make([param], path, **with_eps(case, 0.0))
        # In torch a tensor lr and foreach=True exclude each other, so it comes in afterwards.
        optimizer.param_groups[0]["lr"] = lr
        before = frozen(param)
        for grad in (0.0, 1.0, math.inf):
            param.grad = torch.full_like(param, grad)
            optimizer.step()
            assert frozen(param) == before


@each_case(SOME)
def test_lr_zero_still_moves_the_state(case: Case, path: str) -> None:
    """As in torch; a warm-up from lr = 0 collects momentum and counts steps."""
    optimizer, usual = (case.make(parameters(shapes=SHAPES), path) for _ in range(2))
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, 1)
    run(usual, 1)
    assert torchs_state(optimizer) == torchs_state(usual)


@each_case([case for case in CASES if case.penalty == "none"])
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


@each_case(CASES)
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


@each_case(CASES)
def test_layout_does_not_matter(case: Case, path: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        odd = [nn.Parameter(value) for value in odd_layouts(dtype)]
        usual = [nn.Parameter(value.detach().clone().contiguous()) for value in odd]
        # Kernels leave a parameter with gaps in its memory to the reference path.
        gaps = [not is_dense(param) for param in odd]
        assert sum(gaps) == 1
        dense = [param for param, gap in zip(usual, gaps, strict=True) if not gap]
        sparse = [param for param, gap in zip(usual, gaps, strict=True) if gap]
        optimizers = [
            case.make(odd, path),
            case.make(dense, path),
            case.make(sparse, "reference"),
        ]
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
        for param, plain, gap in zip(odd, usual, gaps, strict=True):
            twin = optimizers[2 if gap else 1]
            states = optimizers[0].state.get(param, {}), twin.state.get(plain, {})
            if case.cls.layerwise:
                # A norm is summed in the order of memory, which moves the last bit of a step.
                assert_close([param, *states[0].values()], [plain, *states[1].values()], ulps=3)
            else:
                assert frozen(param) == frozen(plain)
                assert frozen(states[0]) == frozen(states[1])


@each_case(CASES)
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


@each_case(elementwise(CASES))
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


@each_case(SOME)
def test_same_inputs_give_the_same_bits_under_any_default_dtype(case: Case, path: str) -> None:
    seen = []
    for default in (torch.float32, torch.float32, torch.float64, torch.bfloat16):
        with default_dtype(default):
            optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5)
            run(optimizer, 2)
        seen.append(frozen([*parameters_of(optimizer), optimizer.grad_norm]))
    assert all(each == seen[0] for each in seen)


@each_case(CASES)
def test_low_precision_is_float32_arithmetic_rounded_once(case: Case, path: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        optimizer = case.make(parameters(dtype=dtype, shapes=SHAPES), path)
        run(optimizer, 2)
        set_grads(parameters_of(optimizer), seed=5)
        assert_rounds_once(optimizer, lambda params: case.make(params, path))


# Few digits, so that shrunken examples can be read.
rates = st.sampled_from([1e-3, 0.1, 0.5])
shares = st.sampled_from([0.0, 0.5, 0.9])
weights = st.sampled_from([0.0, 0.01, 0.7])
modes = st.sampled_from(["prox", "decoupled", "subgradient"])
eps = st.sampled_from([1e-8, 1e-2])
betas = st.tuples(shares, st.sampled_from([0.0, 0.9, 0.999]))
common = {"lr": rates, "weight_decay": weights, "l1": weights, "maximize": st.booleans()}
own: dict[type[fusedreg.FusedOptimizer], dict[str, st.SearchStrategy[Any]]] = {
    fusedreg.SGD: {"l1_mode": modes, "momentum": shares, "dampening": shares},
    fusedreg.Adam: {"l1_mode": modes, "betas": betas, "eps": eps, "amsgrad": st.booleans()},
    fusedreg.AdamW: {"l1_mode": modes, "betas": betas, "eps": eps, "amsgrad": st.booleans()},
    # Of 3 gradients the variance is alpha^3 of the mean square or more, and what decay cancels is
    # small beside a large eps: so no root is a rounding's.
    fusedreg.RMSprop: {
        "l1_mode": modes,
        "alpha": st.sampled_from([0.5, 0.9]),
        "momentum": st.sampled_from([0.0, 0.5]),
        "eps": st.sampled_from([0.5, 2.0]),
        "centered": st.booleans(),
    },
    fusedreg.Adagrad: {
        "l1_mode": modes,
        "lr_decay": shares,
        "initial_accumulator_value": st.sampled_from([0.0, 0.5]),
        "eps": eps,
    },
    fusedreg.Lion: {"l1_mode": st.sampled_from(["decoupled", "subgradient"]), "betas": betas},
    fusedreg.LAMB: {"l1_mode": modes, "betas": betas, "eps": eps},
}
either = {"decoupled_weight_decay": st.booleans()}
any_case = st.one_of(
    st.builds(
        Case,
        st.just(cls.__name__),
        st.just("any"),
        st.just(cls),
        st.fixed_dictionaries(common | options | (either if cls is not fusedreg.AdamW else {})),
    )
    for cls, options in own.items()
)


def test_every_class_is_drawn() -> None:
    assert set(own) == set(CLASSES)


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
    max_examples=80,
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
    oracle = Oracle(case, params)
    for seed in range(grad_seed, grad_seed + 3):
        set_grads(params, seed)
        oracle.step([param.grad for param in params])
        optimizer.step()
    # 2 ulp a step as in test_oracle.
    assert_close(params, oracle.values, ulps=3 * 2)
