"""The results as files and as tables: bench.json, bench.csv and bench.txt."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from itertools import groupby
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

CASE = ("kind", "model", "parameters", "tensors", "groups", "method", "dtype", "clip", "scaled")
RESULT = (
    *("implementation", "backend", "part", "rounds", "ms", "p20", "p80"),
    *("ratio", "ratio_p20", "ratio_p80", "matches", "verdict", "error_of_bound"),
    *(
        "gb_per_s",
        "of_bandwidth",
        "needed_bytes",
        "moved_bytes",
        "host_us",
        "launches",
        "extra_mib",
    ),
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
        **{f"{name.replace(' ', '_')}_gb_per_s": value for name, value in bandwidths.items()},
        "traffic": traffic(),
        "targets": [],
        "rows": [],
        "launch_constants": [],
        "left_out": [],
        "not_installed": {},
    }


def traffic() -> list[dict[str, Any]]:
    """Bytes per parameter by arithmetic, for the figure of them."""
    return [
        {
            "method": name,
            "dtype": dtype,
            "scaled": scaled,
            "needed_bytes": size.itemsize * needed_numbers(method, clip=True),
            **{
                who: {part: size.itemsize * n for part, n in moved.items()}
                for who in ("fusedreg kernels", "torch fused", "torch foreach")
                if (moved := moved_numbers(method, True, scaled, who))
            },
        }
        for name, method in METHODS.items()
        for dtype, size in DTYPES.items()
        for scaled in (False, True)
    ]


def git_commit() -> str | None:
    """The commit of this checkout, None where it is a copy without history."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    command += ["--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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


def write(report: Report, out: Path) -> None:
    (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "bench.csv").write_text(as_csv(report), encoding="utf-8")
    (out / "bench.txt").write_text(as_text(report), encoding="utf-8")


def as_csv(report: Report) -> str:
    """Every row with the machine, the versions and the commit that it belongs to."""
    same = {
        **{name: report["machine"].get(name) for name in MACHINE},
        **report["versions"],
        **{name: report[name] for name in RUN},
    }
    text = io.StringIO()
    columns = [*COLUMNS, *report["versions"]]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **same} for row in report["rows"])
    return text.getvalue()


def as_text(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200, record=True, color_system=None)

    def line(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(describe(report))
    line(f"commit {report['commit']} · {report['threads']} threads · {bandwidth_of(report)}")
    line(
        "ratio: time over fusedreg's in the same round; "
        "of bandwidth: needed bytes over time, of the larger of the two bandwidths"
    )
    if report["targets"]:
        line()
        console.print(table_of_targets(report["targets"]))
    for _, rows in groupby(report["rows"], key=lambda row: [row[name] for name in CASE]):
        line()
        console.print(table_of(list(rows)))
    if report["launch_constants"]:
        line()
        console.print(table_of_constants(report["launch_constants"]))
    for title, lines in {
        "Left out:": report["left_out"],
        "Not here:": [f"{name}: {why}" for name, why in report["not_installed"].items()],
    }.items():
        if lines:
            line()
            line(title)
            for each in lines:
                line(f"  {each}")
    return "\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n"


def bandwidth_of(report: Report) -> str:
    copy, in_place = report["copy_gb_per_s"], report["in_place_gb_per_s"]
    return (
        f"a large copy {copy:.1f} GB/s, a product in place {in_place:.1f} GB/s, read plus written"
    )


def title_of(row: dict[str, Any]) -> str:
    job = Job(*(row[name] for name in ("kind", "model", "method", "dtype", "clip")))
    groups = "1 group" if row["groups"] == 1 else f"{row['groups']} groups"
    tensors = "1 tensor" if row["tensors"] == 1 else f"{row['tensors']} tensors"
    size = f"{row['parameters']:,} parameters in {tensors} and {groups}"
    return f"{job} ({row['kind']}): {size}"


COLUMNS_SHOWN = {
    "ms": ".4g",
    "p20": ".4g",
    "p80": ".4g",
    "ratio": ".3g",
    "ratio_p20": ".3g",
    "ratio_p80": ".3g",
    "of_bandwidth": ".1%",
    "rounds": "d",
    "moved_bytes": "d",
    "launches": "d",
    "host_us": ".0f",
    "extra_mib": ".2f",
}


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title_of(rows[0]), box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    shown = [name for name in COLUMNS_SHOWN if any(row.get(name) is not None for row in rows)]
    table.add_column("")
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("")
    for row in rows:
        whole = row["part"] == "all"
        cells = [format_cell(row.get(name), COLUMNS_SHOWN[name]) for name in shown]
        name = row["implementation"] if whole else f"  {row['part']}"
        table.add_row(name, *cells, row["verdict"] if whole else "")
    return table


def format_cell(value: Any, how: str) -> str:
    return "-" if value is None else format(value, how)


TARGETS_TITLE = "Targets of the path for CPUs, float32"
TARGETS_NOTE = (
    "Milliseconds of the first and the second arm, medians; the ratio is that of the pairs, median "
    "(p20 to p80). Clipped: torch by clip_grad_norm_ before its step. First step: seconds more. "
    "Differs: torch's results are off by more than roundings explain, which bench.json has."
)
TARGET_COLUMNS = ("what", "shapes", "arms", "ms", "ratio", "pairs", "target", "")


def table_of_targets(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=TARGETS_TITLE, caption=TARGETS_NOTE, box=box.SIMPLE_HEAD, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    table.caption_justify = "left"
    for heading in TARGET_COLUMNS:
        table.add_column(heading, no_wrap=bool(heading))
    for row in rows:
        table.add_row(*target_cells(row))
    return table


def target_cells(row: dict[str, Any]) -> list[str]:
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
    arms = sign.join(row["arms"])
    # By how much torch's own results differ is in the file.
    verdict = re.sub(r"; (torch \w+): results differ.*", r"; \1 differs", row["verdict"])
    return [row["what"], row["model"], arms, *found, row["target"], verdict]


def table_of_constants(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="AdamW, float32, other launch constants", box=box.SIMPLE_HEAD)
    for heading in rows[0]:
        table.add_column(heading.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
