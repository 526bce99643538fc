"""fusedreg against the torch.optim class of the same name: signature, state and trajectory."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.testing._internal import common_optimizers

import fusedreg
from fusedreg.check.oracle import Oracle

from cases import (
    CASES,
    DTYPES,
    PATHS,
    TORCH_CASES,
    TORCH_CLASSES,
    Case,
    each_case,
    parameters,
    run,
    set_grads,
    tensors,
)
from compare import assert_close, beyond_torch, default_dtype, neighbours_apart, snapshot

# torch's own list of configurations. Those for "cuda" include those for "cpu", with tensor lr and
# betas besides, and making the list needs no GPU.
UPSTREAM_CASES = [
    Case(cls.__name__, entry.desc.replace(" ", "_"), cls, entry.kwargs)
    for cls in TORCH_CLASSES
    for entry in getattr(common_optimizers, f"optim_inputs_func_{cls.__name__.lower()}")("cuda")
]
ALL_CASES = TORCH_CASES + UPSTREAM_CASES

Shapes = tuple[tuple[int, ...], ...]

FEW = ((5, 3), (0,), (), (67,))

SIZES = [(0,), (1,), (7,), (8,), (15,), (16,), (17,), (64,), (1000,)]
"""Around the SIMD blocks of torch's CPU kernels, which are right below a block and wrong in it."""


def torch_twin(case: Case, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """torch's for-loop with the same numbers.

    As Python floats, because torch rounds `1 - lr * weight_decay` to the dtype of a tensor lr, and
    without capturable, which it refuses on a CPU.
    """
    kwargs = {name: _plain(value) for name, value in case.torch_kwargs.items()}
    kwargs.pop("capturable", None)
    return case.torch_cls(params, **kwargs, foreach=False)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(element) for element in value)
    return value.item() if isinstance(value, torch.Tensor) else value


def values(seed: int, dtype: torch.dtype, shapes: Shapes) -> list[torch.Tensor]:
    """As `cases.tensors`, with imaginary parts where the dtype is complex."""
    if not dtype.is_complex:
        return tensors(seed, dtype, shapes)
    pairs = tensors(seed, dtype.to_real(), [(*shape, 2) for shape in shapes])
    return [torch.view_as_complex(pair) for pair in pairs]


def trajectory(
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    dtype: torch.dtype,
    shapes: Shapes,
    run_in: torch.dtype | None = None,
) -> list[torch.nn.Parameter]:
    """Parameters after 25 steps from values rounded to `dtype`, computed in `run_in`."""
    run_in = run_in or dtype
    params = [torch.nn.Parameter(value.to(run_in)) for value in values(0, dtype, shapes)]
    optimizer = make(params)
    for seed in range(1, 26):
        for param, grad in zip(params, values(seed, dtype, shapes), strict=True):
            param.grad = grad.to(run_in)
        optimizer.step()
    return params


