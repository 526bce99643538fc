"""SGD with momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedreg.checks import check_number
from fusedreg.optimizer import FusedOptimizer
from fusedreg.reference import Settings, State
from fusedreg.scalars import Flag, Number, is_zero, wide_dtype


class SGD(FusedOptimizer):
    tensor_states = ("momentum_buffer",)
    scalar_states = ("momentum_mass",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        l1: float = 0.0,
        l1_mode: str = "prox",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "l1": l1,
            "l1_mode": l1_mode,
        }
        super().__init__(
            params, defaults, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite
        )

    def check_group(self, group: dict[str, Any], read_device: bool) -> None:
        check_number("momentum value", group["momentum"], read_device=read_device)
        if group["dampening"] != group["dampening"]:
            raise ValueError("Invalid dampening value: nan (expected a number)")
        if group["nesterov"] and (is_zero(group["momentum"]) or not is_zero(group["dampening"])):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if _is_thresholded(group) and not group["momentum"] < 1:
            raise ValueError(
                f"Invalid momentum value: {group['momentum']} (l1_mode='prox' needs momentum < 1, "
                "because its threshold is that of a constant gradient, lr * l1 / (1 - momentum))"
            )

    def init_state(
        self, group: Settings, param: Tensor, state: dict[str, Tensor], may_skip: bool
    ) -> None:
        """Create the momentum mass where it is needed; the buffer is made by the first step."""
        momentum, dampening = group["momentum"], group["dampening"]
        if is_zero(momentum) or "momentum_mass" in state:
            return
        fresh = "momentum_buffer" not in state
        # The first gradient enters the buffer undamped. If this first step may be skipped on the
        # device, only the mass can tell the next step that it is still the first.
        if _is_thresholded(group) or (fresh and may_skip and not is_zero(dampening)):
            # A buffer without a mass was filled before l1 was turned on: take it as warmed up.
            mass = 0.0 if fresh else (1 - dampening) / (1 - momentum)
            state["momentum_mass"] = torch.zeros(
                (), dtype=wide_dtype(param.device), device=param.device
            ).fill_(mass)

    def direction(self, settings: Settings, state: State, grad: Tensor) -> tuple[Tensor, State]:
        momentum, dampening = settings["momentum"], settings["dampening"]
        if is_zero(momentum):
            return grad, {}
        buffer, mass = state.get("momentum_buffer"), state.get("momentum_mass")
        new: State = {}
        if mass is not None:
            first = mass == 0
            new["momentum_mass"] = _select(first, 1.0, momentum * mass + (1 - dampening))
        else:
            first = False
        if buffer is None:
            new["momentum_buffer"] = grad
        else:
            new["momentum_buffer"] = _select(
                first, grad, momentum * buffer + (1 - dampening) * grad
            )
        if settings["nesterov"]:
            return grad + momentum * new["momentum_buffer"], new
        return new["momentum_buffer"], new

    def gain(self, settings: Settings, state: State) -> Number:
        momentum = settings["momentum"]
        if is_zero(momentum):
            return 1.0
        mass: Number = state["momentum_mass"]
        return 1 + momentum * mass if settings["nesterov"] else mass


def _is_thresholded(group: Settings) -> bool:
    """Whether the momentum mass sets an L1 threshold in this group."""
    return group["l1_mode"] == "prox" and not is_zero(group["l1"])


def _select(condition: Flag, chosen: Number, otherwise: Number) -> Number:
    """`chosen if condition else otherwise`, also where the condition is on a device."""
    if isinstance(condition, Tensor):
        return torch.where(condition, chosen, otherwise)
    return chosen if condition else otherwise
