"""The numbers of a step: what the host sends, and what a row of a tensor holds.

Both are float64. The host sends a header and one line for each param group; `rows` (on a GPU
rows.py, on the host host/engine.py) makes of them one row for each tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fusedreg.kernels.device.language import tl

# What the host sends: a header, then one line for each param group.
MAX_NORM = tl.constexpr(0)  # inf: clip nothing
SCALE = tl.constexpr(1)  # multiplies every gradient
SKIP = tl.constexpr(2)  # not 0: change nothing
SKIP_NONFINITE = tl.constexpr(3)
HEADER = tl.constexpr(4)

LR = tl.constexpr(0)
SIGN = tl.constexpr(1)  # -1 to maximize
COUPLED = tl.constexpr(2)  # weight_decay, in one of the two
DECOUPLED = tl.constexpr(3)
SUBGRADIENT = tl.constexpr(4)  # l1, in one of the three
PROX = tl.constexpr(5)
SHRINK = tl.constexpr(6)
DECAY_LR = tl.constexpr(7)  # divides DECOUPLED; 1 where lr shall multiply the decay
OPTIONS = tl.constexpr(8)  # the rule's own

# A row.
ACTIVE = tl.constexpr(0)  # 0: this tensor does not move
ROW_SCALE = tl.constexpr(1)
ROW_LR = tl.constexpr(2)
ROW_L1 = tl.constexpr(3)
ROW_L2 = tl.constexpr(4)
ROW_DECAY = tl.constexpr(5)  # decoupled, without lr
ROW_THRESHOLD = tl.constexpr(6)
ROW_RULE = tl.constexpr(7)  # the scalars of the rule, and after them the new counts
ROW = tl.constexpr(16)


def header(*, max_norm: float, scale: Any, skip: Any, skip_nonfinite: float) -> list[Any]:
    """What the host says once for all groups."""
    return [max_norm, scale, skip, skip_nonfinite]


def line(
    *,
    lr: Any,
    maximize: bool,
    coupled: Any,
    decoupled: Any,
    subgradient: Any,
    prox: Any,
    shrink: Any,
    decay_lr: Any,
    options: Iterable[Any],
) -> list[Any]:
    """What the host says of one param group."""
    sign = -1.0 if maximize else 1.0
    return [lr, sign, coupled, decoupled, subgradient, prox, shrink, decay_lr, *options]


def with_lr(line: list[Any], lr: float) -> list[Any]:
    """The same with another learning rate."""
    return [*line[: LR.value], lr, *line[LR.value + 1 :]]


def penalties(lines: Iterable[Sequence[Any]]) -> dict[str, bool]:
    """Which hooks of the step kernel any of these groups needs; a tensor counts as not 0."""
    hooks = {
        "subgradient": (SUBGRADIENT,),
        "coupled": (COUPLED,),
        "decoupled": (DECOUPLED,),
        "prox": (PROX, SHRINK),
    }
    lines = list(lines)
    return {
        hook: any(
            isinstance(one[c.value], Tensor) or one[c.value] != 0 for one in lines for c in columns
        )
        for hook, columns in hooks.items()
    }
