"""Whether fusedreg is right on this machine: `python -m fusedreg check`.

`installation` says what is wrong before anything runs; `accuracy` takes one step of every case on
every device and path and holds it against float64; `report` shows what was found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import track

from fusedreg import backend
from fusedreg.cases import CASES, DTYPES, Case
from fusedreg.check import accuracy, installation, report
from fusedreg.check.accuracy import Place, Row
from fusedreg.machine import one_thread

__all__ = ["devices", "run"]

devices = installation.devices


def run(
    checked: Sequence[torch.device],
    cases: Sequence[Case] = CASES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    out: Path | None = None,
) -> int:
    """Examine, step, print, and write JSON.

    Args:
        checked: devices that are there.
        cases: what is stepped.
        dtypes: of weights, gradients and moments.
        out: the JSON file, or None.

    Returns:
        0 if every step is right, 1 if one is not, 2 if none was taken: the installation is broken,
        or no device has any of the dtypes.
    """
    console = Console()
    start = perf_counter()
    findings = installation.examine(checked)
    for finding in findings:
        style = "red" if finding.broken else ""
        console.print(str(finding), style=style, highlight=False, markup=False)
    broken = [finding.name for finding in findings if finding.broken]
    rows = [] if broken else steps(places(checked), cases, dtypes, console)
    failed = sum(bool(row.failures) for row in rows)
    status = 2 if not rows else 1 if failed else 0
    seconds = perf_counter() - start
    where = ", ".join(dict.fromkeys(f"{row.device} ({report.path(row)})" for row in rows))
    verdict = {
        0: f"PASS: all {len(rows)} steps are right on {where}, after {seconds:.0f} s",
        1: f"FAIL: {failed} of {len(rows)} steps are wrong on {where}, after {seconds:.0f} s",
        2: f"BROKEN: no step was taken ({', '.join(broken) or 'no device has the dtypes'})",
    }[status]
    report.show(console, rows, verdict)
    if out is not None:
        record = report.record(rows, findings, seconds, status)
        out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return status


def places(checked: Sequence[torch.device]) -> list[Place]:
    """The reference path on every device, and the kernels where they run."""
    found = []
    for device in checked:
        found.append(Place(device, "reference"))
        if _has_kernels(device):
            found.append(Place(device, "triton"))
    return found


def _has_kernels(device: torch.device) -> bool:
    """Whether kernels run there; where they are missing, `installation` has said so."""
    try:
        return backend.problem() is None and backend.device_kernels(device, fused=True) is not None
    except ImportError:
        return False


def steps(
    places: Sequence[Place],
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    console: Console,
) -> list[Row]:
    """Take every step, with a progress bar."""
    shown = track(
        accuracy.problems(cases, dtypes),
        "steps",
        total=len(cases) * len(dtypes) * len(accuracy.CLIPS),
        console=console,
        transient=True,
    )
    with one_thread():
        return [
            accuracy.measure(problem, place)
            for problem in shown
            for place in places
            if place.takes(problem.dtype)
        ]
