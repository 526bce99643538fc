"""Param groups by role and by name, and the report of exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fusedreg.dist import FLATTENED, sharding_of, whole
from fusedreg.parametrized import Role, formed, weights
from fusedreg.types import ParamGroup, Settings

NORM_LAYERS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norm of every dimension
)
NO_PENALTY = {"weight_decay": 0.0, "l1": 0.0}


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    l1: float | None = None,
    no_decay: Iterable[str | nn.Module | type[nn.Module]] = (),
    overrides: Mapping[str, Settings] | None = None,
) -> list[ParamGroup]:
    """Split a model's parameters into param groups: penalised, unpenalised, and by name.

    Unpenalised (`weight_decay=0, l1=0`) are biases, the scales and shifts of normalisation layers,
    every other parameter with at most one dimension, and what `no_decay` lists. Biases are called
    `bias` or `bias_...`.

    Parameters from which a module forms its weight are penalised where that penalises the weight:

    - weight_norm: the weight is g * v / ||v||, row by row. The direction v is unpenalised, because
      the weight does not change with its length. The size g gets what the weight would get:
      weight_decay * ||g||^2 / 2 is that of the weight, and l1 * ||g||_1 is the sum of the norms of
      its rows (the group lasso), which makes whole rows 0.
    - spectral_norm and orthogonal: unpenalised, because they fix the length of the weight.
    - `torch.nn.utils.prune`: penalised as without the mask.
    - any other parametrization: refused, because a penalty on its original is none on the weight,
      unless `no_decay` or `overrides` says what the original gets. A frozen one is unpenalised.

    Args:
        model: all its parameters are grouped, frozen ones too (they may be unfrozen later). A tied
            weight appears once, and every one of its names counts for the patterns below.
        weight_decay: for the penalised parameters; None leaves it to the optimizer's constructor.
        l1: likewise.
        no_decay: names or shell-style patterns of parameters (`"embed.*"`), modules of the model,
            or module classes (`nn.Embedding`).
        overrides: pattern -> group options for the parameters it matches, e.g.
            `{"head.*": {"lr": 1e-4}}`. They win over the split, for biases too; of several
            matching patterns a later one wins.

    Returns:
        Groups with named parameters for any optimizer's `params`; parameters with equal options
        share one, groups and parameters are in the model's order.

    Raises:
        ValueError: a pattern, module or class matches no parameter; a mistyped name would otherwise
            silently decay what it was meant to protect. Or it is not clear whether a parameter
            should be penalised: it is the original of a parametrization that is not listed above,
            or it does not show its dimensions, as in lazy modules before the first forward and
            where FullyShardedDataParallel flattened it. `no_decay` decides that, `overrides` with a
            `weight_decay` or an `l1` does, and so do `weight_decay=0.0, l1=0.0`.
        TypeError: an entry of `no_decay` is of another kind.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    >>> for group in param_groups(model, weight_decay=0.1, overrides={"2.*": {"lr": 1e-4}}):
    ...     print([name for name, _ in group.pop("params")], group)
    ['0.weight'] {'weight_decay': 0.1}
    ['0.bias', '1.weight', '1.bias'] {'weight_decay': 0.0, 'l1': 0.0}
    ['2.weight'] {'weight_decay': 0.1, 'lr': 0.0001}
    ['2.bias'] {'weight_decay': 0.0, 'l1': 0.0, 'lr': 0.0001}
    """
    names: dict[Tensor, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    unpenalised, unclear = _by_role(model, names)
    for entry in no_decay:
        unpenalised |= _matching(entry, model, names)
    penalty = {"weight_decay": weight_decay, "l1": l1}
    penalised = {key: value for key, value in penalty.items() if value is not None}
    options: dict[Tensor, ParamGroup] = {
        param: dict(NO_PENALTY if param in unpenalised else penalised) for param in names
    }
    decided = set(unpenalised)
    for pattern, chosen in (overrides or {}).items():
        for matched in _matching(pattern, model, names):
            options[matched].update(chosen)
            if chosen.keys() & NO_PENALTY.keys():
                decided.add(matched)
    if penalised != NO_PENALTY:  # the optimizer's constructor may have what is not said here
        _refuse({param: why for param, why in unclear.items() if param not in decided}, names)

    groups: list[ParamGroup] = []
    for tensor, wanted in options.items():
        named = (names[tensor][0], tensor)
        for group in groups:
            if {key: value for key, value in group.items() if key != "params"} == wanted:
                group["params"].append(named)
                break
        else:
            groups.append({"params": [named], **wanted})
    return groups


def _by_role(
    model: nn.Module, names: Mapping[Tensor, list[str]]
) -> tuple[set[Tensor], dict[Tensor, str]]:
    """The unpenalised parameters, and those that only the user can judge, with the reason."""
    unpenalised: set[Tensor] = set()
    unclear: dict[Tensor, str] = {}
    for param, known_as in names.items():
        hidden = _hidden_dimensions(param)
        if any(_is_bias(name) for name in known_as) or (not hidden and param.dim() <= 1):
            unpenalised.add(param)
        elif hidden:
            unclear[param] = hidden
    for module in model.modules():
        exempt = isinstance(module, NORM_LAYERS)
        if exempt:
            unpenalised.update(module.parameters(recurse=False))
        for weight in formed(module):
            _sort_by_role(weight.roles, exempt or _is_bias(weight.name), unpenalised, unclear)
    return unpenalised, unclear


def _sort_by_role(
    roles: Mapping[Tensor, Role], exempt: bool, unpenalised: set[Tensor], unclear: dict[Tensor, str]
) -> None:
    """Sort the parameters that form a weight; `exempt` is a weight without penalty."""
    shaped = {param for param, role in roles.items() if role != "size"}
    if exempt or shaped <= unpenalised:  # a size has fewer dimensions than its weight
        unpenalised.update(roles)
        return
    for param, role in roles.items():
        if role == "direction" or (role == "unknown" and not param.requires_grad):
            unpenalised.add(param)
        elif role == "size":
            unpenalised.discard(param)  # that of a whole matrix has no dimensions
        elif role == "unknown":
            unclear[param] = "a penalty on it would be none on the weight formed from it"


def _is_bias(name: str) -> bool:
    """Biases, and those of attention and recurrent layers: bias_k, bias_ih_l0."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_")


