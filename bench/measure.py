"""How it is timed: every contender is verified first, and then all step in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import REFERENCE, Contender, Maker, Task, contenders, own
from jobs import DTYPES, METHODS, SHAPES, Job, count, moved_numbers, needed_numbers
from verify import Setting

Row = dict[str, Any]
Timer = Callable[[], float]

READABLE = 2**25  # parameters that fusedreg's reference path steps in less than a second
LEAST, MOST = 6, 100  # rounds of a comparison; within them as many as its seconds allow
MEMORY_INFO = Path("/proc/meminfo")


@dataclass
class Machine:
    """Where it runs, and for how long."""

    device: torch.device
    deadline: float
    seconds: float  # for the rounds of one comparison, if the least of them take less
    dry: bool = False
    bandwidth: float = 0.0  # bytes per second, which of_bandwidth is a fraction of

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> int:
        if self.on_gpu:
            return torch.cuda.mem_get_info()[0]
        if not MEMORY_INFO.exists():
            return 2**33  # not Linux
        return 1024 * int(MEMORY_INFO.read_text().partition("MemAvailable:")[2].split()[0])


def milliseconds(call: Callable[[], object], machine: Machine, host: float = 0.0) -> float:
    """What the call takes of the device."""
    if not machine.on_gpu:
        return 1e3 * seconds(call)
    # The GPU idles until the host has queued everything, so that no launch is waited for.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * (1e-4 + 1.5 * host)))  # cycles, of at most 2 GHz
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def host_seconds(call: Callable[[], object], machine: Machine) -> float:
    """Median time of the call alone, with nothing queued before it; 0 where nothing is queued."""
    found = [0.0]
    for _ in range(7 * machine.on_gpu):
        machine.wait()
        found.append(seconds(call))
    machine.wait()
    return median(found[1:] or found)


def rounds(
    timed: dict[str, list[Timer]], machine: Machine, before: Callable[[], object], most: int = MOST
) -> dict[str, list[list[float]]]:
    """The milliseconds that the calls of each give in each round: A B, B A, in an even number of
    rounds, so that none always follows the same other one. `before` each contender is untimed."""
    times: dict[str, list[list[float]]] = {name: [] for name in timed}
    until = min(machine.deadline, time.monotonic() + machine.seconds)
    for done in range(0, most, 2):
        if done and (machine.dry or (done >= LEAST and time.monotonic() > until)):
            break
        for name in [*timed] if machine.dry else [*timed, *reversed(timed)]:
            before()
            times[name].append([call() for call in timed[name]])
    return times


def bandwidths(machine: Machine) -> dict[str, float]:
    """GB/s read and written by a copy of a large tensor, and by a product in its place, which comes
    nearer to what a CPU can do, because that also reads what a copy overwrites."""
    size = 2**14 if machine.dry else 2**29 if machine.on_gpu else 2**27
    source = torch.randn(size, device=machine.device)
    target = source.clone()
    calls = {"copy": partial(target.copy_, source), "in_place": partial(source.mul_, 1)}
    timed = {name: [partial(milliseconds, call, machine)] for name, call in calls.items()}
    times = rounds(timed, machine, before=machine.wait)
    return {name: 2e-6 * source.nbytes / median(map(sum, ms)) for name, ms in times.items()}


def spread(values: Iterable[float], *names: str) -> Row:
    """Median, p20 and p80, by these names."""
    ordered = sorted(values)
    found = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return dict(zip(names or ("ms", "p20", "p80"), (median(ordered), *found), strict=True))


def fusedreg_on(machine: Machine) -> Maker:
    """fusedreg. On a CPU fused=True asks for triton's kernels, which are then interpreted."""
    return partial(own, fused=True) if machine.dry else own


def participants(job: Job, machine: Machine) -> tuple[dict[str, Maker], dict[str, str]]:
    """Who takes part in a comparison, and why others do not."""
    makers, missing = contenders(METHODS[job.method])
    makers["fusedreg"] = fusedreg_on(machine)
    if job.kind == "parts":
        return {name: makers[name] for name in ("fusedreg", "torch fused", "torch foreach")}, {}
    if count(SHAPES[job.model]) > READABLE:
        makers.pop(REFERENCE, None)
    return makers, missing


