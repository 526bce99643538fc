"""A statement about the demo's numbers that must hold."""

from __future__ import annotations

import operator
from typing import NamedTuple

RELATIONS = {"<=": operator.le, ">=": operator.ge}


class Comparison(NamedTuple):
    """`value` must be `relation` `bound`; a NaN never is."""

    name: str
    value: float
    relation: str
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return bool(RELATIONS[self.relation](self.value, self.bound))

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g}, must be {self.relation} {self.bound:.3g}"
