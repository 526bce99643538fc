"""Draw the figures of a run from its bench.json alone: `python bench/figures.py FOLDER`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import describe

Report = dict[str, Any]
Rows = list[dict[str, Any]]

COLOUR = {"torch fused": 0, "torch foreach": 1, "torch for-loop": 3, "fusedreg reference": 7}
COLOUR |= {"optimi": 4, "bitsandbytes 32 bit": 5, "torchao 8 bit": 8, "timm legacy": 9}
PARTS = {"unscale": COLOURS[5], "clip": COLOURS[1], "step": COLOURS[0], "threshold": COLOURS[8]}
NOTE = {"textcoords": "offset points", "fontsize": 8, "color": QUIET}
LABEL = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": QUIET}


def colour_of(implementation: str) -> str:
    """fusedreg, whatever it runs on, in the colour of what a figure is about."""
    return COLOURS[COLOUR[implementation]] if implementation in COLOUR else SPIKE


def draw(folder: Path) -> list[Path]:
    """All figures for which the file has numbers, as SVG and as PNG."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    caption = f"{describe(report)} · commit {report['commit']}"
    figures = {"bytes": bytes_per_parameter(report, caption)}
    for name, kind, drawing in (
        ("bandwidth", "size", bandwidth_by_size),
        ("tensors", "tensors", time_by_tensors),
        ("parts", "parts", stacked_parts),
    ):
        rows, note = whole_steps(report, kind)
        if rows:
            height = 1.9 + 0.5 * len(rows) if kind == "parts" else 4.6
            figures[name] = new_figure(8, height, caption)
            axes = figures[name].subplots()
            finish(axes, drawing(axes, rows, report), note)
    written = []
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            written.append(folder / f"{name}.{kind}")
            # The same numbers give the same file: no date, and names within it that do not vary.
            same: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
            with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(written[-1], **same)
    return written


def whole_steps(report: Report, kind: str) -> tuple[Rows, str]:
    """Rows of a kind whose results are right, and who was left out because theirs are not."""
    rows = [r for r in report["rows"] if r["kind"] == kind and r["part"] == "all"]
    wrong = {row["implementation"] for row in rows if not row["matches"]}
    note = "Left out because their results differ: " + ", ".join(sorted(wrong)) if wrong else ""
    return [row for row in rows if row["matches"]], note


def lines(axes: Axes, rows: Rows, x: str, y: str) -> None:
    """A line with its spread for each implementation."""
    for name in dict.fromkeys(row["implementation"] for row in rows):
        of, colour = [row for row in rows if row["implementation"] == name], colour_of(name)
        places = [row[x] for row in of]
        axes.plot(places, [row[y] for row in of], "o-", color=colour, label=name, markersize=4)
        if y == "ms":
            ends = ([row[p] for row in of] for p in ("p20", "p80"))
        else:  # bandwidth is the less the longer a step takes
            ends = ([row[y] * row["ms"] / row[p] for row in of] for p in ("p80", "p20"))
        axes.fill_between(places, *ends, color=colour, alpha=0.15, linewidth=0)


def bandwidth_by_size(axes: Axes, rows: Rows, report: Report) -> str:
    """Where a step is bound by memory, and how near to it."""
    lines(axes, rows, "parameters", "of_bandwidth")
    axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=":")
    bandwidth = max(report["copy_gb_per_s"], report["in_place_gb_per_s"])
    note = {**NOTE, "xycoords": axes.get_yaxis_transform(), "ha": "left"}
    axes.annotate(f"a large tensor, {bandwidth:.0f} GB/s", (0.01, 1), (0, 3), **note)
    axes.set_xscale("log")
    axes.set_xlabel("parameters, in 16 tensors")
    axes.set_ylabel("needed bytes / time, of the bandwidth")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    return "AdamW with clipping, float32: share of the memory bandwidth"


