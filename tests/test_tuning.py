"""From which l1 on every weight is 0, as the table of docs/tuning.md says."""

from __future__ import annotations

from typing import Any

import pytest

import fusedreg

from cases import CLASSES
from claims import descend, gradient, weight, zeros

LAMBDA_MAX = gradient(weight().detach()).abs().max().item()

# With the usual means of squares, over a thousand steps, a step would remember the way to the end.
SHORT_MEMORY = {"betas": (0.9, 0.9), "alpha": 0.9}
OPTIONS: dict[type, dict[str, Any]] = {
    fusedreg.SGD: {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    fusedreg.RMSprop: {"momentum": 0.5},
    fusedreg.Adagrad: {"lr": 0.1},  # which its sum of squares divides more and more
}


def make(cls: Any, w: Any, **options: Any) -> Any:
    defaults = cls([w]).defaults
    memory = {name: value for name, value in SHORT_MEMORY.items() if name in defaults}
    return cls([w], **{"lr": 0.01, **memory, **OPTIONS.get(cls, {}), **options})


def nonzeros(cls: Any, start: float, steps: int = 500, **options: Any) -> int:
    w = weight(*[start] * 10)
    return w.numel() - zeros(descend(make(cls, w, **options), steps))


decays = pytest.mark.parametrize("weight_decay", [0.0, 0.1])
WITH_PROX = [cls for cls in CLASSES if cls([weight()]).defaults["l1_mode"] == "prox"]


@decays
@pytest.mark.parametrize("cls", WITH_PROX)
def test_from_lambda_max_on_all_weights_stay_zero(cls: Any, weight_decay: float) -> None:
    assert nonzeros(cls, 0.0, l1=1.02 * LAMBDA_MAX, weight_decay=weight_decay) == 0
    assert nonzeros(cls, 0.0, l1=0.98 * LAMBDA_MAX, weight_decay=weight_decay) > 0


@decays
@pytest.mark.parametrize("cls", [cls for cls in WITH_PROX if not cls.layerwise])
def test_from_lambda_max_on_all_weights_become_zero(cls: Any, weight_decay: float) -> None:
    assert nonzeros(cls, 0.01, l1=1.02 * LAMBDA_MAX, weight_decay=weight_decay) == 0
    assert nonzeros(cls, 0.01, l1=0.98 * LAMBDA_MAX, weight_decay=weight_decay) > 0


# Where a step has a length, decoupled shrinking by lr * l1 wins from that on. Means of squares lag
# behind, so that it takes long just above.
DECOUPLED = {
    fusedreg.SGD: (LAMBDA_MAX * (1 - 0.5) / (1 - 0.9), 1.02),
    fusedreg.Adam: (1.0, 1.02),
    fusedreg.AdamW: (1.0, 1.02),
    fusedreg.RMSprop: (1 / (1 - 0.5), 1.1),
    fusedreg.Lion: (1.0, 1.02),
}


@decays
@pytest.mark.parametrize("cls", DECOUPLED)
def test_decoupled_shrinking_wins_from_the_length_of_a_step_on(
    cls: Any, weight_decay: float
) -> None:
    edge, above = DECOUPLED[cls]
    options = {"l1_mode": "decoupled", "weight_decay": weight_decay}
    assert nonzeros(cls, 0.01, l1=above * edge, **options) == 0
    assert nonzeros(cls, 0.01, l1=0.98 * edge, **options) > 0


def test_decoupled_shrinking_beats_adagrad_in_the_long_run() -> None:
    """After t steps along the same gradient a step is lr / sqrt(t): 1 / 0.1^2 are 100 steps."""
    options = {"l1": 0.1, "l1_mode": "decoupled"}
    assert nonzeros(fusedreg.Adagrad, 0.01, steps=10, **options) > 0
    assert nonzeros(fusedreg.Adagrad, 0.01, steps=2000, **options) == 0


@pytest.mark.parametrize("l1_mode", ["prox", "decoupled"])
def test_a_step_as_long_as_the_weights_ends_near_zero_and_not_there(l1_mode: str) -> None:
    w = weight(*[0.01] * 10)
    descend(make(fusedreg.LAMB, w, l1=2.0, l1_mode=l1_mode), 2000)
    assert zeros(w) < w.numel()
    assert w.abs().max() < 1e-6


@pytest.mark.parametrize("cls", CLASSES)
def test_a_subgradient_makes_none_zero(cls: Any) -> None:
    optimizer = cls([weight(*[0.01] * 10)], lr=0.01, l1=2 * LAMBDA_MAX, l1_mode="subgradient")
    assert zeros(descend(optimizer, 100)) == 0
