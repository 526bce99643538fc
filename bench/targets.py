"""What fusedreg's path for CPUs is to reach, and whether it does: pairs of arms, A B B A."""

from __future__ import annotations

import json
import operator
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
from comparison import Row, Runner, affordable, prepare, reason, release
from contenders import REFERENCE, TORCH, Maker, Task, make_groups, of_torch, own, params_of
from jobs import Job
from measure import LEAST, Machine, Timed, rounds, spread
from methods import METHODS
from rich.console import Console
from rich.progress import track
from shapes import Groups, count, of_targets
from verify import Expected, expected, max_norm, set_grads, start

MOST = 1000
"""Rounds of a pair: a hundred steps of a small model are over in milliseconds."""

LITTLE = 1.0
"""Seconds for a pair, below which it is stepped less often than a run to be quoted needs."""

FIRST_STEP = Path(__file__).parent / "first_step.py"

MAKERS: dict[str, Maker] = {
    "fusedreg": own,
    "torch fused": TORCH["torch fused"],
    "torch default": of_torch,  # no flags
}


@dataclass(frozen=True)
class Arm:
    """Who makes a step, and of which method."""

    who: str
    method: str
    clip: bool = True

    def name(self, backend: str) -> str:
        """With the path that fusedreg took, and the L1 that only one of a pair has."""
        path = f" ({backend})" if self.who == "fusedreg" and backend else ""
        return self.who + path + " + L1" * self.method.endswith("L1")


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
    def unit(self) -> str:
        return " s" if self.first_step else ""

    @property
    def wanted(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}{self.unit}"

    def __str__(self) -> str:
        what = f"{self.over.method}{', clipped' * self.over.clip}"
        return f"{what}: first step" if self.first_step else what


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


class Setting:
    """What all arms of a model begin with."""

    def __init__(self, shapes: Groups, machine: Machine) -> None:
        self.machine = machine
        self.groups = make_groups(shapes, torch.float32, machine.device)
        self.norm = max_norm(self.groups)
        self.begin = start(self.groups, Task(METHODS["AdamW"], None))
        self.known: dict[tuple[str, bool], Expected] = {}

    def runner(self, arm: Arm) -> Runner:
        """The arm, verified."""
        task = Task(METHODS[arm.method], self.norm if arm.clip else None)
        case = arm.method, arm.clip
        if case not in self.known:
            self.known[case] = expected(self.begin, self.groups, task)
        contender = MAKERS[arm.who](self.groups, task)
        return prepare(contender, self.groups, self.begin, self.known[case], self.machine)

    def restore(self) -> None:
        set_grads(params_of(self.groups), self.begin.grads)


def measure_targets(machine: Machine) -> list[Row]:
    """A row for each target, also where time or memory did not allow it.

    Large models come last, and what is slow at their end. A target is left out if there is less
    time than the one before took.
    """
    todo, of = targets(machine.dry), of_targets(machine.dry)

    def cost(target: Target) -> tuple[int, str, bool]:
        return count(of[target.model]), target.model, target.slow

    console = Console(stderr=True)
    shown = track(sorted(todo, key=cost), "targets", console=console, transient=True)
    rows: dict[Target, Row] = {}
    spent = 0.0
    for model, some in groupby(shown, key=lambda target: target.model):
        fits = affordable(Job("target", model), of[model], machine) >= 2
        setting = cache(partial(Setting, of[model], machine))  # made by the first that is measured
        for target in some:
            since = time.monotonic()
            if machine.left() < spent:
                found: Row = {"verdict": "not measured: time"}
            elif not fits:
                found = {"verdict": "not measured: memory"}
            else:
                found = measured(target, setting, machine)
                release(machine)
                spent = time.monotonic() - since
            rows[target] = {**row_of(target, of[model]), **found}
    return [rows[target] for target in todo]


def row_of(target: Target, shapes: Groups) -> Row:
    """What a target is; what was found comes on top of it."""
    return {
        "what": str(target),
        "model": target.model,
        "parameters": count(shapes),
        "tensors": sum(map(len, shapes)),
        "arms": [target.over.name(""), target.under.name("")],
        "target": target.wanted,
        "unit": target.unit,
        "met": False,
        **dict.fromkeys(("value", "p20", "p80", "rounds", "ms")),
    }


def measured(target: Target, setting: Callable[[], Setting], machine: Machine) -> Row:
    """Value, spread and verdict; whoever fails or is wrong has missed the target."""
    try:
        of = first_steps(target, machine) if target.first_step else steps(target, setting())
    except Exception as error:  # whatever it is, the other targets shall be measured
        return {"verdict": f"missed: {reason(error)}"}
    names, times, notes = of
    compare = operator.sub if target.first_step else operator.truediv
    values = list(map(compare, *times))
    value, p20, p80 = spread(values)
    met = value >= target.limit if target.at_least else value <= target.limit
    return {
        "arms": names,
        "value": value,
        "p20": p20,
        "p80": p80,
        "rounds": len(values),
        "ms": [1e3 * statistics.median(each) for each in times],
        "met": met,
        "verdict": "; ".join(["met" if met else "missed", *notes]),
    }


Times = tuple[list[str], list[list[float]], list[str]]
"""What the two arms are called, the seconds of each, and where torch is inexact."""


def steps(target: Target, setting: Setting) -> Times:
    """Verify both arms, then time them, each as often after the other as before it."""
    arms = (target.over, target.under)
    runners = [setting.runner(arm) for arm in arms]
    backends = [getattr(runner.contender.optimizer, "backend", "") for runner in runners]
    verdicts = [str(runner.verdict) for runner in runners]
    notes = [note_of(arm, verdict) for arm, verdict in zip(arms, verdicts, strict=True)]
    timed = {(str(i), "all"): Timed(r.contender.step) for i, r in enumerate(runners)}
    pairs = least(target, setting.machine)
    ms = rounds(timed, setting.machine, setting.restore, pairs, MOST)
    names = [arm.name(backend) for arm, backend in zip(arms, backends, strict=True)]
    return names, [[1e-3 * each for each in of] for of in ms.values()], [*filter(None, notes)]


def first_steps(target: Target, machine: Machine) -> Times:
    """The first step, which then verifies what it has compiled."""
    arms = (target.over, target.under)
    names, seconds = ["", ""], [[], []]
    for pair in range(least(target, machine)):
        for place in (0, 1) if pair % 2 == 0 else (1, 0):
            options = ["--reference"] * (arms[place].who == REFERENCE)
            command = [sys.executable, str(FIRST_STEP), target.model, *options]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            answer = json.loads(done.stdout)
            note_of(arms[place], answer["verdict"])
            names[place] = arms[place].name(answer["backend"])
            seconds[place].append(answer["seconds"])
    return names, seconds, []


def least(target: Target, machine: Machine) -> int:
    """Pairs, of steps or processes, as far as the seconds of a pair do not allow more."""
    if machine.dry:
        return 1
    if target.slow or machine.seconds < LITTLE:
        return 2
    return 4 if target.first_step else LEAST


def note_of(arm: Arm, verdict: str) -> str:
    """What is to be said of an arm whose results differ; raises where that is fusedreg's.

    torch's norm of a large float32 tensor is inexact on a CPU, by 3e-3 for GPT-2's embedding.
    """
    if verdict and not arm.who.startswith("torch"):
        raise ArithmeticError(f"{arm.name('')}: {verdict}")
    return f"{arm.who}: {verdict}" if verdict else ""
