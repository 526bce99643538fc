"""triton and its language, for device code that is also read where triton is not installed.

Rules and penalties are compiled by triton for a GPU and by LLVM for a CPU. For LLVM their Python
functions are enough; see cpu/compiler.py.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["tl", "triton"]

try:
    import triton
    import triton.language as tl
except Exception:  # whatever a broken triton raises; fusedreg.backend says what it was

    class constexpr:  # noqa: N801  # triton's name
        """A number that compiled code knows, in the place of triton's."""

        def __init__(self, value: int) -> None:
            self.value = value

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        """Mark a device function as triton's decorator does, and leave it a Python function."""
        function.fn = function  # type: ignore[attr-defined]
        return function

    tl = SimpleNamespace(constexpr=constexpr)
    triton = SimpleNamespace(jit=jit, language=tl)
