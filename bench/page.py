"""Publish the results of a run: `python bench/page.py FOLDER`.

Its files are kept in a folder of bench/results/ that is named after the device. Table and figures
of docs/benchmark.md then come from that folder and from nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from report import TARGET_COLUMNS, TARGETS_NOTE, TARGETS_TITLE, bandwidth_of, slug, target_cells
from run import LATEST

from fusedreg.machine import describe

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/benchmark.md"
FIGURES = ("parts", "bandwidth", "tensors", "bytes")
BEGIN, END = "<!-- from bench/page.py -->\n", "<!-- until here -->\n"
CASE = ("model", "method", "dtype", "clip")


def table(report: dict[str, Any]) -> str:
    """One line for each comparison of a model, one column for each implementation."""
    rows = [row for row in report["rows"] if row["kind"] == "model"]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for case, of in groupby(rows, key=lambda row: tuple(row[name] for name in CASE)):
        by_name = {row["implementation"]: row for row in of}
        model, method, dtype, clip = case
        head = f"{model}, {method}, {dtype}{', clipped' * clip}"
        cells = [cell(by_name.get(name)) for name in names]
        lines.append("| " + " | ".join([head, *cells]) + " |")
    return "\n".join(lines) + "\n"


def table_of_targets(rows: list[dict[str, Any]]) -> str:
    """The targets of the path for CPUs; nothing where there are none, as on a GPU."""
    if not rows:
        return ""
    lines = ["| " + " | ".join(TARGET_COLUMNS) + " |", "|---" * len(TARGET_COLUMNS) + "|"]
    lines += ["| " + " | ".join(target_cells(row)) + " |" for row in rows]
    return f"\n\n**{TARGETS_TITLE}.** {TARGETS_NOTE}\n\n" + "\n".join(lines) + "\n\n"


def cell(row: dict[str, Any] | None) -> str:
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


def results(folder: Path) -> str:
    """What stands between the marks of the page."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    where = f"bench/results/{folder.name}/bench.json"
    targets = table_of_targets(report.get("targets", []))
    return (
        f"From `{where}`: {describe(report)}; commit {report['commit']}, {report['threads']} "
        f"threads; {bandwidth_of(report)}.{targets or ' '}Milliseconds of a step, "
        "median (p20 to p80), then the time over fusedreg's in the same round: below 1 is faster "
        f"than fusedreg.\n\n{table(report)}"
    )


def keep(folder: Path) -> Path:
    """The folder that is named after the device, with these results in it."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    kept = LATEST.parent / slug(report["machine"])
    if kept != folder:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=LATEST, help="of the run")
    folder = keep(parser.parse_args().folder.resolve())
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n{results(folder)}\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8")
    for name in FIGURES:
        shutil.copyfile(folder / f"{name}.svg", ROOT / f"docs/figures/benchmark-{name}.svg")


if __name__ == "__main__":
    main()
