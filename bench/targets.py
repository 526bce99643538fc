"""What fusedreg's path for CPUs is to reach, and whether it does: pairs of arms, A B B A."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context
from typing import NamedTuple

import torch
from comparison import Row, affordable, reason, release, timed
from contenders import REFERENCE, TORCH, Maker, of_torch, own
from jobs import OF_TARGETS, SHAPES, TINY, Job, count
from measure import LEAST, Machine, rounds, seconds, spread
from methods import METHODS
from rich.console import Console
from rich.progress import track
from verify import Setting

MOST = 1000
"""Rounds of a pair: a hundred steps of a small model are over in milliseconds."""

LITTLE = 1.0
"""Seconds for a pair, below which it is stepped less often than a run to be quoted needs."""

MAKERS: dict[str, Maker] = {**TORCH, "fusedreg": own, "torch default": of_torch}
MAKERS[REFERENCE] = partial(own, fused=False)


class Arm(NamedTuple):
    """Who makes a step, and of which method."""

    who: str
    method: str
    clip: bool = True

    def name(self, backend: str | None = None) -> str:
        """With the path that fusedreg took, and the L1 that only one of a pair has."""
        path = f" ({backend})" if self.who == "fusedreg" and backend else ""
        return self.who + path + " + L1" * bool(METHODS[self.method].l1)


class Target(NamedTuple):
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
        return f"at {'least' if self.at_least else 'most'} {self.limit:g}{' s' * self.first_step}"

    def __str__(self) -> str:
        how = ", clipped" * self.over.clip + ": first step" * self.first_step
        return self.over.method + how


def targets(dry: bool) -> list[Target]:
    """All, in the order of the table."""
    *large, many, small = TINY if dry else OF_TARGETS
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
    todo = targets(machine.dry)
    ordered = sorted(todo, key=lambda t: (count(SHAPES[t.model]), t.model, t.slow))
    shown = track(ordered, "targets", console=Console(stderr=True), transient=True)
    rows: dict[Target, Row] = {}
    spent = 0.0
    for model, some in groupby(shown, key=lambda target: target.model):
        shapes = SHAPES[model]
        fits = affordable(Job("target", model), shapes, machine) >= 2
        # Made by the first that is measured.
        setting = cache(partial(Setting, shapes, torch.float32, machine.device))
        for target in some:
            since, found = time.monotonic(), {"verdict": "not measured: memory"}
            if machine.left() < spent:
                found = {"verdict": "not measured: time"}
            elif fits:
                found = measured(target, setting, machine)
                release(machine)
                spent = time.monotonic() - since
            asked = {"what": str(target), "model": model, "parameters": count(shapes)}
            asked |= {"tensors": sum(map(len, shapes)), "target": target.wanted}
            asked |= {"unit": " s" * target.first_step, "met": False}
            asked["arms"] = [target.over.name(), target.under.name()]
            asked |= dict.fromkeys(("value", "p20", "p80", "rounds", "ms"))
            rows[target] = {**asked, **found}
    return [rows[target] for target in todo]


def measured(target: Target, setting: Callable[[], Setting], machine: Machine) -> Row:
    """Value, spread and verdict; whoever fails or is wrong has missed the target."""
    try:
        how = first_steps if target.first_step else steps
        names, times, notes = how(target, setting, machine)
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
    setting, names, notes, calls = of(), [], [], {}
    for place, arm in enumerate((target.over, target.under)):
        task = setting.task(METHODS[arm.method], arm.clip)
        contender = setting.prepare(MAKERS[arm.who], task, machine)
        notes += note_of(arm, str(contender.verdict))
        names.append(arm.name(contender.backend))
        calls |= timed(str(place), contender, machine, parts=False)
    least = 2 if target.slow or machine.seconds < LITTLE else LEAST
    return names, [*rounds(calls, machine, setting.set_grads, least, MOST).values()], notes


def first_steps(target: Target, of: Callable[[], Setting], machine: Machine) -> Found:
    """Of processes that are started in turns."""
    names = {}

    def timed(arm: Arm) -> float:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            taken, backend, verdict = process.submit(first_step, target.model, arm).result()
        note_of(arm, verdict)
        names[arm] = arm.name(backend)
        return 1e3 * taken

    arms = {(arm.who, ""): partial(timed, arm) for arm in (target.over, target.under)}
    pairs = 2 if machine.seconds < LITTLE else 4
    times = rounds(arms, machine, machine.wait, pairs, pairs)
    return [names[target.over], names[target.under]], [*times.values()], []


def first_step(model: str, arm: Arm) -> tuple[float, str | None, str]:
    """Seconds of a process's first step, its path and, from another optimizer, the verdict."""
    setting = Setting(SHAPES[model], torch.float32, torch.device("cpu"))
    task = setting.task(METHODS[arm.method], arm.clip)
    first, second = (MAKERS[arm.who](setting.groups, task) for _ in range(2))
    taken = seconds(first.step)
    return taken, first.backend, str(setting.check(second, task))


def note_of(arm: Arm, verdict: str) -> list[str]:
    """What is to be said of an arm whose results differ; raises where that is fusedreg's.

    torch's norm of a large float32 tensor is inexact on a CPU, by 3e-3 for GPT-2's embedding.
    """
    if verdict and not arm.who.startswith("torch"):
        raise ArithmeticError(f"{arm.name()}: {verdict}")
    return [f"{arm.who}: {verdict}"] * bool(verdict)
