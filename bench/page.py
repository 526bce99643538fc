"""The results of a run as files: bench.json and the tables of bench.txt.

`python bench/page.py FOLDER` keeps them, by default those of the latest run, in a folder that is
named after the device. Table and figures of docs/benchmark.md come from there alone.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jobs import DTYPES, METHODS, Job, moved_numbers
from rich import box
from rich.console import Console
from rich.table import Table

from fusedreg.machine import describe, environment

Report = dict[str, Any]
Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
LATEST = ROOT / "bench/results/latest"
PAGE = ROOT / "docs/benchmark.md"
BEGIN, END = "<!-- from bench/page.py -->\n", "<!-- until here -->\n"
SHOWN = {  # columns of the tables, and how they are written
    **dict.fromkeys(("ms", "p20", "p80"), ".4g"),
    **dict.fromkeys(("ratio", "ratio_p20", "ratio_p80"), ".3g"),
    "of_bandwidth": ".1%",
    **dict.fromkeys(("rounds", "moved_bytes", "launches"), "d"),
    "host_us": ".0f",
}
LIBRARIES = (  # whose versions are written down where they are installed
    *("optimi", "torch-optimi", "bitsandbytes", "torchao", "timm"),
    *("lion-pytorch", "pytorch-optimizer", "apex"),
)
TARGETS_TITLE = "Targets of the path for CPUs, float32"
TARGETS_NOTE = (
    "Milliseconds of the first and the second arm, medians; the ratio is that of the pairs, median "
    "(p20 to p80). Clipped: torch by clip_grad_norm_ before its step. First step: seconds more. "
    "Differs: torch's results are off by more than roundings explain, which bench.json has."
)
TARGET_COLUMNS = ("what", "shapes", "arms", "ms", "ratio", "pairs", "target", "")


def new_report(bandwidths: dict[str, float]) -> Report:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = None
    if (ROOT / ".git").exists():  # not a copy without history
        commit = subprocess.check_output(command, cwd=ROOT, text=True).strip()
    return {
        **environment("triton", *LIBRARIES),
        "threads": torch.get_num_threads(),
        "commit": commit,
        **{f"{name}_gb_per_s": value for name, value in bandwidths.items()},
        "traffic": list(map(traffic, METHODS)),
        **{name: [] for name in ("targets", "rows", "left_out")},
        "not_installed": {},
    }


def traffic(name: str) -> Row:
    """Bytes per parameter by arithmetic, for the figure of them."""
    row: Row = {"method": name, "dtype": "float32", "scaled": True}
    for who in ("fusedreg kernels", "torch fused", "torch foreach"):
        if moved := moved_numbers(METHODS[name], True, True, who):
            row[who] = {part: DTYPES["float32"].itemsize * n for part, n in moved.items()}
    return row


def write(report: Report, out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "bench.txt").write_text(as_text(report), encoding="utf-8")


def as_text(report: Report) -> str:
    parts: list[str | Table] = [
        describe(report),
        f"commit {report['commit']} · {report['threads']} threads · {bandwidth_of(report)}",
        "ratio: time over fusedreg's in the same round; "
        "of bandwidth: needed bytes over time, of the larger of the two bandwidths",
    ]
    if report["targets"]:
        made = table(TARGETS_TITLE, TARGET_COLUMNS, map(target_cells, report["targets"]), "left")
        made.caption, made.caption_justify = TARGETS_NOTE, "left"
        parts += ["", made]
    for title, of in groupby(report["rows"], key=title_of):
        parts += ["", table_of(title, list(of))]
    why = [f"{name}: {reason}" for name, reason in report["not_installed"].items()]
    for title, lines in (("Left out:", report["left_out"]), ("Not here:", why)):
        if lines:
            parts += ["", title, *(f"  {line}" for line in lines)]
    console = Console(file=io.StringIO(), width=200, color_system=None)
    for part in parts:
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def bandwidth_of(report: Report) -> str:
    copy, product = report["copy_gb_per_s"], report["in_place_gb_per_s"]
    return f"a large copy {copy:.1f} GB/s, a product in place {product:.1f} GB/s, read plus written"


def table(title: str, headings: Sequence[str], rows: Iterable[list[str]], justify: Any) -> Table:
    """A name, columns that stand to the left or to the right, and a verdict, which may be long."""
    made = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    made.add_column(headings[0], no_wrap=True)
    for heading in headings[1:-1]:
        made.add_column(heading, no_wrap=True, justify=justify)
    made.add_column(headings[-1])
    for row in rows:
        made.add_row(*row)
    return made


def title_of(row: Row) -> str:
    job = Job(*(row[name] for name in ("kind", "model", "method", "dtype", "clip")))
    tensors, groups = (
        f"{row[of]} {of[:-1] if row[of] == 1 else of}" for of in ("tensors", "groups")
    )
    return f"{job} ({job.kind}): {row['parameters']:,} parameters in {tensors} and {groups}"


def table_of(title: str, rows: list[Row]) -> Table:
    """A line for each contender of a comparison, and each part."""
    shown = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    lines = []
    for row in rows:
        values = [(row.get(name), SHOWN[name]) for name in shown]
        cells = ["-" if value is None else format(value, how) for value, how in values]
        whole = row["part"] == "all"
        name = row["implementation"] if whole else f"  {row['part']}"
        lines.append([name, *cells, row["verdict"] if whole else ""])
    return table(title, ["", *(name.replace("_", " ") for name in shown), ""], lines, "right")


def target_cells(row: Row) -> list[str]:
    """A line of the table of targets, here and on the page."""
    sign = " - " if row["unit"] else " / "
    found = ["-"] * 3
    if row["value"] is not None:
        ratio = f"{row['value']:.4g}{row['unit']} ({row['p20']:.4g} to {row['p80']:.4g})"
        found = [sign.join(f"{ms:.4g}" for ms in row["ms"]), ratio, str(row["rounds"])]
    # By how much torch's own results differ is in the file.
    verdict = re.sub(r"; (torch \w+): results differ.*", r"; \1 differs", row["verdict"])
    return [row["what"], row["model"], sign.join(row["arms"]), *found, row["target"], verdict]


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (headings, *rows)]
    lines.insert(1, "|---" * len(list(headings)) + "|")
    return "\n".join(lines)


def cell(row: Row | None) -> str:
    """Milliseconds and, where the results are right, the ratio."""
    if row is None or row.get("ms") is None:
        return row["verdict"] if row else ""
    ms = f"{row['ms']:.4g} ({row['p20']:.4g} to {row['p80']:.4g})"
    if row["ratio"] is None:
        return f"{ms}, results differ"
    if row["implementation"].startswith("fusedreg ("):
        return ms
    return f"{ms}, {row['ratio']:.2g} ({row['ratio_p20']:.2g} to {row['ratio_p80']:.2g})"


def results(folder: Path) -> str:
    """What stands between the marks of the page: a line for each comparison of a model."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    rows = [row for row in report["rows"] if row["kind"] == "model"]
    names, lines = list(dict.fromkeys(row["implementation"] for row in rows)), []
    case = ("model", "method", "dtype", "clip")
    for (*head, clip), of in groupby(rows, key=lambda row: [row[name] for name in case]):
        by_name = {row["implementation"]: row for row in of}
        title = f"{', '.join(head)}{', clipped' * clip}"
        lines.append([title, *(cell(by_name.get(name)) for name in names)])
    targets = markdown(TARGET_COLUMNS, map(target_cells, report["targets"]))
    targets = f"\n\n**{TARGETS_TITLE}.** {TARGETS_NOTE}\n\n{targets}\n\n"
    return (
        f"From `bench/results/{folder.name}/bench.json`: {describe(report)}; "
        f"commit {report['commit']}, {report['threads']} threads; {bandwidth_of(report)}."
        f"{targets if report['targets'] else ' '}"
        "Milliseconds of a step, median (p20 to p80), then the time over fusedreg's in the same "
        f"round: below 1 is faster than fusedreg.\n\n{markdown(['', *names], lines)}\n"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve() if sys.argv[1:] else LATEST
    machine = json.loads((folder / "bench.json").read_text(encoding="utf-8"))["machine"]
    cpu = machine["cpu"] or machine["architecture"]
    name = machine.get("gpu") or f"{cpu} {machine['cores']} cores cpu"
    kept = LATEST.parent / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if kept != folder:
        shutil.copytree(folder, kept, dirs_exist_ok=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = f"{before}{BEGIN}\n{results(kept)}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(text, encoding="utf-8")
    for figure in kept.glob("*.svg"):
        shutil.copyfile(figure, ROOT / f"docs/figures/benchmark-{figure.name}")
