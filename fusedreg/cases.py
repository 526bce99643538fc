"""The one table of cases: every optimizer with every penalty. Tests and `fusedreg check` take it.

A rule is a class with the options that change its formula; a penalty is what is added to it; a path
is how the constructor is asked to run. A new optimizer adds its rules here, and its formula once
more from the paper, sharing no code with the package; everything goes through them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import fusedreg
from fusedreg.optimizer import FusedOptimizer
from fusedreg.types import ParamGroup

PATHS: dict[str, ParamGroup] = {
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
    kwargs: ParamGroup = field(hash=False)

    @property
    def id(self) -> str:
        """Its name."""
        return f"{self.rule}-{self.penalty}"

    @cached_property
    def options(self) -> ParamGroup:
        """All its options, with the defaults of the class."""
        return dict(self.make([torch.zeros(1)]).defaults)

    @property
    def torch_cls(self) -> type[torch.optim.Optimizer] | None:
        """The torch.optim namesake, or None where there is none."""
        found: type[torch.optim.Optimizer] | None
        found = getattr(torch.optim, self.cls.__name__, None)
        return found

    @property
    def torch_kwargs(self) -> ParamGroup | None:
        """The kwargs of the torch.optim namesake, or None where torch has no equal."""
        cls = self.torch_cls
        known = cls is not None and self.kwargs.keys() <= inspect.signature(cls).parameters.keys()
        return self.kwargs if known else None

    def make(self, params: ParamsT, path: str = "reference", **more: object) -> FusedOptimizer:
        """The optimizer of this case over `params`, run by `path`."""
        make: Callable[..., FusedOptimizer] = self.cls
        return make(params, **{**self.kwargs, **PATHS[path], **more})


# ---- the formulas, in float64 --------------------------------------------------------------------

Value = Tensor | float
History = ParamGroup
"""The states of one parameter by name, 0.0 where none is yet."""
Moved = tuple[Value, Value]
"""What lr multiplies, and what a gradient of 1 has made of it."""
Formula = Callable[[History, Tensor, ParamGroup], Moved]


def sgd(s: History, g: Tensor, options: ParamGroup) -> Moved:
    """Polyak's heavy ball, as Sutskever et al. (2013) and torch write it."""
    mu, tau = options["momentum"], options["dampening"]
    if mu == 0:
        return g, 1.0
    if s["momentum_mass"] == 0:
        s["momentum_buffer"], s["momentum_mass"] = g, 1.0
    else:
        s["momentum_buffer"] = mu * s["momentum_buffer"] + (1 - tau) * g
        s["momentum_mass"] = mu * s["momentum_mass"] + (1 - tau)
    if options["nesterov"]:
        return g + mu * s["momentum_buffer"], 1 + mu * s["momentum_mass"]
    return s["momentum_buffer"], s["momentum_mass"]


def adam(s: History, g: Tensor, options: ParamGroup) -> Moved:
    """Kingma and Ba (2015), algorithm 1; Reddi et al. (2018), algorithm 2, in torch's form."""
    (b1, b2), eps = options["betas"], options["eps"]
    s["step"] += 1
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    v = s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g**2
    if options.get("amsgrad"):  # the maximum of the uncorrected moment
        old = s["max_exp_avg_sq"]
        v = s["max_exp_avg_sq"] = torch.where(v > old, v, old)
    root = torch.sqrt(v / (1 - b2 ** s["step"])) + eps
    return s["exp_avg"] / (1 - b1 ** s["step"]) / root, torch.where(v == 0, 0.0, 1 / root)


def rmsprop(s: History, g: Tensor, options: ParamGroup) -> Moved:
    """Tieleman and Hinton (2012); Graves (2013), equations 38 to 41, with torch's eps."""
    alpha, eps, mu = options["alpha"], options["eps"], options["momentum"]
    s["step"] += 1
    v = variance = s["square_avg"] = alpha * s["square_avg"] + (1 - alpha) * g**2
    if options["centered"]:
        s["grad_avg"] = alpha * s["grad_avg"] + (1 - alpha) * g
        variance = torch.relu(v - s["grad_avg"] ** 2)
    root = torch.sqrt(variance) + eps
    s["momentum_mass"] = mu * s["momentum_mass"] + 1
    s["momentum_buffer"] = mu * s["momentum_buffer"] + torch.where(root == 0, 0.0, g / root)
    return s["momentum_buffer"], torch.where(v == 0, 0.0, s["momentum_mass"] / root)


def adagrad(s: History, g: Tensor, options: ParamGroup) -> Moved:
    """Duchi, Hazan and Singer (2011), figure 1, with torch's lr_decay."""
    if s["step"] == 0:
        s["sum"] = options["initial_accumulator_value"]
    s["step"] += 1
    s["sum"] = s["sum"] + g**2
    root = (torch.sqrt(s["sum"]) + options["eps"]) * (1 + (s["step"] - 1) * options["lr_decay"])
    gain = torch.where(s["sum"] == 0, 0.0, 1 / root)
    return g * gain, gain


