"""What was found, as tables for a person and as JSON for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fusedreg.cases import DTYPES, PENALTIES
from fusedreg.check.accuracy import Row, dtype_name
from fusedreg.check.installation import Finding
from fusedreg.machine import Record, environment

VERDICTS = ("pass", "fail", "broken")
"""By exit status; "broken" whatever the steps gave that were taken."""

SHOWN = 5
"""Failures that are printed in full: where much is wrong, the tables say what."""

KINDS = ("decay", "L1", "elastic net")


def kind(row: Row) -> str:
    """Which of `KINDS` its penalty is."""
    options = PENALTIES[row.penalty]
    if not options.get("l1"):
        return "decay"
    return "elastic net" if options["weight_decay"] else "L1"


def path(row: Row) -> str:
    """The path, and that it was no GPU which ran the kernels."""
    return "triton, interpreted" if (row.path, row.device) == ("triton", "cpu") else row.path


def place(row: Row) -> str:
    """The device, with the name of a GPU, and the path."""
    gpu = torch.cuda.get_device_name(row.device) if row.device.startswith("cuda") else ""
    return f"{row.device}{gpu and f' ({gpu})'}, {path(row)}"


def verdict(rows: Sequence[Row], broken: Sequence[str], seconds: float) -> tuple[int, str]:
    """The exit status, and all in one line; `broken` names what kept steps from being taken."""
    if not rows:
        return 2, f"BROKEN: no step was taken ({', '.join(broken) or 'no device has the dtypes'})"
    failed = sum(bool(row.failures) for row in rows)
    taken = "steps that were taken" if broken else "steps"
    right = (
        f"{failed} of {len(rows)} {taken} are wrong"
        if failed
        else f"all {len(rows)} {taken} are right"
    )
    where = ", ".join(dict.fromkeys(f"{row.device} ({path(row)})" for row in rows))
    said = f"{right} on {where}, after {seconds:.0f} s"
    if broken:
        return 2, f"BROKEN: {', '.join(broken)}; {said}"
    return (1, f"FAIL: {said}") if failed else (0, f"PASS: {said}")


def show(console: Console, rows: Sequence[Row], verdict: str) -> None:
    """Print a table for each place, everything about the first failures, and the verdict."""
    for device, way in dict.fromkeys((row.device, row.path) for row in rows):
        console.print(table([row for row in rows if (row.device, row.path) == (device, way)]), "")
    failed = [row for row in rows if row.failures]
    for row in failed[:SHOWN]:
        for line in failure(row):
            console.out(line, highlight=False)
    if len(failed) > SHOWN:
        console.out(
            f"and {len(failed) - SHOWN} more, all of them with --json FILE", highlight=False
        )
    style = "bold green" if verdict.startswith("PASS") else "bold red"
    console.print(verdict, style=style, highlight=False, markup=False, soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """One place: a line for each rule and kind of penalty."""
    dtypes = [name for name in map(dtype_name, DTYPES) if any(row.dtype == name for row in rows)]
    made = Table(
        title=f"{place(rows[0])}: worst error in ulp, fusedreg/torch.optim",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=caption(rows, dtypes),
    )
    for heading in ("rule", "penalty"):
        made.add_column(heading, no_wrap=True)
    for heading in (*dtypes, "calls"):
        made.add_column(heading, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    for rule in dict.fromkeys(row.rule for row in rows):
        name = rule
        for penalty in KINDS:
            some = [row for row in rows if row.rule == rule and kind(row) == penalty]
            if some:
                errors = (_errors([row for row in some if row.dtype == name]) for name in dtypes)
                launches = sorted({row.launches for row in some})
                failed = any(row.failures for row in some)
                made.add_row(
                    name,
                    penalty,
                    *errors,
                    "-".join(map(str, launches)),
                    "[red]FAIL[/]" if failed else "[green]pass[/]",
                )
                name = ""  # once is enough
    return made


def caption(rows: Sequence[Row], dtypes: Sequence[str]) -> str:
    """What the numbers of a table are, and what they must be."""
    bounds = {name: [row.bound for row in rows if row.dtype == name] for name in dtypes}
    # A bound is NaN where the step raised.
    finite = {name: [x for x in found if math.isfinite(x)] for name, found in bounds.items()}
    said = ", ".join(f"{name} {max(found):.4g}" for name, found in finite.items() if found)
    text = (
        f"{len(rows)} steps, half of them first ones, half clipped, against the papers' formulas "
        "in float64; ulp at the larger of before and after. Must hold: the bound (at most "
        f"{said}), the path that was asked for, .grad untouched, exact zeros where the threshold "
        "makes them. "
        "-: torch.optim has no equal."
    )
    theirs = [row.torch_ulp for row in rows if row.torch_ulp is not None]
    if not all(map(math.isfinite, theirs)):
        text += " inf or nan: torch.optim's own step gave no finite number."
    return text


def failure(row: Row) -> list[str]:
    """Everything about a failure, and how to see it again."""
    step = "first step" if row.first else "later step"
    clip = "clipped" if row.clip else "not clipped"
    theirs = "-" if row.torch_ulp is None else f"{row.torch_ulp:.3g}"
    command = f"fusedreg check --device {row.device} --case {row.case} --dtype {row.dtype}"
    return [
        f"FAIL {row.case}, {step}, {clip}, {row.dtype}, {row.device}, {row.path} path, "
        f"{row.weights} weights",
        f"     {'; '.join(row.failures)}",
        f"     ulp {row.ulp:.3g}, bound {row.bound:.3g}, torch.optim {theirs}, "
        f"backend {row.backend}, launches {row.launches}",
        f"     {command}",
    ]


def write(found: Record, out: Path) -> str | None:
    """Write the JSON file; why it cannot be written, None where it is."""
    try:
        out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        return f"--json {out}: {error.strerror}"
    return None


def record(rows: Sequence[Row], findings: Sequence[Finding], seconds: float, status: int) -> Record:
    """Everything, for a JSON file; a number that is not finite is a string there."""
    return {
        **environment("triton"),
        "threads": torch.get_num_threads(),
        "verdict": VERDICTS[status],
        "seconds": seconds,
        "findings": [finding._asdict() for finding in findings],
        "steps": [{name: _plain(x) for name, x in row._asdict().items()} for row in rows],
    }


def _errors(rows: Sequence[Row]) -> str:
    theirs = [row.torch_ulp for row in rows if row.torch_ulp is not None]
    return (
        f"{_short(_worst([row.ulp for row in rows]))}/{_short(_worst(theirs)) if theirs else '-'}"
    )


def _worst(numbers: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _short(x: float) -> str:
    """In four characters if it is no huge number: 0, 0.5, 3.4, 120."""
    if x == 0 or not x < 1e4:
        return f"{x:.0e}" if math.isfinite(x) and x else f"{x:g}"
    return f"{x:.{1 if x < 10 else 0}f}"


def _plain(x: object) -> object:
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
