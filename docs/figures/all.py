"""Draw every figure whose script has a main; arguments as of each of them, see drawing.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType

THIS = Path(__file__)


def scripts() -> list[ModuleType]:
    """The scripts beside this one."""
    names = sorted(path.stem for path in THIS.parent.glob("*.py") if path != THIS)
    return [script for script in map(importlib.import_module, names) if hasattr(script, "main")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run them one after the other."""
    for script in scripts():
        start = perf_counter()
        script.main(arguments)
        print(f"{script.__name__}: {perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
