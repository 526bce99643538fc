"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fusedreg.checks import check_number
from fusedreg.optimizer import FusedOptimizer
from fusedreg.reference import Settings, State
from fusedreg.scalars import Number

Betas = tuple[float | Tensor, float | Tensor]


class Adam(FusedOptimizer):
    tensor_states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    scalar_states = ("step",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        l1: float = 0.0,
        l1_mode: str = "prox",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        _check_tensors(lr, betas, foreach_only=bool(foreach) and not capturable)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
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
        check_number("epsilon value", group["eps"], read_device=read_device)
        for index, beta in enumerate(group["betas"]):
            label = f"beta parameter at index {index}"
            check_number(label, beta, below=1.0, read_device=read_device)

    def init_state(
        self, group: Settings, param: Tensor, state: dict[str, Tensor], may_skip: bool
    ) -> None:
        """Create what is missing, also `max_exp_avg_sq` where amsgrad was turned on later."""
        if "step" not in state:
            # float32 is torch's; on the parameter's device nobody has to wait for it.
            wide = torch.get_default_dtype() == torch.float64 and param.device.type == "cpu"
            dtype = torch.float64 if wide else torch.float32
            state["step"] = torch.zeros((), dtype=dtype, device=param.device)
        names = self.tensor_states if group["amsgrad"] else self.tensor_states[:2]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)

    def direction(self, settings: Settings, state: State, grad: Tensor) -> tuple[Tensor, State]:
        beta1, beta2 = settings["betas"]
        new: State = {
            "step": state["step"] + 1,
            "exp_avg": beta1 * state["exp_avg"] + (1 - beta1) * grad,
            # ((1 - beta2) g) g: the square alone overflows sooner.
            "exp_avg_sq": beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad,
        }
        if settings["amsgrad"]:
            new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], new["exp_avg_sq"])
        bias_correction1 = 1 - beta1 ** new["step"]
        denominator = _denominator(settings, new)
        direction = new["exp_avg"] / bias_correction1 / denominator
        # 0/0 with eps = 0: a coordinate that has never seen a gradient does not move.
        return torch.where(denominator == 0, 0.0, direction), new

    def gain(self, settings: Settings, state: State) -> Number:
        """1 / (sqrt(v_hat) + eps), and 0 where no gradient was ever seen.

        There the formula would give 1 / eps and wipe out, say, every unused row of an embedding.
        """
        unseen = _second_moment(settings, state) == 0
        return torch.where(unseen, 0.0, 1 / _denominator(settings, state))


class AdamW(Adam):
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        l1: float = 0.0,
        l1_mode: str = "prox",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            l1=l1,
            l1_mode=l1_mode,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of Adam must not turn this into Adam
            group["decoupled_weight_decay"] = True


def _check_tensors(lr: object, betas: Betas, foreach_only: bool) -> None:
    """Torch's rules on which of lr and betas may be tensors, in its order and words."""
    if isinstance(lr, Tensor):
        if foreach_only:
            raise ValueError(
                "lr as a Tensor is not supported for capturable=False and foreach=True"
            )
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    for index, beta in enumerate(betas):
        check_number(f"beta parameter at index {index}", beta, below=1.0, read_device=True)
    kinds = {Tensor if isinstance(beta, Tensor) else type(beta) for beta in betas}
    if kinds not in ({float}, {Tensor}):
        raise ValueError("betas must be either both floats or both Tensors")
    if kinds == {Tensor} and foreach_only:
        raise ValueError(
            "betas[0] as a Tensor is not supported for capturable=False and foreach=True"
        )


def _second_moment(settings: Settings, state: State) -> Tensor:
    moment: Tensor = state["max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"]
    return moment


def _denominator(settings: Settings, state: State) -> Tensor:
    """sqrt(v_hat) + eps with the bias-corrected second moment of the step."""
    _, beta2 = settings["betas"]
    bias_correction2 = 1 - beta2 ** state["step"]
    moment: Tensor = (_second_moment(settings, state) / bias_correction2).sqrt() + settings["eps"]
    return moment
