"""One comparison: every contender is verified first and then timed round-robin."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import measure
import torch
from contenders import REFERENCE, Contender, Maker, compiled, contenders, own
from jobs import Groups, Job, count
from measure import Key, Machine, Times, rounds, spread
from methods import DTYPES, METHODS, moved_numbers, needed_numbers
from verify import Setting

Row = dict[str, Any]

READABLE = 2**25
"""Parameters, of which fusedreg's reference path makes a step in less than a second."""


def timed(name: str, contender: Contender, machine: Machine, parts: bool) -> Any:
    """The milliseconds of the whole step, or of each part of it, for `rounds`."""
    calls = contender.parts if parts else {"": contender.step}
    time = partial(measure.milliseconds, machine=machine, host=contender.host)
    return {(name, part): partial(time, call) for part, call in calls.items()}


def fusedreg_on(machine: Machine) -> Maker:
    """fusedreg. On a CPU fused=True asks for triton's kernels, which are then interpreted."""
    return partial(own, fused=True) if machine.dry else own


def participants(
    job: Job, shapes: Groups, machine: Machine
) -> tuple[dict[str, Maker], dict[str, str]]:
    """Who takes part in a comparison, and why others do not."""
    method = METHODS[job.method]
    makers, missing = contenders(method)
    makers["fusedreg"] = fusedreg_on(machine)
    if job.compiled:
        backend = "eager" if machine.dry else "inductor"
        how = partial(compiled, how=job.compiled, backend=backend)
        return {"fusedreg": makers["fusedreg"], f"torch.compile {job.compiled}": how}, {}
    if job.kind == "parts":
        return {name: makers[name] for name in ("fusedreg", "torch fused", "torch foreach")}, {}
    makers.pop(REFERENCE, None)
    # Where it is cheap the readable path is timed too, for what torch lacks and, on a CPU, for one
    # other method.
    first = (job.method, job.dtype, job.clip) == ("AdamW", "float32", True) and not machine.on_gpu
    if count(shapes) <= READABLE and (first or not method.ways_of_torch):
        makers[REFERENCE] = partial(own, fused=False)
    return makers, missing


def affordable(job: Job, shapes: Groups, machine: Machine) -> int:
    """How many contenders have their states in the free memory at the same time."""
    one = count(shapes) * DTYPES[job.dtype].itemsize
    # Parameters and gradients, both as they were, and the temporaries of foreach and of clipping;
    # a tenth is left for what nobody counts.
    shared = 4 + 2
    return int((0.9 * machine.free_memory() / one - shared) // METHODS[job.method].states)


def compare(job: Job, shapes: Groups, makers: dict[str, Maker], machine: Machine) -> list[Row]:
    """Rows of a comparison: one for each contender and, where parts are timed, each part."""
    setting = Setting(shapes, DTYPES[job.dtype], machine.device, job.scaled)
    task = setting.task(METHODS[job.method], job.clip)
    setting.expected(task)  # before others take memory
    made: dict[str, Contender] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        try:
            made[name] = setting.prepare(make, task, machine)
        except Exception as error:  # whatever it is, the others shall be timed
            failures[name] = reason(error)
        release(machine)  # when the error, which holds on to its tensors, is gone
    calls: dict[Key, Callable[[], float]] = {}
    for name, contender in made.items():
        calls |= timed(name, contender, machine, job.kind == "parts")
    times = rounds(calls, machine, setting.set_grads)
    head = {**asdict(job), "scaled": job.scaled, "parameters": count(shapes)}
    head |= {"tensors": len(setting.params), "groups": len(shapes)}
    del head["compiled"]
    failed = {"part": "all", "matches": False}
    of = {name: rows_of(name, made, times, job, head["parameters"], machine) for name in made}
    of |= {n: [{"implementation": n, **failed, "verdict": why}] for n, why in failures.items()}
    return [{**head, **row} for name in makers for row in of[name]]


def rows_of(
    name: str, made: dict[str, Contender], times: Times, job: Job, numel: int, machine: Machine
) -> list[Row]:
    """The whole step, and its parts where they were timed."""
    contender, ours = made[name], made.get("fusedreg")
    shown = f"{name} ({contender.backend})" if name == "fusedreg" else name
    size, method = DTYPES[job.dtype].itemsize, METHODS[job.method]
    moved = moved_numbers(method, job.clip, job.scaled, shown)
    needed = size * needed_numbers(method, job.clip)
    whole, verdict = total(times, name), contender.verdict
    same = {"implementation": shown, "backend": contender.backend, "rounds": len(whole)}
    same |= {"matches": verdict.matches, "verdict": str(verdict)}
    ratios: Any = [None] * 3
    if verdict.matches and ours and ours.verdict.matches:
        ratios = spread([a / b for a, b in zip(whole, total(times, "fusedreg"), strict=True)])
    elif verdict.matches:
        same["verdict"] = "no ratio: fusedreg's results differ or it failed"
    row = {
        **same,
        "part": "all",
        **in_ms(whole),
        **dict(zip(("ratio", "ratio_p20", "ratio_p80"), ratios, strict=True)),
        "error_of_bound": verdict.of_bound,
        "needed_bytes": needed,
        "moved_bytes": size * sum(moved.values()) if moved else None,
        "host_us": 1e6 * contender.host if machine.on_gpu else None,
        "launches": getattr(contender.optimizer, "launches", None),
    }
    row["gb_per_s"] = needed * numel / (1e6 * row["ms"])
    row["of_bandwidth"] = 1e9 * row["gb_per_s"] / machine.bandwidth
    parts = [
        {**same, "part": part, **in_ms(ms), "moved_bytes": size * moved[part] if moved else None}
        for (who, part), ms in times.items()
        if who == name and part
    ]
    return [row, *parts]


def total(times: Times, name: str) -> list[float]:
    """Milliseconds of a whole step in each round."""
    parts = [ms for (who, _), ms in times.items() if who == name]
    return [sum(one) for one in zip(*parts, strict=True)]


def in_ms(times: list[float]) -> Row:
    return dict(zip(("ms", "p20", "p80"), spread(times), strict=True))


def reason(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def release(machine: Machine) -> None:
    """Give memory back, also that of what failed."""
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
