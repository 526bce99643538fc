"""What the scripts beside this share: the command line, and how a figure is saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TITLE = {"fontsize": 11.5}

T = TypeVar("T")


def run(name: str, draw: Callable[[], Figure], arguments: Sequence[str] | None = None) -> None:
    """The main of a script: draw NAME.png into the folder that the user gave."""
    parser = argparse.ArgumentParser(description=f"Draw {name}.png.")
    parser.add_argument("out", nargs="?", type=Path, default=HERE, help="folder, made if missing")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # these tensors are too small to share
    draw().savefig(out / f"{name}.png", dpi=150)


def silently(items: Sequence[T], description: str) -> Iterator[T]:
    """Go through the items without a progress bar."""
    return iter(items)
