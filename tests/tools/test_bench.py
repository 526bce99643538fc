"""The benchmark on a CPU, its kernels interpreted: its logic, not its numbers."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import subprocess
import sys
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow  # a minute of dry runs, which measure the package and do not test it

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"


def run(*arguments: Any) -> str:
    """What a script of the benchmark prints."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder, which is on sys.path only where a script of it runs."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one dry run."""
    out = tmp_path_factory.mktemp("bench")
    shown = run(BENCH / "run.py", out, "--dry-run", "--quick")
    assert shown == (out / "bench.txt").read_text()
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text())


def test_every_implementation_is_timed_and_right(report: dict[str, Any]) -> None:
    assert {"torch", "triton", "python", "fusedreg"} <= report["versions"].keys()
    assert report["left_out"] == []
    first = [row for row in report["rows"] if row["kind"] == "model"]
    names = {"fusedreg (triton)", "torch fused", "torch foreach", "torch for-loop"}
    assert names <= {row["implementation"] for row in first}
    paths = {row["backend"] for row in first if row["implementation"] == "fusedreg reference"}
    assert paths == {"reference"}
    for row in report["rows"]:
        assert row["matches"], row
        assert 0 < row["p20"] <= row["ms"] <= row["p80"]
        if row["part"] == "all":
            assert 0 <= row["error_of_bound"] <= 1
            assert row["ratio_p20"] <= row["ratio"] <= row["ratio_p80"]
            if row["implementation"] == "fusedreg (triton)":
                assert row["ratio"] == 1
                assert row["launches"] == 2 + row["clip"]
                assert row["moved_bytes"] == row["needed_bytes"]


def test_parts_add_up_to_the_step(report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row["kind"] == "parts"]
    for name in {row["implementation"] for row in rows}:
        whole, *parts = (row for row in rows if row["implementation"] == name)
        assert whole["part"] == "all"
        wanted = ["step"] if name.startswith("fusedreg") else ["unscale", "clip", "step"]
        assert [part["part"] for part in parts] == wanted
        # One round, so the medians add up, to the rounding of the additions.
        assert sum(part["ms"] for part in parts) == pytest.approx(whole["ms"], rel=1e-12)
        assert sum(part["moved_bytes"] for part in parts) == whole["moved_bytes"]


def test_the_text_has_what_the_file_says(folder: Path, report: dict[str, Any]) -> None:
    text = (folder / "bench.txt").read_text()
    assert f"commit {report['commit']} · {report['threads']} threads" in text
    assert report["machine"]["cpu"] in text
    for name in ("copy_gb_per_s", "in_place_gb_per_s"):
        assert report[name] > 0
        assert f"{report[name]:.1f} GB/s" in text
    for name, version in report["versions"].items():
        assert (f"{name} {version}" in text) == (version is not None)
    for row in report["rows"]:
        name = row["implementation"] if row["part"] == "all" else f"  {row['part']}"
        numbers = r"\s+".join(f"{row[of]:.4g}" for of in ("ms", "p20", "p80"))
        assert re.search(rf"^ {re.escape(name)}\s+{numbers}\b", text, re.M)


def test_figures_are_drawn_from_the_file_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_bytes((folder / "bench.json").read_bytes())
    drawn = run(BENCH / "figures.py", tmp_path).split()
    assert {f"{name}.svg" for name in ("bandwidth", "tensors", "parts", "bytes")} <= set(drawn)
    for name in drawn:
        if name.endswith(".svg"):
            assert (tmp_path / name).read_text() == (folder / name).read_text()
        else:
            assert (tmp_path / name).stat().st_size > 0


def test_figures_show_nothing_of_what_differs(
    report: dict[str, Any], bench: Any, tmp_path: Path
) -> None:
    for row in report["rows"]:
        if row["implementation"] == "torch fused":
            row |= {"matches": False, "ratio": None}
    (tmp_path / "bench.json").write_text(json.dumps(report))
    bench("figures").draw(tmp_path)
    for name in ("bandwidth", "tensors", "parts"):
        shown = re.findall(r">([^<>]*torch fused[^<>]*)<", (tmp_path / f"{name}.svg").read_text())
        assert shown == ["Left out because their results differ: torch fused"]


def test_the_bytes_of_every_method_are_drawn(folder: Path, bench: Any) -> None:
    labels = re.findall(r">([^<>]+): fusedreg kernels<", (folder / "bytes.svg").read_text())
    assert labels == list(bench("jobs").METHODS)


def test_without_time_everything_is_left_out(tmp_path: Path) -> None:
    run(BENCH / "run.py", tmp_path, "--dry-run", "--budget", "0")
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["rows"] == []
    assert "tiny, AdamW, float32, clipped: time" in report["left_out"]
    text = (tmp_path / "bench.txt").read_text()
    assert "Left out:" in text
    assert {row["verdict"] for row in report["targets"]} == {"not measured: time"}
    assert sum("fusedreg + L1" in row["arms"] for row in report["targets"]) == 2
    assert text.count("not measured: time") == len(report["targets"]) > 0
    assert not any(row["met"] for row in report["targets"])


def test_some_methods_alone_are_asked_for(tmp_path: Path) -> None:
    run(BENCH / "run.py", tmp_path, "--dry-run", "--budget", "0", "--methods", "Lion", "LAMB")
    report = json.loads((tmp_path / "bench.json").read_text())
    methods = {re.split(", ", line)[1] for line in report["left_out"]}
    assert methods == {"Lion", "LAMB"}
    assert report["targets"] == []


def test_rare_methods_come_after_the_usual_ones(bench: Any) -> None:
    jobs, methods = bench("jobs").jobs, bench("jobs")
    rare = [method for method in methods.METHODS if method not in methods.USUAL]
    quick = jobs(dry=False, quick=True)
    assert {job.method for job in quick} == set(methods.USUAL)
    found = jobs(dry=False, quick=False)
    assert found[: len(quick)] == quick
    assert [job.method for job in found[len(quick) :]][: len(rare)] == rare
    every = {(job.model, job.method, job.dtype, job.clip) for job in found if job.kind == "model"}
    axes = (bench("jobs").MODELS, methods.METHODS, methods.DTYPES, (True, False))
    assert every == set(product(*axes))


def test_targets_are_those_that_were_set(bench: Any) -> None:
    """Clipped: 1.3 and 5 times faster; unclipped 5 % slower at most; overhead no larger."""
    found = {}
    for target in bench("run").targets(dry=False):
        case = target.model, str(target), target.over, target.under
        assert case not in found
        found[case] = f"{target.sense} {target.limit:g}{target.unit}"
    rules = ("AdamW", "Adam + L2", "SGD momentum")
    wanted = {}
    for model in ("GPT-2 124M", "144 tensors of 264000"):
        for rule in rules:
            wanted[model, f"{rule}, clipped", "torch fused", "fusedreg"] = "at least 1.3"
            wanted[model, f"{rule}, clipped", "torch default", "fusedreg"] = "at least 5"
            wanted[model, rule, "fusedreg", "torch fused"] = "at most 1.05"
        wanted[model, "AdamW + L1, clipped", "fusedreg + L1", "fusedreg"] = "at most 1.25"
    many, small = "3000 tensors of 3500", "10 tensors of 1000"
    wanted[many, "AdamW, clipped", "torch fused", "fusedreg"] = "at least 1.3"
    for rule in rules:
        wanted[small, rule, "fusedreg", "torch fused"] = "at most 1"
        wanted[small, f"{rule}, clipped", "fusedreg", "torch fused"] = "at most 1"
    wanted[small, "AdamW, clipped: first step", "fusedreg", "fusedreg reference"] = "at most 1 s"
    assert found == wanted


def test_every_target_is_measured_and_shown(
    folder: Path, report: dict[str, Any], bench: Any
) -> None:
    asked = bench("run").targets(dry=True)
    assert [row["what"] for row in report["targets"]] == [str(target) for target in asked]
    text, page = (folder / "bench.txt").read_text(), bench("page").results(folder)
    for row, target in zip(report["targets"], asked, strict=True):
        # Of the one pair of a dry run.
        over, under = row["ms"]
        value = 1e-3 * (over - under) if "first" in row["what"] else over / under
        assert row["value"] == pytest.approx(value, rel=1e-12)
        assert row["verdict"] == ("met" if row["met"] else "missed")
        least = target.sense == "at least"
        assert row["met"] == (value >= target.limit if least else value <= target.limit)
        assert sum("fusedreg (llvm)" in arm for arm in row["arms"]) == 1 + ("L1" in row["what"])
        cells = bench("page").target_cells(row)
        assert f"| {' | '.join(cells)} |" in page
        assert re.search(r"\s+".join(map(re.escape, cells)), text)


@pytest.mark.parametrize(
    ("sense", "limit", "verdict"),
    [
        *[("at least", 2, "met"), ("at least", 2.1, "missed")],
        *[("at most", 2, "met"), ("at most", 1.9, "missed")],
    ],
)
def test_a_target_is_met_by_the_median_of_the_pairs(
    bench: Any, monkeypatch: pytest.MonkeyPatch, sense: str, limit: float, verdict: str
) -> None:
    module, machine = bench("run"), machine_of(bench)
    over, under = "torch fused", "fusedreg"
    times = {over: [[4.0], [2.0], [9.0]], under: [[2.0], [2.0], [1.0]]}
    monkeypatch.setattr(module, "rounds", lambda *_: times)
    target = module.Target("tiny", "AdamW", over, under, sense, limit)
    setting = bench("verify").Setting(bench("jobs").TINY["tiny"], torch.float32, machine.device)
    row = module.measured(target, setting, machine)
    assert (row["value"], row["rounds"], row["verdict"]) == (2, 3, verdict)


@pytest.mark.parametrize(
    ("who", "verdict"),
    [
        ("fusedreg", "missed; fusedreg: results differ: by "),
        ("torch fused", "met; torch fused: results differ: by "),
    ],
)
def test_a_target_is_missed_where_our_results_differ_and_told_where_torchs_do(
    bench: Any, monkeypatch: pytest.MonkeyPatch, who: str, verdict: str
) -> None:
    module = bench("run")
    monkeypatch.setitem(module.MAKERS, who, unclipped(bench("contenders"), None))
    shapes, machine = bench("jobs").TINY["tiny"], machine_of(bench)
    setting = bench("verify").Setting(shapes, torch.float32, machine.device)
    target = module.Target("tiny", "AdamW", "torch fused", "fusedreg", "at least", 0.0)
    row = module.measured(target, setting, machine)
    assert row["verdict"].startswith(verdict)
    assert ("value" in row) == (who != "fusedreg")


def test_spread_is_median_and_ranks(bench: Any) -> None:
    found = bench("measure").spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert found == {"ms": 3.5, "p20": 2.0, "p80": 5.0}


def test_no_arm_always_follows_the_other(bench: Any) -> None:
    called: list[str] = []
    timed = {
        "A": [partial(called.append, "A1"), partial(called.append, "A2")],
        "B": [partial(called.append, "B1")],
    }
    before = partial(called.append, "-")
    times = bench("measure").rounds(timed, machine_of(bench), before)
    assert {len(of) for of in times.values()} == {6}  # even, so that each is first as often
    assert " ".join(called) == " ".join(["- A1 A2 - B1", "- B1 - A1 A2"] * 3)


def softshrink(contenders: ModuleType, method: Any) -> Any:
    """What users write for L1 after torch's step, which is not the proximal step of Adam."""

    def make(groups: Any, task: Any) -> Any:
        contender = contenders.of_torch(groups, task, foreach=True)

        @torch.no_grad()
        def threshold() -> None:
            for group in groups:
                for param in group["params"]:
                    shrink = group["lr"] * method.l1
                    param.copy_(torch.nn.functional.softshrink(param, shrink))

        contender.parts["threshold"] = threshold
        return contender

    return make


