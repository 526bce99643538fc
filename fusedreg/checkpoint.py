"""Writing a state_dict, and reading one: everything is checked before it is used."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from fusedreg.contract import UpdateRule
from fusedreg.dist import checkpoint_reads_keys, mesh_of, sharded_as
from fusedreg.formats import Plain, planes_of
from fusedreg.scalars import Count, wide_dtype
from fusedreg.types import ParamGroup, States

EXECUTION_FLAGS = ("foreach", "fused", "capturable", "differentiable", "state_dtype")
"""Group options that say how to run here; a file from another machine must not change them."""

STATES_OF_CLASSES = frozenset(
    {
        *("step", "momentum_buffer", "momentum_mass"),
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "mu_product", "exp_inf"),
        *("square_avg", "grad_avg", "acc_delta", "sum"),
        *("row_var", "col_var", "variance"),
        *("ax", "eta", "step_size", "func_evals", "n_iter"),
    }
)
"""Names of states by which the classes of torch.optim and those here are known.

A fixed table: what a file may load must not depend on which classes a program has imported.
"""
OPTIONS_OF_CLASSES = frozenset(
    {
        *("betas", "dampening", "alpha", "rho", "lr_decay", "lambd", "etas"),
        *("beta2_decay", "max_iter", "ns_steps"),
    }
)
"""Options by which they are known."""


def pack(rule: UpdateRule, groups: Sequence[ParamGroup], states: States) -> StateDict:
    """What torch.optim makes of groups and states: each parameter is its number among all.

    Each state is what its format has a checkpoint hold. Where torch.distributed.checkpoint asks,
    options that torch.optim does not know are left out if none of them has an effect: it loads only
    files that have every key.
    """
    group_of = {param: group for group in groups for param in group["params"]}
    params = (param for group in groups for param in group["params"])
    number = {param: index for index, param in enumerate(params)}  # the last place, as in torch
    left_out = {"params"}
    if checkpoint_reads_keys():
        left_out |= _keys_beyond_torch(rule, groups)
    packed = []
    for group in groups:
        options = {name: value for name, value in group.items() if name not in left_out}
        packed.append({**options, "params": [number[param] for param in group["params"]]})
    state: dict[Any, Any] = {}
    for key, value in states.items():
        if isinstance(key, Tensor):
            state[number[key]] = _joined(rule, group_of[key], key, value)
        else:  # of nothing here, as a file had it
            state[key] = value
    return {"state": state, "param_groups": packed}


def _joined(
    rule: UpdateRule, group: ParamGroup, param: Tensor, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The state of a parameter with each tensor state in the place of its planes."""
    storage = rule.state_format(group, param)
    if type(storage) is Plain:
        return state  # the very dict, as torch.optim hands it out
    joined = {**state}
    for name in rule.tensor_states:
        planes = planes_of(storage, [name])
        if planes[0] in state:
            joined[name] = storage.to_checkpoint([joined.pop(plane) for plane in planes])
    return joined


def check_keys(state_dict: object) -> None:
    """Raise unless it has the structure of a state_dict."""
    parts = {"state": Mapping, "param_groups": Sequence}
    has = state_dict if isinstance(state_dict, Mapping) else {}
    wrong = [repr(name) for name, kind in parts.items() if not isinstance(has.get(name), kind)]
    if not isinstance(state_dict, Mapping):
        problem = f"is no dict but {type(state_dict).__name__}"
    elif wrong:
        problem = f"lacks {' and '.join(wrong)}"
    elif not all(map(_is_group, state_dict["param_groups"])):
        problem = "lacks 'params' in a group"
    else:
        return
    raise ValueError(
        f"loaded state dict {problem}: pass what optimizer.state_dict() returned (a checkpoint of "
        "a whole training has it under a name of its own)"
    )


def _is_group(group: object) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), Sequence)


def is_absent(value: object) -> bool:
    """None, as an older torch.optim.SGD wrote, or the empty dict that torch unflattens to."""
    return value is None or (isinstance(value, dict) and not value)


def check_states(state_dict: StateDict, rule: UpdateRule) -> None:
    """Raise unless each parameter has the states that the optimizer keeps, all or none.

    What else it has is a user's own, unless its name is that of a state that other classes keep.
    """
    _check_class(state_dict["param_groups"], rule)
    who, known = type(rule).__name__, {*rule.counts, *rule.tensor_states}
    ids = {key for group in state_dict["param_groups"] for key in group["params"]}
    for key, state in state_dict["state"].items():
        if key not in ids:
            if isinstance(key, int):
                raise ValueError(
                    f"loaded state dict contains state of parameter {key}, which is in none of its "
                    "groups: it was not written whole"
                )
            continue
        if not isinstance(state, Mapping):
            raise ValueError(
                f"loaded state dict contains {state!r} as the state of parameter {key}, not a dict"
            )
        present = [name for name, value in state.items() if not is_absent(value)]
        foreign = [name for name in present if name in STATES_OF_CLASSES - known]
        if foreign:
            raise ValueError(
                f"loaded state dict contains {foreign[0]!r} for parameter {key}, which {who} does "
                "not keep: load it into the class that it was saved from"
            )
        missing = sorted(known - {*rule.late_states, *present})
        if missing and not known.isdisjoint(present):
            raise ValueError(
                f"loaded state dict lacks {missing[0]!r} for parameter {key}: it was not written "
                "whole, or by another class"
            )


