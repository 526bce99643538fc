"""One comparison: every contender is verified first and then timed round-robin."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from contenders import (
    REFERENCE,
    Contender,
    Maker,
    Task,
    compiled,
    contenders,
    make_groups,
    own,
    params_of,
)
from jobs import Job
from measure import Key, Machine, Timed, extra_bytes, host_seconds, rounds, spread, time_limit
from methods import DTYPES, METHODS, moved_numbers, needed_numbers
from shapes import Groups, count
from verify import Expected, Start, Verdict, check, expected, max_norm, set_grads, start

Row = dict[str, Any]

READABLE = 2**25
"""Parameters, of which fusedreg's reference path makes a step in less than a second."""


@dataclass
class Runner:
    """A contender that has taken its first steps, and how right they were."""

    contender: Contender
    verdict: Verdict
    host: float | None = None
    extra: int | None = None


def participants(
    job: Job, shapes: Groups, machine: Machine
) -> tuple[dict[str, Maker], dict[str, str]]:
    """Who takes part in a comparison, and why others do not."""
    # On a CPU fused=True asks for triton's kernels, which are then interpreted.
    makers, missing = contenders(METHODS[job.method], **({"fused": True} if machine.dry else {}))
    if job.compiled:
        how = compiled(job.compiled, backend="eager" if machine.dry else "inductor")
        return {"fusedreg": makers["fusedreg"], f"torch.compile {job.compiled}": how}, {}
    if job.kind == "parts":
        return {name: makers[name] for name in ("fusedreg", "torch fused", "torch foreach")}, {}
    makers.pop(REFERENCE, None)
    if shows_reference(job, shapes, machine):
        makers[REFERENCE] = partial(own, fused=False)
    return makers, missing


def shows_reference(job: Job, shapes: Groups, machine: Machine) -> bool:
    """Whether the readable path is timed too, where it is cheap.

    It is for what torch lacks and, on a CPU, for one other method.
    """
    first = (job.method, job.dtype, job.clip) == ("AdamW", "float32", True)
    lacks = not METHODS[job.method].ways_of_torch
    return count(shapes) <= READABLE and (lacks or (first and not machine.on_gpu))


