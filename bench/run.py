"""Time one step on a GPU beside torch.optim's: `python bench/run.py OUT_DIR`; see README.md."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from shapes import GPT2, MODELS, TINY, Groups
from torch import nn

import fusedreg

LR, CLIP, L1 = 1e-3, 1.0, 1e-4


@dataclass(frozen=True)
class Method:
    """What is computed."""

    cls: str
    kwargs: dict[str, Any]
    states: int
    """Tensors of state that are read and written."""


# The first of each are the most important.
METHODS = {
    "AdamW": Method("AdamW", {"weight_decay": 0.01}, 2),
    "SGD momentum": Method("SGD", {"momentum": 0.9}, 1),
    "AdamW + L1": Method("AdamW", {"weight_decay": 0.01, "l1": L1}, 2),
    "Adam + L2": Method("Adam", {"weight_decay": 0.01}, 2),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED = ("GPT-2 124M", "tiny")
"""The models for which torch.compile's optimizers are timed, which takes it long."""


@dataclass(frozen=True)
class Job:
    """One comparison."""

    model: str
    method: str
    dtype: str
    clip: bool
    compiled: str = ""
    """Which of torch's is compiled: one at a time, as they share code and its compiled forms."""

    def __str__(self) -> str:
        parts = [self.model, self.method, self.dtype]
        parts += ["clipped"] * self.clip + [f"compiled {self.compiled}"] * bool(self.compiled)
        return ", ".join(parts)


@dataclass
class Machine:
    """Where and how it runs."""

    device: torch.device
    rounds: int
    deadline: float
    copy_bandwidth: float = 0.0
    dry: bool = False

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ---- what is timed -------------------------------------------------------------------------------

Step = Callable[[], object]


def make_groups(shapes: Groups, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Param groups with random values and gradients, each with a learning rate of its own."""
    torch.manual_seed(0)
    groups = []
    for index, group in enumerate(shapes):
        params = [nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for s in group]
        for param in params:
            param.grad = torch.randn_like(param)
        groups.append({"params": params, "lr": LR / (index + 1)})
    return groups


def own(method: Method, groups: list[dict[str, Any]], clip: bool, dry: bool) -> tuple[Any, Step]:
    # On a CPU only fused=True asks for the kernels.
    asked = {"fused": True} if dry else {}
    max_norm = CLIP if clip else None
    cls = getattr(fusedreg, method.cls)
    optimizer = cls(copies(groups), **method.kwargs, **asked, max_grad_norm=max_norm)
    return optimizer, optimizer.step


def others(
    cls: Any, method: Method, groups: list[dict[str, Any]], clip: bool, **options: Any
) -> tuple[Any, Step]:
    """Somebody else's optimizer with what it leaves to the user."""
    kwargs = {name: value for name, value in method.kwargs.items() if name != "l1"}
    optimizer = cls(copies(groups), **kwargs, **options)
    params = [param for group in groups for param in group["params"]]
    threshold = LR * method.kwargs.get("l1", 0.0)

    def step() -> None:
        if clip:
            nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        if threshold:
            with torch.no_grad():
                for param in params:
                    param.copy_(nn.functional.softshrink(param, threshold))

    return optimizer, step


def copies(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups over the same parameters: an optimizer adds to those that it is given."""
    return [{**group, "lr": group["lr"]} for group in groups]


def implementations(job: Job, machine: Machine) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Names, and functions that make an optimizer and its step from param groups."""
    method = METHODS[job.method]
    torchs = getattr(torch.optim, method.cls)
    yield "fusedreg", lambda groups: own(method, groups, job.clip, machine.dry)
    for how in (job.compiled,) if job.compiled else ("fused", "foreach"):

        def make(groups: list[dict[str, Any]], how: str = how) -> tuple[Any, Step]:
            optimizer, step = others(torchs, method, groups, job.clip, **{how: True})
            return optimizer, compiled(step, machine) if job.compiled else step

        yield f"{'compiled' if job.compiled else 'torch'} {how}", make
    if job.method == "AdamW" and not job.compiled:
        try:
            import optimi  # noqa: PLC0415  # hardly anywhere installed
        except ImportError:
            return
        yield "optimi", lambda groups: others(optimi.AdamW, method, groups, job.clip)


def compiled(step: Step, machine: Machine) -> Step:
    torch.compiler.reset()
    return torch.compile(step, backend="eager" if machine.dry else "inductor")


# ---- how it is timed -----------------------------------------------------------------------------


def host_seconds(step: Step, machine: Machine, times: int) -> float:
    """Median time of the call alone, with nothing queued before it."""
    seconds = []
    for _ in range(times):
        machine.wait()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    machine.wait()
    return statistics.median(seconds)


def device_timer(step: Step, machine: Machine, ahead: float) -> Callable[[], float]:
    """Start one step; what is returned waits for it and gives its milliseconds.

    The GPU first idles for `ahead` seconds, so that the host has queued the step when it begins and
    no launch is waited for.
    """
    if machine.device.type != "cuda":
        start = time.perf_counter()
        step()
        elapsed = 1e3 * (time.perf_counter() - start)
        return lambda: elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2e9 * ahead))  # cycles, of at most 2 GHz
    begin.record()
    step()
    end.record()

    def read() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return read


