"""Publish the results of a run: `python bench/page.py FOLDER`.

Its files are kept in a folder of bench/results/ that is named after the device. Table and figures
of docs/benchmark.md then come from that folder and from nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from report import TARGET_COLUMNS, TARGETS_NOTE, TARGETS_TITLE, Row, bandwidth_of, target_cells
from run import LATEST

from fusedreg.machine import describe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmark.md"
FIGURES = ("parts", "bandwidth", "tensors", "bytes")
BEGIN, END = "<!-- from bench/page.py -->\n", "<!-- until here -->\n"
CASE = ("model", "method", "dtype", "clip")


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    lines.insert(1, "|---" * len(list(headings)) + "|")
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    """One line for each comparison, one column for each implementation."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = []
    for case, of in groupby(rows, key=lambda row: [row[name] for name in CASE]):
        by_name = {row["implementation"]: row for row in of}
        head = f"{', '.join(case[:3])}{', clipped' * case[3]}"
        lines.append([head, *(cell(by_name.get(name)) for name in names)])
    return markdown(["", *names], lines)


def cell(row: Row | None) -> str:
    """Milliseconds and, where the results are right, the ratio."""
    if row is None:
        return ""
    if row.get("ms") is None:
        return str(row["verdict"])
    ms = f"{row['ms']:.4g} ({row['p20']:.4g} to {row['p80']:.4g})"
    if row["ratio"] is None:
        return f"{ms}, results differ"
    if row["implementation"].startswith("fusedreg ("):
        return ms
    return f"{ms}, {row['ratio']:.2g} ({row['ratio_p20']:.2g} to {row['ratio_p80']:.2g})"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text(encoding="utf-8"))


def results(folder: Path) -> str:
    """What stands between the marks of the page."""
    report = read(folder)
    targets = markdown(TARGET_COLUMNS, map(target_cells, report["targets"]))
    return (
        f"From `bench/results/{folder.name}/bench.json`: {describe(report)}; "
        f"commit {report['commit']}, {report['threads']} threads; {bandwidth_of(report)}."
        + (
            f"\n\n**{TARGETS_TITLE}.** {TARGETS_NOTE}\n\n{targets}\n\n"
            if report["targets"]
            else " "
        )
        + "Milliseconds of a step, median (p20 to p80), then the time over fusedreg's in the same "
        "round: below 1 is faster than fusedreg.\n\n"
        + table([row for row in report["rows"] if row["kind"] == "model"])
        + "\n"
    )


def slug(machine: dict[str, Any]) -> str:
    """A folder name for the device.

    >>> slug({"cpu": "AMD EPYC", "cores": 2})
    'amd-epyc-2-cores-cpu'
    >>> slug({"cpu": "AMD EPYC", "cores": 16, "gpu": "NVIDIA H100 80GB HBM3"})
    'nvidia-h100-80gb-hbm3'
    """
    cpu = machine.get("cpu") or machine.get("architecture")
    name = machine.get("gpu") or f"{cpu} {machine['cores']} cores cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=LATEST, help="of the run")
    folder = parser.parse_args().folder.resolve()
    kept = LATEST.parent / slug(read(folder)["machine"])
    if kept != folder:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n{results(kept)}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")
    for name in FIGURES:
        shutil.copyfile(kept / f"{name}.svg", ROOT / f"docs/figures/benchmark-{name}.svg")


if __name__ == "__main__":
    main()
