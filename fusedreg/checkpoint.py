"""Reading a state_dict: groups merged, tensors copied, everything checked before it is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from fusedreg.dist import placements_of, sharded_as
from fusedreg.scalars import wide_dtype

EXECUTION_FLAGS = ("foreach", "fused", "capturable", "differentiable", "state_dtype")
"""Group options that say how to run here; a file from another machine must not change them."""


def check_keys(state_dict: object) -> None:
    """Raise unless it has the structure of a state_dict."""
    parts = {"state": dict, "param_groups": list}
    if isinstance(state_dict, dict):
        wrong = [name for name, kind in parts.items() if not isinstance(state_dict.get(name), kind)]
        lacks = f"lacks {' and '.join(map(repr, wrong))}"
        if not wrong and all("params" in group for group in state_dict["param_groups"]):
            return
        lacks = lacks if wrong else "lacks 'params' in a group"
    else:
        lacks = f"is no dict but {type(state_dict).__name__}"
    raise ValueError(
        f"loaded state dict {lacks}: pass what optimizer.state_dict() returned (a checkpoint of a "
        "whole training has it under a name of its own)"
    )


def is_absent(value: object) -> bool:
    """None, as an older torch.optim.SGD wrote, or the empty dict that torch unflattens to."""
    return value is None or value == {}


def check_states(state_dict: StateDict, rule: Any) -> None:
    """Raise unless each parameter has the states that class `rule` keeps, all or none."""
    needed = {*rule.scalar_states, *rule.tensor_states} - {*rule.late_states}
    ids = {key for group in state_dict["param_groups"] for key in group["params"]}
    for key, state in state_dict["state"].items():
        if key not in ids:
            if isinstance(key, int):
                raise ValueError(
                    f"loaded state dict contains state of parameter {key}, which is in none of its "
                    "groups: it was not written whole"
                )
            continue
        found = {name for name, value in state.items() if not is_absent(value)}
        # Counters, masks and notes are a user's own; what has a floating dtype is a moment.
        foreign = [
            name
            for name, value in state.items()
            if name not in {*rule.scalar_states, *rule.tensor_states}
            and isinstance(value, Tensor)
            and (value.is_floating_point() or value.is_complex())
        ]
        if foreign:
            raise ValueError(
                f"loaded state dict contains {foreign[0]!r} for parameter {key}, which "
                f"{rule.__name__} does not keep: load it into the class that it was saved from"
            )
        missing = sorted(needed - found)
        if found and missing:
            raise ValueError(
                f"loaded state dict lacks {missing[0]!r} for parameter {key}: it was not written "
                "whole, or by another class"
            )


def merge_groups(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Saved hyper-parameters over the present ones, with the present parameters and flags."""
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)} instead of {len(groups)}"
        )
    merged = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: {len(saved['params'])} instead of {len(group['params'])} "
                f"parameters in group {index}"
            )
        kept = {name: group[name] for name in ("params", *EXECUTION_FLAGS) if name in group}
        copied = {name: deepcopy(value) for name, value in saved.items() if name not in kept}
        merged.append({**group, **copied, **kept})
    return merged


def restore_state(
    groups: list[dict[str, Any]], state_dict: StateDict, rule: Any
) -> defaultdict[Tensor, Any]:
    """Copies of the saved states, keyed by the parameters of `groups`.

    State that belongs to no parameter, or that class `rule` does not know, is kept as it is.
    """
    params = [(param, group["state_dtype"]) for group in groups for param in group["params"]]
    saved_ids = [key for group in state_dict["param_groups"] for key in group["params"]]
    by_id = dict(zip(saved_ids, params, strict=True))
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key not in by_id:
            state[key] = deepcopy(saved)
            continue
        param, state_dtype = by_id[key]
        restored = {}
        for name, value in saved.items():
            where = f"loaded state dict contains {name!r} {{}} for parameter {key}, {{}}"
            if is_absent(value):
                continue
            if name in rule.scalar_states:
                restored[name] = _count(where.format, name, value, param)
            elif name in rule.tensor_states:
                restored[name] = _moment(where.format, value, param, state_dtype)
            elif isinstance(value, Tensor):
                restored[name] = value.detach().to(param.device, copy=True)
            else:
                restored[name] = deepcopy(value)
        if restored:
            state[param] = restored
    return state


def _count(problem: Callable[..., str], name: str, value: Any, param: Tensor) -> Tensor:
    """One number on the parameter's device, in a dtype that can count."""
    # A file older than torch 1.12 has a Python number. A default device would move a tensor.
    number = not isinstance(value, Tensor)
    count: Tensor = torch.as_tensor(value, device=param.device) if number else value
    if count.numel() != 1:
        raise ValueError(problem(f"of shape {tuple(count.shape)}", "but it is one number"))
    # Another class may have narrowed it: a bfloat16 count would stand still at 256.
    least = torch.float32 if name == "step" else wide_dtype(param.device)
    dtype = torch.promote_types(count.dtype, least)
    return count.detach().to(param.device, dtype, copy=True)


def _moment(
    problem: Callable[..., str], value: Any, param: Tensor, state_dtype: torch.dtype | None
) -> Tensor:
    """A tensor of the parameter's shape, device and placements, never narrowed unasked."""
    if not isinstance(value, Tensor):
        raise ValueError(problem(f"as {type(value).__name__}", "but it is a tensor"))
    if value.shape != param.shape:
        raise ValueError(
            problem(
                f"of shape {tuple(value.shape)}",
                f"which has shape {tuple(param.shape)}: load it into the model it was saved from",
            )
        )
    if placements_of(param) is not None:
        if placements_of(value) is None:
            raise ValueError(
                problem(
                    "as a plain tensor",
                    "which is a DTensor: load it with "
                    "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict",
                )
            )
        value = sharded_as(param, value)
    # torch casts to the parameter's dtype. A state wider than its parameter was asked for, and one
    # narrower would lose bits in every step: keep the wider of the two.
    dtype = state_dtype or torch.promote_types(value.dtype, param.dtype)
    if value.is_complex() and not dtype.is_complex:
        dtype = dtype.to_complex()
    restored: Tensor = value.detach().to(param.device, dtype, copy=True)
    return restored
