"""The penalties of a step, one file each; see base.py."""

from fusedreg.penalties.base import Penalty, Settings, Term, kkt_distance
from fusedreg.penalties.l1 import L1
from fusedreg.penalties.l2 import L2

__all__ = ["L1", "L2", "Penalty", "Settings", "Term", "kkt_distance"]
