"""The command line: `python -m fusedreg` and `fusedreg`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEMO_EXTRA = ("matplotlib", "rich", "sklearn")
"""Modules that only the demo imports."""


def demo(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 if every comparison holds, 1 if one does not, 2 if it cannot run."""
    try:
        # Only here: `import fusedreg` and the other commands must work without the extra.
        from fusedreg.demo import run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        return _cannot("the demo needs its extra, install it with: pip install 'fusedreg[demo]'")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _cannot(f"--out {arguments.out}: {error.strerror}")
    failed = run(arguments.out)
    for comparison in failed:
        print(f"fusedreg demo: does not hold: {comparison}", file=sys.stderr)
    return 1 if failed else 0


def _cannot(reason: str) -> int:
    print(f"fusedreg demo: {reason}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names (default: the process's own arguments)."""
    parser = argparse.ArgumentParser(
        prog="fusedreg",
        description="torch.optim optimizers with exact weight decay, L1 and clipping in the step",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="compare with scikit-learn and torch.optim on real data, in about a minute",
        description="Compare with scikit-learn and torch.optim on data that scikit-learn ships. "
        "Prints tables, writes figures and demo.json, and fails if a comparison does not hold.",
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("fusedreg-demo"),
        metavar="DIR",
        help="where the figures and demo.json go (default: %(default)s)",
    )
    command.set_defaults(command=demo)
    arguments = parser.parse_args(argv)
    status: int = arguments.command(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