def extra_bytes(step: Step, machine: Machine) -> int | None:
    """Memory that a step takes for itself and gives back."""
    if machine.device.type != "cuda":
        return None
    machine.wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "p20": ordered[round(0.2 * last)],
        "p80": ordered[round(0.8 * last)],
    }


def copy_bandwidth(machine: Machine) -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randn(2**14 if machine.dry else 2**29, device=machine.device)
    target = torch.empty_like(source)
    times = [device_timer(lambda: target.copy_(source), machine, 1e-4)() for _ in range(25)]
    return 2 * source.nbytes / (1e-3 * statistics.median(times[5:]))


def traffic(job: Job) -> int:
    """Bytes per parameter that a step cannot do without, with clipping one reading more."""
    numbers = 3 + 2 * METHODS[job.method].states + job.clip
    return numbers * DTYPES[job.dtype].itemsize


# ---- one comparison ------------------------------------------------------------------------------


@dataclass
class Runner:
    """One implementation, warmed up."""

    optimizer: Any
    step: Step
    host: float
    """Seconds of the call."""
    extra: int | None
    """Bytes that a step takes for itself."""

    def time(self, machine: Machine) -> Callable[[], float]:
        return device_timer(self.step, machine, ahead=1e-4 + 1.5 * self.host)


def compare(job: Job, models: dict[str, Groups], machine: Machine) -> dict[str, Any]:
    """Time all implementations round-robin on the same parameters and gradients."""
    groups = make_groups(models[job.model], DTYPES[job.dtype], machine.device)
    params = [param for group in groups for param in group["params"]]
    numel = sum(param.numel() for param in params)
    limit = min(60.0, machine.left()) if job.compiled else None
    attempts = {
        name: attempt(make, groups, machine, limit) for name, make in implementations(job, machine)
    }
    runners = {name: made for name, made in attempts.items() if isinstance(made, Runner)}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(machine.rounds):
        for name, runner in runners.items():
            times[name].append(runner.time(machine)())
    needed = traffic(job) * numel
    results = {
        name: describe(runners[name], times[name], needed, machine) if name in runners else failure
        for name, failure in attempts.items()
    }
    return {
        "model": job.model,
        "method": job.method,
        "dtype": job.dtype,
        "clip": job.clip,
        "compiled": job.compiled,
        "parameters": numel,
        "tensors": len(params),
        "groups": len(groups),
        "bytes_per_parameter": traffic(job),
        "implementations": results,
    }


def attempt(
    make: Any, groups: list[dict[str, Any]], machine: Machine, seconds: float | None
) -> Runner | dict[str, str]:
    """An implementation ready to be timed, or why it is not."""
    try:
        with time_limit(seconds):
            return warm_up(*make(groups), machine)
    except Exception as error:  # whatever it is, the others shall be timed
        failure = {"error": f"{type(error).__name__}: {error}"[:300]}
    release(machine)  # when the error, which holds on to its tensors, is gone
    return failure


