"""Time one step beside torch.optim's and others': `python bench/run.py`; see docs/benchmark.md.

On a CPU it begins with what fusedreg's path for CPUs is to reach: pairs of arms, A B B A.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import measure
import torch
from contenders import REFERENCE, TORCH, Maker, of_torch, own
from jobs import METHODS, OF_TARGETS, SHAPES, TINY, Job, count, jobs
from measure import LEAST, Machine, affordable, prepare, reason, release, rounds, spread
from page import LATEST, Report, Row, as_text, new_report, write
from rich.console import Console
from rich.progress import track
from verify import Setting

FOR_TARGETS = 0.75  # of the time, at most: they come first
TO_COMPILE = 45  # seconds that must be left to wait for torch.compile
PAIRS = 1000  # rounds of a pair: a hundred steps of a small model are over in milliseconds
MAKERS: dict[str, Maker] = {**TORCH, "fusedreg": own, "torch default": of_torch}
MAKERS[REFERENCE] = partial(own, fused=False)


class Arm(NamedTuple):
    """Who makes a step, and of which method."""

    who: str
    method: str
    clip: bool = True

    def name(self, path: str = "") -> str:
        return self.who + path + " + L1" * bool(METHODS[self.method].l1)  # one of a pair has it


class Target(NamedTuple):
    """A limit for the time of `over`, divided by that of `under`."""

    model: str
    over: Arm
    under: Arm
    limit: float
    at_least: bool = False
    first_step: bool = False  # the difference of the seconds of first steps, instead

    @property
    def wanted(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}{' s' * self.first_step}"

    def __str__(self) -> str:
        how = ", clipped" * self.over.clip + ": first step" * self.first_step
        return self.over.method + how


def targets(dry: bool) -> list[Target]:
    """All, in the order of the table."""
    *large, many, small = TINY if dry else OF_TARGETS
    rules = ("AdamW", "Adam + L2", "SGD momentum")
    adamw = Arm("fusedreg", "AdamW")

    def pair(model: str, over: str, under: str, rule: str, limit: float, clip: bool) -> Target:
        arms = Arm(over, rule, clip), Arm(under, rule, clip)
        return Target(model, *arms, limit, at_least=under == "fusedreg")

    us, torch_fused = "fusedreg", "torch fused"
    return [
        *(pair(model, torch_fused, us, rule, 1.3, True) for model in large for rule in rules),
        *(pair(model, "torch default", us, rule, 5, True) for model in large for rule in rules),
        *(pair(model, us, torch_fused, rule, 1.05, False) for model in large for rule in rules),
        *(Target(model, Arm(us, "AdamW + L1"), adamw, 1.25) for model in large),
        pair(many, torch_fused, us, "AdamW", 1.3, True),
        *(pair(small, us, torch_fused, rule, 1, clip) for clip in (True, False) for rule in rules),
        Target(small, adamw, Arm(REFERENCE, "AdamW"), 1, first_step=True),
    ]


def measure_targets(machine: Machine) -> list[Row]:
    """A row for each target, also where time or memory did not allow it; large models come last."""
    todo = targets(machine.dry)
    # At their end what is a for-loop, which takes seconds on some machines.
    slow = {target for target in todo if target.over.who == "torch default"}
    ordered = sorted(todo, key=lambda t: (count(SHAPES[t.model]), t.model, t in slow))
    shown = track(ordered, "targets", console=Console(stderr=True), transient=True)
    rows: dict[Target, Row] = {}
    spent = 0.0
    for model, some in groupby(shown, key=lambda target: target.model):
        shapes, fits = SHAPES[model], affordable(Job("target", model), machine) >= 2
        # Made by the first that is measured.
        setting = cache(partial(Setting, shapes, torch.float32, machine.device))
        for target in some:
            since, found = time.monotonic(), {"verdict": "not measured: memory"}
            if machine.left() < spent:  # on the one before
                found = {"verdict": "not measured: time"}
            elif fits:
                found = measured(target, setting, machine)
                release(machine)
                spent = time.monotonic() - since
            row = {"what": str(target), "model": model, "parameters": count(shapes)}
            row |= {"tensors": sum(map(len, shapes)), "target": target.wanted, "met": False}
            row |= {
                "unit": " s" * target.first_step,
                "arms": [target.over.name(), target.under.name()],
            }
            rows[target] = row | dict.fromkeys(("value", "p20", "p80", "rounds", "ms")) | found
    return [rows[target] for target in todo]


def measured(target: Target, setting: Callable[[], Setting], machine: Machine) -> Row:
    """Value, spread and verdict; whoever fails or is wrong has missed the target."""
    try:
        names, times, notes = steps(target, setting(), machine)
    except Exception as error:  # whatever it is, the other targets shall be measured
        return {"verdict": f"missed: {reason(error)}"}
    pairs = zip(*times, strict=True)
    values = [1e-3 * (a - b) if target.first_step else a / b for a, b in pairs]
    value, p20, p80 = spread(values)
    met = value >= target.limit if target.at_least else value <= target.limit
    row = {"arms": names, "value": value, "p20": p20, "p80": p80, "rounds": len(values)}
    row |= {"ms": list(map(statistics.median, times)), "met": met}
    return {**row, "verdict": "; ".join(["met" if met else "missed", *notes])}


def steps(target: Target, setting: Setting, machine: Machine) -> Any:
    """What the two arms are called, the milliseconds of each, and where torch is inexact."""
    names, notes, calls = [], [], {}
    for place, arm in enumerate((target.over, target.under)):
        task = setting.task(METHODS[arm.method], arm.clip)
        contender = prepare(MAKERS[arm.who], setting, task, machine)
        names.append(arm.name(f" ({contender.backend})" if arm.who == "fusedreg" else ""))
        if not contender.verdict.matches:
            # torch's norm of GPT-2's embedding is inexact on a CPU, by 3e-3.
            if not arm.who.startswith("torch"):
                raise ArithmeticError(f"{arm.who}: {contender.verdict}")
            notes.append(f"{arm.who}: {contender.verdict}")
        calls[str(place)] = measure.timed([contender.step], contender, machine)
        if target.first_step:
            calls[str(place)] = [partial(in_process, target.model, arm)]
    least, most = (4, 4) if target.first_step else (LEAST, PAIRS)
    times = rounds(calls, machine, setting.set_grads, least, most)
    return names, [[ms for (ms,) in of] for of in times.values()], notes


def in_process(*arguments: Any) -> float:
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(first_step, arguments)


def first_step(model: str, arm: Arm) -> float:
    """Milliseconds of the first step of a process."""
    setting = Setting(SHAPES[model], torch.float32, torch.device("cpu"))
    task = setting.task(METHODS[arm.method], arm.clip)
    return 1e3 * measure.seconds(MAKERS[arm.who](setting.groups, task).step)


def run_jobs(todo: list[Job], report: Report, machine: Machine, out: Path) -> None:
    """All comparisons that memory and time allow; the files are written after each."""
    pace = 0.0  # seconds per parameter of the last comparison of more than a million
    for job in track(todo, "comparisons", console=Console(stderr=True), transient=True):
        begin, numel = time.monotonic(), count(SHAPES[job.model])
        if machine.left() < (TO_COMPILE if job.compiled else max(0.0, pace * numel)):
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
        rows = measure.compare(job, {name: makers[name] for name in names[:able]}, machine)
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
    found = measure.bandwidths(machine)
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