def time_by_tensors(axes: Axes, rows: Rows, _report: Report) -> str:
    """What many tensors cost, the number of parameters being the same."""
    lines(axes, rows, "tensors", "ms")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["tensors"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    total = max(row["parameters"] for row in rows)
    axes.set_xlabel(f"tensors, of {total:,} parameters together")
    axes.set_ylabel("milliseconds of a step")
    return "AdamW with clipping, float32: time of a step by the number of tensors"


def stack(axes: Axes, place: int, parts: dict[str, float], own: bool, height: float) -> float:
    """A bar of parts, or of one step that does all; where it ends."""
    begin = 0.0
    for part, size in parts.items():
        colour = SPIKE if own else PARTS[part]
        axes.barh(place, size, left=begin, color=colour, height=height)
        begin += size
    return begin


def legend(axes: Axes, parts: int, ticks: list[int], labels: list[str]) -> None:
    for part, colour in [*list(PARTS.items())[:parts], ("all in one step", SPIKE)]:
        axes.barh(0, 0, color=colour, label=part)
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()


def stacked_parts(axes: Axes, rows: Rows, report: Report) -> str:
    """Unscale, clip and step as separate calls, beside one step that does all three."""
    parts = [r for r in report["rows"] if r["kind"] == "parts" and r["part"] != "all"]
    for place, row in enumerate(rows):
        own = {p["part"]: p["ms"] for p in parts if p["implementation"] == row["implementation"]}
        end = stack(axes, place, own, len(own) == 1, 0.6)
        error = [[max(end - row["p20"], 0)], [max(row["p80"] - end, 0)]]
        axes.errorbar(end, place, xerr=error, color=QUIET, capsize=3, linewidth=1)
        beyond = max(end, row["p80"])
        axes.annotate(f"{row['ms']:.3g} ms", (beyond, place), (6, 0), **LABEL)
    legend(axes, 3, list(range(len(rows))), [row["implementation"] for row in rows])
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds, medians; the whisker is p20 to p80 of the whole step")
    return f"AdamW, float32, {rows[0]['model']}: unscale, clip and step"


def bytes_per_parameter(report: Report, caption: str) -> Figure:
    """What each must move, by arithmetic, and what a step took for itself where it was measured."""
    extra = [r for r in whole_steps(report, "model")[0] if r.get("extra_mib") is not None]
    first = next((r["model"] for r in extra if r["dtype"] == "float32"), None)
    case = {"model": first, "dtype": "float32", "method": "AdamW", "clip": True}
    extra = [r for r in extra if case.items() <= r.items()]
    who = ("fusedreg kernels", "torch fused", "torch foreach")
    entries = [t for t in report["traffic"] if t["dtype"] == "float32" and t["scaled"]]
    bars = [(entry, [name for name in who if name in entry]) for entry in entries]
    height = 1.2 + 0.25 * sum(len(names) + 1 for _, names in bars)
    figure = new_figure(11 if extra else 8, height, caption)
    left, *right = figure.subplots(1, 2 if extra else 1, squeeze=False)[0]
    ticks: list[int] = []
    labels: list[str] = []
    for entry, names in bars:
        first_place = ticks[-1] + 2 if ticks else 0
        for place, name in enumerate(names, first_place):
            end = int(stack(left, place, entry[name], name == who[0], 0.75))
            left.annotate(str(end), (end, place), (4, 0), **LABEL)
            ticks.append(place)
            labels.append(f"{entry['method']}: {name}" if place == first_place else name)
    legend(left, len(PARTS), ticks, labels)
    left.margins(x=0.1)
    left.set_xlabel("bytes per parameter, by counting what is read and written; not measured")
    finish(left, "float32 with loss scale and clipping: bytes that a step moves", "")
    for axes in right:
        names = [row["implementation"] for row in extra]
        values = [2**20 * row["extra_mib"] / row["parameters"] for row in extra]
        axes.barh(names, values, color=[colour_of(name) for name in names], height=0.6)
        axes.invert_yaxis()
        axes.set_xlabel("bytes per parameter, measured")
        finish(axes, f"Memory a step takes for itself, {first}", "")
    return figure


def finish(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    tidy(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, frameon=False, loc="best")
    if note:
        where = {"xycoords": axes.get_yaxis_transform(), "ha": "right"}
        axes.annotate(note, (0.99, 0.01), (0, 0), **NOTE, **where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the bench.json of a run")
    for path in draw(parser.parse_args().folder):
        print(path.name)


if __name__ == "__main__":
    main()
