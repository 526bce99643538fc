"""How it is timed: round-robin, by the clock of the device, until enough rounds are made."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

LEAST, MOST = 6, 100
"""Rounds of a comparison; within them as many as its seconds allow."""
MEMORY_INFO = Path("/proc/meminfo")


@dataclass
class Machine:
    """Where it runs, and for how long."""

    device: torch.device
    deadline: float
    seconds: float
    """For the rounds of one comparison, if the least of them take less."""
    dry: bool = False
    bandwidth: float = 0.0
    """Bytes per second, which of_bandwidth is a fraction of."""

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
    """What the call takes of the device.

    A GPU first idles until the host, which needs so many seconds, has queued everything, so that no
    launch is waited for.
    """
    if not machine.on_gpu:
        return 1e3 * seconds(call)
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
    return statistics.median(found[1:] or found)


def rounds(
    timed: Mapping[str, Sequence[Callable[[], float]]],
    machine: Machine,
    before: Callable[[], object],
    least: int = LEAST,
    most: int = MOST,
) -> dict[str, list[list[float]]]:
    """The milliseconds that the calls of each give in each round: A B, B A, and so on.

    So a drift of the machine meets all. As the order turns, and there is an even number of rounds,
    none always follows the same other one: a step finds what the one before left in the caches, and
    threads that still wait for more. `before` is called, untimed, before each contender.
    """
    times: dict[str, list[list[float]]] = {name: [] for name in timed}
    begin, order = time.monotonic(), list(timed)
    for done in range(most):
        spent = time.monotonic() - begin
        late = done >= least and (spent > machine.seconds or machine.left() < 0)
        if (machine.dry and done) or (late and done % 2 == 0):
            break
        for name in order:
            before()
            times[name].append([call() for call in timed[name]])
        order.reverse()
    return times


def bandwidths(machine: Machine) -> dict[str, float]:
    """GB/s read and written by a copy of a large tensor, and by a product in its place.

    A CPU reads what a copy is to overwrite, which nobody counts, so that there the product, which
    writes what it has read, as optimizers do, comes nearer to what the memory can do.
    """
    size = 2**14 if machine.dry else 2**29 if machine.on_gpu else 2**27
    source = torch.randn(size, device=machine.device)
    target = source.clone()
    calls: dict[str, Any] = {
        "copy": lambda: target.copy_(source),
        "in_place": lambda: source.mul_(1),
    }
    timed = {name: [partial(milliseconds, call, machine)] for name, call in calls.items()}
    times = rounds(timed, machine, before=machine.wait)
    moved = 2e-6 * source.nbytes
    return {name: moved / statistics.median(map(sum, ms)) for name, ms in times.items()}


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80.

    >>> spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    (3.5, 2.0, 5.0)
    """
    ordered, last = sorted(values), len(values) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
