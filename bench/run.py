"""Time one step beside torch.optim's and others': `python bench/run.py`; see docs/benchmark.md."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from comparison import affordable, compare, participants, release
from jobs import METHODS, SHAPES, Job, count, jobs
from measure import Machine, bandwidths
from page import LATEST, Report, as_text, new_report, write
from rich.console import Console
from rich.progress import track
from targets import measure_targets

FOR_TARGETS = 0.75
"""Of the time, at most: they come first."""
TO_COMPILE = 45
"""Seconds that must be left to wait for torch.compile."""


def run_jobs(todo: list[Job], report: Report, machine: Machine, out: Path) -> None:
    """All comparisons that memory and time allow; the files are written after each."""
    pace = 0.0  # seconds per parameter of the last comparison of more than a million
    for job in track(todo, "comparisons", console=Console(stderr=True), transient=True):
        begin, numel = time.monotonic(), count(SHAPES[job.model])
        if machine.left() < (TO_COMPILE if job.compiled else max(0.0, pace * numel)):
            report["left_out"].append(f"{job}: time")
            continue
        makers, missing = participants(job, machine)
        report["not_installed"] |= missing
        release(machine)
        able, names = affordable(job, machine), list(makers)
        if able < min(2, len(names)):
            report["left_out"].append(f"{job}: memory")
            continue
        report["left_out"] += [f"{job}, {name}: memory" for name in names[able:]]
        rows = compare(job, {name: makers[name] for name in names[:able]}, machine)
        report["rows"] += rows
        write(report, out)
        if not job.compiled and numel > 2**20:
            stepped = sum(1e-3 * row["ms"] * row["rounds"] for row in rows if "ms" in row)
            pace = (time.monotonic() - begin - min(stepped, machine.seconds)) / numel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=LATEST, help="folder of the results")
    add("--budget", type=float, default=240, help="seconds (default: 240)")
    add("--quick", action="store_true", help="the first comparisons only")
    add("--targets", action="store_true", help="those of the path for CPUs only")
    add("--methods", help="of these only", nargs="+", choices=METHODS, metavar="METHOD")
    add("--base", metavar="REF", help="this tree beside another commit, instead")
    add("--commit", help="what to call the version that is timed")
    add("--dry-run", action="store_true", help="tiny and interpreted, for tests")
    options = parser.parse_args()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    gpu = torch.cuda.is_available() and not options.dry_run
    if options.targets and gpu:
        raise SystemExit("--targets are those of the path for CPUs")
    until, seconds = time.monotonic() + options.budget, options.budget / 60
    machine = Machine(torch.device("cuda" if gpu else "cpu"), until, seconds, options.dry_run)
    if options.base:
        from bits import compare_versions  # noqa: PLC0415  # starts processes

        compare_versions(options.base, machine, options.quick)
        return
    found = bandwidths(machine)
    machine.bandwidth = 1e9 * max(found.values())
    report, out = new_report(options.commit, found), options.out
    out.mkdir(parents=True, exist_ok=True)
    # The targets are those of the path for CPUs, and nobody has set others. A pair of arms takes
    # half the time of a comparison.
    if not (gpu or options.methods):
        left = machine.left() * (1 if options.targets else FOR_TARGETS)
        less = replace(machine, deadline=time.monotonic() + left, seconds=seconds / 2)
        report["targets"] = measure_targets(less)
        write(report, out)
    asked = options.methods or METHODS
    todo = [] if options.targets else jobs(machine.dry, options.quick, gpu)
    run_jobs([job for job in todo if job.method in asked], report, machine, out)
    write(report, out)
    print(as_text(report), end="")
    if report["rows"]:
        from figures import draw  # noqa: PLC0415  # the only part that needs matplotlib

        draw(out)


if __name__ == "__main__":
    main()