def warm_up(optimizer: Any, step: Step, machine: Machine) -> Runner:
    for _ in range(1 if machine.dry else 3):
        step()
    host = host_seconds(step, machine, times=1 if machine.dry else 9)
    return Runner(optimizer, step, host, extra_bytes(step, machine))


def describe(runner: Runner, ms: list[float], needed: int, machine: Machine) -> dict[str, Any]:
    result = spread(ms)
    bandwidth = needed / (1e-3 * result["median"])
    return {
        "ms": result,
        "bandwidth": bandwidth,
        "of_copy": bandwidth / machine.copy_bandwidth,
        "launches": getattr(runner.optimizer, "launches", None),
        "backend": getattr(runner.optimizer, "backend", None),
        "host_us": 1e6 * runner.host,
        "extra_mib": None if runner.extra is None else runner.extra / 2**20,
    }


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Interrupt the block after so many seconds."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release(machine: Machine) -> None:
    """Give memory back, also that of what failed."""
    if machine.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def fits(job: Job, models: dict[str, Groups], machine: Machine) -> bool:
    """Whether parameters, gradients and everybody's states go into the free memory."""
    if machine.device.type != "cuda":
        return True
    numel = sum(math.prod(shape) for group in models[job.model] for shape in group)
    numbers = 2 + 4 * METHODS[job.method].states  # no more than four are timed together
    free, _ = torch.cuda.mem_get_info()
    return 1.2 * numbers * numel * DTYPES[job.dtype].itemsize < free


def jobs(models: dict[str, Groups], quick: bool) -> list[Job]:
    """All comparisons, those first that are nearest to the first of each list."""
    axes = [list(models), list(METHODS), list(DTYPES), [False, True]]
    ranked = [
        (sum(axis.index(value) for axis, value in zip(axes, values, strict=True)), Job(*values))
        for values in product(*axes)
    ]
    ranked += [
        (rank + clip, Job(model, "AdamW", "float32", clip, how))
        for model in models
        for clip in (False, True)
        for rank, how in [(2, "foreach"), (3, "fused")]
        if model in COMPILED
    ]
    ranked.sort(key=lambda pair: pair[0])
    return [job for rank, job in ranked if rank <= 2 or not quick]


# ---- the launch constants ------------------------------------------------------------------------


def sweep(machine: Machine) -> list[dict[str, Any]]:
    """AdamW of GPT-2 124M in float32 with other block sizes."""
    from fusedreg.kernels import launch, table  # noqa: PLC0415  # only here, after the environment

    shapes = TINY["tiny"] if machine.dry else [GPT2]
    groups = make_groups(shapes, torch.float32, machine.device)
    numel = sum(param.numel() for group in groups for param in group["params"])
    before = launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"], table.CHUNK
    grid = product((1024, 2048, 4096), (4, 8), (8192, 16384, 32768, 65536), (False, True))
    found = []
    for block, warps, chunk, clip in islice(grid, 2 if machine.dry else None):
        if machine.left() < 0:
            break
        launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"] = block, warps
        launch.CHUNK = table.CHUNK = chunk
        job = Job("GPT-2 124M", "AdamW", "float32", clip)
        runner = warm_up(*own(METHODS["AdamW"], groups, clip, machine.dry), machine)
        ms = [runner.time(machine)() for _ in range(machine.rounds)]
        result = describe(runner, ms, traffic(job) * numel, machine)
        found.append({"block": block, "warps": warps, "chunk": chunk, "clip": clip, **result})
    launch.BLOCK, launch.LAUNCH_OPTIONS["num_warps"], table.CHUNK = before
    launch.CHUNK = table.CHUNK
    return found


# ---- the report ----------------------------------------------------------------------------------

