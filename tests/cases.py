"""The one table of cases that every property test goes through.

A rule is a class with the options that change its formula; a penalty is what is added to it; a path
is how the constructor is asked to run. A new optimizer adds rules, a new backend adds a path; no
test changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedreg

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"fused": False},
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "device": {"fused": False},
}
"""Constructor options that choose how a step runs. All must give the same result.

"device" is the reference as it runs on an accelerator: the fixture `path` makes every number look
as if it lay there, so that nothing is read by the host.
"""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One optimizer with all that changes its arithmetic."""

    rule: str
    penalty: str
    cls: type[fusedreg.optimizer.FusedOptimizer]
    kwargs: dict[str, Any] = field(hash=False)

    @property
    def id(self) -> str:
        return f"{self.rule}-{self.penalty}"

    @property
    def torch_cls(self) -> type[torch.optim.Optimizer]:
        return getattr(torch.optim, self.cls.__name__)

    @property
    def torch_kwargs(self) -> dict[str, Any] | None:
        """The kwargs of the torch.optim namesake, or None where torch has no equal."""
        if "l1" in self.kwargs:
            return None
        if self.cls is fusedreg.SGD and self.kwargs.get("decoupled_weight_decay"):
            return None
        return self.kwargs

    def make(self, params: Iterable[Any], path: str = "reference", **more: Any) -> Any:
        """The optimizer of this case over `params`, run by `path`."""
        return self.cls(params, **{**self.kwargs, **PATHS[path], **more})


# Rates are large so that a misplaced factor shows in one step (lr * weight_decay is about 0.1).
RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "sgd": (fusedreg.SGD, {"lr": 0.1}),
    "sgd_maximize": (fusedreg.SGD, {"lr": 0.1, "maximize": True}),
    "sgd_momentum": (fusedreg.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd_dampening": (fusedreg.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "sgd_nesterov": (fusedreg.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (fusedreg.Adam, {"lr": 0.1}),
    "adam_maximize": (fusedreg.Adam, {"lr": 0.1, "maximize": True}),
    "adam_amsgrad": (fusedreg.Adam, {"lr": 0.1, "betas": (0.8, 0.9), "amsgrad": True}),
    "adamw": (fusedreg.AdamW, {"lr": 0.1}),
    "adamw_amsgrad": (fusedreg.AdamW, {"lr": 0.1, "eps": 1e-3, "amsgrad": True}),
}

PENALTIES: dict[str, dict[str, Any]] = {
    "none": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.9},  # coupled, but decoupled in AdamW
    "decoupled_decay": {"weight_decay": 0.9, "decoupled_weight_decay": True},
    "l1_prox": {"weight_decay": 0.0, "l1": 0.3},
    "l1_decoupled": {"weight_decay": 0.0, "l1": 0.3, "l1_mode": "decoupled"},
    "l1_subgradient": {"weight_decay": 0.0, "l1": 0.3, "l1_mode": "subgradient"},
    "elastic_net": {"weight_decay": 0.9, "l1": 0.3},
}

CASES = [
    Case(rule, penalty, cls, {**options, **weights})
    for rule, (cls, options) in RULES.items()
    for penalty, weights in PENALTIES.items()
    # AdamW is Adam with the decoupled decay, and has no such keyword.
    if not (cls is fusedreg.AdamW and penalty == "decoupled_decay")
]
TORCH_CASES = [case for case in CASES if case.torch_kwargs is not None]
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
