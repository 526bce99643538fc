"""The one table of cases: every optimizer with every penalty. Tests and `fusedreg check` take it.

A rule is a class with the options that change its formula; a penalty is what is added to it; a path
is how the constructor is asked to run. A new optimizer adds its rules here, and everything goes
through them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import fusedreg
from fusedreg.optimizer import FusedOptimizer

PATHS: dict[str, dict[str, Any]] = {
    "reference": {"fused": False},
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
"""Constructor options that choose how a step runs. All must give the same result."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One optimizer with all that changes its arithmetic."""

    rule: str
    penalty: str
    cls: type[FusedOptimizer]
    kwargs: dict[str, Any] = field(hash=False)

    @property
    def id(self) -> str:
        """Its name."""
        return f"{self.rule}-{self.penalty}"

    @property
    def torch_cls(self) -> type[torch.optim.Optimizer]:
        """The torch.optim namesake."""
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.cls.__name__)
        return found

    @property
    def torch_kwargs(self) -> dict[str, Any] | None:
        """The kwargs of the torch.optim namesake, or None where torch has no equal."""
        if "l1" in self.kwargs:
            return None
        if self.cls is fusedreg.SGD and self.kwargs.get("decoupled_weight_decay"):
            return None
        return self.kwargs

    def make(self, params: Iterable[Any], path: str = "reference", **more: Any) -> FusedOptimizer:
        """The optimizer of this case over `params`, run by `path`."""
        make: Any = self.cls
        made: FusedOptimizer = make(params, **{**self.kwargs, **PATHS[path], **more})
        return made


# Rates are large so that a misplaced factor shows in one step (lr * weight_decay is about 0.1).
RULES: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
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