HEADINGS = ("", "ms", "p20", "p80", "GB/s", "of copy", "launches", "host us", "extra MiB")


def table_of(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    cells = [HEADINGS, *((name, *row_of(result)) for name, result in rows)]
    widths = [26, 9, 9, 9, 8, 8, 9, 9, 10]
    return [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False))
        for row in cells
    ]


def row_of(result: dict[str, Any]) -> list[str]:
    if "error" in result:
        return ["  " + result["error"].splitlines()[0]]
    launches, extra = result["launches"], result["extra_mib"]
    return [
        *(f"{result['ms'][name]:.4g}" for name in ("median", "p20", "p80")),
        f"{result['bandwidth'] / 1e9:.0f}",
        f"{result['of_copy']:.1%}",
        "-" if launches is None else str(launches),
        f"{result['host_us']:.0f}",
        "-" if extra is None else f"{extra:.2f}",
    ]


def as_text(report: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in report["machine"].items()]
    lines += [f"{name} {value}" for name, value in report["versions"].items()]
    lines += [f"copy: {report['copy_bandwidth'] / 1e9:.0f} GB/s"]
    for one in report["results"]:
        job = Job(*(one[name] for name in ("model", "method", "dtype", "clip", "compiled")))
        lines += [
            "",
            f"{job}: {one['parameters'] / 1e6:.1f} M parameters in {one['tensors']} tensors and "
            f"{one['groups']} groups, {one['bytes_per_parameter']} bytes each",
            *table_of(list(one["implementations"].items())),
        ]
    if report["sweep"]:
        rows = [
            (
                f"{s['block']} x {s['warps']} of {s['chunk']}{', clipped' if s['clip'] else ''}",
                s,
            )
            for s in report["sweep"]
        ]
        lines += ["", "block x warps of chunk, AdamW, GPT-2 124M, float32", *table_of(rows)]
    if report["left_out"]:
        lines += ["", "left out for want of", *report["left_out"]]
    return "\n".join(lines) + "\n"


def machine_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"platform": platform.platform(), "cpus": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def versions(commit: str | None) -> dict[str, Any]:
    import triton  # noqa: PLC0415  # after the environment

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "fusedreg": fusedreg.__version__,
        "commit": commit or os.environ.get("FUSEDREG_COMMIT") or git_commit(),
    }


def git_commit() -> str | None:
    """The commit of this checkout, None where it is a copy without history."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="directory for bench.json and bench.txt")
    parser.add_argument("--budget", type=float, default=600, help="seconds (default: 600)")
    parser.add_argument("--quick", action="store_true", help="the first comparisons only")
    parser.add_argument("--sweep", action="store_true", help="other block sizes instead")
    parser.add_argument("--commit", help="what to call the version under test")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, to test this script")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    elif not torch.cuda.is_available():
        raise SystemExit("bench/run.py needs a CUDA GPU (or --dry-run)")
    machine = Machine(
        device=torch.device("cpu" if options.dry_run else "cuda"),
        rounds=1 if options.dry_run else 15 if options.quick else 30,
        deadline=time.monotonic() + options.budget,
        dry=options.dry_run,
    )
    machine.copy_bandwidth = copy_bandwidth(machine)
    models = TINY if machine.dry else MODELS
    report: dict[str, Any] = {
        "machine": machine_facts(machine.device),
        "versions": versions(options.commit),
        "copy_bandwidth": machine.copy_bandwidth,
        "results": [],
        "sweep": [],
        "left_out": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        report["sweep"] = sweep(machine)
    for job in [] if options.sweep else jobs(models, options.quick):
        release(machine)
        if machine.left() < 0 or not fits(job, models, machine):
            report["left_out"].append(f"{job} ({'time' if machine.left() < 0 else 'memory'})")
            continue
        report["results"].append(compare(job, models, machine))
        write(report, options.out)  # what there is, should the time be cut
    write(report, options.out)
    print(as_text(report), end="")


def write(report: dict[str, Any], out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "bench.txt").write_text(as_text(report))


if __name__ == "__main__":
    main()
