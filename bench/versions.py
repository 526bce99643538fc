"""Two versions of fusedreg beside each other: `python bench/run.py --base REF`.

Each runs in a process of its own, because one process can import only one of them. The processes
step in turns, A B A B, when they are told to. Both are judged by the oracle of this tree.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from comparison import fusedreg_on, release
from contenders import Task
from jobs import Job, all_shapes, count, jobs
from measure import Machine, host_seconds, milliseconds, rounds, spread
from methods import DTYPES, METHODS
from report import git_commit, new_table, text_of
from verify import Setting

import fusedreg
from fusedreg.machine import describe, environment

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("median", "p20", "p80")

MADE: dict[str, Callable[[], float]] = {}
"""The milliseconds of a step of what was made last, in the process of a version."""


def compare_versions(ref: str, machine: Machine, out: Path, quick: bool) -> str:
    """Time this tree beside another commit; writes base.json and base.txt and returns the text."""
    commit = resolve(ref)
    report: dict[str, Any] = {**environment("triton"), "commit": git_commit(), "base": commit}
    report |= {"rows": [], "left_out": []}
    kinds = ("model",) if quick else ("model", "size", "tensors")
    todo = [job for job in jobs(machine.dry, quick, gpu=False) if job.kind in kinds]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        base = process(tree_of(commit, folder / "tree"))
        workers = {"base": stack.enter_context(base), "this": stack.enter_context(process(None))}
        pace = 0.0
        for job in todo:
            numel = count(all_shapes(machine.dry)[job.model])
            # Parameters, gradients and states of both processes.
            need = 2.4 * numel * (6 + METHODS[job.method].states) * DTYPES[job.dtype].itemsize
            if machine.left() < max(0.0, pace * numel):
                report["left_out"].append(f"{job}: time")
            elif need >= machine.free_memory():
                report["left_out"].append(f"{job}: memory")
            else:
                begin = time.monotonic()
                report["rows"].append({**asdict(job), **one(job, workers, folder, machine)})
                if numel > 2**20:
                    pace = (time.monotonic() - begin) / numel
    text = as_text(report)
    (out / "base.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "base.txt").write_text(text, encoding="utf-8")
    return text


def one(job: Job, workers: dict[str, Executor], folder: Path, machine: Machine) -> dict[str, Any]:
    """What was found: results first, and times only where both are right."""
    setting, task = beginning(job, machine)
    found, verdict = [], ""
    for name, worker in workers.items():
        file = folder / f"{name}.pt"
        wrong = worker.submit(make, job, machine, file).result()
        if not wrong:
            found.append(torch.load(file))
            wrong = str(setting.judge([x.to(machine.device) for x in found[-1]], task))
        verdict = verdict or (f"{name}: {wrong}" if wrong else "")
    del setting
    release(machine)
    equal = len(found) == 2 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    row = {"verdict": verdict, "bitwise_equal": equal}
    if verdict:
        return row
    steps = {(name, ""): lambda w=w: w.submit(step).result() for name, w in workers.items()}
    times = dict(zip(workers, rounds(steps, machine, before=machine.wait).values(), strict=True))
    ratios = [now / base for base, now in zip(times["base"], times["this"], strict=True)]
    of = {"base_ms": times["base"], "this_ms": times["this"], "ratio": ratios}
    spreads = {name: dict(zip(NAMES, spread(each), strict=True)) for name, each in of.items()}
    return {**row, "rounds": len(ratios), **spreads}


def make(job: Job, machine: Machine, results: Path) -> str:
    """Make an optimizer, take its first steps and write their results; or say why not."""
    if not hasattr(fusedreg, METHODS[job.method].cls):
        return f"has no {job.method}"
    setting, task = beginning(job, machine)
    contender = fusedreg_on(machine)(setting.groups, task)
    setting.take_steps(contender)
    torch.save([param.detach().cpu() for param in setting.params], results)
    host = host_seconds(contender.step, machine) if machine.on_gpu else 0.0

    def timed() -> float:
        setting.set_grads()
        machine.wait()
        return milliseconds(contender.step, machine, host)

    MADE["step"] = timed
    return ""


def step() -> float:
    return MADE["step"]()


def beginning(job: Job, machine: Machine) -> tuple[Setting, Task]:
    """The same in every process."""
    setting = Setting(all_shapes(machine.dry)[job.model], DTYPES[job.dtype], machine.device)
    return setting, setting.task(METHODS[job.method], job.clip)


def resolve(ref: str) -> str:
    """The commit that a name stands for."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{ref}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--base {ref}: {done.stderr.strip()}")
    return done.stdout.strip()


def tree_of(commit: str, folder: Path) -> Path:
    """The package as it was, to be put on sys.path; git has not to be told to forget it."""
    command = ["git", "-C", str(ROOT), "archive", commit, "fusedreg", "kernels", "tests"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    # The folder kernels/ is the package fusedreg.kernels: put it there, as an installation would.
    (folder / "fusedreg/kernels").symlink_to(folder / "kernels")
    return folder


def process(tree: Path | None) -> Executor:
    """A process with the version in `tree`, None for the one that is imported here."""
    before = sys.path.copy()
    sys.path[:0] = [str(tree)] if tree else []  # a new process begins with a copy of sys.path
    try:
        executor = ProcessPoolExecutor(1, get_context("spawn"))
        executor.submit(int).result()
    finally:
        sys.path[:] = before
    return executor


def as_text(report: dict[str, Any]) -> str:
    title = f"this tree ({report['commit']}) over {report['base'][:12]}, of the same round"
    headings = ("ms base", "ms this", "ratio", "p20", "p80", "rounds")
    table = new_table(title, "", *headings, "results", right=headings)
    for row in report["rows"]:
        job = Job(**{name: row[name] for name in Job.__dataclass_fields__})
        equal = "bitwise equal" if row["bitwise_equal"] else "both right, not bitwise equal"
        cells = ["-"] * 6
        if "ratio" in row:
            ms = [f"{row[name]['median']:.4g}" for name in ("base_ms", "this_ms")]
            ratio = [f"{row['ratio'][name]:.3f}" for name in NAMES]
            cells = [*ms, *ratio, str(row["rounds"])]
        table.add_row(str(job), *cells, row["verdict"] or equal)
    left_out = [f"left out: {line}" for line in report["left_out"]]
    return text_of([describe(report), table, *left_out], width=150)
