"""Reading a state_dict: groups merged, tensors copied, everything checked before it is used."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from fusedreg.scalars import wide_dtype

EXECUTION_FLAGS = ("foreach", "fused", "capturable", "differentiable", "state_dtype")
"""Group options that say how to run here; a file from another machine must not change them."""


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
    groups: list[dict[str, Any]], state_dict: StateDict, scalar_states: tuple[str, ...]
) -> defaultdict[Tensor, Any]:
    """Copies of the saved states, keyed by the parameters of `groups`.

    State that belongs to no parameter is kept as it is, as torch does.
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
        restored = {
            name: _restore(key, name, value, param, name in scalar_states, state_dtype)
            for name, value in saved.items()
            if value is not None  # an older torch.optim.SGD wrote momentum_buffer=None
        }
        if restored:
            state[param] = restored
    return state


def _restore(
    key: Any, name: str, value: Any, param: Tensor, scalar: bool, state_dtype: torch.dtype | None
) -> Any:
    if scalar:
        # A number in a file older than torch 1.12, or narrowed by a class that did not know it: a
        # bfloat16 count would stand still at 256.
        value = torch.as_tensor(value)
        least = torch.float32 if name == "step" else wide_dtype(param.device)
        dtype = torch.promote_types(value.dtype, least)
        return value.detach().to(param.device, dtype, copy=True)
    if not isinstance(value, Tensor):
        return deepcopy(value)
    if value.dim() == 0 and param.dim() > 0:
        return value.detach().to(param.device, copy=True)
    if value.shape != param.shape:
        raise ValueError(
            f"loaded state dict contains {name!r} of shape {tuple(value.shape)} for parameter "
            f"{key}, which has shape {tuple(param.shape)}: load it into the model it was saved from"
        )
    # torch casts to the parameter's dtype. A state wider than its parameter was asked for, and one
    # narrower would lose bits in every step: keep the wider of the two. Counters and masks stay.
    dtype = value.dtype
    if value.is_floating_point() or value.is_complex():
        dtype = state_dtype or torch.promote_types(value.dtype, param.dtype)
        if value.is_complex() and not dtype.is_complex:
            dtype = dtype.to_complex()
    return value.detach().to(param.device, dtype, copy=True)
