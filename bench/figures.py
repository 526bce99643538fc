"""Draw the figures of a run from its bench.json alone: `python bench/figures.py FOLDER`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from fusedreg.demo.style import COLOURS, QUIET, SPIKE, new_figure, tidy
from fusedreg.machine import describe

Report = dict[str, Any]
Row = dict[str, Any]

NAMES = {
    "torch fused": COLOURS[0],
    "torch foreach": COLOURS[1],
    "torch for-loop": COLOURS[3],
    "fusedreg reference": COLOURS[7],
    "optimi": COLOURS[4],
    "bitsandbytes 32 bit": COLOURS[5],
    "torchao 8 bit": COLOURS[8],
    "timm legacy": COLOURS[9],
}
PARTS = {
    "unscale": COLOURS[5],
    "clip": COLOURS[1],
    "step": COLOURS[0],
    "threshold": COLOURS[8],
}
NOT_IN = "Left out because their results differ: "


def colour_of(implementation: str) -> str:
    """fusedreg, whatever it runs on, in the colour of what a figure is about."""
    return NAMES.get(implementation, SPIKE)


def draw(folder: Path) -> list[Path]:
    """All figures for which the file has numbers, as SVG and as PNG."""
    report = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    drawings = {
        "bandwidth": bandwidth_by_size,
        "tensors": time_by_tensors,
        "parts": stacked_parts,
        "bytes": bytes_per_parameter,
    }
    written = []
    for name, drawing in drawings.items():
        figure = drawing(report)
        if figure is None:
            continue
        for kind in ("svg", "png"):
            written.append(folder / f"{name}.{kind}")
            # The same numbers give the same file: no date, and names within it that do not vary.
            same: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
            with rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(written[-1], **same)
    return written


def caption(report: Report) -> str:
    return f"{describe(report)} · commit {report['commit']}"


def whole_steps(report: Report, kind: str) -> tuple[list[Row], str]:
    """Rows of a kind whose results are right, and who was left out because theirs are not."""
    rows = [r for r in report["rows"] if r["kind"] == kind and r["part"] == "all"]
    wrong = {row["implementation"] for row in rows if not row["matches"]}
    note = NOT_IN + ", ".join(sorted(wrong)) if wrong else ""
    return [row for row in rows if row["matches"]], note


def by_implementation(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["implementation"], []).append(row)
    return found


def bandwidth_by_size(report: Report) -> Figure | None:
    """Where a step is bound by memory, and how near to it."""
    rows, note = whole_steps(report, "size")
    if not rows:
        return None
    figure = new_figure(8, 4.6, caption(report))
    axes = figure.subplots()
    for name, of in by_implementation(rows).items():
        x = [row["parameters"] for row in of]
        share = [row["of_bandwidth"] for row in of]
        low = [row["of_bandwidth"] * row["ms"] / row["p80"] for row in of]
        high = [row["of_bandwidth"] * row["ms"] / row["p20"] for row in of]
        axes.plot(x, share, "o-", color=colour_of(name), label=name, markersize=4)
        axes.fill_between(x, low, high, color=colour_of(name), alpha=0.15, linewidth=0)
    axes.axhline(1, color=QUIET, linewidth=0.8, linestyle=":")
    bandwidth = max(report["copy_gb_per_s"], report["in_place_gb_per_s"])
    axes.annotate(f"a large tensor, {bandwidth:.0f} GB/s", (0.01, 1), (0, 3), **_note(axes))
    axes.set_xscale("log")
    axes.set_xlabel("parameters, in 16 tensors")
    axes.set_ylabel("needed bytes / time, of the bandwidth")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    finish(axes, "AdamW with clipping, float32: share of the memory bandwidth", note)
    return figure


def time_by_tensors(report: Report) -> Figure | None:
    """What many tensors cost, the number of parameters being the same."""
    rows, note = whole_steps(report, "tensors")
    if not rows:
        return None
    figure = new_figure(8, 4.6, caption(report))
    axes = figure.subplots()
    for name, of in by_implementation(rows).items():
        x = [row["tensors"] for row in of]
        axes.plot(x, [row["ms"] for row in of], "o-", color=colour_of(name), label=name, ms=4)
        low, high = [row["p20"] for row in of], [row["p80"] for row in of]
        axes.fill_between(x, low, high, color=colour_of(name), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["tensors"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    plain_ms(axes)
    total = max(row["parameters"] for row in rows)
    axes.set_xlabel(f"tensors, of {total:,} parameters together")
    axes.set_ylabel("milliseconds of a step")
    finish(axes, "AdamW with clipping, float32: time of a step by the number of tensors", note)
    return figure


def plain_ms(axes: Axes) -> None:
    """Ticks at 1, 2 and 5, as plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def stacked_parts(report: Report) -> Figure | None:
    """Unscale, clip and step as separate calls, beside one step that does all three."""
    rows, note = whole_steps(report, "parts")
    if not rows:
        return None
    parts = [r for r in report["rows"] if r["kind"] == "parts" and r["part"] != "all"]
    figure = new_figure(8, 1.9 + 0.5 * len(rows), caption(report))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        of = [part for part in parts if part["implementation"] == row["implementation"]]
        own = len(of) == 1
        begin = 0.0
        for part in of:
            colour = SPIKE if own else PARTS[part["part"]]
            axes.barh(place, part["ms"], left=begin, color=colour, height=0.6)
            begin += part["ms"]
        error = [[max(begin - row["p20"], 0)], [max(row["p80"] - begin, 0)]]
        axes.errorbar(begin, place, xerr=error, color=QUIET, capsize=3, linewidth=1)
        beyond = max(begin, row["p80"])
        axes.annotate(f"{row['ms']:.3g} ms", (beyond, place), (6, 0), **_label("center"))
    for part, colour in list(PARTS.items())[:3]:
        axes.barh(0, 0, color=colour, label=part)
    axes.barh(0, 0, color=SPIKE, label="all in one step")
    axes.set_yticks(range(len(rows)), [row["implementation"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("milliseconds, medians; the whisker is p20 to p80 of the whole step")
    finish(axes, f"AdamW, float32, {rows[0]['model']}: unscale, clip and step", note)
    return figure


def bytes_per_parameter(report: Report) -> Figure:
    """What each must move, by arithmetic, and what a step took for itself where it was measured."""
    entries = [t for t in report["traffic"] if t["dtype"] == "float32" and t["scaled"]]
    extra = [
        row
        for row in whole_steps(report, "model")[0]
        if row.get("extra_mib") is not None and row["dtype"] == "float32"
    ]
    first = extra[0]["model"] if extra else None
    extra = [r for r in extra if (r["model"], r["method"], r["clip"]) == (first, "AdamW", True)]
    who = ("fusedreg kernels", "torch fused", "torch foreach")
    bars = [(entry, [name for name in who if name in entry]) for entry in entries]
    height = 1.2 + 0.25 * sum(len(names) + 1 for _, names in bars)
    figure = new_figure(11 if extra else 8, height, caption(report))
    left, *right = figure.subplots(1, 2 if extra else 1, squeeze=False)[0]
    ticks, labels = [], []
    for entry, names in bars:
        first_place = ticks[-1] + 2 if ticks else 0
        for place, name in enumerate(names, first_place):
            begin = 0
            for part, size in entry[name].items():
                colour = SPIKE if name == who[0] else PARTS[part]
                left.barh(place, size, left=begin, color=colour, height=0.75)
                begin += size
            left.annotate(str(begin), (begin, place), (4, 0), **_label("center"))
            ticks.append(place)
            labels.append(f"{entry['method']}: {name}" if place == first_place else name)
    for part, colour in PARTS.items():
        left.barh(0, 0, color=colour, label=part)
    left.barh(0, 0, color=SPIKE, label="all in one step")
    left.set_yticks(ticks, labels)
    left.invert_yaxis()
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
        axes.annotate(note, (0.99, 0.01), (0, 0), **{**_note(axes), "ha": "right"})


def _note(axes: Axes) -> dict[str, Any]:
    style = {"textcoords": "offset points", "fontsize": 8, "color": QUIET}
    return {**style, "xycoords": axes.get_yaxis_transform(), "ha": "left"}


def _label(va: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "va": va, "fontsize": 9, "color": QUIET}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with the bench.json of a run")
    for path in draw(parser.parse_args().folder):
        print(path.name)


if __name__ == "__main__":
    main()
