"""The numbers of a step, all float64: what the host sends, and what `rows` makes of it.

The host sends the step scalars, and for each param group its group scalars: the numbers of
`GroupScalars`, then those of the penalties, then the options of the rule. On the device `rows`
writes one row for each tensor: the numbers of `Row`, then the scalars of the rule, then the new
counts. Each record is declared once, and what is at which place follows from it.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from typing_extensions import NamedTuple  # generic, also in Python 3.10

Number = float | Tensor
"""A number of the host, or a one-element tensor where it must not be read."""

T = TypeVar("T")


class StepScalars(NamedTuple, Generic[T]):
    """What the host says once for all groups."""

    max_norm: T
    """inf: clip nothing."""
    scale: T
    """Multiplies every gradient."""
    skip: T
    """Not 0: change nothing."""
    skip_nonfinite: T


class GroupScalars(NamedTuple, Generic[T]):
    """What the scalars of a param group begin with."""

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
STEP_SCALARS = StepScalars(*range(len(StepScalars._fields)))
GROUP_SCALARS = GroupScalars(*range(len(GroupScalars._fields)))
ROW = Row(*range(len(Row._fields)))


def with_lr(scalars: list[Number], lr: float) -> list[Number]:
    """The scalars of a group with another learning rate."""
    return [*scalars[: GROUP_SCALARS.lr], lr, *scalars[GROUP_SCALARS.lr + 1 :]]
