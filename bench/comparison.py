"""One comparison: every contender is verified first and then timed round-robin."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, product
from typing import Any
from unittest import mock

import measure
import torch
from contenders import REFERENCE, Contender, Maker, Task, compiled, contenders, own
from jobs import GPT2, TINY, Groups, Job, count
from measure import Key, Machine, Times, rounds, spread, time_limit
from methods import DTYPES, METHODS, moved_numbers, needed_numbers
from verify import Setting, Verdict

Row = dict[str, Any]

READABLE = 2**25
"""Parameters, of which fusedreg's reference path makes a step in less than a second."""


@dataclass
class Runner:
    """A contender that has taken its first steps, and how right they were."""

    contender: Contender
    verdict: Verdict
    machine: Machine
    host: float | None = None
    extra: int | None = None

    @property
    def backend(self) -> str | None:
        return getattr(self.contender.optimizer, "backend", None)

    def timed(self, name: str, parts: bool = False) -> dict[Key, Callable[[], float]]:
        """The whole step, or each part of it, for `rounds`."""
        calls = self.contender.parts if parts else {"": self.contender.step}
        time = partial(measure.milliseconds, machine=self.machine, host=self.host or 0.0)
        return {(name, part): partial(time, call) for part, call in calls.items()}


def prepare(contender: Contender, setting: Setting, task: Task, machine: Machine) -> Runner:
    """Verify; on a GPU, see what a step takes of host and memory."""
    runner = Runner(contender, setting.check(contender, task), machine)
    if machine.on_gpu:
        runner.host = measure.host_seconds(contender.step, machine)
        runner.extra = measure.extra_bytes(contender.step)
    return runner


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
    limit = min(machine.compile_seconds, machine.left()) if job.compiled else None
    runners: dict[str, Runner] = {}
    failures: dict[str, str] = {}
    for name, make in makers.items():
        try:
            with time_limit(limit):
                runners[name] = prepare(make(setting.groups, task), setting, task, machine)
        except Exception as error:  # whatever it is, the others shall be timed
            failures[name] = reason(error)
        release(machine)  # when the error, which holds on to its tensors, is gone
    timed: dict[Key, Callable[[], float]] = {}
    for name, runner in runners.items():
        timed |= runner.timed(name, job.kind == "parts")
    times = rounds(timed, machine, setting.set_grads)
    head = {**asdict(job), "scaled": job.scaled, "parameters": count(shapes)}
    head |= {"tensors": len(setting.params), "groups": len(shapes)}
    del head["compiled"]
    failed = {"part": "all", "matches": False}
    of = {name: rows_of(name, runners, times, job, head["parameters"]) for name in runners}
    of |= {n: [{"implementation": n, **failed, "verdict": why}] for n, why in failures.items()}
    return [{**head, **row} for name in makers for row in of[name]]


def rows_of(name: str, runners: dict[str, Runner], times: Times, job: Job, numel: int) -> list[Row]:
    """The whole step, and its parts where they were timed."""
    runner, ours = runners[name], runners.get("fusedreg")
    shown = f"{name} ({runner.backend})" if name == "fusedreg" else name
    size, method = DTYPES[job.dtype].itemsize, METHODS[job.method]
    moved = moved_numbers(method, job.clip, job.scaled, shown)
    needed = size * needed_numbers(method, job.clip)
    whole = total(times, name)
    same = {"implementation": shown, "backend": runner.backend, "rounds": len(whole)}
    same |= {"matches": runner.verdict.matches, "verdict": str(runner.verdict)}
    ratios: Any = [None] * 3
    if runner.verdict.matches and ours and ours.verdict.matches:
        ratios = spread([a / b for a, b in zip(whole, total(times, "fusedreg"), strict=True)])
    elif runner.verdict.matches:
        same["verdict"] = "no ratio: fusedreg's results differ or it failed"
    row = {
        **same,
        "part": "all",
        **in_ms(whole),
        **dict(zip(("ratio", "ratio_p20", "ratio_p80"), ratios, strict=True)),
        "error_of_bound": runner.verdict.of_bound,
        "needed_bytes": needed,
        "moved_bytes": size * sum(moved.values()) if moved else None,
        "host_us": None if runner.host is None else 1e6 * runner.host,
        "launches": getattr(runner.contender.optimizer, "launches", None),
        "extra_mib": None if runner.extra is None else runner.extra / 2**20,
    }
    row["gb_per_s"] = needed * numel / (1e6 * row["ms"])
    row["of_bandwidth"] = 1e9 * row["gb_per_s"] / runner.machine.bandwidth
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


def sweep(machine: Machine) -> list[Row]:
    """AdamW in float32 with other launch constants of the kernels; only what is right is timed."""
    from fusedreg.kernels import table  # noqa: PLC0415  # triton only where it is asked for
    from fusedreg.kernels.gpu import backend  # noqa: PLC0415

    shapes = TINY["tiny"] if machine.dry else [GPT2]
    setting = Setting(shapes, torch.float32, machine.device)
    grid = product((1024, 2048, 4096), (4, 8), (8192, 16384, 32768, 65536), (False, True))
    found: list[Row] = []
    for block, warps, chunk, clip in islice(grid, 2 if machine.dry else None):
        if machine.left() < 0:
            break
        task = setting.task(METHODS["AdamW"], clip)
        row: Row = {"block": block, "warps": warps, "chunk": chunk, "clip": clip}
        with (
            mock.patch.multiple(backend, BLOCK=block, CHUNK=chunk),
            mock.patch.dict(backend.LAUNCH_OPTIONS, num_warps=warps),
            mock.patch.object(table, "CHUNK", chunk),
        ):
            runner = prepare(fusedreg_on(machine)(setting.groups, task), setting, task, machine)
            if runner.verdict.matches:
                (times,) = rounds(runner.timed(""), machine, setting.set_grads).values()
                row |= in_ms(times)
        found.append({**row, "verdict": str(runner.verdict)})
    return found
