"""Random programs around an optimizer, the same in every run; see stateful.py.

`python tests/stateful.py --steps 100000` takes as many steps as one likes, in other programs.
"""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test

from stateful import machine, short

PROGRAMS = {"reference": 20, "default": 14, "fused": 2}


@pytest.mark.parametrize("on", PROGRAMS)
def test_whatever_a_user_does_the_next_step_is_right(on: str) -> None:
    run_state_machine_as_test(machine(on), settings=short(PROGRAMS[on], steps=20))
