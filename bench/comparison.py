"""One comparison: every contender is verified first and then timed round-robin."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from contenders import REFERENCE, Contender, Maker, compiled, contenders, own
from jobs import DTYPES, METHODS, SHAPES, Job, count, moved_numbers, needed_numbers
from measure import Machine, milliseconds, rounds, spread
from verify import Setting

Row = dict[str, Any]

READABLE = 2**25
"""Parameters, of which fusedreg's reference path makes a step in less than a second."""


def fusedreg_on(machine: Machine) -> Maker:
    """fusedreg. On a CPU fused=True asks for triton's kernels, which are then interpreted."""
    return partial(own, fused=True) if machine.dry else own


def participants(job: Job, machine: Machine) -> tuple[dict[str, Maker], dict[str, str]]:
    """Who takes part in a comparison, and why others do not."""
    makers, missing = contenders(METHODS[job.method])
    makers["fusedreg"] = fusedreg_on(machine)
    if job.compiled:
        backend = "eager" if machine.dry else "inductor"
        how = partial(compiled, how=job.compiled, backend=backend)
        return {"fusedreg": makers["fusedreg"], f"torch.compile {job.compiled}": how}, {}
    if job.kind == "parts":
        return {name: makers[name] for name in ("fusedreg", "torch fused", "torch foreach")}, {}
    # Where it is cheap the readable path is timed too, for what torch lacks and, on a CPU, for one
    # other method.
    if count(SHAPES[job.model]) > READABLE:
        makers.pop(REFERENCE, None)
    elif (job.method, job.dtype, job.clip, machine.on_gpu) == ("AdamW", "float32", True, False):
        makers[REFERENCE] = partial(own, fused=False)
    return makers, missing


def affordable(job: Job, machine: Machine) -> int:
    """How many contenders have their states in the free memory at the same time."""
    one = count(SHAPES[job.model]) * DTYPES[job.dtype].itemsize
    # Parameters and gradients, both as they were, and the temporaries of foreach and of clipping;
    # a tenth is left for what nobody counts.
    shared = 4 + 2
    return int((0.9 * machine.free_memory() / one - shared) // METHODS[job.method].states)


def timed(calls: Any, contender: Contender, machine: Machine) -> list[Callable[[], float]]:
    """The milliseconds of each call, for `rounds`."""
    return [partial(milliseconds, call, machine, contender.host) for call in calls]


def compare(job: Job, makers: dict[str, Maker], machine: Machine) -> list[Row]:
    """Rows of a comparison: one for each contender and, where parts are timed, each part."""
    shapes = SHAPES[job.model]
    setting = Setting(shapes, DTYPES[job.dtype], machine.device, job.scaled)
    task = setting.task(METHODS[job.method], job.clip)
    setting.expected(task)  # before others take memory
    made: dict[str, Contender] = {}
    head = {**asdict(job), "scaled": job.scaled, "parameters": count(shapes)}
    head |= {"tensors": len(setting.params), "groups": len(shapes)}
    del head["compiled"]
    rows: dict[str, list[Row]] = {}
    for name, make in makers.items():
        try:
            made[name] = setting.prepare(make, task, machine)
        except Exception as error:  # whatever it is, the others shall be timed
            failed = {"implementation": name, "part": "all", "matches": False}
            rows[name] = [{**failed, "verdict": reason(error)}]
        release(machine)  # when the error, which holds on to its tensors, is gone
    times = rounds(
        {
            name: timed(one.parts.values() if job.kind == "parts" else [one.step], one, machine)
            for name, one in made.items()
        },
        machine,
        setting.set_grads,
    )
    for name in made:
        rows[name] = rows_of(name, made, times, job, machine)
    return [{**head, **row} for name in makers for row in rows[name]]


def rows_of(name: str, made: dict[str, Contender], times: Any, job: Job, machine: Any) -> list[Row]:
    """The whole step, and its parts where they were timed."""
    contender, ours, method = made[name], made.get("fusedreg"), METHODS[job.method]
    shown = f"{name} ({contender.backend})" if name == "fusedreg" else name
    moved, size = moved_numbers(method, job.clip, job.scaled, shown), DTYPES[job.dtype].itemsize
    needed, whole, verdict = size * needed_numbers(method, job.clip), times[name], contender.verdict
    same = {"implementation": shown, "backend": contender.backend, "rounds": len(whole)}
    same |= {"matches": verdict.matches, "verdict": str(verdict)}
    ratios: Any = [None] * 3
    if verdict.matches and ours and ours.verdict.matches:
        ratios = spread([sum(a) / sum(b) for a, b in zip(whole, times["fusedreg"], strict=True)])
    elif verdict.matches:
        same["verdict"] = "no ratio: fusedreg's results differ or it failed"
    row = {
        **same,
        "part": "all",
        **in_ms(map(sum, whole)),
        **dict(zip(("ratio", "ratio_p20", "ratio_p80"), ratios, strict=True)),
        "error_of_bound": verdict.of_bound,
        "needed_bytes": needed,
        "moved_bytes": size * sum(moved.values()) if moved else None,
        "host_us": 1e6 * contender.host if machine.on_gpu else None,
        "launches": getattr(contender.optimizer, "launches", None),
    }
    row["gb_per_s"] = needed * count(SHAPES[job.model]) / (1e6 * row["ms"])
    row["of_bandwidth"] = 1e9 * row["gb_per_s"] / machine.bandwidth
    if job.kind != "parts":
        return [row]
    parts = zip(contender.parts, zip(*whole, strict=True), strict=True)
    of = {part: size * moved[part] if moved else None for part in contender.parts}
    return [row, *({**same, "part": p, **in_ms(ms), "moved_bytes": of[p]} for p, ms in parts)]


def in_ms(times: Any) -> Row:
    return dict(zip(("ms", "p20", "p80"), spread(list(times)), strict=True))


def reason(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def release(machine: Machine) -> None:
    """Give memory back, also that of what failed."""
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
