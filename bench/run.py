"""Time one step beside torch.optim's and others': `python bench/run.py`; see docs/benchmark.md.

On a CPU it begins with what fusedreg's path for CPUs is to reach: pairs of arms, A B B A.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from operator import ge, le
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from contenders import REFERENCE, TORCH, Maker, of_torch, own
from jobs import METHODS, OF_TARGETS, SHAPES, TINY, Job, jobs
from measure import Machine, affordable, prepare, release, rounds, spread
from page import LATEST, Report, Row, as_text, new_report, write
from rich.console import Console
from rich.progress import track
from verify import Setting

FOR_TARGETS = 0.75  # of the time, at most: they come first
RULES, WITH_L1 = ("AdamW", "Adam + L2", "SGD momentum"), " + L1"
PAIRS = 1000  # rounds of a pair: a hundred steps of a small model are over in milliseconds
MAKERS: dict[str, Maker] = {**TORCH, "fusedreg": own, "torch default": of_torch}
MAKERS[REFERENCE] = partial(own, fused=False)
shown = partial(track, console=Console(stderr=True), transient=True)


class Target(NamedTuple):
    """A limit for the time of one arm over that of another."""

    model: str
    rule: str
    over: str
    under: str
    sense: str  # at least or at most
    limit: float
    clip: bool = True

    @property
    def unit(self) -> str:
        return " s" * (self.under == REFERENCE)  # how much longer the first step is, instead

    def __str__(self) -> str:
        rule = self.rule + WITH_L1 * self.over.endswith(WITH_L1)
        return rule + ", clipped" * self.clip + ": first step" * bool(self.unit)


def targets(dry: bool) -> list[Target]:
    """All, in the order of the table: small models first, and of a model first what is fast."""
    small, many, *large = TINY if dry else OF_TARGETS
    us, fused, least, most = "fusedreg", "torch fused", "at least", "at most"
    found = [Target(small, "AdamW", us, REFERENCE, most, 1)]
    found += [Target(small, of, us, fused, most, 1, clip) for clip in (True, False) for of in RULES]
    found.append(Target(many, "AdamW", fused, us, least, 1.3))
    for model in large:
        found += [Target(model, of, fused, us, least, 1.3) for of in RULES]
        found += [Target(model, of, us, fused, most, 1.05, clip=False) for of in RULES]
        found.append(Target(model, "AdamW", us + WITH_L1, us, most, 1.25))
        found += [Target(model, of, "torch default", us, least, 5) for of in RULES]
    return found


def measure_targets(machine: Machine) -> list[Row]:
    """A row for each target, also where time or memory did not allow it."""
    rows = []
    for model, some in groupby(shown(targets(machine.dry), "targets"), lambda each: each.model):
        fits = affordable(Job("target", model), machine) >= 2
        # Made by the first that is measured.
        setting = cache(partial(Setting, SHAPES[model], torch.float32, machine.device))
        for target in some:
            wanted = f"{target.sense} {target.limit:g}{target.unit}"
            row = {"what": str(target), "model": model, "arms": [target.over, target.under]}
            row |= {"target": wanted, "unit": target.unit, "met": False}
            row |= dict.fromkeys(("value", "p20", "p80", "rounds", "ms"))
            if machine.left() < 0 or not fits:
                row["verdict"] = f"not measured: {'time' if fits else 'memory'}"
            else:
                row |= measured(target, setting(), machine)
            release(machine)
            rows.append(row)
    return rows


def measured(target: Target, setting: Setting, machine: Machine) -> Row:
    """Value, spread and verdict; has missed the target where fusedreg's results are wrong."""
    arms, notes, calls = [], [], {}
    for who in (target.over, target.under):
        method = METHODS[target.rule + WITH_L1 * who.endswith(WITH_L1)]
        make, task = MAKERS[who.removesuffix(WITH_L1)], setting.task(method, target.clip)
        contender = prepare(make, setting, task, machine)
        if not contender.verdict.matches:
            notes.append(f"{who}: {contender.verdict.text}")
            # torch's norm of GPT-2's embedding is inexact on a CPU, by 3e-3.
            if not who.startswith("torch"):
                return {"verdict": "; ".join(["missed", *notes])}
        calls[who] = measure.timed(contender, machine)
        if target.unit:
            calls[who] = [partial(in_process, target.model, make, task)]
        path = f"fusedreg ({contender.backend})"
        arms.append(who if who == REFERENCE else who.replace("fusedreg", path))
    found = rounds(calls, machine, setting.set_grads, 4 if target.unit else PAIRS).values()
    times = [[ms for (ms,) in of] for of in found]
    values = (1e-3 * (a - b) if target.unit else a / b for a, b in zip(*times, strict=True))
    row = {"arms": arms, "rounds": len(times[0]), **spread(values, "value", "p20", "p80")}
    met = (ge if target.sense == "at least" else le)(row["value"], target.limit)
    row |= {"ms": list(map(statistics.median, times)), "met": met}
    return {**row, "verdict": "; ".join(["met" if met else "missed", *notes])}


def in_process(*arguments: Any) -> float:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(first_step, arguments)


def first_step(model: str, make: Maker, task: Any) -> float:
    """Milliseconds of the first step of a process."""
    setting = Setting(SHAPES[model], torch.float32, torch.device("cpu"))
    return 1e3 * measure.seconds(make(setting.groups, task).step)


def run_jobs(todo: list[Job], report: Report, machine: Machine, out: Path) -> None:
    """All comparisons that memory and time allow; the files are written after each."""
    for job in shown(todo, "comparisons"):
        if machine.left() < 0:
            report["left_out"].append(f"{job}: time")
            continue
        makers, missing = measure.participants(job, machine)
        report["not_installed"] |= missing
        release(machine)
        able, names = affordable(job, machine), list(makers)
        if able < min(2, len(names)):
            report["left_out"].append(f"{job}: memory")
            continue
        report["left_out"] += [f"{job}, {name}: memory" for name in names[able:]]
        makers = {name: makers[name] for name in names[:able]}
        report["rows"] += measure.compare(job, makers, machine)
        write(report, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("out", type=Path, nargs="?", default=LATEST, help="folder of the results")
    add("--budget", type=float, default=240, help="seconds (default: 240)")
    add("--quick", action="store_true", help="the first comparisons only")
    add("--targets", action="store_true", help="those of the path for CPUs only")
    add("--methods", help="of these only", nargs="+", choices=METHODS, metavar="METHOD")
    add("--base", metavar="REF", help="this tree beside another commit, instead")
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
        from bits import compare_versions  # noqa: PLC0415  # bits imports this folder's modules

        compare_versions(options.base, machine, options.quick)
        return
    found = measure.bandwidths(machine)
    machine.bandwidth = 1e9 * max(found.values())
    report, out = new_report(found), options.out
    out.mkdir(parents=True, exist_ok=True)
    # The targets are those of the path for CPUs, and nobody has set others.
    if not (gpu or options.methods):
        left = machine.left() * (1 if options.targets else FOR_TARGETS)
        less = replace(machine, deadline=time.monotonic() + left, seconds=seconds / 2)
        report["targets"] = measure_targets(less)
    asked = options.methods or METHODS
    todo = [] if options.targets else jobs(machine.dry, options.quick)
    run_jobs([job for job in todo if job.method in asked], report, machine, out)
    write(report, out)
    print(as_text(report), end="")
    if report["rows"]:
        from figures import draw  # noqa: PLC0415  # the only part that needs matplotlib

        draw(out)


if __name__ == "__main__":
    main()
