"""From which l1 on every weight is 0, as the table of docs/tuning.md says."""

from __future__ import annotations

from typing import Any

import pytest

import fusedreg

from claims import descend, gradient, weight, zeros

LAMBDA_MAX = gradient(weight().detach()).abs().max().item()

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
# With the default beta2 of 0.999 the second moment would remember the way for the whole run.
ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.9)}

ROWS = {
    '"prox", SGD': (fusedreg.SGD, SGD, "prox", LAMBDA_MAX),
    '"prox", Adam': (fusedreg.Adam, ADAM, "prox", LAMBDA_MAX),
    '"prox", AdamW': (fusedreg.AdamW, ADAM, "prox", LAMBDA_MAX),
    '"decoupled", SGD': (fusedreg.SGD, SGD, "decoupled", LAMBDA_MAX * (1 - 0.5) / (1 - 0.9)),
    '"decoupled", Adam': (fusedreg.Adam, ADAM, "decoupled", 1.0),
    '"decoupled", AdamW': (fusedreg.AdamW, ADAM, "decoupled", 1.0),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("row", ROWS)
def test_all_weights_are_zero_above_and_one_is_not_below(row: str, weight_decay: float) -> None:
    cls, options, mode, edge = ROWS[row]

    def nonzeros(l1: float) -> int:
        w = weight(*[0.01] * 10)
        optimizer = cls([w], **options, l1=l1, l1_mode=mode, weight_decay=weight_decay)
        return w.numel() - zeros(descend(optimizer, 500))

    assert nonzeros(1.02 * edge) == 0
    assert nonzeros(0.98 * edge) > 0


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam, fusedreg.AdamW])
def test_a_subgradient_makes_none_zero(cls: Any) -> None:
    optimizer = cls([weight(*[0.01] * 10)], lr=0.01, l1=2 * LAMBDA_MAX, l1_mode="subgradient")
    assert zeros(descend(optimizer, 100)) == 0
