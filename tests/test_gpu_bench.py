"""The benchmark for GPUs, run on a CPU through the interpreter: its logic, not its numbers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def dry_run(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The report and the text of a run."""
    command = [sys.executable, BENCH / "run.py", out, "--dry-run", *options]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown == (out / "bench.txt").read_text()
    return json.loads((out / "bench.json").read_text()), shown


def test_dry_run_reports_every_implementation(tmp_path: Path) -> None:
    report, shown = dry_run(tmp_path, "--quick", "--commit", "abc")
    assert {"torch", "triton", "python", "fusedreg"} <= report["versions"].keys()
    assert report["versions"]["commit"] == "abc"
    assert report["copy_bandwidth"] > 0
    assert report["left_out"] == []
    for result in report["results"]:
        timed = result["implementations"]
        compiled = {f"compiled {result['compiled']}"}
        theirs = compiled if result["compiled"] else {"torch fused", "torch foreach"}
        assert timed.keys() >= {"fusedreg", *theirs}
        assert not [one["error"] for one in timed.values() if "error" in one]
        assert timed["fusedreg"]["backend"] == "triton"
        assert timed["fusedreg"]["launches"] == 2 + result["clip"]
        for one in timed.values():
            assert one["ms"]["p20"] <= one["ms"]["median"] <= one["ms"]["p80"]
            assert one["host_us"] > 0
        assert result["model"] in shown
    adamw = [r for r in report["results"] if (r["method"], r["dtype"]) == ("AdamW", "float32")]
    assert {(r["clip"], r["bytes_per_parameter"]) for r in adamw} == {(False, 28), (True, 32)}


def test_without_time_everything_is_left_out(tmp_path: Path) -> None:
    report, shown = dry_run(tmp_path, "--budget", "0")
    assert report["results"] == []
    assert "tiny, AdamW, float32 (time)" in report["left_out"]
    assert "left out" in shown


def test_sweep_times_other_block_sizes(tmp_path: Path) -> None:
    report, shown = dry_run(tmp_path, "--sweep")
    assert [(one["block"], one["clip"]) for one in report["sweep"]] == [(1024, False), (1024, True)]
    assert "1024 x 4 of 8192, clipped" in shown


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [  # as their authors count them; ResNet-50 as in torchvision
        ("GPT-2 124M", 124_439_808, 148),
        ("GPT-2 124M in 50 groups", 124_439_808, 148),
        ("GPT 1.3B", 1_315_723_264, 292),
        ("ResNet-50", 25_557_032, 161),
        ("3000 tensors of 3500", 10_500_000, 3000),
    ],
)
def test_models_have_their_sizes(model: str, parameters: int, tensors: int) -> None:
    groups = runpy.run_path(str(BENCH / "shapes.py"))["MODELS"][model]
    shapes = [shape for group in groups for shape in group]
    assert (sum(map(prod, shapes)), len(shapes)) == (parameters, tensors)