def affordable(job: Job, machine: Machine) -> int:
    """How many contenders have their states in the free memory at the same time."""
    one = count(SHAPES[job.model]) * DTYPES[job.dtype].itemsize
    # Parameters and gradients, both as they were, and the temporaries of foreach and of clipping;
    # a tenth is left for what nobody counts.
    return int((0.9 * machine.free_memory() / one - (4 + 2)) // METHODS[job.method].states)


def timed(contender: Contender, machine: Machine, parts: bool = False) -> list[Timer]:
    """What gives the milliseconds of its step, or of each part of that."""
    calls = contender.parts.values() if parts else [contender.step]
    return [partial(milliseconds, call, machine, contender.host) for call in calls]


def prepare(make: Maker, setting: Setting, task: Task, machine: Machine) -> Contender:
    """A contender with its verdict and, on a GPU, what its step takes of the host."""
    contender = make(setting.groups, task)
    contender.verdict = setting.check(contender, task)
    contender.host = host_seconds(contender.step, machine)
    return contender


def compare(job: Job, makers: dict[str, Maker], machine: Machine) -> list[Row]:
    """Rows of a comparison: one for each contender and, where parts are timed, each part."""
    shapes = SHAPES[job.model]
    setting = Setting(shapes, DTYPES[job.dtype], machine.device, job.scaled)
    task = setting.task(METHODS[job.method], job.clip)
    setting.expected(task)  # before others take memory
    made, rows = {}, {}
    for name, make in makers.items():
        try:
            made[name] = prepare(make, setting, task, machine)
        except Exception as error:  # whatever it is, the others shall be timed
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            rows[name] = [{"implementation": name, "part": "all", "matches": False, "verdict": why}]
        release(machine)  # when the error, which holds on to its tensors, is gone
    calls = {name: timed(one, machine, job.kind == "parts") for name, one in made.items()}
    times = rounds(calls, machine, setting.set_grads)
    rows |= {name: rows_of(name, made, times, job, machine) for name in made}
    head = {**asdict(job), "scaled": job.scaled, "parameters": count(shapes)}
    head |= {"tensors": len(setting.params), "groups": len(shapes)}
    return [{**head, **row} for name in makers for row in rows[name]]


def rows_of(name: str, made: dict[str, Contender], times: Any, job: Job, machine: Any) -> list[Row]:
    """The whole step, and its parts where they were timed."""
    contender, ours, method = made[name], made.get("fusedreg"), METHODS[job.method]
    size, whole, verdict = DTYPES[job.dtype].itemsize, times[name], contender.verdict
    shown = f"{name} ({contender.backend})" if name == "fusedreg" else name
    same = {"implementation": shown, "backend": contender.backend, "rounds": len(whole)}
    same |= {"matches": verdict.matches, "verdict": verdict.text}
    names = ("ratio", "ratio_p20", "ratio_p80")
    ratios: Row = dict.fromkeys(names)
    if verdict.matches and ours and ours.verdict.matches:
        pairs = zip(whole, times["fusedreg"], strict=True)
        ratios = spread((sum(a) / sum(b) for a, b in pairs), *names)
    elif verdict.matches:
        same["verdict"] = "no ratio: fusedreg's results differ or it failed"
    numbers = moved_numbers(method, job.clip, job.scaled, shown)
    moved = {part: size * number for part, number in numbers.items()}
    needed = size * needed_numbers(method, job.clip)
    row = {**same, "part": "all", **spread(map(sum, whole)), **ratios}
    row |= {"needed_bytes": needed, "moved_bytes": sum(moved.values()) or None}
    row["of_bandwidth"] = 1e3 * needed * count(SHAPES[job.model]) / row["ms"] / machine.bandwidth
    row["launches"] = getattr(contender.optimizer, "launches", None)
    row["host_us"] = 1e6 * contender.host if machine.on_gpu else None
    row["error_of_bound"] = verdict.of_bound
    if job.kind != "parts":
        return [row]
    parts = zip(contender.parts, zip(*whole, strict=True), strict=True)
    more = ({**same, "part": p, **spread(ms), "moved_bytes": moved.get(p)} for p, ms in parts)
    return [row, *more]


def release(machine: Machine) -> None:
    """Give memory back, also that of what failed."""
    gc.collect()
    if machine.on_gpu:
        torch.cuda.empty_cache()
