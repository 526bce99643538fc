"""What the scripts beside this share: the command line, and how a figure is saved."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TITLE = {"fontsize": 11.5}


def run(name: str, draw: Callable[[], Figure], arguments: Sequence[str] | None = None) -> None:
    """The main of a script: draw NAME.png and NAME.svg into the folder that the user gave."""
    parser = argparse.ArgumentParser(description=f"Draw {name}.png and {name}.svg.")
    parser.add_argument("out", nargs="?", type=Path, default=HERE, help="folder, made if missing")
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # these tensors are too small to share
    save(draw(), out / name)


def save(figure: Figure, path: Path) -> None:
    """Write both formats; the SVG has the same bytes for the same numbers."""
    figure.savefig(path.with_suffix(".png"), dpi=150)
    with rc_context({"svg.hashsalt": path.name}):  # else its ids are random
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
