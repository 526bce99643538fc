"""The penalties of a step, one file each; see base.py."""

from fusedreg.penalties.base import Penalty, Term, kkt_distance
from fusedreg.penalties.l1 import L1, L1Options
from fusedreg.penalties.l2 import L2, L2Options

__all__ = ["L1", "L2", "PENALTIES", "Penalty", "PenaltyOptions", "Term", "kkt_distance"]

PENALTIES: tuple[Penalty, ...] = (L1(), L2())
"""Those of every class, in the order in which they act at each stage of a step."""


class PenaltyOptions(L1Options, L2Options, total=False):
    """Their options, for type checkers."""
