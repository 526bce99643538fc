"""The numbers of a step, all float64: what the host sends, and what `rows` makes of it.

The host sends a header, and one line for each param group: the numbers of `Group`, then those of
the penalties, then the options of the rule. On the device `rows` writes one row for each tensor:
the numbers of `Row`, then the scalars of the rule, then the new counts. Each record is declared
once, and what is at which place follows from it.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from torch import Tensor

Number = float | Tensor
"""A number of the host, or a one-element tensor where it must not be read."""


class Header(NamedTuple):
    """What the host says once for all groups."""

    max_norm: Number
    """inf: clip nothing."""
    scale: Number
    """Multiplies every gradient."""
    skip: Number
    """Not 0: change nothing."""
    skip_nonfinite: Number


class Group(NamedTuple):
    """What a line begins with."""

    lr: Number
    sign: Number
    """-1 to maximize."""


class Row(NamedTuple):
    """What a row begins with."""

    active: Number
    """0: this tensor does not move."""
    scale: Number
    """Multiplies the gradient: sign, clip factor and loss scale."""
    gain: Number
    """What the rule's scalars say of the gain."""


Record = TypeVar("Record", Header, Group, Row)


def places(record: type[Record]) -> Record:
    """Where each number of a record is: 0, 1, 2, ..."""
    return record(*range(len(record._fields)))


def with_lr(line: list[Number], lr: float) -> list[Number]:
    """A line with another learning rate."""
    place = Group._fields.index("lr")
    return [*line[:place], lr, *line[place + 1 :]]
