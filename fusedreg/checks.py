"""What a user can get wrong, refused in torch's words plus the remedy, before anything changes."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fusedreg.scalars import on_host

L1_MODES = ("prox", "decoupled", "subgradient")

LABELS = {
    "lr": "learning rate",
    "eps": "epsilon value",
    "betas[0]": "beta parameter at index 0",
    "betas[1]": "beta parameter at index 1",
}
"""How torch calls an option in an error; every other is called by its name and "value"."""


def check_number(
    name: str, value: Any, *, below: float | None = None, read_device: bool = False
) -> None:
    """Raise unless option `name` is a number >= 0, and < `below` where that is given.

    A tensor must have one element. One on an accelerator is looked at only with `read_device`,
    because that waits for the device: at construction, never in a step.
    """
    label = LABELS.get(name, f"{name} value")
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element (got {value.numel()} elements)")
        if not (read_device or on_host(value)):
            return
    elif not isinstance(value, Real):
        raise TypeError(f"Invalid {label}: {value!r} (expected a number, got {type(value)})")
    if not value >= 0 or (below is not None and not value < below):
        upper = "" if below is None else f" < {below:g}"
        raise ValueError(f"Invalid {label}: {value} (expected 0 <= value{upper})")


def check_flags(group: dict[str, Any]) -> None:
    """Raise where `fused`, `foreach` and `differentiable` exclude each other or are not offered."""
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["differentiable"]:
        raise NotImplementedError(
            "differentiable=True is not supported: a fused step has no autograd graph. "
            "Use the class of the same name in torch.optim to differentiate through a step."
        )


def describe(group: dict[str, Any], index: int) -> str:
    """Name, shape and dtype of parameter `index` of `group`, for an error message."""
    param = group["params"][index]
    name = repr(group["param_names"][index]) if "param_names" in group else str(index)
    return f"parameter {name} of shape {tuple(param.shape)}, {param.dtype}, {param.device}"


def check_param(group: dict[str, Any], index: int) -> None:
    """Raise where a parameter cannot be stepped, or not with the penalties of its group."""
    param = group["params"][index]
    if param.is_conj():
        raise RuntimeError(
            "view_as_real doesn't work on unresolved conjugated tensors: make the parameter from "
            f"resolve_conj() ({describe(group, index)})"
        )
    if param.is_complex() and not (isinstance(group["l1"], Real) and group["l1"] == 0):
        raise ValueError(
            f"Invalid l1 value: {group['l1']} for a complex parameter: the steps treat it as pairs "
            "of reals, whose soft-threshold is not that of the modulus. Put it into a group with "
            f"l1=0 ({describe(group, index)})"
        )


def check_grad(optimizer_name: str, group: dict[str, Any], index: int) -> None:
    """Raise where the gradient of a parameter cannot be used.

    Called for every gradient in every step, so the good case comes first and is short.
    """
    param = group["params"][index]
    grad = param.grad
    if (
        grad.layout is torch.strided
        and (grad.is_floating_point() or grad.is_complex())
        and grad.is_complex() == param.is_complex()
        and grad.device == param.device
        and grad.shape == param.shape
        and grad.device.type != "meta"
        and (param.is_floating_point() or param.is_complex())
        and not _overlaps_itself(param)
    ):
        return
    where = describe(group, index)
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{optimizer_name} does not support sparse gradients, please consider torch.optim.SGD "
            f"or torch.optim.SparseAdam, or build the layer with sparse=False ({where})"
        )
    for what, tensor in (("parameters", param), ("gradients", grad)):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise RuntimeError(
                f"{optimizer_name} only supports {what} of floating point and complex dtypes, but "
                f"got {tensor.dtype}: set requires_grad=False on the parameter or cast it ({where})"
            )
    if grad.is_complex() != param.is_complex():
        raise RuntimeError(
            f"{optimizer_name} needs a gradient of the parameter's kind, real or complex, but got "
            f"{grad.dtype}: clear it with zero_grad() ({where})"
        )
    if grad.device.type == "meta":
        raise RuntimeError(
            f"{optimizer_name} cannot step a parameter on the meta device: "
            f"give it memory first, with module.to_empty(device=...) ({where})"
        )
    if grad.device != param.device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but the gradient is on "
            f"{grad.device}: clear it with zero_grad() after moving the parameter ({where})"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"The size of the gradient {tuple(grad.shape)} must match the size of the parameter: "
            f"clear it with zero_grad() after resizing the parameter ({where})"
        )
    raise RuntimeError(
        "unsupported operation: more than one element of the written-to tensor refers to a single "
        f"memory location: clone() the expanded parameter ({where})"
    )


def _overlaps_itself(param: Tensor) -> bool:
    """Whether `param` was expanded: one memory location under several indices."""
    return 0 in param.stride() and any(
        size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)
    )
