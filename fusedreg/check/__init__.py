"""Whether fusedreg is right on this machine: `python -m fusedreg check`.

`installation` says what is wrong before anything runs; `accuracy` takes one step of every case on
every device and path and holds it against float64; `report` shows what was found.
"""

from __future__ import annotations

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

__all__ = ["devices", "examine", "run"]

devices, examine = installation.devices, installation.examine


def run(
    checked: Sequence[torch.device],
    cases: Sequence[Case] = CASES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    out: Path | None = None,
) -> int:
    """Examine, step, write JSON, and print.

    What is broken stops what it concerns: of torch everything, of llvmlite the kernels of a CPU,
    all else the kernels of a GPU. The other steps are taken and shown.

    Args:
        checked: devices that are there.
        cases: what is stepped.
        dtypes: of weights, gradients and moments.
        out: the JSON file, or None.

    Returns:
        0 if every step is right, 1 if one is not, 2 if steps could not be taken or results not be
        written: the installation is broken, no device has any of the dtypes, or the disk is full.
    """
    console = Console()
    start = perf_counter()
    findings = installation.examine(checked)
    for finding in findings:
        style = "red" if finding.broken else ""
        console.print(str(finding), style=style, highlight=False, markup=False)
    broken = [finding.name for finding in findings if finding.broken]
    taken = [] if "torch" in broken else places(checked, broken)
    rows = steps(taken, cases, dtypes, console)
    seconds = perf_counter() - start
    status, verdict = report.verdict(rows, broken, seconds)
    if out is not None:
        unwritten = report.write(report.record(rows, findings, seconds, status), out)
        if unwritten is not None:
            status, verdict = report.verdict(rows, [*broken, unwritten], seconds)
    report.show(console, rows, verdict)
    return status


def places(checked: Sequence[torch.device], broken: Sequence[str] = ()) -> list[Place]:
    """The reference path on every device, and the kernels where they run.

    `broken` names the findings that keep kernels from running.
    """
    found = []
    for device in checked:
        found.append(Place(device, "reference"))
        on_cpu = device.type == "cpu"
        if on_cpu and "llvm" not in broken and backend.host_problem() is None:
            found.append(Place(device, "llvm"))
        if (on_cpu or set(broken) <= {"llvm"}) and _has_triton(device):
            found.append(Place(device, "triton"))
    return found


def _has_triton(device: torch.device) -> bool:
    """Whether triton's kernels run there; where they are missing, `installation` has said so."""
    if device.type == "cpu" and not backend.interpreted():
        return False
    try:
        return backend.problem() is None and backend.device_kernels(device, fused=True) is not None
    except Exception:  # as many as a broken triton raises
        return False


def steps(
    places: Sequence[Place],
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    console: Console,
) -> list[Row]:
    """Take every step, with a progress bar.

    The host's kernels step one case more, on as many threads as torch has.
    """
    if not places:
        return []
    whole = set(cases) == set(CASES)

    def measured(case: Case, at: Sequence[Place], shapes: accuracy.Shapes) -> list[Row]:
        return [
            accuracy.measure(problem, place)
            for problem in accuracy.problems([case], dtypes, shapes)
            for place in at
            if place.takes(problem) and not (whole and accuracy.is_spared(problem, place))
        ]

    shown = track(cases, "cases", console=console, transient=True)
    with one_thread():
        rows = [row for case in shown for row in measured(case, places, accuracy.SHAPES)]
    on_threads = [place for place in places if place.path == "llvm"]
    if on_threads:
        for case in cases[-1:]:
            rows += measured(case, on_threads, accuracy.LARGE)
    order = [(str(place.device), place.path) for place in places]
    return sorted(rows, key=lambda row: order.index((row.device, row.path)))
