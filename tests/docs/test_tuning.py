"""From which l1 on every weight is 0, as the table of docs/tuning.md says."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fusedreg

from cases import CLASSES
from claims import descend, gradient, weight, zeros
from compare import frozen
from pages import ROOT

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


class Row(NamedTuple):
    """What the page says of a mode in a class."""

    edge: str
    """From which l1 on a weight that gets gradients is 0."""
    never_on: str
    """What becomes of a weight whose gradient is always 0."""


def rows() -> dict[tuple[str, type], Row]:
    """The table of the page, a row for each mode and class."""
    page = (ROOT / "docs/tuning.md").read_text()
    found = {}
    for mode, classes, edge, never_on in re.findall(
        r'^\| `"(\w+)"` \| (.*) \| (.*) \| (.*) \|$', page, re.MULTILINE
    ):
        names = re.findall(r"\w+", classes.replace(" and", ","))
        for cls in CLASSES if names == ["all"] else [getattr(fusedreg, name) for name in names]:
            assert (mode, cls) not in found
            found[mode, cls] = Row(edge, never_on)
    return found


ROWS = rows()


def edge(mode: str, cls: type) -> float:
    """The number that the page prints as a formula, with the options of `make`."""
    formula = re.match(r"`(.*?)`", ROWS[mode, cls].edge)
    assert formula, f"no number for {mode} in {cls}"
    options = OPTIONS.get(cls, {})
    momentum, dampening = options.get("momentum", 0.0), options.get("dampening", 0.0)
    names = {"lambda_max": LAMBDA_MAX, "momentum": momentum, "dampening": dampening}
    return float(eval(formula[1], names))


def cells(edge: str = "", never_on: str = "") -> list[tuple[str, type]]:
    """Modes and classes of which the page says this."""
    return [at for at, row in ROWS.items() if edge in row.edge and never_on in row.never_on]


def test_the_page_has_every_mode_of_every_class() -> None:
    modes = {(mode, cls) for mode in ("prox", "decoupled", "subgradient") for cls in CLASSES}
    assert set(ROWS) == modes - {("prox", fusedreg.Lion)}
    assert {cls for mode, cls in cells("`lambda_max`") if mode == "prox"} == {
        cls for cls in WITH_PROX if not cls.layerwise
    }
    assert [cls for _, cls in cells("any, in the long run")] == [fusedreg.Adagrad]
    assert {cls for _, cls in cells("none")} == {fusedreg.LAMB}
    assert {mode for mode, _ in cells("never", "by chance")} == {"subgradient"}


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
ABOVE = {fusedreg.RMSprop: 1.1}
DECOUPLED = [cls for mode, cls in cells("`") if mode == "decoupled"]


@decays
@pytest.mark.parametrize("cls", DECOUPLED)
def test_decoupled_shrinking_wins_from_the_length_of_a_step_on(
    cls: Any, weight_decay: float
) -> None:
    value, above = edge("decoupled", cls), ABOVE.get(cls, 1.02)
    options = {"l1_mode": "decoupled", "weight_decay": weight_decay}
    assert nonzeros(cls, 0.01, l1=above * value, **options) == 0
    assert nonzeros(cls, 0.01, l1=0.98 * value, **options) > 0


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


def test_a_centered_step_with_momentum_takes_a_little_more() -> None:
    options: dict[str, Any] = {"centered": True, "momentum": 0.5}
    assert nonzeros(fusedreg.RMSprop, 0.01, l1=1.02 * LAMBDA_MAX, **options) > 0
    assert nonzeros(fusedreg.RMSprop, 0.01, l1=1.1 * LAMBDA_MAX, **options) == 0
    options["momentum"] = 0.0
    assert nonzeros(fusedreg.RMSprop, 0.01, l1=1.02 * LAMBDA_MAX, **options) == 0


# ---- an input that is never on -------------------------------------------------------------------


def beside_one_that_is_never_on(w: Tensor) -> Tensor:
    """The gradient of the diabetes data, and 0 for one weight more."""
    return torch.cat([gradient(w[:10]), w.new_zeros(1)])


def never_on(cls: Any, start: float, steps: int = 500, **options: Any) -> tuple[Tensor, Tensor]:
    """What becomes of the weight of an input that is never on, and of the others."""
    w = weight(*[start] * 11)
    options = {"weight_decay": 0.0, **options}
    end = descend(make(cls, w, **options), steps, beside_one_that_is_never_on)
    return end[10], end[:10]


@pytest.mark.parametrize(("mode", "cls"), cells(never_on="is 0 for any"))
def test_any_l1_zeroes_a_weight_of_an_input_that_is_never_on(mode: str, cls: Any) -> None:
    """Others need much more."""
    silent, others = never_on(cls, 1e-4, steps=2000, l1=1e-3, l1_mode=mode)
    assert silent == 0
    assert others.count_nonzero() > 0 or "any" in ROWS[mode, cls].edge


KEEPING = [cls for _, cls in cells(never_on="keeps its value")]


@pytest.mark.parametrize("cls", KEEPING)
def test_no_l1_zeroes_a_weight_of_an_input_that_is_never_on(cls: Any) -> None:
    silent, others = never_on(cls, 0.01, l1=100 * LAMBDA_MAX)
    assert frozen(silent) == frozen(torch.tensor(0.01, dtype=torch.float64))
    assert others.count_nonzero() == 0


@pytest.mark.parametrize("cls", KEEPING)
def test_what_makes_a_weight_of_an_input_that_is_never_on_zero(cls: Any) -> None:
    assert never_on(cls, 0.0, l1=1e-3)[0] == 0  # where it starts there
    decay = {"weight_decay": 0.1, "l1": 1e-3}
    if "decoupled_weight_decay" in cls([weight()]).param_groups[0] and cls is not fusedreg.AdamW:
        assert never_on(cls, 0.01, **decay, decoupled_weight_decay=False)[0] == 0
        decay["decoupled_weight_decay"] = True
    assert 0 < never_on(cls, 0.01, **decay)[0] < 0.01


def test_adagrad_that_begins_above_zero_thresholds_all() -> None:
    assert never_on(fusedreg.Adagrad, 0.01, l1=0.1, initial_accumulator_value=0.1)[0] == 0


def test_coupled_decay_gives_lion_a_step_for_a_weight_that_is_never_on() -> None:
    options = {"weight_decay": 0.1, "decoupled_weight_decay": False}
    assert never_on(fusedreg.Lion, 0.01, l1=0.1)[0] == 0
    assert never_on(fusedreg.Lion, 0.01, l1=0.1, **options)[0] != 0
    assert never_on(fusedreg.Lion, 0.01, l1=1.1, **options)[0] == 0
