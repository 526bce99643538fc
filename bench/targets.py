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
from jobs import METHODS, OF_TARGETS, SHAPES, TINY, Job, count
from measure import LEAST, Machine, rounds, seconds, spread
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
        shapes, fits = SHAPES[model], affordable(Job("target", model), machine) >= 2
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
            row = {"what": str(target), "model": model, "parameters": count(shapes)}
            row |= {"tensors": sum(map(len, shapes)), "target": target.wanted, "met": False}
            row |= {"unit": " s" * target.first_step, "arms": [target.over.who, target.under.who]}
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


Found = tuple[list[str], list[list[float]], list[str]]
"""What the two arms are called, the milliseconds of each, and where torch is inexact."""


def steps(target: Target, setting: Setting, machine: Machine) -> Found:
    """Verify both arms, then time them, each as often after the other as before it."""
    names, notes, calls = [], [], {}
    for place, arm in enumerate((target.over, target.under)):
        method = METHODS[arm.method]
        task = setting.task(method, arm.clip)
        contender = setting.prepare(MAKERS[arm.who], task, machine)
        path = f" ({contender.backend})" if arm.who == "fusedreg" else ""
        names.append(arm.who + path + " + L1" * bool(method.l1))  # which one of a pair may have
        if not contender.verdict.matches:
            # torch's norm of a large float32 tensor is inexact on a CPU, by 3e-3 for GPT-2's
            # embedding.
            if not arm.who.startswith("torch"):
                raise ArithmeticError(f"{arm.who}: {contender.verdict}")
            notes.append(f"{arm.who}: {contender.verdict}")
        calls[str(place)] = timed([contender.step], contender, machine)
        if target.first_step:
            calls[str(place)] = [partial(in_process, target.model, arm)]
    least = 2 if target.slow or machine.seconds < LITTLE else LEAST
    least, most = (min(least, 4), 4) if target.first_step else (least, MOST)
    times = rounds(calls, machine, setting.set_grads, least, most)
    return names, [[ms for (ms,) in of] for of in times.values()], notes


def in_process(model: str, arm: Arm) -> float:
    """Milliseconds of the first step of a process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(first_step, model, arm).result()


def first_step(model: str, arm: Arm) -> float:
    setting = Setting(SHAPES[model], torch.float32, torch.device("cpu"))
    task = setting.task(METHODS[arm.method], arm.clip)
    return 1e3 * seconds(MAKERS[arm.who](setting.groups, task).step)
