"""Random programs around an optimizer, the same in every run; see stateful.py.

`python tests/stateful.py --steps 100000` takes as many steps as one likes, in other programs.
"""

from __future__ import annotations

import pytest

from stateful import COUNTS, run_programs

PROGRAMS = {"reference": 30, "default": 20, "fused": 6}
STEPS = {"reference": 200, "default": 200, "fused": 50}
"""At least: a machine that hardly steps would find nothing."""


@pytest.mark.parametrize("on", PROGRAMS)
def test_whatever_a_user_does_the_next_step_is_right(on: str) -> None:
    COUNTS.clear()
    run_programs(on, number=0, programs=PROGRAMS[on], steps=30)
    assert COUNTS["steps"] >= STEPS[on]
    # Elsewhere roundings could explain anything: next to a jump, or where a small number divides.
    assert COUNTS["judged"] >= 0.99 * COUNTS["elements"]