def _hidden_dimensions(param: Tensor) -> str:
    """Why a parameter does not show how many dimensions it has; empty where it does."""
    if is_lazy(param):
        return "it is uninitialized: run a forward pass with a dummy batch first"
    if sharding_of(param) == FLATTENED and param.dim() <= 1:
        return (
            "FullyShardedDataParallel flattened it: use fully_shard, or make the groups before "
            "wrapping and wrap with use_orig_params=True"
        )
    return ""


def _refuse(unclear: Mapping[Tensor, str], names: Mapping[Tensor, list[str]]) -> None:
    """Raise for parameters that may or may not be penalised: only the user can say it."""
    for why in unclear.values():
        which = ", ".join(repr(names[param][0]) for param, other in unclear.items() if other == why)
        raise ValueError(
            f"cannot tell whether to penalise {which} ({why}). Name it in no_decay, or give it a "
            "weight_decay or l1 in overrides"
        )


def _matching(
    entry: str | nn.Module | type[nn.Module], model: nn.Module, names: Mapping[Tensor, list[str]]
) -> set[Tensor]:
    """The parameters that a name, pattern, module or module class stands for; at least one."""
    found: set[Tensor]
    if isinstance(entry, str):
        found = {p for p, known in names.items() if any(fnmatchcase(n, entry) for n in known)}
    elif isinstance(entry, nn.Module):
        found = {param for param in entry.parameters() if param in names}
    elif isinstance(entry, type) and issubclass(entry, nn.Module):
        modules = [module for module in model.modules() if isinstance(module, entry)]
        found = {param for module in modules for param in module.parameters()}
    else:
        raise TypeError(
            f"no_decay takes parameter names, modules and module classes, got {type(entry)}"
        )
    if not found:
        known = ", ".join(name for known_as in names.values() for name in known_as)
        raise ValueError(f"{entry!r} matches no parameter of the model (it has: {known})")
    return found


class Zeros(NamedTuple):
    """Exact zeros of one weight."""

    zeros: int
    numel: int

    @property
    def fraction(self) -> float:
        """Zeros over entries; 0.0 for an empty weight."""
        return self.zeros / self.numel if self.numel else 0.0


class Sparsity(dict[str, Zeros]):
    """Exact zeros per name of a weight, in the model's order; `print` shows it as a table."""

    @property
    def total(self) -> Zeros:
        """The sum over all weights."""
        return Zeros(
            sum(row.zeros for row in self.values()), sum(row.numel for row in self.values())
        )

    def __str__(self) -> str:
        """One aligned line per weight and one for the total."""
        rows = [*self.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        digits = max(len(f"{row.numel:,}") for _, row in rows)
        return "\n".join(
            f"{name:<{width}}  {row.zeros:>{digits},} of {row.numel:>{digits},} zero"
            f"  {row.fraction:7.2%}"
            for name, row in rows
        )


def sparsity(model: nn.Module) -> Sparsity:
    """Count the exact zeros (`== 0`, not merely small) of every weight of a model.

    A weight that a module forms from other parameters, by a parametrization, weight_norm,
    spectral_norm or a mask of `torch.nn.utils.prune`, is counted in their place, under its own name
    (`"0.weight"`) and as a forward in eval mode reads it. A weight that several modules share is
    counted once, but where each of them has a mask or parametrization of its own, each counts.

    The counts are read from the device in one transfer; the model is left as it is. Of DTensors the
    whole is counted, so that every rank must call this; under FullyShardedDataParallel call it
    within `summon_full_params`.

    Raises:
        ValueError: a parameter of a lazy module has no shape yet.
        RuntimeError: a parameter is on the meta device.

    >>> model = nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight[0].zero_()
    ...     _ = model.bias.fill_(1.0)
    >>> print(sparsity(model))
    weight  4 of  8 zero   50.00%
    bias    0 of  2 zero    0.00%
    total   4 of 10 zero   40.00%
    >>> sparsity(model)["weight"].zeros
    4
    """
    _check_has_data(model)
    with torch.no_grad():
        counted = [(name, _zeros(weight), weight.numel()) for name, weight in weights(model)]
    if not counted:
        return Sparsity()
    device = counted[0][1].device
    zeros = torch.stack([count.to(device) for _, count, _ in counted]).tolist()
    return Sparsity(
        (name, Zeros(int(count), numel))
        for (name, _, numel), count in zip(counted, zeros, strict=True)
    )


def _check_has_data(model: nn.Module) -> None:
    """Refuse parameters that have no values to count."""
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ValueError(
                f"Attempted to count the zeros of {name!r}, an uninitialized parameter: run a "
                "forward pass with a dummy batch first"
            )
        if param.is_meta:
            raise RuntimeError(
                f"Cannot count the zeros of {name!r}, a meta tensor; no data! Call "
                "torch.nn.Module.to_empty(), then initialise or load it"
            )


def _zeros(weight: Tensor) -> Tensor:
    """How many entries are 0, as a tensor; what a sparse layout leaves out is 0."""
    dense = weight if weight.layout == torch.strided else weight.to_dense()
    return whole((dense == 0).sum())
