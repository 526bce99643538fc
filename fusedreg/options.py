"""How options are declared, each once, and the signatures that show them.

A key of a `TypedDict` is an option: its name, its type for type checkers, and an `Option` with
everything else. Those that every class has are declared here and by each penalty. Constructors take
them as `**options: Unpack[Options]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import Parameter
from types import FunctionType, SimpleNamespace
from typing import Annotated, TypedDict, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from typing_extensions import Unpack

from fusedreg.checks import (
    check_flags,
    check_nonnegative,
    check_state_dtype,
)
from fusedreg.dist import ProcessGroup
from fusedreg.scalars import pair, settled
from fusedreg.types import ParamGroup


@dataclass(frozen=True)
class Option:
    """What holds for an option in every class."""

    default: object
    """Its value where none is given. It has no effect."""
    check: Callable[[ParamGroup, str, bool], None] | None = None
    """Raises if the option of this name in a group is out of range.

    The last argument says whether numbers on an accelerator may be read, which waits for it.
    """
    of_group: bool = True
    """False if it belongs to the optimizer, as an attribute or a property of this name."""
    copied_from: str | None = None
    """The option that None stands for, as it was when the group was added."""
    needs: str | None = None
    """The option without which it has no effect."""


class TorchOptions(TypedDict, total=False):
    """Options that constructors of torch.optim write out."""

    weight_decay: Annotated[float | Tensor, Option(0.0, check_nonnegative)]
    maximize: Annotated[bool, Option(False)]
    foreach: Annotated[bool | None, Option(None)]
    fused: Annotated[bool | None, Option(None, check_flags)]
    differentiable: Annotated[bool, Option(False)]


class StepOptions(TypedDict, total=False):
    """Clipping and skipping of whole steps, and how states are stored."""

    max_grad_norm: Annotated[float | None, Option(None, of_group=False)]
    skip_nonfinite: Annotated[bool, Option(False, of_group=False)]
    state_dtype: Annotated[torch.dtype | None, Option(None, check_state_dtype)]
    process_group: Annotated[ProcessGroup | None, Option(None, of_group=False)]


def declarations(*sets: type) -> dict[str, Option]:
    """The `Option` of each key of some TypedDicts."""
    return {
        name: extra
        for options in sets
        for name, hint in get_type_hints(options, include_extras=True).items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Option)
    }


def owner(cls: type, name: str) -> int:
    """Where the class that defines an attribute stands in the order of bases."""
    return next(index for index, base in enumerate(cls.__mro__) if name in vars(base))


def nearest(name: str, known: Mapping[str, object]) -> str:
    """The end of an error: " Did you mean 'l1'?", or nothing if no known name is near."""
    near = get_close_matches(name, known, n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def complete_signature(cls: type, changed: Mapping[str, object], sets: tuple[type, ...]) -> None:
    """Have the constructor of a class show the options that it takes as `**options`.

    `inspect.signature`, `help` and `typing.get_type_hints` then see each of them, with its type and
    default. Static type checkers see `Unpack[...]`.

    Args:
        cls: the class. Nothing is done if it inherits its constructor or has no `**options`.
        changed: the defaults that this class has for options of others.
        sets: the TypedDicts of all options that the class declares.
    """
    init = vars(cls).get("__init__")
    if not isinstance(init, FunctionType):
        return
    signature = inspect.signature(init)
    *others, last = signature.parameters.values()
    if last.kind is not Parameter.VAR_KEYWORD:
        return
    added = [
        option.replace(kind=Parameter.KEYWORD_ONLY, default=changed.get(name, option.default))
        for name, option in _keywords(cls, init, last, sets).items()
        if name not in signature.parameters
    ]
    shown = signature.replace(parameters=[*others, *added])
    init.__signature__ = shown  # type: ignore[attr-defined]  # inspect reads it
    hints = {name: hint for name, hint in init.__annotations__.items() if name != last.name}
    for option in added:
        if option.annotation is not Parameter.empty:
            hints[option.name] = option.annotation
    init.__annotations__ = hints


def _keywords(
    cls: type, init: FunctionType, last: Parameter, sets: tuple[type, ...]
) -> dict[str, Parameter]:
    """The parameters that `**options` stands for.

    An annotation `Unpack[...]` names them. Without one, the options are taken to be passed on: they
    are the parameters of the next constructor that have a default, and all that the class declares.
    """
    unpacked = _unpacked(init, last)
    sets = sets if unpacked is None else (unpacked,)
    hints = {name: hint for each in sets for name, hint in get_type_hints(each).items()}
    declared = {
        name: Parameter(
            name, Parameter.KEYWORD_ONLY, default=option.default, annotation=hints[name]
        )
        for name, option in declarations(*sets).items()
    }
    if unpacked is not None:
        return declared
    parent = next((base for base in cls.__mro__[1:] if "__init__" in vars(base)), object)
    by_keyword = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    inherited = {
        name: parameter
        for name, parameter in inspect.signature(parent).parameters.items()
        if parameter.kind in by_keyword and parameter.default is not Parameter.empty
    }
    return {**inherited, **declared, **inherited}  # in their order, with their values


def _unpacked(init: FunctionType, last: Parameter) -> type | None:
    """The TypedDict of `**options: Unpack[TypedDict]`, if the annotation is one."""
    hints = SimpleNamespace(__annotations__={"options": last.annotation})
    try:
        hint = get_type_hints(hints, init.__globals__, include_extras=True)["options"]
    except (NameError, TypeError):  # its names are imported for type checkers only
        return None
    if get_origin(hint) is not Unpack:
        return None
    unpacked: type = get_args(hint)[0]
    return unpacked


# ---- the options of a group ----------------------------------------------------------------------

PLAIN = frozenset((float, int, bool, str, tuple, list, type(None), torch.dtype))
"""Types of options that stay as they are."""


def make_plain(group: ParamGroup, defaults: Mapping[str, object]) -> None:
    """Replace arrays and the like, which a schedule may have made, by numbers and pairs."""
    for name, default in defaults.items():
        if type(group[name]) not in PLAIN:
            of = pair if isinstance(default, tuple) else settled
            group[name] = of(group[name])


def make_pairs(group: ParamGroup, defaults: Mapping[str, object]) -> None:
    """Make tuples of pairs: a list would have to be read in every step, as it may change."""
    for name, default in defaults.items():
        if isinstance(default, tuple) and name in group:
            group[name] = pair(group[name])


def copy_options(group: ParamGroup, declared: Mapping[str, Option]) -> None:
    """Replace None in options that are then a copy of another one."""
    for name, option in declared.items():
        if option.copied_from is not None and group[name] is None:
            value = group[option.copied_from]  # may be a tensor that is written into later
            group[name] = value.detach().clone() if isinstance(value, Tensor) else value
