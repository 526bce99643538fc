"""The names of what passes between modules."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeAlias

from torch import Tensor

from fusedreg.scalars import Number

ParamGroup: TypeAlias = dict[str, Any]
"""A param group: its parameters, and the options, which may be of any type."""
Settings: TypeAlias = Mapping[str, Any]
"""A param group without its parameters, each number where the arithmetic needs it."""
State: TypeAlias = dict[str, Any]
"""The state of one parameter, read for the arithmetic: moments widened, counts as numbers."""
Update: TypeAlias = tuple[Tensor, Number, State]
"""What a rule makes of a gradient: the direction, the gain and the new state."""
States: TypeAlias = MutableMapping[Tensor, dict[str, Tensor]]
"""The states of all parameters, by name."""
GroupsWithGrads: TypeAlias = list[tuple[ParamGroup, list[Tensor]]]
"""Groups, each with those of its parameters that are stepped."""