# ---- the interface -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_signature_is_a_superset_of_torchs(cls: type) -> None:
    ours = inspect.signature(cls).parameters
    theirs = inspect.signature(getattr(torch.optim, cls.__name__)).parameters
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    positional = [
        [name for name, p in signature.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for signature in (ours, theirs)
    ]
    assert positional[0] == positional[1]
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in ours.keys() - theirs)


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_options_and_defaults_are_a_superset_of_torchs(cls: type) -> None:
    optimizer = cls(parameters())
    theirs = getattr(torch.optim, cls.__name__)(parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert theirs.defaults.items() <= optimizer.defaults.items()
    assert theirs.param_groups[0].keys() <= optimizer.param_groups[0].keys()


# ---- the trajectory ----------------------------------------------------------------------------


@cache
def torch_trajectory(
    case: Case, dtype: torch.dtype, shapes: Shapes, run_in: torch.dtype
) -> list[torch.nn.Parameter]:
    """torch's result, computed once for all paths."""
    return trajectory(partial(torch_twin, case), dtype, shapes, run_in)


@each_case(TORCH_CASES, all_on=("reference", "default"))
def test_float64_trajectory_equals_torch(case: Case, path: str) -> None:
    actual = trajectory(partial(case.make, path=path), torch.float64, FEW)
    expected = torch_trajectory(case, torch.float64, FEW, torch.float64)
    # Each side rounds a weight by up to half an ulp a step, 0.29 ulp in the root mean square. The
    # difference of two such walks of 25 steps has a spread of 0.29 * sqrt(50) = 2 ulp: 4 of them.
    assert_close(actual, expected, ulps=8)


@pytest.mark.sampled(4)
@each_case(UPSTREAM_CASES, all_on=("reference", "default"))
def test_optim_inputs_equal_torch(case: Case, path: str) -> None:
    actual = trajectory(partial(case.make, path=path), torch.float64, FEW)
    expected = torch_trajectory(case, torch.float64, FEW, torch.float64)
    # Here lr is 0.01 or less: both sides round nearly the same number, so the same way in all but
    # a few of the 25 steps.
    assert_close(actual, expected, ulps=2)


def rms_error(params: list[torch.nn.Parameter], exact: list[torch.nn.Parameter]) -> float:
    errors = [(p.to(e.dtype) - e).abs().square().sum() for p, e in zip(params, exact, strict=True)]
    return math.sqrt(sum(error.item() for error in errors))


def assert_as_accurate_as_torch(case: Case, dtype: torch.dtype, path: str) -> None:
    shapes = ((2048,),)  # enough that the ratio of two root mean squares is known to a few percent
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch_trajectory(case, dtype, shapes, wide)
    theirs = rms_error(torch_trajectory(case, dtype, shapes, dtype), exact)
    ours = rms_error(trajectory(partial(case.make, path=path), dtype, shapes), exact)
    # NaN is torch's result in float16 where eps underflows to 0.
    assert ours <= 1.5 * theirs or (math.isnan(theirs) and math.isfinite(ours))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case(TORCH_CASES, all_on=("reference", "default"))
def test_error_is_at_most_one_and_a_half_of_torchs(
    case: Case, dtype: torch.dtype, path: str
) -> None:
    assert_as_accurate_as_torch(case, dtype, path)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
@each_case(UPSTREAM_CASES, all_on=("reference",))
def test_optim_inputs_error_is_at_most_one_and_a_half_of_torchs(
    case: Case, dtype: torch.dtype
) -> None:
    assert_as_accurate_as_torch(case, dtype, "default")


@each_case(TORCH_CASES, all_on=("reference", "default"))
def test_low_precision_step_is_the_float64_step_rounded(case: Case, path: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        params = parameters(dtype=dtype, shapes=SIZES)
        optimizer = case.make(params, path)
        run(optimizer, 3)
        exact = [torch.nn.Parameter(param.detach().double()) for param in params]
        twin = torch_twin(case, exact)
        twin.load_state_dict(deepcopy(optimizer.state_dict()))  # which widens the states
        for group in twin.param_groups:
            group.update(foreach=False, fused=False)
        set_grads(params, seed=7)
        for wide, param in zip(exact, params, strict=True):
            wide.grad = param.grad.double()
        optimizer.step()
        twin.step()
        # float32 arithmetic may land on the other side of the middle between two neighbours.
        for param, wide in zip(params, exact, strict=True):
            assert neighbours_apart(param, wide.to(dtype)) <= 1
            for name, state in optimizer.state[param].items():
                if state.dtype == dtype:
                    assert neighbours_apart(state, twin.state[wide][name].to(dtype)) <= 1


@each_case(CASES, all_on=("reference", "default"))
def test_every_size_equals_the_oracle(case: Case, path: str) -> None:
    for dtype in (torch.float64, torch.float32):
        params = parameters(dtype=dtype, shapes=SIZES)
        optimizer = case.make(params, path)
        oracle = Oracle(case, params)
        for seed in range(3):
            set_grads(params, seed)
            oracle.step([param.grad for param in params])
            optimizer.step()
        # Per step at most 2 ulp, as in test_oracle.
        expected = [value.to(dtype) for value in oracle.values]
        assert_close(params, expected, ulps=3 * 2)


@each_case(TORCH_CASES, all_on=("reference", "default"))
def test_complex_parameter_is_a_pair_of_reals(case: Case, path: str) -> None:
    make = partial(case.make, path=path)
    results = trajectory(make, torch.complex64, FEW)
    make = partial(case.make, path="reference")  # to which kernels leave complex parameters
    pairs = trajectory(make, torch.float32, tuple((*shape, 2) for shape in FEW))
    for actual, expected in zip(results, pairs, strict=True):
        assert torch.equal(torch.view_as_real(actual), expected)


def test_adam_without_decay_is_adamw(path: str) -> None:
    seen = []
    for cls in (fusedreg.Adam, fusedreg.AdamW):
        optimizer = cls(parameters(), lr=0.1, weight_decay=0.0, **PATHS[path])
        run(optimizer, steps=25)
        seen.append(snapshot(optimizer))
    assert seen[0]["params"] == seen[1]["params"]
    assert seen[0]["state"] == seen[1]["state"]


# ---- the state ---------------------------------------------------------------------------------


def layout(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> list[Any]:
    """Names, dtypes, shapes and strides of all states but our own."""
    return [
        {
            name: (state.dtype, state.shape, state.stride(), state.device)
            for name, state in optimizer.state[param].items()
            if name not in beyond_torch(optimizer)
        }
        for param in params
        if param in optimizer.state
    ]


def odd_layouts(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Contiguous, transposed, channels_last, strided, 0-dim and empty parameters."""
    data = [
        torch.randn(4, 3, dtype=torch.float64).to(dtype),
        torch.randn(4, 3, dtype=torch.float64).to(dtype).t(),
        torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last),
        torch.randn(6, 4).to(dtype)[:, ::2],
        torch.ones((), dtype=dtype),
        torch.ones(0, 3, dtype=dtype),
    ]
    return [torch.nn.Parameter(value) for value in data]


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=lambda d: f"default-{d}")
@each_case(TORCH_CASES, all_on=("reference", "default"))
def test_state_has_torchs_names_dtypes_and_layouts(
    case: Case, default: torch.dtype, path: str
) -> None:
    for dtype in (*DTYPES, torch.complex64):
        layouts = []
        for make in (partial(case.make, path=path), partial(torch_twin, case)):
            params = odd_layouts(dtype)
            without_grad = torch.nn.Parameter(torch.ones(2, dtype=dtype))
            with default_dtype(default):
                optimizer = make([*params, without_grad])
                for param in params:
                    param.grad = torch.ones_like(param)
                optimizer.step()
            # torch.optim.Adagrad has state before there is a gradient.
            begun = type(optimizer) is torch.optim.Adagrad
            assert begun == (without_grad in optimizer.state)
            layouts.append(layout(optimizer, params))
        assert layouts[0] == layouts[1]
