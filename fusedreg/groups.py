"""Param groups by role and by name, and the report of exact zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedreg.dist import whole

NORM_LAYERS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norm of every dimension
)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float | None = None,
    l1: float | None = None,
    no_decay: Iterable[str | nn.Module | type[nn.Module]] = (),
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into param groups: penalised, unpenalised, and by name.

    Unpenalised (`weight_decay=0, l1=0`) are biases, the scales and shifts of normalisation layers,
    every other parameter with at most one dimension, and what `no_decay` lists.

    Args:
        model: all its parameters are grouped, frozen ones too (they may be unfrozen later). A tied
            weight appears once, and every one of its names counts for the patterns below.
        weight_decay: for the penalised parameters; None leaves it to the optimizer's constructor.
        l1: likewise.
        no_decay: names or shell-style patterns of parameters (`"embed.*"`), modules of the model,
            or module classes (`nn.Embedding`).
        overrides: pattern -> group options for the parameters it matches, e.g.
            `{"head.*": {"lr": 1e-4, "l1": 1e-3}}`. They win over the split; of several matching
            patterns a later one wins.

    Returns:
        Groups with named parameters for any optimizer's `params`; parameters with equal options
        share one, groups and parameters are in the model's order.

    Raises:
        ValueError: a pattern, module or class matches no parameter; a mistyped name would otherwise
            silently decay what it was meant to protect.
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
    unpenalised = _unpenalised_by_role(model, names)
    for entry in no_decay:
        unpenalised |= _matching(entry, model, names)
    penalty = {"weight_decay": weight_decay, "l1": l1}
    penalised = {key: value for key, value in penalty.items() if value is not None}
    options: dict[Tensor, dict[str, Any]] = {
        param: {"weight_decay": 0.0, "l1": 0.0} if param in unpenalised else dict(penalised)
        for param in names
    }
    for pattern, chosen in (overrides or {}).items():
        for matched in _matching(pattern, model, names):
            options[matched].update(chosen)

    groups: list[dict[str, Any]] = []
    for tensor, wanted in options.items():
        named = (names[tensor][0], tensor)
        for group in groups:
            if {key: value for key, value in group.items() if key != "params"} == wanted:
                group["params"].append(named)
                break
        else:
            groups.append({"params": [named], **wanted})
    return groups


def _unpenalised_by_role(model: nn.Module, names: Mapping[Tensor, list[str]]) -> set[Tensor]:
    found = {
        param
        for param, known_as in names.items()
        if param.dim() <= 1 or any(name.rpartition(".")[2] == "bias" for name in known_as)
    }
    for module in model.modules():
        if isinstance(module, NORM_LAYERS):
            found.update(module.parameters(recurse=False))
    return found


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
    """Exact zeros of one parameter."""

    zeros: int
    numel: int

    @property
    def fraction(self) -> float:
        """Zeros over entries; 0.0 for an empty parameter."""
        return self.zeros / self.numel if self.numel else 0.0


class Sparsity(dict[str, Zeros]):
    """Exact zeros per parameter name, in the model's order; `print` shows it as a table."""

    @property
    def total(self) -> Zeros:
        """The sum over all parameters."""
        return Zeros(
            sum(row.zeros for row in self.values()), sum(row.numel for row in self.values())
        )

    def __str__(self) -> str:
        """One aligned line per parameter and one for the total."""
        rows = [*self.items(), ("total", self.total)]
        width = max(len(name) for name, _ in rows)
        digits = max(len(f"{row.numel:,}") for _, row in rows)
        return "\n".join(
            f"{name:<{width}}  {row.zeros:>{digits},} of {row.numel:>{digits},} zero"
            f"  {row.fraction:7.2%}"
            for name, row in rows
        )


def sparsity(model: nn.Module) -> Sparsity:
    """Count the exact zeros (`== 0`, not merely small) of every parameter of a model.

    A tied weight is counted once. The counts are read from the device in one transfer.

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
    named = list(model.named_parameters())
    if not named:
        return Sparsity()
    device = named[0][1].device
    counts = [whole((param.detach() == 0).sum()).to(device) for _, param in named]
    zeros = torch.stack(counts).tolist()
    return Sparsity(
        (name, Zeros(int(count), param.numel()))
        for (name, param), count in zip(named, zeros, strict=True)
    )