def lion(s: History, g: Tensor, options: ParamGroup) -> Moved:
    """Chen et al. (2023), algorithm 2."""
    b1, b2 = options["betas"]
    update = torch.sign(b1 * s["exp_avg"] + (1 - b1) * g)
    s["exp_avg"] = b2 * s["exp_avg"] + (1 - b2) * g
    return update, float("nan")  # no gain: nothing must come to need one


FORMULAS: dict[type[FusedOptimizer], Formula] = {
    fusedreg.SGD: sgd,
    fusedreg.Adam: adam,
    fusedreg.AdamW: adam,
    fusedreg.RMSprop: rmsprop,
    fusedreg.Adagrad: adagrad,
    fusedreg.Lion: lion,
    fusedreg.LAMB: adam,  # and the trust ratio, which is the step's
}

# ---- the penalties, in float64 -------------------------------------------------------------------


def penalised(w: Tensor, g: Tensor, options: ParamGroup) -> tuple[Tensor, float]:
    """The gradient with that of the coupled penalties, and the weight of the decoupled decay."""
    decay = options["weight_decay"]
    if options["l1_mode"] == "subgradient":
        g = g + options["l1"] * torch.sign(w)
    if options["decoupled_weight_decay"]:
        return g, decay
    return g + decay * w, 0.0


def proximal(w: Tensor, lr: float, per_unit: Value, options: ParamGroup) -> Tensor:
    """The weights after the proximal step; `per_unit` is the second number of a `Moved`."""
    l1, mode = options["l1"], options["l1_mode"]
    if mode == "prox" and l1:
        w = shrink(w, lr * l1 * per_unit)
    if mode == "decoupled":
        w = shrink(w, lr * l1)
    return w


def shrink(x: Tensor, threshold: Value) -> Tensor:
    """argmin over z of threshold |z| + (z - x)^2 / 2, case by case."""
    return torch.where(
        x > threshold, x - threshold, torch.where(x < -threshold, x + threshold, 0.0)
    )


# ---- the table -----------------------------------------------------------------------------------

# Rates are large so that a misplaced factor shows in one step (lr * weight_decay is about 0.1).
RULES: dict[str, tuple[type[FusedOptimizer], ParamGroup]] = {
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
    "rmsprop": (fusedreg.RMSprop, {"lr": 0.05, "alpha": 0.9}),
    "rmsprop_momentum": (fusedreg.RMSprop, {"lr": 0.03, "alpha": 0.9, "momentum": 0.9}),
    # Where gradients settle, so does their variance at 0, and eps alone limits the step.
    "rmsprop_centered": (
        fusedreg.RMSprop, {"lr": 0.1, "alpha": 0.9, "eps": 0.5, "centered": True}
    ),
    "rmsprop_both": (
        fusedreg.RMSprop,
        {"lr": 0.1, "alpha": 0.9, "eps": 0.5, "centered": True, "momentum": 0.9},
    ),
    "adagrad": (fusedreg.Adagrad, {"lr": 0.7}),
    # Where the sum begins is a number of every dtype.
    "adagrad_decay": (
        fusedreg.Adagrad, {"lr": 0.7, "lr_decay": 0.001, "initial_accumulator_value": 0.125}
    ),
    "lion": (fusedreg.Lion, {"lr": 0.1}),
    "lamb": (fusedreg.LAMB, {"lr": 0.1}),
}  # fmt: skip
CLASSES = list(dict.fromkeys(cls for cls, _ in RULES.values()))
TORCH_CLASSES = [cls for cls in CLASSES if hasattr(torch.optim, cls.__name__)]
"""Those with a namesake in torch.optim."""

PENALTIES: dict[str, ParamGroup] = {
    "none": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.9},  # coupled or decoupled, as is usual in the class
    "decoupled_decay": {"weight_decay": 0.9, "decoupled_weight_decay": True},
    "coupled_decay": {"weight_decay": 0.9, "decoupled_weight_decay": False},
    "l1_prox": {"weight_decay": 0.0, "l1": 0.3},
    "l1_decoupled": {"weight_decay": 0.0, "l1": 0.3, "l1_mode": "decoupled"},
    "l1_subgradient": {"weight_decay": 0.0, "l1": 0.3, "l1_mode": "subgradient"},
    "elastic_net": {"weight_decay": 0.9, "l1": 0.3},
}


def _is_another(cls: type[FusedOptimizer], penalty: str) -> bool:
    """Whether a class has a penalty, and none of the others is the same by its defaults."""
    defaults = {name: option.default for name, option in inspect.signature(cls).parameters.items()}
    decoupled = PENALTIES[penalty].get("decoupled_weight_decay")
    if decoupled is not None:
        free = "decoupled_weight_decay" not in cls.fixed_options
        return free and defaults["decoupled_weight_decay"] is not decoupled
    return penalty != "l1_prox" or defaults["l1_mode"] == "prox"


CASES = [
    Case(rule, penalty, cls, {**options, **weights})
    for rule, (cls, options) in RULES.items()
    for penalty, weights in PENALTIES.items()
    if _is_another(cls, penalty)
]
TORCH_CASES = [case for case in CASES if case.torch_kwargs is not None]
