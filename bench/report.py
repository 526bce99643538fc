"""The results as files and as tables: bench.json, bench.csv and bench.txt."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from collections.abc import Collection, Iterable
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from jobs import Job
from methods import DTYPES, METHODS, moved_numbers, needed_numbers
from rich import box
from rich.console import Console
from rich.table import Table

from fusedreg.machine import describe, environment

Report = dict[str, Any]
Row = dict[str, Any]

CASE = ("kind", "model", "parameters", "tensors", "groups", "method", "dtype", "clip", "scaled")
RESULT = (
    *("implementation", "backend", "part", "rounds", "ms", "p20", "p80"),
    *("ratio", "ratio_p20", "ratio_p80", "matches", "verdict", "error_of_bound"),
    *("gb_per_s", "of_bandwidth", "needed_bytes", "moved_bytes"),
    *("host_us", "launches", "extra_mib"),
)
MACHINE = ("cpu", "architecture", "cores", "system", "gpu")
LIBRARIES = (
    *("optimi", "torch-optimi", "bitsandbytes", "torchao", "timm"),
    *("lion-pytorch", "pytorch-optimizer", "apex"),
)
"""Of which the versions are written down where they are installed."""
RUN = ("copy_gb_per_s", "in_place_gb_per_s", "threads", "commit")
COLUMNS = (*CASE, *RESULT, *MACHINE, *RUN)
"""Of bench.csv, before the versions."""


def new_report(commit: str | None, bandwidths: dict[str, float]) -> Report:
    return {
        **environment("triton", *LIBRARIES),
        "threads": torch.get_num_threads(),
        "commit": commit or git_commit(),
        **{f"{name}_gb_per_s": value for name, value in bandwidths.items()},
        "traffic": traffic(),
        **{name: [] for name in ("targets", "rows", "launch_constants", "left_out")},
        "not_installed": {},
    }


def traffic() -> list[Row]:
    """Bytes per parameter by arithmetic, for the figure of them."""
    rows = []
    for (name, method), (dtype, kind), scaled in product(
        METHODS.items(), DTYPES.items(), (False, True)
    ):
        size, row = kind.itemsize, {"method": name, "dtype": dtype, "scaled": scaled}
        row["needed_bytes"] = size * needed_numbers(method, clip=True)
        for who in ("fusedreg kernels", "torch fused", "torch foreach"):
            if moved := moved_numbers(method, True, scaled, who):
                row[who] = {part: size * n for part, n in moved.items()}
        rows.append(row)
    return rows


def git_commit() -> str | None:
    """The commit of this checkout, None where it is a copy without history."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(report: Report, out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "bench.csv").write_text(as_csv(report), encoding="utf-8")
    (out / "bench.txt").write_text(as_text(report), encoding="utf-8")


def as_csv(report: Report) -> str:
    """Every row with the machine, the versions and the commit that it belongs to."""
    same = {name: report["machine"].get(name) for name in MACHINE}
    same |= report["versions"] | {name: report[name] for name in RUN}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *report["versions"]], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **same} for row in report["rows"])
    return text.getvalue()


def new_table(title: str, *headings: str, right: Collection[str] = (), **more: Any) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, **more)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    return table


def text_of(parts: Iterable[str | Table], width: int) -> str:
    """Lines and tables below each other."""
    console = Console(file=io.StringIO(), width=width, record=True, color_system=None)
    for part in parts:
        plain = {"markup": False, "soft_wrap": True} if isinstance(part, str) else {}
        console.print(part, highlight=False, **plain)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def as_text(report: Report) -> str:
    parts: list[str | Table] = [
        describe(report),
        f"commit {report['commit']} · {report['threads']} threads · {bandwidth_of(report)}",
        "ratio: time over fusedreg's in the same round; "
        "of bandwidth: needed bytes over time, of the larger of the two bandwidths",
    ]
    if report["targets"]:
        parts += ["", table_of_targets(report["targets"])]
    for _, rows in groupby(report["rows"], key=lambda row: [row[name] for name in CASE]):
        parts += ["", table_of(list(rows))]
    if constants := report["launch_constants"]:
        headings = [name.replace("_", " ") for name in constants[0]]
        table = new_table("AdamW, float32, other launch constants", *headings, right=headings)
        for row in constants:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        parts += ["", table]
    why = [f"{name}: {reason}" for name, reason in report["not_installed"].items()]
    for title, lines in (("Left out:", report["left_out"]), ("Not here:", why)):
        if lines:
            parts += ["", title, *(f"  {line}" for line in lines)]
    return text_of(parts, width=200)