def affordable(job: Job, shapes: Groups, machine: Machine) -> int:
    """How many contenders have their states in the free memory at the same time."""
    one = count(shapes) * DTYPES[job.dtype].itemsize
    # Parameters and gradients, both as they were, and the temporaries of foreach and of clipping;
    # a tenth is left for what nobody counts.
    shared = 4 + 2
    return int((0.9 * machine.free_memory() / one - shared) // METHODS[job.method].states)


def compare(job: Job, shapes: Groups, makers: dict[str, Maker], machine: Machine) -> list[Row]:
    """Rows of a comparison: one for each contender and, where parts are timed, each part."""
    groups = make_groups(shapes, DTYPES[job.dtype], machine.device)
    clip = max_norm(groups) if job.clip else None
    task = Task(METHODS[job.method], clip, job.scaled)
    begin = start(groups, task)
    must_be = expected(begin, groups, task)
    limit = min(machine.compile_seconds, machine.left()) if job.compiled else None
    runners: dict[str, Runner] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        try:
            with time_limit(limit):
                runners[name] = prepare(make(groups, task), groups, begin, must_be, machine)
        except Exception as error:  # whatever it is, the others shall be timed
            failures[name] = reason(error)
        release(machine)  # when the error, which holds on to its tensors, is gone
    params = params_of(groups)
    timed = {key: one for name in runners for key, one in parts_of(name, runners[name], job)}
    times = rounds(timed, machine, before=lambda: set_grads(params, begin.grads))
    head = {
        **{field: getattr(job, field) for field in ("kind", "model", "method", "dtype", "clip")},
        "scaled": job.scaled,
        "parameters": count(shapes),
        "tensors": len(params),
        "groups": len(groups),
    }
    return [
        {**head, **row}
        for name in makers
        for row in (
            rows_of(name, runners, times, job, head["parameters"], machine)
            if name in runners
            else [failed(name, failures[name])]
        )
    ]


def prepare(
    contender: Contender, groups: Any, begin: Start, must_be: Expected, machine: Machine
) -> Runner:
    """Verify; on a GPU, see what a step takes of host and memory."""
    runner = Runner(contender, check(contender, groups, begin, must_be))
    if machine.on_gpu:
        runner.host = host_seconds(contender.step, machine)
        runner.extra = extra_bytes(contender.step)
    return runner


def parts_of(name: str, runner: Runner, job: Job) -> list[tuple[Key, Timed]]:
    """What is timed of a contender: its whole step, or each part of it."""
    host = runner.host or 0.0
    if job.kind != "parts":
        return [((name, "all"), Timed(runner.contender.step, host))]
    return [((name, part), Timed(call, host)) for part, call in runner.contender.parts.items()]


def rows_of(
    name: str,
    runners: dict[str, Runner],
    times: dict[Key, list[float]],
    job: Job,
    numel: int,
    machine: Machine,
) -> list[Row]:
    """The whole step, and its parts where they were timed."""
    runner, ours = runners[name], runners.get("fusedreg")
    backend = getattr(runner.contender.optimizer, "backend", None)
    shown = f"{name} ({backend})" if name == "fusedreg" else name
    size = DTYPES[job.dtype].itemsize
    moved = moved_numbers(METHODS[job.method], job.clip, job.scaled, shown)
    needed = size * needed_numbers(METHODS[job.method], job.clip)
    whole = total(times, name)
    row: Row = {
        "implementation": shown,
        "backend": backend,
        "part": "all",
        "rounds": len(whole),
        **dict(zip(("ms", "p20", "p80"), spread(whole), strict=True)),
        "ratio": None,
        "ratio_p20": None,
        "ratio_p80": None,
        "matches": runner.verdict.matches,
        "verdict": str(runner.verdict),
        "error_of_bound": runner.verdict.of_bound,
        "needed_bytes": needed,
        "moved_bytes": size * sum(moved.values()) if moved else None,
        "host_us": None if runner.host is None else 1e6 * runner.host,
        "launches": getattr(runner.contender.optimizer, "launches", None),
        "extra_mib": None if runner.extra is None else runner.extra / 2**20,
    }
    row["gb_per_s"] = needed * numel / (1e6 * row["ms"])
    row["of_bandwidth"] = 1e9 * row["gb_per_s"] / machine.bandwidth
    if ours is not None and ours.verdict.matches and runner.verdict.matches:
        pairs = zip(whole, total(times, "fusedreg"), strict=True)
        names = ("ratio", "ratio_p20", "ratio_p80")
        row |= zip(names, spread([theirs / own for theirs, own in pairs]), strict=True)
    elif runner.verdict.matches:
        row["verdict"] = "no ratio: fusedreg's results differ or it failed"
    found = [row]
    for part in runner.contender.parts if job.kind == "parts" else ():
        ms = dict(zip(("ms", "p20", "p80"), spread(times[name, part]), strict=True))
        bytes_of = size * moved[part] if moved else None
        same = ("implementation", "backend", "rounds", "matches", "verdict")
        found.append({**{k: row[k] for k in same}, "part": part, **ms, "moved_bytes": bytes_of})
    return found


def total(times: dict[Key, list[float]], name: str) -> list[float]:
    """Milliseconds of a whole step in each round."""
    parts = [of for (contender, _), of in times.items() if contender == name]
    return [sum(one) for one in zip(*parts, strict=True)]


def reason(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def failed(name: str, why: str) -> Row:
    return {"implementation": name, "part": "all", "matches": False, "verdict": why}


def release(machine: Machine) -> None:
    """Give memory back, also that of what failed."""
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
