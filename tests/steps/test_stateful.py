"""Random programs around an optimizer, the same in every run; see lib/stateful.py.

`python tests/lib/stateful.py --steps 100000` takes as many steps as one likes, in other programs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fusedreg

from stateful import run_programs
from stateful_program import COUNTS, Program, interrupted

PROGRAMS = {"reference": 45, "default": 35, "fused": 6}
STEPS = {"reference": 200, "default": 200, "fused": 50}
"""At least: a machine that hardly steps would find nothing."""


@pytest.mark.parametrize("on", PROGRAMS)
def test_whatever_a_user_does_the_next_step_is_right(on: str) -> None:
    COUNTS.clear()
    run_programs(on, number=0, programs=PROGRAMS[on], steps=30)
    assert COUNTS["steps"] >= STEPS[on]
    # Elsewhere roundings could explain anything: next to a jump, or where a small number divides.
    assert COUNTS["judged"] >= 0.99 * COUNTS["elements"]


def two_steps() -> Program:
    """One parameter that fills every other place of its memory, after a step."""
    spec = ((5, 3), torch.float32, "gaps", 0)
    program = Program("reference", fusedreg.Adam, {"lr": 0.1}, [spec])
    program.set_grads(["same"], 1.0, 1)
    program.step()
    program.set_grads(["same"], 1.0, 2)
    return program


WRONG: dict[str, Callable[[torch.Tensor, dict[str, torch.Tensor]], object]] = {
    "value": lambda w, _: w.mul_(1 + 1e-5),
    "exp_avg": lambda _, state: state["exp_avg"].mul_(1 + 1e-5),
    "step": lambda _, state: state["step"].sub_(1),
    "grad": lambda w, _: w.grad.zero_(),  # type: ignore[union-attr]
    "around": lambda w, _: w.as_strided((1,), (1,), 1).zero_(),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_step_that_does_something_else_is_seen(what: str) -> None:
    program = two_steps()
    optimizer, step = program.optimizer, program.optimizer.step

    def wrong(_: object = None) -> None:
        step()
        with torch.no_grad():
            WRONG[what](program.params[0], optimizer.state[program.params[0]])

    optimizer.step = wrong
    with pytest.raises(AssertionError, match=what):
        program.step()


def test_a_change_between_steps_is_seen() -> None:
    program = two_steps()
    program.optimizer.state[program.params[0]]["exp_avg"].add_(1)
    with pytest.raises(AssertionError, match="between two steps"):
        program.step()


def test_an_interrupt_comes_at_the_line_that_is_asked_for() -> None:
    program = two_steps()
    with interrupted(at=-1) as lines:
        program.optimizer.step()
    with pytest.raises(KeyboardInterrupt), interrupted(at=lines[0]):
        program.optimizer.step()
    with interrupted(at=lines[0] + 1):
        program.optimizer.step()
