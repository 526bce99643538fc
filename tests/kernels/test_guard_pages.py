"""No path reads or writes beside a parameter, gradient or state, where the process would die."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="mprotect as Linux has it, and its SIGSEGV"
)


def run(what: str) -> str:
    program = Path(__file__).parents[1] / "lib" / "guarded.py"
    result = subprocess.run(
        [sys.executable, str(program), what], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, (result.returncode, result.stderr)
    return result.stdout


TENSORS = {"default": 7504, "reference": 1072, "fused": 36}


@pytest.mark.parametrize(("on", "tensors"), TENSORS.items())
def test_steps_touch_nothing_beside_their_tensors(on: str, tensors: int) -> None:
    assert int(run(on)) == tensors


def test_reading_one_number_beside_a_tensor_is_fatal() -> None:
    assert run("ends").split() == ["0", str(-signal.SIGSEGV), str(-signal.SIGSEGV)]