def bandwidth_of(report: Report) -> str:
    copy, product = report["copy_gb_per_s"], report["in_place_gb_per_s"]
    return f"a large copy {copy:.1f} GB/s, a product in place {product:.1f} GB/s, read plus written"


def title_of(row: Row) -> str:
    job = Job(*(row[name] for name in ("kind", "model", "method", "dtype", "clip")))
    tensors, groups = (f"{row[of]} {of[:-1] if row[of] == 1 else of}" for of in CASE[3:5])
    return f"{job} ({row['kind']}): {row['parameters']:,} parameters in {tensors} and {groups}"


COLUMNS_SHOWN = {
    **dict.fromkeys(("ms", "p20", "p80"), ".4g"),
    **dict.fromkeys(("ratio", "ratio_p20", "ratio_p80"), ".3g"),
    "of_bandwidth": ".1%",
    **dict.fromkeys(("rounds", "moved_bytes", "launches"), "d"),
    "host_us": ".0f",
    "extra_mib": ".2f",
}


def table_of(rows: list[Row]) -> Table:
    shown = [name for name in COLUMNS_SHOWN if any(row.get(name) is not None for row in rows)]
    headings = [name.replace("_", " ") for name in shown]
    table = new_table(title_of(rows[0]), "", *headings, "", right=headings, title_style="bold")
    for row in rows:
        values = [(row.get(name), COLUMNS_SHOWN[name]) for name in shown]
        cells = ["-" if value is None else format(value, how) for value, how in values]
        whole = row["part"] == "all"
        name = row["implementation"] if whole else f"  {row['part']}"
        table.add_row(name, *cells, row["verdict"] if whole else "")
    return table


TARGETS_TITLE = "Targets of the path for CPUs, float32"
TARGETS_NOTE = (
    "Milliseconds of the first and the second arm, medians; the ratio is that of the pairs, median "
    "(p20 to p80). Clipped: torch by clip_grad_norm_ before its step. First step: seconds more. "
    "Differs: torch's results are off by more than roundings explain, which bench.json has."
)
TARGET_COLUMNS = ("what", "shapes", "arms", "ms", "ratio", "pairs", "target", "")


def table_of_targets(rows: list[Row]) -> Table:
    style = {"title_style": "bold", "caption": TARGETS_NOTE, "caption_justify": "left"}
    table = new_table(TARGETS_TITLE, *TARGET_COLUMNS, **style)
    for column in table.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        table.add_row(*target_cells(row))
    return table


def target_cells(row: Row) -> list[str]:
    """A line of the table of targets, here and on the page.

    >>> row = {"what": "AdamW", "model": "tiny", "arms": ["torch", "fusedreg"], "unit": "",
    ...     "ms": [3.0, 2.0], "value": 1.5, "p20": 1.25, "p80": 1.75, "rounds": 6,
    ...     "target": "at least 2", "met": False, "verdict": "missed"}
    >>> target_cells(row)[2:]
    ['torch / fusedreg', '3 / 2', '1.5 (1.25 to 1.75)', '6', 'at least 2', 'missed']
    """
    sign = " - " if row["unit"] else " / "
    found = ["-"] * 3
    if row["value"] is not None:
        ratio = f"{row['value']:.4g}{row['unit']} ({row['p20']:.4g} to {row['p80']:.4g})"
        found = [sign.join(f"{ms:.4g}" for ms in row["ms"]), ratio, str(row["rounds"])]
    # By how much torch's own results differ is in the file.
    verdict = re.sub(r"; (torch \w+): results differ.*", r"; \1 differs", row["verdict"])
    return [row["what"], row["model"], sign.join(row["arms"]), *found, row["target"], verdict]
