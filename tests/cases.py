"""Which of the package's cases a test takes, and the tensors that they step.

The table itself is fusedreg/cases.py: a new optimizer adds rules there, a new backend adds a path;
no test changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fusedreg.cases import CASES, DTYPES, PATHS, RULES, TORCH_CASES, Case

__all__ = ["CASES", "DTYPES", "PATHS", "RULES", "TORCH_CASES", "Case"]

# Every device function: each rule's with the elastic net, each penalty's with Adam. Maximizing is a
# sign in a row, and AdamW is Adam with the decoupled decay.
KERNEL_CASES = [
    case
    for case in CASES
    if case.rule == "adam"
    or (case.penalty == "elastic_net" and case.rule not in ("sgd_maximize", "adam_maximize"))
]
# Where the formula does not matter: one case of each class, with all it has.
SOME = [
    case
    for case in CASES
    if case.penalty == "elastic_net" and case.rule in ("sgd_nesterov", "adam_amsgrad", "adamw")
]


def by_id(cases: list[Case]) -> dict[str, Any]:
    """Keywords for `pytest.mark.parametrize("case", **by_id(CASES))`."""
    return {"argvalues": cases, "ids": [case.id for case in cases]}


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


def ulp(dtype: torch.dtype, at: float = 1.0) -> float:
    """Distance between neighbouring numbers of `dtype` at the magnitude of `at`."""
    exponent = torch.frexp(torch.tensor(abs(at), dtype=torch.float64)).exponent.item()
    return torch.finfo(dtype).eps * 2.0 ** (exponent - 1)
