"""What fusedreg's path for CPUs is to reach, and whether it does: pairs of arms, A B B A."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import torch
from comparison import Row, affordable, prepare, reason, release
from contenders import REFERENCE, TORCH, Maker, of_torch, own
from jobs import Job, count, of_targets
from measure import LEAST, Machine, rounds, spread
from methods import METHODS
from rich.console import Console
from rich.progress import track
from verify import Setting

MOST = 1000
"""Rounds of a pair: a hundred steps of a small model are over in milliseconds."""

LITTLE = 1.0
"""Seconds for a pair, below which it is stepped less often than a run to be quoted needs."""

FIRST_STEP = Path(__file__).parent / "first_step.py"

MAKERS: dict[str, Maker] = {**TORCH, "fusedreg": own, "torch default": of_torch}


@dataclass(frozen=True)
class Arm:
    """Who makes a step, and of which method."""

    who: str
    method: str
    clip: bool = True

    def name(self, backend: str | None = None) -> str:
        """With the path that fusedreg took, and the L1 that only one of a pair has."""
        path = f" ({backend})" if self.who == "fusedreg" and backend else ""
        return self.who + path + " + L1" * bool(METHODS[self.method].l1)


@dataclass(frozen=True)
class Target:
    """A limit for the time of `over`, divided by that of `under`."""

    model: str
    over: Arm
    under: Arm
    limit: float
    at_least: bool = False
    first_step: bool = False
    """The difference of the seconds of first steps, instead."""

    @property
    def slow(self) -> bool:
        """torch's default is a for-loop on a CPU: seconds for a large model on some machines."""
        return self.over.who == "torch default"

    @property
    def wanted(self) -> str:
        most = "least" if self.at_least else "most"
        return f"at {most} {self.limit:g}{' s' * self.first_step}"

    def __str__(self) -> str:
        what = f"{self.over.method}{', clipped' * self.over.clip}"
        return what + ": first step" * self.first_step


def targets(dry: bool) -> list[Target]:
    """All, in the order of the table."""
    *large, many, small = of_targets(dry)
    rules = ("AdamW", "Adam + L2", "SGD momentum")
    adamw = Arm("fusedreg", "AdamW")

    def faster(model: str, rule: str, than: str, times: float) -> Target:
        return Target(model, Arm(than, rule), Arm("fusedreg", rule), times, at_least=True)

    def as_fast(model: str, rule: str, clip: bool, times: float) -> Target:
        return Target(model, Arm("fusedreg", rule, clip), Arm("torch fused", rule, clip), times)

    return [
        *(faster(model, rule, "torch fused", 1.3) for model in large for rule in rules),
        *(faster(model, rule, "torch default", 5) for model in large for rule in rules),
        *(as_fast(model, rule, False, 1.05) for model in large for rule in rules),
        *(Target(model, Arm("fusedreg", "AdamW + L1"), adamw, 1.25) for model in large),
        faster(many, "AdamW", "torch fused", 1.3),
        *(as_fast(small, rule, clip, 1) for clip in (True, False) for rule in rules),
        Target(small, adamw, Arm(REFERENCE, "AdamW"), 1, first_step=True),
    ]


def measure_targets(machine: Machine) -> list[Row]:
    """A row for each target, also where time or memory did not allow it.

    Large models come last, and what is slow at their end. A target is left out if there is less
    time than the one before took.
    """
    todo, of = targets(machine.dry), of_targets(machine.dry)
    ordered = sorted(todo, key=lambda t: (count(of[t.model]), t.model, t.slow))
    shown = track(ordered, "targets", console=Console(stderr=True), transient=True)
    rows: dict[Target, Row] = {}
    spent = 0.0
    for model, some in groupby(shown, key=lambda target: target.model):
        fits = affordable(Job("target", model), of[model], machine) >= 2
        # Made by the first that is measured.
        setting = cache(partial(Setting, of[model], torch.float32, machine.device))
        for target in some:
            since, found = time.monotonic(), {"verdict": "not measured: memory"}
            if machine.left() < spent:
                found = {"verdict": "not measured: time"}
            elif fits:
                found = measured(target, setting, machine)
                release(machine)
                spent = time.monotonic() - since
            asked = {"what": str(target), "model": model, "parameters": count(of[model])}
            asked |= {"tensors": sum(map(len, of[model])), "target": target.wanted}
            asked |= {"unit": " s" * target.first_step, "met": False}
            asked["arms"] = [target.over.name(), target.under.name()]
            asked |= dict.fromkeys(("value", "p20", "p80", "rounds", "ms"))
            rows[target] = {**asked, **found}
    return [rows[target] for target in todo]


def measured(target: Target, setting: Callable[[], Setting], machine: Machine) -> Row:
    """Value, spread and verdict; whoever fails or is wrong has missed the target."""
    try:
        names, times, notes = (first_steps if target.first_step else steps)(
            target, setting, machine
        )
    except Exception as error:  # whatever it is, the other targets shall be measured
        return {"verdict": f"missed: {reason(error)}"}
    pairs = zip(*times, strict=True)
    values = [1e-3 * (a - b) if target.first_step else a / b for a, b in pairs]
    value, p20, p80 = spread(values)
    met = value >= target.limit if target.at_least else value <= target.limit
    row = {"arms": names, "value": value, "p20": p20, "p80": p80, "rounds": len(values)}
    row |= {"ms": list(map(statistics.median, times)), "met": met}
    return {**row, "verdict": "; ".join(["met" if met else "missed", *notes])}


Found = tuple[list[str], list[list[float]], list[str]]
"""What the two arms are called, the milliseconds of each, and where torch is inexact."""


def steps(target: Target, of: Callable[[], Setting], machine: Machine) -> Found:
    """Verify both arms, then time them, each as often after the other as before it."""
    setting, names, notes, timed = of(), [], [], {}
    for place, arm in enumerate((target.over, target.under)):
        task = setting.task(METHODS[arm.method], arm.clip)
        runner = prepare(MAKERS[arm.who](setting.groups, task), setting, task, machine)
        notes += note_of(arm, str(runner.verdict))
        names.append(arm.name(runner.backend))
        timed |= runner.timed(str(place))
    least = 2 if target.slow or machine.seconds < LITTLE else LEAST
    return names, [*rounds(timed, machine, setting.set_grads, least, MOST).values()], notes


def first_steps(target: Target, _of: Callable[[], Setting], machine: Machine) -> Found:
    """Of processes that are started in turns; each then verifies what it has compiled."""
    arms = {"0": target.over, "1": target.under}
    names = {}

    def first_step(place: str) -> float:
        options = ["--reference"] * (arms[place].who == REFERENCE)
        command = [sys.executable, str(FIRST_STEP), target.model, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answer = json.loads(done.stdout)
        note_of(arms[place], answer["verdict"])
        names[place] = arms[place].name(answer["backend"])
        return 1e3 * answer["seconds"]

    timed = {(place, ""): partial(first_step, place) for place in arms}
    pairs = 2 if machine.seconds < LITTLE else 4
    times = rounds(timed, machine, machine.wait, pairs, pairs)
    return [names[place] for place in arms], [*times.values()], []


def note_of(arm: Arm, verdict: str) -> list[str]:
    """What is to be said of an arm whose results differ; raises where that is fusedreg's.

    torch's norm of a large float32 tensor is inexact on a CPU, by 3e-3 for GPT-2's embedding.
    """
    if verdict and not arm.who.startswith("torch"):
        raise ArithmeticError(f"{arm.name()}: {verdict}")
    return [f"{arm.who}: {verdict}"] * bool(verdict)
