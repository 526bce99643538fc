"""Two commits bit for bit: `python bench/bits.py --base REF`.

Every case of the table of `fusedreg check` takes three steps by LLVM's kernels and by triton's,
interpreted, in four dtypes, with clipping and without. Parameters and states that differ are
printed, and the exit status is 1. `python bench/run.py --base REF` times both. Each commit has a
process, a table of cases and tests of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jobs import DTYPES, METHODS, SHAPES, Job, jobs
from measure import Machine, affordable, fusedreg_on, host_seconds, rounds, spread, timed
from verify import Setting

import fusedreg
from fusedreg import cases

ROOT = Path(__file__).resolve().parent.parent
# By path; an interpreter takes its time.
SIZES = {"default": [(37,), (5, 7), (1,), (0,), (40, 33)], "fused": [(37,), (5, 7), (1100,)]}
CALLS: list[Callable[[], Any]] = []  # for a timed step, in the process of a version


@contextmanager
def versions(ref: str) -> Iterator[dict[str, Executor]]:
    """A process with the package as it was at a commit, and one with that of this tree."""
    command = ["git", "-C", str(ROOT), "archive", ref, "fusedreg", "kernels", "tests"]
    archived = io.BytesIO(subprocess.check_output(command))  # git says what is wrong with a name
    with TemporaryDirectory() as folder:
        with tarfile.open(fileobj=archived) as archive:
            archive.extractall(folder, filter="data")
        tree = Path(folder)
        # kernels/ is the package fusedreg.kernels: put it there, as an installation would.
        (tree / "fusedreg/kernels").symlink_to(tree / "kernels")
        with process(folder) as base, process() as this:
            yield {"base": base, "this": this}


def process(*folders: str) -> Executor:
    """A process whose modules come from these folders first."""
    before = sys.path.copy()  # a new process begins with a copy of it
    sys.path[:0] = folders
    executor = ProcessPoolExecutor(1, get_context("spawn"))
    executor.submit(int).result()
    sys.path[:] = before
    return executor


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digests() -> dict[str, dict[str, str]]:
    """Of parameters and states by step, in the version that is imported here."""
    torch.set_num_threads(1)
    tests = Path(fusedreg.__file__).parents[1] / "tests"
    sys.path[:0] = [str(tests), str(tests / "lib")]
    import_module("interpreter")  # rounds to bfloat16 as a GPU does
    found = {}
    for path, case, dtype, clip in product(SIZES, cases.CASES, cases.DTYPES, (None, 0.5)):
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SIZES[path]]
        params = list(map(torch.nn.Parameter, values))
        second = {"params": params[2:], "lr": 0.03, "weight_decay": 0.0}
        optimizer = case.make([{"params": params[:2]}, second], path, max_grad_norm=clip)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
        key = f"{optimizer.backend}, {case.id}, {dtype}{', clipped' * bool(clip)}"
        found[key] = {
            f"{name} {i}": digest(x)
            for i, param in enumerate(params)
            for name, x in {"parameter": param, **optimizer.state[param]}.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", metavar="REF", default="HEAD", help="a commit (default: HEAD)")
    ref = parser.parse_args().base
    os.environ["TRITON_INTERPRET"] = "1"
    with versions(ref) as processes:
        running = [process.submit(digests) for process in processes.values()]
        base, this = (each.result() for each in running)
    both = sorted(base.keys() & this.keys())
    differing = [key for key in both if base[key] != this[key]]
    for key in differing:
        names = {**base[key], **this[key]}
        print(f"{key}:", *(n for n in names if base[key].get(n) != this[key].get(n)), sep="  ")
    for key in sorted(base.keys() ^ this.keys()):
        print(f"{key}: only in {ref if key in base else 'this tree'}")
    print(f"{len(both)} programs in both, {len(differing)} of them differ in some bit")
    raise SystemExit(min(len(differing), 1))


def compare_versions(ref: str, machine: Machine, quick: bool) -> None:
    """Print whether both give the same bits, and the ratio of their times in turns, A B B A."""
    with versions(ref) as processes:
        for job in jobs(machine.dry, quick):
            # Each version needs memory of its own.
            if job.kind == "parts" or machine.left() < 0 or affordable(job, machine) < 8:
                continue
            try:
                found = {p.submit(make, job, machine).result() for p in processes.values()}
            except AttributeError as error:  # a commit lacks the class
                print(f"{job}: {error}")
                continue
            bits = "bitwise equal" if len(found) == 1 else "not bitwise equal"
            steps = {who: [lambda p=p: p.submit(step).result()] for who, p in processes.items()}
            times = rounds(steps, machine, before=machine.wait)
            base, this = ([ms for (ms,) in each] for each in times.values())
            ratio = spread((b / a for a, b in zip(base, this, strict=True)), "ratio", "p20", "p80")
            ms = f"{median(this):.4g} ms, at {ref} {median(base):.4g} ms"
            text = "ratio {ratio:.3f} ({p20:.3f} to {p80:.3f})".format(**ratio)
            print(f"{job}: {ms}, {text}, {bits}", flush=True)


def make(job: Job, machine: Machine) -> str:
    """Make an optimizer and take its first steps; the digest of the parameters."""
    setting = Setting(SHAPES[job.model], DTYPES[job.dtype], machine.device)
    contender = fusedreg_on(machine)(setting.groups, setting.task(METHODS[job.method], job.clip))
    setting.take_steps(contender)
    found = digest(*setting.params)
    contender.host = host_seconds(contender.step, machine)
    CALLS[:] = [setting.set_grads, machine.wait, *timed(contender, machine)]
    return found


def step() -> Any:
    """The milliseconds of one more."""
    return [call() for call in CALLS][-1]


if __name__ == "__main__":
    main()
