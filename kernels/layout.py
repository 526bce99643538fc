"""The numbers of a step, all float64: what the host sends, and what `rows` makes of it.

The host sends a header, and one line for each param group: the numbers of `Group`, then those of
the penalties, then the options of the rule. On the device `rows` writes one row for each tensor:
the numbers of `Row`, then the scalars of the rule, then the new counts. Each record is declared
once, and what is at which place follows from it.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from typing_extensions import NamedTuple  # generic, also in Python 3.10

Number = float | Tensor
"""A number of the host, or a one-element tensor where it must not be read."""

T = TypeVar("T")


class Header(NamedTuple, Generic[T]):
    """What the host says once for all groups."""

    max_norm: T
    """inf: clip nothing."""
    scale: T
    """Multiplies every gradient."""
    skip: T
    """Not 0: change nothing."""
    skip_nonfinite: T


class Group(NamedTuple, Generic[T]):
    """What a line begins with."""

    lr: T
    sign: T
    """-1 to maximize."""


class Row(NamedTuple, Generic[T]):
    """What a row begins with."""

    active: T
    """0: this tensor does not move."""
    scale: T
    """Multiplies the gradient: sign, clip factor and loss scale."""
    gain: T
    """What the rule's scalars say of the gain."""


# Where each number of a record is.
HEADER = Header(*range(len(Header._fields)))
GROUP = Group(*range(len(Group._fields)))
ROW = Row(*range(len(Row._fields)))


def with_lr(line: list[Number], lr: float) -> list[Number]:
    """A line with another learning rate."""
    return [*line[: GROUP.lr], lr, *line[GROUP.lr + 1 :]]
