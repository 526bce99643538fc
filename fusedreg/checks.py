"""What a user can get wrong, refused in torch's words plus the remedy, before anything changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import takewhile
from numbers import Real
from operator import eq
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedreg.dist import mesh_of
from fusedreg.scalars import on_host
from fusedreg.types import ParamGroup

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


def check_nonnegative(group: ParamGroup, name: str, read_device: bool) -> None:
    """Raise unless option `name` of a group is a number >= 0."""
    check_number(name, group[name], read_device=read_device)


def check_finite(group: ParamGroup, name: str, read_device: bool) -> None:
    """Raise unless option `name` of a group is a finite number >= 0."""
    check_number(name, group[name], below=float("inf"), read_device=read_device)


def misspelt(key: object, known: Iterable[str]) -> str | None:
    """The known name that is one edit away from a key, if there is one."""
    return next((name for name in known if _is_one_edit(str(key), name)), None)


def check_keys(
    group: ParamGroup,
    known: Collection[str],
    own: Mapping[str, object],
    warned: set[str],
    *,
    new: bool = False,
) -> None:
    """Raise for a key that belongs to the optimizer or that is a misspelt option.

    Args:
        group: a param group. Keys that resemble no option are a user's own.
        known: options of a group.
        own: options of the optimizer and their values. A wrapper may repeat them in its groups, as
            ZeroRedundancyOptimizer does.
        warned: keys that there was a warning of; more are added.
        new: whether a user has just passed the group. Of a misspelt option that appears later,
            there is one warning.

    Raises:
        ValueError: a group has another value of one of `own`, which would be ignored there; a new
            group has a misspelt option.
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
        near = misspelt(key, (*known, *own))
        if near is not None and new:
            raise ValueError(
                f"Invalid key in a param group: {key!r} (it is no option: did you mean {near!r}? "
                "If it is a key of your own, rename it)"
            )
        if near is not None:
            warned.add(key)
            warnings.warn(
                f"the param group key {key!r} is no option and has no effect: is {near!r} meant?",
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


def check_flags(group: ParamGroup, *_: object) -> None:
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


def check_state_dtype(group: ParamGroup, name: str, _: bool) -> None:
    """Raise unless the moments can be stored in this dtype."""
    if group[name] not in STATE_DTYPES:
        expected = f"expected one of {STATE_DTYPES}"
        raise ValueError(f"Invalid {name} value: {group[name]!r} ({expected})")


def describe(groups: list[ParamGroup], number: int, index: int) -> str:
    """Name, shape, dtype and device of parameter `index` of group `number`, for an error."""
    param = groups[number]["params"][index]
    names = groups[number].get("param_names", [])
    name = repr(names[index]) if index < len(names) else f"{index} of group {number}"
    return f"parameter {name} of shape {tuple(param.shape)}, {param.dtype}, {param.device}"


def check_param(
    problems: Iterable[Callable[[ParamGroup, Tensor], str | None]],
    groups: list[ParamGroup],
    number: int,
    index: int,
) -> None:
    """Raise where a parameter cannot be stepped, or one of `problems` says why not."""
    param = groups[number]["params"][index]
    if is_lazy(param):  # of a lazy module: nothing is known before the first forward
        return
    if param.is_conj():
        raise RuntimeError(
            "view_as_real doesn't work on unresolved conjugated tensors: make the parameter from "
            f"resolve_conj() ({describe(groups, number, index)})"
        )
    for problem_of in problems:
        problem = problem_of(groups[number], param)
        if problem is not None:
            raise ValueError(f"{problem} ({describe(groups, number, index)})")


def check_grad(who: str, groups: list[ParamGroup], number: int, index: int) -> None:
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


def check_moment(group: ParamGroup, param: Tensor, name: str, value: object) -> None:
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


def check_planes(group: ParamGroup, param: Tensor, name: str, planes: Mapping[str, object]) -> None:
    """The same for the tensors that a state is stored in, which are all there or none."""
    for plane, value in planes.items():
        check_moment(group, param, plane, value)
    missing = [plane for plane, value in planes.items() if value is None]
    if missing and len(missing) < len(planes):
        raise RuntimeError(
            f"The state {name!r} lacks {missing[0]!r}, in which a part of it is stored. Delete "
            f"optimizer.state[parameter] to begin anew ({_describe_one(group, param)})"
        )


def check_count(group: ParamGroup, param: Tensor, name: str, value: object) -> None:
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


def _describe_one(group: ParamGroup, param: Tensor) -> str:
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
