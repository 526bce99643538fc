"""fusedreg against scikit-learn and torch.optim, on real data: `python -m fusedreg demo`.

Needs the extra `fusedreg[demo]`. `diabetes` and `digits` each compute one half and say what must
hold of it; `report` and `figures` show the numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

from rich.console import Console

from fusedreg.demo import diabetes, digits, figures, report
from fusedreg.demo.comparison import Comparison
from fusedreg.demo.progress import tracking
from fusedreg.machine import one_thread

__all__ = ["run"]


def run(out: Path, *, l1_count: int = 30, max_epochs: int = 100) -> list[Comparison]:
    """Compute, print and draw everything, and write it into the folder `out`.

    Args:
        out: an existing folder; gets the figures and demo.json.
        l1_count: points on each path.
        max_epochs: limit of each training, which early stopping usually does not reach.

    Returns:
        The comparisons that must hold and do not.
    """
    console = Console()
    start = perf_counter()
    seconds: dict[str, float] = {}
    patients, images = diabetes.load(), digits.load()
    l1s = diabetes.l1_grid(patients, l1_count)
    jobs = len(diabetes.PENALTIES) * len(diabetes.SOLVERS) + digits.training_count() + 1
    with one_thread(), tracking(console, jobs) as track:
        paths = []
        for penalty in diabetes.PENALTIES:
            paths += [diabetes.reference(patients, penalty, l1s)]
            paths += [
                diabetes.follow(patients, penalty, solver, l1s, track)
                for solver in diabetes.SOLVERS
            ]
        seconds["diabetes"] = perf_counter() - start
        pairs = [digits.compare(images, recipe, max_epochs, track) for recipe in digits.RECIPES]
        seconds["digits"] = perf_counter() - start - seconds["diabetes"]
        drawn = figures.write(out, patients, paths, pairs, track)
    seconds["total"] = perf_counter() - start

    compared = diabetes.comparisons(paths) + digits.comparisons(pairs)
    record = report.record(paths, pairs, compared, seconds)
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for penalty in diabetes.PENALTIES:
        console.print(report.path_table([p for p in paths if p.penalty == penalty], patients), "")
    console.print(report.digits_table(pairs), "")
    failed = [comparison for comparison in compared if not comparison.holds]
    held = f"{len(compared) - len(failed)} of {len(compared)} comparisons hold"
    files = ", ".join(["demo.json", *drawn])
    console.out(f"{held}, after {seconds['total']:.0f} s. In {out}: {files}", highlight=False)
    return failed