def _check_class(saved_groups: Sequence[Mapping[str, object]], rule: UpdateRule) -> None:
    """Raise where a group lacks an option of this class and has one of another class.

    The names of states do not always tell: torch's Muon has a `momentum_buffer` as SGD has, and SGD
    without momentum has no state at all. One of the two alone is no sign: a file may lack options,
    and wrappers add their own.
    """
    who, own = type(rule).__name__, set(rule.device_options)
    for index, saved in enumerate(saved_groups):
        missing = sorted(own - saved.keys())
        foreign = sorted(OPTIONS_OF_CLASSES & saved.keys() - own)
        if missing and foreign:
            raise ValueError(
                f"loaded state dict contains {foreign[0]!r} and lacks {missing[0]!r} in group "
                f"{index}, unlike {who}: load it into the class that it was saved from"
            )


def _keys_beyond_torch(rule: UpdateRule, groups: Sequence[ParamGroup]) -> frozenset[str]:
    """Options that a file of the torch.optim class of the same name lacks.

    Empty where one of them has an effect or a default that has one, and where torch has no such
    class.
    """
    bases = (base for base in type(rule).__mro__ if base.__module__.startswith("torch.optim."))
    namesake = next(bases)
    if namesake is Optimizer:
        return frozenset()
    of_torch = {*inspect.signature(namesake).parameters, *rule.fixed_options}
    beyond = frozenset(rule.defaults.keys() - of_torch)
    declared = rule.declared_options
    for name in beyond.difference(EXECUTION_FLAGS):
        if name not in declared:  # of a subclass, which alone knows what it does
            return frozenset()
        switch = declared[name].needs or name
        for options in (rule.defaults, *groups):
            if options[switch] != declared[switch].default:
                return frozenset()
    return beyond


def merge_groups(groups: list[ParamGroup], saved_groups: list[ParamGroup]) -> list[ParamGroup]:
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
    groups: list[ParamGroup], state_dict: StateDict, rule: UpdateRule
) -> defaultdict[Tensor, Any]:
    """Copies of the saved states, keyed by the parameters of `groups`.

    State that belongs to no parameter, or that the class does not know, is kept as it is.
    """
    params = [
        (param, rule.state_format(group, param)) for group in groups for param in group["params"]
    ]
    saved_ids = [key for group in state_dict["param_groups"] for key in group["params"]]
    by_id = dict(zip(saved_ids, params, strict=True))
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for key, saved in state_dict["state"].items():
        if key not in by_id:
            state[key] = deepcopy(saved)
            continue
        param, storage = by_id[key]
        restored = {}
        for name, value in saved.items():
            if name in rule.counts:
                if not is_absent(value):
                    restored[name] = _count(key, name, value, param, rule.counts[name])
            elif name in rule.tensor_states:
                if not is_absent(value):
                    moment = _moment(key, name, value, param, storage.dtype)
                    planes = storage.from_checkpoint(moment)
                    restored.update(zip(planes_of(storage, [name]), planes, strict=True))
            elif isinstance(value, Tensor):
                restored[name] = value.detach().to(param.device, copy=True)
            else:
                restored[name] = deepcopy(value)
        if restored:
            state[param] = restored
    return state


def _count(key: object, name: str, value: object, param: Tensor, declared: Count) -> Tensor:
    """One number on the parameter's device, in a dtype that can count."""
    what = f"loaded state dict contains {name!r}"
    # Another class may have narrowed it: a bfloat16 count would stop at 256.
    least = wide_dtype(param.device) if declared.wide else torch.float32
    if isinstance(value, Tensor):
        count = value
    elif isinstance(value, (int, float)):  # in a file older than torch 1.12
        count = torch.as_tensor(value, dtype=least, device=param.device)
    else:
        raise ValueError(f"{what} as {type(value).__name__} for parameter {key}, not a number")
    if count.numel() != 1:
        raise ValueError(
            f"{what} of shape {tuple(count.shape)} for parameter {key}, but it is one number"
        )
    if count.is_complex() or not count >= declared.least:
        raise ValueError(
            f"{what} {count.item()} for parameter {key}, but it is a number >= {declared.least:g}"
        )
    dtype = torch.promote_types(count.dtype, least)
    return count.detach().to(param.device, dtype, copy=True)


def _moment(
    key: object, name: str, value: object, param: Tensor, dtype: torch.dtype | None
) -> Tensor:
    """A tensor of the parameter's shape, device and placements, never narrowed unasked."""
    what = f"loaded state dict contains {name!r}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} as {type(value).__name__} for parameter {key}, not a tensor")
    if value.shape != param.shape:
        raise ValueError(
            f"{what} of shape {tuple(value.shape)} for parameter {key}, which has shape "
            f"{tuple(param.shape)}: load it into the model it was saved from"
        )
    if mesh_of(value) != mesh_of(param):
        raise ValueError(
            f"{what} on {mesh_of(value) or 'no mesh'} for parameter {key}, which is on "
            f"{mesh_of(param) or 'no mesh'}: DTensors and what is not one are loaded with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    if value.layout is not torch.strided or (value.is_complex() and not param.is_complex()):
        raise ValueError(
            f"{what} as {value.dtype}, {value.layout} for parameter {key}, which is {param.dtype}, "
            f"{torch.strided}"
        )
    value = sharded_as(param, value)
    # torch casts to the parameter's dtype. A state wider than its parameter was asked for, and one
    # narrower would lose bits in every step: keep the wider of the two.
    dtype = dtype or torch.promote_types(value.dtype, param.dtype)
    if value.is_complex() and not dtype.is_complex:
        dtype = dtype.to_complex()
    restored: Tensor = value.detach().to(param.device, dtype, copy=True)
    return restored
