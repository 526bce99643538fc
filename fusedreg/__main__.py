"""The command line: `python -m fusedreg` and `fusedreg`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from fusedreg.cases import CASES, DTYPES

DEMO_EXTRA = ("matplotlib", "numpy", "sklearn")
"""Modules that only the demo imports."""


def demo(arguments: argparse.Namespace) -> int:
    """Run the demo; 0 if every comparison holds, 1 if one does not, 2 if it cannot run."""
    try:
        # Only here: `import fusedreg` and the other commands must work without the extra.
        from fusedreg.demo import run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        needed = "the demo needs its extra, install it with: pip install 'fusedreg[demo]'"
        return _cannot("demo", needed)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _cannot("demo", f"--out {arguments.out}: {error.strerror}")
    failed = run(arguments.out)
    for comparison in failed:
        print(f"fusedreg demo: does not hold: {comparison}", file=sys.stderr)
    return 1 if failed else 0


def check(arguments: argparse.Namespace) -> int:
    """Run the check; 0 if every step is right, 1 if one is not, 2 if it cannot run as meant."""
    if arguments.json is not None:
        try:
            # Rather than fail at the end, or leave an older result if this run dies.
            arguments.json.write_text("")
        except OSError as error:
            return _cannot("check", f"--json {arguments.json}: {error.strerror}")
    try:
        # Only here: `import fusedreg` must not take the time.
        from fusedreg.check import devices, examine, run  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        return _cannot("check", "rich is missing, install it with: pip install rich")
    present = devices()
    checked = []
    for asked in arguments.device or present:
        found = [each for each in present if _is_meant(asked, each)]
        if not found:
            here = f"--device {asked}: here are {', '.join(map(str, present))}"
            return _cannot("check", "\n".join([here, *map(str, examine(present))]))
        checked += found
    cases = [case for case in CASES if case.id in (arguments.case or [case.id])]
    dtypes = [dtype for dtype in DTYPES if dtype in (arguments.dtype or DTYPES)]
    return run(list(dict.fromkeys(checked)), cases, dtypes, arguments.json)


def _is_meant(asked: torch.device, device: torch.device) -> bool:
    """Whether a device is the one that was asked for; without an index all of its type are."""
    return device.type == asked.type and asked.index in (None, device.index)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device of torch") from None


def _dtype(name: str) -> torch.dtype:
    found = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if name not in found:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(found)}")
    return found[name]


def _case(name: str) -> str:
    if name not in {case.id for case in CASES}:
        known = f"{CASES[0].id} to {CASES[-1].id}, see fusedreg.cases.CASES"
        raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    return name


def _cannot(command: str, reason: str) -> int:
    print(f"fusedreg {command}: {reason}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names (default: the process's own arguments)."""
    parser = argparse.ArgumentParser(
        prog="fusedreg",
        description="torch.optim optimizers with exact weight decay, L1 and clipping in the step",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_check(commands)
    _add_demo(commands)
    arguments = parser.parse_args(argv)
    status: int = arguments.command(arguments)
    return status


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_check(commands: Commands) -> None:
    command = commands.add_parser(
        "check",
        help="see that every optimizer is right on this machine",
        description="Say what is wrong with the installation. Then take one step of every "
        "optimizer with every penalty in every dtype, on every device and path that is here, and "
        "hold it against float64. Fails if a step is wrong or takes another path than asked for.",
    )
    only = {
        "device": (_device, "only this device: cpu, cuda, cuda:1 (repeatable)"),
        "case": (_case, "only this case, named as failures are: adam-l1_prox (repeatable)"),
        "dtype": (_dtype, "only this dtype: bfloat16 (repeatable)"),
    }
    for option, (read, what) in only.items():
        name = option.upper()
        command.add_argument(f"--{option}", type=read, action="append", metavar=name, help=what)
    command.add_argument("--json", type=Path, metavar="FILE", help="write all that is found")
    command.set_defaults(command=check)


def _add_demo(commands: Commands) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
