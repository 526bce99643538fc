"""What a user can get wrong, refused in torch's words plus the remedy, before anything changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from itertools import takewhile
from numbers import Real
from operator import eq
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedreg.dist import mesh_of
from fusedreg.penalties import Penalty
from fusedreg.scalars import on_host

L1_MODES = ("prox", "decoupled", "subgradient")

TORCH_KEYS = frozenset(("params", "param_names", "initial_lr"))
"""What torch itself writes into a group."""

STATE_DTYPES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)

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


def check_keys(
    group: dict[str, Any], known: Collection[str], own: Mapping[str, Any], warned: set[str]
) -> None:
    """Refuse what belongs to the optimizer, and warn once of a key that looks like a misspelt one.

    Args:
        group: a param group; any other key in it is a user's own.
        known: options of a group.
        own: options of the optimizer and their values. A wrapper may repeat them in its groups, as
            ZeroRedundancyOptimizer does.
        warned: keys that were named before; more are added.

    Raises:
        ValueError: a group has another value of one of `own`, which would be ignored there.
    """
    for name, value in own.items():
        if name in group and group[name] != value:
            raise ValueError(
                f"Invalid key in a param group: {name!r} (it belongs to the optimizer, whose "
                "norm is that of all groups: pass it to the constructor or assign "
                f"optimizer.{name})"
            )
    for key in group:
        if key in known or key in TORCH_KEYS or key in own or key in warned:
            continue
        near = [name for name in (*known, *own) if _is_one_edit(str(key), name)]
        if near:
            warned.add(key)
            warnings.warn(
                f"the param group key {key!r} is no option and has no effect: "
                f"is {near[0]!r} meant?",
                stacklevel=4,
            )


def _is_one_edit(first: str, second: str) -> bool:
    """Whether one letter more, fewer, other or swapped with its neighbour makes one the other."""
    short, long = sorted((first, second), key=len)
    if len(long) - len(short) > 1 or short == long:
        return False
    start = sum(takewhile(bool, map(eq, short, long)))
    if len(short) < len(long):
        return short[start:] == long[start + 1 :]
    swapped = short[start + 1 : start + 2] + short[start : start + 1]
    return short[start + 1 :] == long[start + 1 :] or (
        swapped == long[start : start + 2] and short[start + 2 :] == long[start + 2 :]
    )


def check_betas(betas: Any, *, read_device: bool = False) -> None:
    """Raise unless `betas` are two numbers in [0, 1)."""
    if not hasattr(betas, "__len__"):
        raise TypeError(f"Invalid betas: {betas} (expected two numbers)")
    if len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas} (expected two numbers)")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, below=1.0, read_device=read_device)


def check_is_fake(param: Tensor, who: str) -> None:
    """Raise where a real parameter would be stepped by operations that have no memory."""
    fake = torch._guards.active_fake_mode() is not None
    if fake and type(param).__torch_dispatch__ is Tensor.__torch_dispatch__:
        raise RuntimeError(
            f"{who} cannot step a parameter that has memory inside a FakeTensorMode, where new "
            "tensors have none: step outside of it, or make the model inside it"
        )


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


def check_lr_independent_decay(group: dict[str, Any], read_device: bool = False) -> None:
    """Raise where the decay is asked to leave out lr and cannot."""
    decay_lr = group["decay_lr"]
    if decay_lr is not None:
        check_number("decay_lr", decay_lr, read_device=read_device)
    if not group["lr_independent_decay"]:
        return
    if not group["decoupled_weight_decay"]:
        raise ValueError(
            "lr_independent_decay=True needs decoupled_weight_decay=True: a coupled decay is part "
            "of the gradient, and what lr does to that it does to the decay"
        )
    if (not isinstance(decay_lr, Tensor) or read_device or on_host(decay_lr)) and decay_lr == 0:
        raise ValueError(
            "Invalid decay_lr value: 0 (with lr_independent_decay=True a step decays by "
            "weight_decay * lr / decay_lr, where decay_lr is the lr that the group was added with: "
            "add it with the largest of its schedule)"
        )


def check_state_dtype(dtype: object) -> None:
    """Raise unless the moments can be stored in `dtype`."""
    if not (dtype is None or dtype in STATE_DTYPES):
        raise ValueError(f"Invalid state_dtype value: {dtype!r} (expected one of {STATE_DTYPES})")


def describe(groups: list[dict[str, Any]], number: int, index: int) -> str:
    """Name, shape, dtype and device of parameter `index` of group `number`, for an error."""
    param = groups[number]["params"][index]
    names = groups[number].get("param_names", [])
    name = repr(names[index]) if index < len(names) else f"{index} of group {number}"
    return f"parameter {name} of shape {tuple(param.shape)}, {param.dtype}, {param.device}"


def check_param(
    penalties: Iterable[Penalty], groups: list[dict[str, Any]], number: int, index: int
) -> None:
    """Raise where a parameter cannot be stepped, or not with the penalties of its group."""
    param = groups[number]["params"][index]
    if is_lazy(param):  # of a lazy module: nothing is known before the first forward
        return
    if param.is_conj():
        raise RuntimeError(
            "view_as_real doesn't work on unresolved conjugated tensors: make the parameter from "
            f"resolve_conj() ({describe(groups, number, index)})"
        )
    for penalty in penalties:
        problem = penalty.check_param(groups[number], param)
        if problem is not None:
            raise ValueError(f"{problem} ({describe(groups, number, index)})")


def check_grad(who: str, groups: list[dict[str, Any]], number: int, index: int) -> None:
    """Raise where the gradient of a parameter cannot be used by the optimizer called `who`."""
    param = groups[number]["params"][index]
    grad = param.grad
    problem = None
    if grad.layout is not torch.strided:
        problem = (
            f"{who} does not support sparse gradients, please consider torch.optim.SGD, "
            "torch.optim.Adagrad or torch.optim.SparseAdam, or build the layer with sparse=False"
        )
    elif not _is_numeric(param) or not _is_numeric(grad):
        what, dtype = (
            ("gradients", grad.dtype) if _is_numeric(param) else ("parameters", param.dtype)
        )
        problem = (
            f"{who} only supports {what} of floating point and complex dtypes, but got {dtype}: "
            "set requires_grad=False on the parameter or cast it"
        )
    elif grad.is_complex() != param.is_complex():
        problem = (
            f"{who} needs a gradient of the parameter's kind, real or complex, but got "
            f"{grad.dtype}: clear it with zero_grad()"
        )
    elif grad.device != param.device:
        problem = (
            f"Expected all tensors to be on the same device, but the gradient is on {grad.device}: "
            "clear it with zero_grad() after moving the parameter"
        )
    elif mesh_of(grad) != mesh_of(param):
        problem = (
            f"got mixed torch.Tensor and DTensor, or DTensors of different meshes: a gradient on "
            f"{mesh_of(grad)} for a parameter on {mesh_of(param)}; distribute both over one mesh"
        )
    elif grad.shape != param.shape:
        problem = (
            f"The size of the gradient {tuple(grad.shape)} must match the size of the parameter: "
            "clear it with zero_grad() after resizing the parameter"
        )
    elif _overlaps_itself(param):
        problem = (
            "unsupported operation: more than one element of the written-to tensor refers to a "
            "single memory location: clone() the expanded parameter"
        )
    if problem is not None:
        raise RuntimeError(f"{problem} ({describe(groups, number, index)})")


def check_moment(group: dict[str, Any], param: Tensor, name: str, value: Any) -> None:
    """Raise where a tensor state does not fit its parameter; None is taken for none."""
    if value is None or is_lazy(param):
        return
    if not isinstance(value, Tensor):
        problem = f"is {value!r}, and not a tensor"
    elif value.shape != param.shape:
        problem = f"has shape {tuple(value.shape)}, which must match the size of the parameter"
    elif value.device != param.device:
        problem = f"is on {value.device}: load_state_dict(state_dict()) moves all states"
    else:
        return
    raise RuntimeError(
        f"The state {name!r} {problem}. Delete optimizer.state[parameter] to begin anew "
        f"({_describe_one(group, param)})"
    )


def check_count(group: dict[str, Any], param: Tensor, name: str, value: Any) -> None:
    """Raise where a state that is one number is something else; None is taken for none."""
    if value is None or (isinstance(value, Real) and math.isfinite(value)):
        return
    if not isinstance(value, Tensor):
        problem = f"is {value!r}, and not a number"
    elif value.numel() != 1:
        problem = f"has {value.numel()} elements, but is one number"
    elif value.is_complex():
        problem = f"is {value.dtype}, but a real number"
    else:
        return
    raise RuntimeError(
        f"The state {name!r} {problem}. Delete optimizer.state[parameter] to begin anew "
        f"({_describe_one(group, param)})"
    )


def _describe_one(group: dict[str, Any], param: Tensor) -> str:
    """`describe`, where the place of the parameter has to be found first."""
    index = next(i for i, other in enumerate(group["params"]) if other is param)
    return describe([group], 0, index)


def _is_numeric(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _overlaps_itself(param: Tensor) -> bool:
    """Whether `param` was expanded: one memory location under several indices."""
    return 0 in param.stride() and any(
        size > 1 and stride == 0 for size, stride in zip(param.shape, param.stride(), strict=True)
    )
