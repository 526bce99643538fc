"""Two versions of fusedreg beside each other: `python bench/run.py --base REF`.

Each runs in a process of its own, because one process can import only one of them. The processes
step in turns, A B A B, when they are told to.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jobs import Job, all_shapes, jobs
from measure import LEAST, MOST, Machine, spread
from methods import DTYPES, METHODS
from report import git_commit
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import count

from fusedreg.machine import describe, environment

ROOT = Path(__file__).resolve().parent.parent


def compare_versions(ref: str, machine: Machine, out: Path, quick: bool) -> str:
    """Time this tree beside another commit; writes base.json and base.txt and returns the text."""
    report: dict[str, Any] = {
        **environment("triton"),
        "commit": git_commit(),
        "base": resolve(ref),
        "rows": [],
        "left_out": [],
    }
    kinds = ("model",) if quick else ("model", "size", "tensors")
    todo = [job for job in jobs(machine.dry, quick, gpu=False) if job.kind in kinds]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        extract(report["base"], folder / "base-tree")
        workers = {
            "base": stack.enter_context(worker(folder / "base-tree", folder / "base", machine)),
            "this": stack.enter_context(worker(ROOT, folder / "this", machine)),
        }
        pace = 0.0
        for job in todo:
            numel = count(all_shapes(machine.dry)[job.model])
            if machine.left() < max(0.0, pace * numel):
                report["left_out"].append(f"{job}: time")
            elif not fits(job, numel, machine):
                report["left_out"].append(f"{job}: memory")
            else:
                begin = time.monotonic()
                report["rows"].append(one(job, workers, folder, machine))
                if numel > 2**20:
                    pace = (time.monotonic() - begin) / numel
    text = as_text(report)
    (out / "base.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "base.txt").write_text(text, encoding="utf-8")
    return text


def fits(job: Job, numel: int, machine: Machine) -> bool:
    """Whether both processes have their parameters, gradients and states in the free memory."""
    numbers = 2 * (6 + METHODS[job.method].states)
    return 1.2 * numbers * numel * DTYPES[job.dtype].itemsize < machine.free_memory()


def one(job: Job, workers: dict[str, Any], folder: Path, machine: Machine) -> dict[str, Any]:
    """A row: results first, and times only where both are right."""
    row: dict[str, Any] = {**asdict(job), "verdict": ""}
    files = {name: folder / f"{name}.pt" for name in workers}
    for name, ask in workers.items():
        files[name].unlink(missing_ok=True)
        made = ask("make", job=asdict(job), results=str(files[name]))
        row["verdict"] = row["verdict"] or (f"{name}: {made['verdict']}" if made["verdict"] else "")
    found = [torch.load(file) for file in files.values() if file.exists()]
    pairs = zip(*found, strict=True)
    row["bitwise_equal"] = len(found) == 2 and all(torch.equal(a, b) for a, b in pairs)
    if row["verdict"]:
        return row
    times: dict[str, list[float]] = {name: [] for name in workers}
    begin, least = time.monotonic(), 1 if machine.dry else LEAST
    for done in range(MOST):
        spent = time.monotonic() - begin
        if done >= least and (machine.dry or spent > machine.seconds or machine.left() < 0):
            break
        for name, ask in workers.items():
            times[name].append(ask("step")["ms"])
    ratios = [now / base for base, now in zip(times["base"], times["this"], strict=True)]
    names = ("median", "p20", "p80")
    row["rounds"] = len(ratios)
    row |= {f"{name}_ms": dict(zip(names, spread(of), strict=True)) for name, of in times.items()}
    row["ratio"] = dict(zip(names, spread(ratios), strict=True))
    return row


def resolve(ref: str) -> str:
    """The commit that a name stands for."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{ref}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--base {ref}: {done.stderr.strip()}")
    return done.stdout.strip()


def extract(commit: str, folder: Path) -> None:
    """The package as it was; unlike a worktree, git does not have to be told to forget it."""
    command = ["git", "-C", str(ROOT), "archive", commit, "fusedreg", "kernels"]
    packed = subprocess.run(command, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")


@contextmanager
def worker(tree: Path, package: Path, machine: Machine) -> Iterator[Any]:
    """A process with the version in `tree`, as a function that asks it and returns its answer."""
    # The folder kernels/ is the package fusedreg.kernels: put it there, as an installation would.
    (package / "fusedreg").mkdir(parents=True)
    for path in [*(tree / "fusedreg").iterdir(), tree / "kernels"]:
        (package / "fusedreg" / path.name).symlink_to(path)
    # Before the folder of the script on sys.path, and before what is installed.
    code = f"import sys; sys.path[:0] = [{str(package)!r}, {str(ROOT / 'bench')!r}]\n"
    code += "import worker; worker.main()"
    command = [sys.executable, "-c", code, *["--dry-run"] * machine.dry]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=package
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def ask(name: str, **arguments: Any) -> Any:
        print(json.dumps([name, arguments]), file=requests, flush=True)
        answer = answers.readline()
        if not answer:
            raise SystemExit(f"the process with {tree} has ended, see above")
        return json.loads(answer)

    with process:
        yield ask
        requests.close()


def as_text(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=150, record=True, color_system=None)
    title = f"this tree ({report['commit']}) over {report['base'][:12]}, of the same round"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for heading in ("ms base", "ms this", "ratio", "p20", "p80", "rounds"):
        table.add_column(heading, justify="right")
    table.add_column("results")
    for row in report["rows"]:
        job = Job(**{name: row[name] for name in Job.__dataclass_fields__})
        equal = "bitwise equal" if row["bitwise_equal"] else "both right, not bitwise equal"
        cells = ["-"] * 6
        if "ratio" in row:
            ms = [f"{row[name]['median']:.4g}" for name in ("base_ms", "this_ms")]
            ratio = [f"{row['ratio'][name]:.3f}" for name in ("median", "p20", "p80")]
            cells = [*ms, *ratio, str(row["rounds"])]
        table.add_row(str(job), *cells, row["verdict"] or equal)
    console.print(describe(report), highlight=False, soft_wrap=True)
    console.print(table)
    for line in report["left_out"]:
        console.print(f"left out: {line}", highlight=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"
