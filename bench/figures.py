"""Draw the figures of a run from its bench.json alone: `python bench/figures.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import describe

Rows = list[dict[str, Any]]

OTHERS = {"torch fused": 0, "torch foreach": 1, "torch for-loop": 3, "fusedreg reference": 7}
OTHERS |= {"optimi": 4, "bitsandbytes 32 bit": 5, "torchao 8 bit": 8, "timm legacy": 9}
PARTS = {"unscale": COLOURS[5], "clip": COLOURS[1], "step": COLOURS[0], "threshold": COLOURS[8]}
COUNTED = ("fusedreg kernels", "torch fused", "torch foreach")
NOTE: Any = {"textcoords": "offset points", "fontsize": 8, "color": QUIET}
LABEL: Any = {**NOTE, "fontsize": 9, "va": "center"}


def draw(folder: Path) -> list[Path]:
    """All figures for which the file has numbers, as SVG and as PNG."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    written = []
    for name, kind, drawing in (
        ("bytes", "", bytes_per_parameter),
        ("bandwidth", "size", bandwidth_by_size),
        ("tensors", "tensors", time_by_tensors),
        ("parts", "parts", stacked_parts),
    ):
        rows = [r for r in report["rows"] if r["kind"] == kind and r["part"] == "all"]
        wrong = sorted({row["implementation"] for row in rows if not row["matches"]})
        rows, height = [row for row in rows if row["matches"]], 4.6
        if name == "bytes":
            rows = [t for t in report["traffic"] if t["dtype"] == "float32" and t["scaled"]]
            height = 1.2 + 0.25 * sum(1 + sum(who in t for who in COUNTED) for t in rows)
        if name == "parts":
            height = 1.9 + 0.5 * len(rows)
        if not rows:
            continue
        figure = new_figure(8, height, f"{describe(report)} · commit {report['commit']}")
        axes = figure.subplots()
        axes.set_title(drawing(axes, rows, report), fontsize=11, loc="left")
        tidy(axes)
        axes.legend(fontsize=9, frameon=False, loc="best")
        if wrong:
            text = "Left out because their results differ: " + ", ".join(wrong)
            across = axes.get_yaxis_transform()
            axes.annotate(text, (0.99, 0.01), (0, 0), xycoords=across, ha="right", **NOTE)
        svg, png = folder / f"{name}.svg", folder / f"{name}.png"
        # The same numbers give the same file: no date, and names within it that do not vary.
        with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=150)
        written += [svg, png]
    return written


def lines(axes: Axes, rows: Rows, x: str, y: str) -> None:
    """A line with its spread for each implementation; fusedreg in the colour of the subject."""
    for name in dict.fromkeys(row["implementation"] for row in rows):
        of = [row for row in rows if row["implementation"] == name]
        colour, places = COLOURS[OTHERS[name]] if name in OTHERS else SPIKE, [row[x] for row in of]
        axes.plot(places, [row[y] for row in of], "o-", color=colour, label=name, markersize=4)
        if y == "ms":
            ends = ([row[p] for row in of] for p in ("p20", "p80"))
        else:  # bandwidth is the less the longer a step takes
            ends = ([row[y] * row["ms"] / row[p] for row in of] for p in ("p80", "p20"))
        axes.fill_between(places, *ends, color=colour, alpha=0.15, linewidth=0)


def bandwidth_by_size(axes: Axes, rows: Rows, report: Any) -> str:
    """Where a step is bound by memory, and how near to it."""
    lines(axes, rows, "parameters", "of_bandwidth")
    axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=":")
    text = f"a large tensor, {max(report['copy_gb_per_s'], report['in_place_gb_per_s']):.0f} GB/s"
    across = axes.get_yaxis_transform()  # a share of the width, and a value
    axes.annotate(text, (0.01, 1), (0, 3), xycoords=across, ha="left", **NOTE)
    axes.set(xscale="log", xlabel="parameters, in 16 tensors")
    axes.set(ylim=(0, None), ylabel="needed bytes / time, of the bandwidth")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return "AdamW with clipping, float32: share of the memory bandwidth"


def time_by_tensors(axes: Axes, rows: Rows, _report: Any) -> str:
    """What many tensors cost, the number of parameters being the same."""
    lines(axes, rows, "tensors", "ms")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xticks=sorted({row["tensors"] for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    numel = max(row["parameters"] for row in rows)
    axes.set(xlabel=f"tensors, of {numel:,} parameters together", ylabel="milliseconds of a step")
    return "AdamW with clipping, float32: time of a step by the number of tensors"


def stack(axes: Axes, place: int, parts: dict[str, float], own: bool, height: float) -> float:
    """A bar of parts, or of one step that does all; where it ends."""
    begin = 0.0
    for part, size in parts.items():
        axes.barh(place, size, height, begin, color=SPIKE if own else PARTS[part])
        begin += size
    return begin


def legend(axes: Axes, parts: int, labels: dict[int, str]) -> None:
    for part, colour in [*list(PARTS.items())[:parts], ("all in one step", SPIKE)]:
        axes.barh(0, 0, color=colour, label=part)
    axes.set_yticks(list(labels), list(labels.values()))
    axes.invert_yaxis()


def stacked_parts(axes: Axes, rows: Rows, report: Any) -> str:
    """Unscale, clip and step as separate calls, beside one step that does all three."""
    parts = [r for r in report["rows"] if r["kind"] == "parts" and r["part"] != "all"]
    for place, row in enumerate(rows):
        own = {p["part"]: p["ms"] for p in parts if p["implementation"] == row["implementation"]}
        end = stack(axes, place, own, len(own) == 1, 0.6)
        error = [[max(end - row["p20"], 0)], [max(row["p80"] - end, 0)]]
        axes.errorbar(end, place, xerr=error, color=QUIET, capsize=3, linewidth=1)
        axes.annotate(f"{row['ms']:.3g} ms", (max(end, row["p80"]), place), (6, 0), **LABEL)
    legend(axes, 3, {place: row["implementation"] for place, row in enumerate(rows)})
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds, medians; the whisker is p20 to p80 of the whole step")
    return f"AdamW, float32, {rows[0]['model']}: unscale, clip and step"


def bytes_per_parameter(axes: Axes, rows: Rows, _report: Any) -> str:
    """What each must move, by arithmetic."""
    labels: dict[int, str] = {}
    for row in rows:
        first = max(labels, default=-2) + 2
        for place, name in enumerate((who for who in COUNTED if who in row), first):
            end = int(stack(axes, place, row[name], name == COUNTED[0], 0.75))
            axes.annotate(str(end), (end, place), (4, 0), **LABEL)
            labels[place] = f"{row['method']}: {name}" if place == first else name
    legend(axes, len(PARTS), labels)
    axes.margins(x=0.1)
    axes.set_xlabel("bytes per parameter, by counting what is read and written; not measured")
    return "float32 with loss scale and clipping: bytes that a step moves"


if __name__ == "__main__":
    print(*(path.name for path in draw(Path(sys.argv[1]))), sep="\n")
