"""Which of the package's cases a test takes, and the tensors that they step.

The table itself is fusedreg/cases.py: a new optimizer adds rules there, a new backend adds a
path; no test changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from fusedreg.cases import (
    CASES,
    CLASSES,
    DTYPES,
    PATHS,
    PENALTIES,
    RULES,
    TORCH_CASES,
    TORCH_CLASSES,
    Case,
)
from fusedreg.kernels.contract import FIRST_NUMBER, Program, Rule

__all__ = [
    "CASES",
    "CLASSES",
    "DTYPES",
    "PATHS",
    "PENALTIES",
    "RULES",
    "TORCH_CASES",
    "TORCH_CLASSES",
    "Case",
]

# Tests choose among these lists by `each_case`, so that the time of the suite grows with the rules
# and not with rules times penalties. All CASES meet the oracle and torch, and on the reference path
# what is said of L1 and decay.

# What meets every other property: a penalty is the step's and does not know the rule, so three
# rules stand for all, one for each way in which the L1 threshold comes about (a mass that counts
# steps, a second moment) and decay is meant (coupled, decoupled). Each rule comes without any
# penalty, and with the elastic net, which has its class's own decay and L1 in it.
PROPERTY_CASES = [
    case
    for case in CASES
    if case.rule in ("sgd_momentum", "adam", "adamw") or case.penalty in ("none", "elastic_net")
]

# Of each class its first rule without a penalty, and, where the formula does not matter, one case
# with all it has: the last of the rules that have the most options.
PLAIN = {case.cls: case for case in reversed(CASES) if case.penalty == "none"}
_ELASTIC_NETS = [case for case in CASES if case.penalty == "elastic_net"]
SOME = [
    sorted((c for c in _ELASTIC_NETS if c.cls is cls), key=lambda case: len(case.kwargs))[-1]
    for cls in CLASSES
]
FULL = {case.cls: case for case in SOME}

# What meets the properties on the interpreter, where a step takes ten times as long: every class,
# and every penalty with Adam.
INTERPRETED_CASES = [case for case in CASES if case.rule == "adam" or case in SOME]


def _device_rule(case: Case) -> tuple[type, Any]:
    """What kernels are compiled for: two rules of a class may differ in numbers only."""
    return case.cls, case.make([torch.zeros(1)]).device_rule(case.options)


# Every device function: each rule's once with the elastic net, and each penalty's with Adam.
_FIRST = {_device_rule(case): case for case in reversed(_ELASTIC_NETS)}
KERNEL_CASES = [case for case in CASES if case.rule == "adam" or case in _FIRST.values()]


FEW_PATHS = ("reference", "device")
"""For tests that take many steps: numbers on the host, and numbers as tensors."""

ON_PATH = {
    "reference": PROPERTY_CASES,
    "default": PROPERTY_CASES,
    "foreach": SOME,  # what "default" runs, by another flag
    "fused": INTERPRETED_CASES,  # the rules of "default", interpreted
    "device": PROPERTY_CASES,  # what "reference" runs, with numbers that nobody may read
}
"""Path -> the cases that a property meets there; conftest.path says what the paths are."""


QUICK = {**dict.fromkeys(ON_PATH, SOME), "foreach": []}
"""Path -> those of them that `make test` takes; "foreach" runs what "default" runs."""


def by_id(cases: Iterable[Case]) -> dict[str, Any]:
    """Keywords for `pytest.mark.parametrize("case", **by_id(SOME))`: exactly these cases."""
    cases = list(cases)
    return {"argvalues": cases, "ids": [case.id for case in cases]}


def each_case(
    cases: Iterable[Case], *, paths: Iterable[str] = tuple(ON_PATH), all_on: Iterable[str] = ()
) -> Callable[[Any], Any]:
    """Run a test with those of the `cases` that ON_PATH has, and on each path if it takes `path`.

    On the paths in `all_on` it runs with all of them. A case that is not in the table always runs.
    A test that takes no `path` counts as one of "reference". Cases that run the code of others are
    slow, so that `make test` leaves them out: of each class one case with all that it has remains.
    On the paths in `all_on`, but for the interpreted one, PROPERTY_CASES remain, which have every
    rule, and each penalty with a rule of each kind.
    """
    cases, whole = list(cases), set(all_on)

    def params(path: str, *more: str) -> list[Any]:
        taken = CASES if path in whole else ON_PATH[path]
        quick = PROPERTY_CASES if path in whole and path != "fused" else QUICK[path]
        return [
            pytest.param(
                *(case, *more),
                id="-".join([case.id, *more]),
                marks=[pytest.mark.slow] if case in CASES and case not in quick else [],
            )
            for case in cases
            if case in taken or case not in CASES
        ]

    def decorate(test: Any) -> Any:
        if "path" in inspect.signature(test).parameters:
            pairs = [param for path in paths for param in params(path, path)]
            return pytest.mark.parametrize(("case", "path"), pairs, indirect=["path"])(test)
        return pytest.mark.parametrize("case", params("reference"))(test)

    return decorate


# Odd sizes, a size above any SIMD block, empty first, in the middle and last, and 0-dim.
SHAPES = [(0,), (5, 3), (), (1,), (3, 0, 2), (67,), (2, 3, 5), (0,)]


def tensors(
    seed: int, dtype: torch.dtype = torch.float64, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[torch.Tensor]:
    """Normal random tensors, the same values (rounded) for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def parameters(
    seed: int = 0, dtype: torch.dtype = torch.float64, shapes: Iterable[tuple[int, ...]] = SHAPES
) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(value) for value in tensors(seed, dtype, shapes)]


def set_grads(params: Iterable[torch.Tensor], seed: int) -> None:
    """Random gradients, the same values (rounded) for every dtype."""
    params = list(params)
    grads = tensors(seed, shapes=[tuple(param.shape) for param in params])
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.dtype)


def run(optimizer: torch.optim.Optimizer, steps: int, first_seed: int = 1000) -> None:
    """Step with random gradients that depend on the step's number only."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in range(first_seed, first_seed + steps):
        set_grads(params, seed)
        optimizer.step()


def program(rule: Rule, dtype: torch.dtype, states: int = 0) -> Program:
    """What kernels of a rule are compiled for without penalties, counts and options."""
    return Program(
        rule=rule,
        hooks=(),
        states=states,
        planes=(dtype,),
        codec=None,
        counts=(),
        options=0,
        group_width=FIRST_NUMBER,
        param=dtype,
        grad=dtype,
        aligned=False,
        layerwise=False,
    )


def ulp(dtype: torch.dtype, at: float = 1.0) -> float:
    """Distance between neighbouring numbers of `dtype` at the magnitude of `at`."""
    exponent = torch.frexp(torch.tensor(abs(at), dtype=torch.float64)).exponent.item()
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)