def unclipped(contenders: ModuleType, method: Any) -> Any:
    """Clipping that does nothing."""

    def make(groups: Any, task: Any) -> Any:
        contender = contenders.of_torch(groups, task, foreach=True)
        del contender.parts["clip"]
        return contender

    return make


def test_a_wrong_implementation_gets_no_ratio(bench: Any) -> None:
    contenders, measure = bench("contenders"), bench("measure")
    job = bench("jobs").Job("model", "tiny in 2 groups", "AdamW + L1")
    method = bench("jobs").METHODS[job.method]
    makers = {
        "fusedreg": contenders.own,
        "torch foreach": contenders.TORCH["torch foreach"],
        "softshrink": softshrink(contenders, method),
        "unclipped": unclipped(contenders, method),
    }
    rows = by_name(bench, measure, job, makers)
    assert rows["torch foreach"]["verdict"] == ""
    assert rows["torch foreach"]["ratio"] > 0
    for name in ("softshrink", "unclipped"):
        assert rows[name]["verdict"].startswith("results differ: by ")
        assert rows[name]["ratio"] is rows[name]["ratio_p20"] is rows[name]["ratio_p80"] is None
        assert rows[name]["ms"] > 0


def test_nobody_gets_a_ratio_to_a_wrong_fusedreg(bench: Any) -> None:
    contenders, measure = bench("contenders"), bench("measure")
    job = bench("jobs").Job("model", "tiny", "AdamW + L1", clip=False)
    method = bench("jobs").METHODS[job.method]
    makers = {
        "fusedreg": softshrink(contenders, method),
        "torch fused": contenders.TORCH["torch fused"],
    }
    for row in by_name(bench, measure, job, makers).values():
        assert row["ratio"] is None
        assert row["verdict"]


