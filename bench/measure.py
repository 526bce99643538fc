"""How it is timed: round-robin, by the clock of the device, until enough rounds are made."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

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
    compile_seconds: float = 60.0
    """No compiler is waited for any longer."""
    dry: bool = False
    bandwidth: float = 0.0
    """Bytes per second, which of_bandwidth is a fraction of."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free_memory(self) -> int:
        """Bytes that can be had."""
        if self.on_gpu:
            return torch.cuda.mem_get_info()[0]
        try:
            lines = MEMORY_INFO.read_text(encoding="utf-8").splitlines()
        except OSError:  # not Linux
            return 2**33
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
        return 1024 * int(available)


@dataclass
class Timed:
    """One part of a step of one contender, to be timed in every round."""

    call: Callable[[], object]
    host: float = 0.0
    """Seconds of the call, so that a GPU can be kept waiting for so long."""


def timer(timed: Timed, machine: Machine) -> Callable[[], float]:
    """Start the call; what is returned waits for it and gives its milliseconds.

    A GPU first idles until the host has queued everything, so that no launch is waited for.
    """
    if not machine.on_gpu:
        begin_s = time.perf_counter()
        timed.call()
        elapsed = 1e3 * (time.perf_counter() - begin_s)
        return lambda: elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * (1e-4 + 1.5 * timed.host)))  # cycles, of at most 2 GHz
    begin.record()
    timed.call()
    end.record()

    def read() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return read


Key = tuple[str, str]
"""A contender and a part of its step."""


def rounds(
    timed: Mapping[Key, Timed],
    machine: Machine,
    before: Callable[[], object],
    least: int = LEAST,
    most: int = MOST,
) -> dict[Key, list[float]]:
    """Milliseconds of each in every round: A B, B A, so that a drift of the machine meets all.

    As the order turns, and there is an even number of rounds, none always follows the same other
    one: a step finds what the one before left in the caches, and threads that still wait for more.
    `before` is called, untimed, before each contender.
    """
    times: dict[Key, list[float]] = {key: [] for key in timed}
    contenders = [list(parts) for _, parts in groupby(timed, key=lambda key: key[0])]
    begin = time.monotonic()
    for done in range(most):
        spent = time.monotonic() - begin
        late = done >= least and (spent > machine.seconds or machine.left() < 0)
        if (machine.dry and done) or (late and done % 2 == 0):
            break
        for parts in contenders if done % 2 == 0 else reversed(contenders):
            before()
            for key in parts:
                times[key].append(timer(timed[key], machine)())
    return times


def host_seconds(call: Callable[[], object], machine: Machine) -> float:
    """Median time of the call alone, with nothing queued before it."""
    seconds = []
    for _ in range(7):
        machine.wait()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    machine.wait()
    return statistics.median(seconds)


def extra_bytes(call: Callable[[], object]) -> int:
    """GPU memory that the call takes for itself and gives back."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def bandwidths(machine: Machine) -> dict[str, float]:
    """GB/s read and written by a copy of a large tensor, and by a product in its place.

    A CPU reads what a copy is to overwrite, which nobody counts, so that there the product, which
    writes what it has read, as optimizers do, comes nearer to what the memory can do.
    """
    size = 2**14 if machine.dry else 2**29 if machine.on_gpu else 2**27
    source = torch.randn(size, device=machine.device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "in place": lambda: source.mul_(1.0)}
    timed = {(name, "all"): Timed(call) for name, call in calls.items()}
    for one in timed.values():
        one.call()
    times = rounds(timed, machine, before=machine.wait)
    return {
        name: 2e-9 * source.nbytes / (1e-3 * statistics.median(ms))
        for (name, _), ms in times.items()
    }


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, p20 and p80.

    >>> spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    (3.5, 2.0, 5.0)
    """
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after so many seconds."""
    if seconds is None:
        yield
        return
    late = TimeoutError(f"not ready after {seconds:.0f} s")
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise late

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    except Exception as error:  # a compiler may make another one of it
        if interrupted:
            raise late from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