def test_one_that_fails_does_not_stop_the_others(bench: Any) -> None:
    def make(groups: Any, task: Any) -> Any:
        raise OSError("no such card")

    contenders, measure = bench("contenders"), bench("measure")
    makers = {"fusedreg": contenders.own, "other": make}
    rows = by_name(bench, measure, bench("jobs").Job("model", "tiny"), makers)
    assert rows["other"]["verdict"] == "OSError: no such card"
    assert "ms" not in rows["other"]
    assert rows["fusedreg (llvm)"]["ratio"] == 1


def machine_of(bench: Any) -> Any:
    """A CPU on which no time is left, so that the least is done."""
    return bench("measure").Machine(torch.device("cpu"), 0.0, 0.0, bandwidth=1e9)


def by_name(bench: Any, measure: ModuleType, job: Any, makers: Any) -> dict[str, Any]:
    rows = measure.compare(job, makers, machine_of(bench))
    return {row["implementation"]: row for row in rows}


@pytest.mark.parametrize("method", ["RMSprop", "Adagrad", "Lion", "LAMB"])
def test_rare_methods_are_timed_beside_whoever_has_them(
    bench: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    contenders, measure = bench("contenders"), bench("measure")
    monkeypatch.setattr(contenders, "OTHERS", {})
    job = bench("jobs").Job("model", "tiny in 2 groups", method)
    makers, missing = measure.participants(job, machine_of(bench))
    assert missing == {}
    rows = by_name(bench, measure, job, makers)
    theirs = {
        "RMSprop": {"torch foreach", "torch for-loop"},
        "Adagrad": {"torch fused", "torch foreach", "torch for-loop"},
    }
    others = theirs.get(method, {"fusedreg reference"})
    assert rows.keys() == {"fusedreg (llvm)"} | others
    for row in rows.values():
        assert row["verdict"] == ""
        assert row["ratio"] > 0
    ours = rows["fusedreg (llvm)"]
    again = 4 if method == "LAMB" else 0  # the gradient
    assert ours["moved_bytes"] == ours["needed_bytes"] + again


def test_another_commit_is_timed_in_turns_with_this_tree(tmp_path: Path) -> None:
    shown = run(BENCH / "run.py", tmp_path, "--dry-run", "--quick", "--base", "HEAD")
    number = r"[0-9.e+-]+"
    for line in shown.splitlines():
        assert re.fullmatch(
            rf"\S.*: {number} ms, at HEAD {number} ms, "
            rf"ratio {number} \({number} to {number}\), bitwise equal",
            line,
        )
    assert shown.startswith("tiny, AdamW, float32, clipped: ")


def test_another_commit_may_lack_a_method_or_differ(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits, machine = bench("bits"), machine_of(bench)
    machine.dry, machine.deadline = True, float("inf")
    jobs = [bench("jobs").Job("model", "tiny", method) for method in ("AdamW", "SGD momentum")]
    monkeypatch.setattr(bits, "jobs", lambda *_, **__: jobs)

    class Other(Executor):
        """Calls at once, in a version that has no SGD and whose AdamW is Adam."""

        def submit(self, call: Any, *arguments: Any) -> Any:
            done: Future[Any] = Future()
            fusedreg = bench("contenders").fusedreg
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(fusedreg, "AdamW", fusedreg.Adam)
                patch.delattr(fusedreg, "SGD")
                try:
                    done.set_result(call(*arguments))
                except AttributeError as error:
                    done.set_exception(error)
            return done

    with bits.process() as this:
        versions = nullcontext({"base": Other(), "this": this})
        monkeypatch.setattr(bits, "versions", lambda _: versions)
        bits.compare_versions("old", machine, quick=True)
    adamw, sgd = capsys.readouterr().out.splitlines()
    assert adamw.endswith(", not bitwise equal")
    assert sgd == "tiny, SGD momentum, float32, clipped: module 'fusedreg' has no attribute 'SGD'"


def test_bits_that_differ_are_told(
    bench: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits, zero = bench("bits"), torch.zeros(2)
    same = {"parameter 0": bits.digest(zero), "step 0": bits.digest(torch.tensor(3.0))}
    commits = [
        {"adam": same, "lion": same, "lamb": same},
        {"adam": same, "lion": {**same, "parameter 0": bits.digest(-zero)}, "sgd": same},
    ]

    class Worker(Executor):
        def submit(self, *_: Any) -> Any:
            done: Future[Any] = Future()
            done.set_result(commits.pop(0))
            return done

    versions = nullcontext({"base": Worker(), "this": Worker()})
    monkeypatch.setattr(bits, "versions", lambda _: versions)
    monkeypatch.setattr(sys, "argv", ["bits.py", "--base", "HEAD"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which it sets, and which is taken back here
    with pytest.raises(SystemExit, match="1"):
        bits.main()
    assert capsys.readouterr().out.splitlines() == [
        "lion:  parameter 0",
        "lamb: only in HEAD",
        "sgd: only in this tree",
        "2 programs in both, 1 of them differ in some bit",
    ]


def test_examples_in_docstrings(bench: Any) -> None:
    failed, tried = doctest.testmod(bench("jobs"))
    assert tried > 0
    assert failed == 0


def test_the_line_of_a_target(bench: Any) -> None:
    row = {"what": "AdamW", "model": "tiny", "arms": ["torch fused", "fusedreg"], "unit": ""}
    row |= {"ms": [3.0, 2.0], "value": 1.5, "p20": 1.25, "p80": 1.75, "rounds": 6}
    row |= {"target": "at least 2", "verdict": "missed; torch fused: results differ: by 2.0e-05"}
    assert bench("page").target_cells(row) == [
        *("AdamW", "tiny", "torch fused / fusedreg", "3 / 2"),
        *("1.5 (1.25 to 1.75)", "6", "at least 2", "missed; torch fused differs"),
    ]


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [  # as their authors count them; ResNet-50 and ViT-B/16 as in torchvision
        ("GPT-2 124M", 124_439_808, 148),
        ("GPT-2 124M in 50 groups", 124_439_808, 148),
        ("GPT 1.3B", 1_315_723_264, 292),
        ("ResNet-50", 25_557_032, 161),
        ("ViT-B", 86_567_656, 152),
        ("3000 tensors of 3500", 10_500_000, 3000),
    ],
)
def test_models_have_their_sizes(bench: Any, model: str, parameters: int, tensors: int) -> None:
    groups = bench("jobs").MODELS[model]
    shapes = [shape for group in groups for shape in group]
    assert (sum(map(prod, shapes)), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize(
    ("method", "scaled", "floor", "fused"),
    [
        *[("AdamW", False, 8, 10), ("AdamW", True, 8, 12), ("SGD momentum", False, 6, 8)],
        *[("Adagrad", False, 6, 8), ("RMSprop", False, 8, 0), ("LAMB", False, 11, 0)],
    ],
)
def test_traffic_is_that_of_the_accesses(
    bench: Any, method: str, scaled: bool, floor: int, fused: int
) -> None:
    """Counted by hand: the gradient twice, parameter and states read and written; torch's clipping
    reads, reads and writes the gradient, its unscaling reads and writes it. For LAMB parameter and
    states once more; what torch has no fused step for moves nothing there."""
    methods = bench("jobs")
    assert methods.needed_numbers(methods.METHODS[method], clip=True) == floor
    moved = methods.moved_numbers(methods.METHODS[method], True, scaled, "torch fused")
    assert sum(moved.values()) == fused


def test_the_page_shows_what_the_file_says(bench: Any) -> None:
    page = bench("page")
    text = page.PAGE.read_text()
    shown = text.partition(page.BEGIN)[2].partition(page.END)[0]
    (name,) = re.findall(r"`bench/results/(.*?)/bench.json`", shown)
    assert shown.strip() == page.results(BENCH / "results" / name).strip()
    for figure in ("parts", "bandwidth", "tensors", "bytes"):
        copied = ROOT / f"docs/figures/benchmark-{figure}.svg"
        assert copied.read_text() == (BENCH / f"results/{name}/{figure}.svg").read_text()
        assert f"(figures/{copied.name})" in text.replace("\n", "")
