"""`fusedreg check`: that it passes here, and that it notices each thing that can be wrong."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusedreg
import fusedreg.__main__
from fusedreg import backend
from fusedreg.__main__ import main
from fusedreg.check import accuracy
from fusedreg.check.accuracy import Place, Row, measure, problem

from cases import CASES, DTYPES, Case

CPU = torch.device("cpu")
REFERENCE, KERNELS = Place(CPU, "reference"), Place(CPU, "triton")
BY_ID = {case.id: case for case in CASES}
needs_interpreter = pytest.mark.skipif(
    not backend.interpreted(), reason="kernels step CPU parameters only where interpreted"
)


class Check(NamedTuple):
    status: int
    printed: str
    errors: str
    found: dict[str, Any]


def check(folder: Path, *arguments: str) -> Check:
    """The command on the CPU, in a terminal of 80 columns."""
    printed, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.setenv("COLUMNS", "80")
        command = ["check", "--device", "cpu", "--json", str(folder / "check.json"), *arguments]
        status = main(command)
    found = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    return Check(status, printed.getvalue(), errors.getvalue(), found)


# ---- the whole -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Every case and dtype, as on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        return check(tmp_path_factory.mktemp("check"))


def test_all_steps_are_right(whole: Check) -> None:
    assert whole.status == 0
    assert whole.errors == ""
    steps = len(CASES) * len(DTYPES) * 2
    assert whole.printed.splitlines()[-1].startswith(f"PASS: all {steps} steps are right on cpu")
    assert "FAIL" not in whole.printed


def test_table_is_whole_in_80_columns(whole: Check) -> None:
    lines = whole.printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in whole.printed
    for rule in {case.rule for case in CASES}:
        assert any(line.startswith(f"{rule} ") for line in lines)
    assert sum(line.endswith(" pass") for line in lines) == 3 * len({case.rule for case in CASES})


def test_it_says_what_was_not_run(whole: Check) -> None:
    said = " ".join(whole.printed.split())
    assert "no GPU is checked here, so no kernel is launched" in said
    assert "cpu, reference:" in said
    assert "triton:" not in said


def test_json_holds_everything(whole: Check) -> None:
    found = whole.found
    assert found["verdict"] == "pass"
    assert found["seconds"] > 0
    assert found["versions"]["fusedreg"] == fusedreg.__version__
    assert {"torch", "triton", "python"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert [finding["broken"] for finding in found["findings"]] == [False] * len(found["findings"])
    steps = found["steps"]
    names = {(step["case"], step["clip"], step["dtype"]) for step in steps}
    assert len(names) == len(steps) == len(CASES) * len(DTYPES) * 2
    for step in steps:
        assert set(step) == set(Row._fields)
        assert step["backend"] == step["path"] == "reference"
        assert (step["torch_ulp"] is None) == (BY_ID[step["case"]].torch_kwargs is None)
        assert 0 <= step["ulp"] <= step["bound"]
        assert step["failures"] == []


def test_the_numbers_say_something(whole: Check) -> None:
    """Rounding shows, once in low precision, and torch's for-loop rounds more often."""
    worst = {
        dtype: max(step["ulp"] for step in whole.found["steps"] if step["dtype"] == dtype)
        for dtype in ("float64", "float32", "bfloat16", "float16")
    }
    assert worst["float64"] == 0  # the yardstick itself
    assert 1 < worst["float32"] <= accuracy.ROUNDINGS / 2  # as its bound says
    assert 0.49 < worst["bfloat16"] < 0.501
    assert 0.49 < worst["float16"] < 0.502
    theirs = [s["torch_ulp"] for s in whole.found["steps"] if s["dtype"] == "bfloat16"]
    assert max(ulp for ulp in theirs if ulp is not None) > 1


def test_what_is_not_finite_is_a_string_in_json(whole: Check) -> None:
    """Adam of torch divides 0 by 0 in float16, where its eps is 0."""
    (step,) = (
        step
        for step in whole.found["steps"]
        if (step["case"], step["dtype"], step["clip"]) == ("adam-none", "float16", False)
    )
    assert step["torch_ulp"] == "nan"
    assert "0.5/nan" in whole.printed
    assert "torch.optim's own step gave no finite number" in " ".join(whole.printed.split())


@needs_interpreter
def test_kernels_are_checked_where_they_run(tmp_path: Path) -> None:
    ids = ["sgd_nesterov-elastic_net", "adamw-decay"]
    done = check(tmp_path, *(f"--case={name}" for name in ids))
    assert done.status == 0
    steps = [step for step in done.found["steps"] if step["path"] == "triton"]
    assert len(steps) == len(ids) * 2 * 3  # the interpreter truncates to bfloat16
    assert {(step["backend"], step["clip"], step["launches"]) for step in steps} == {
        ("triton", False, 2),
        ("triton", True, 3),
    }
    assert "cpu, triton, interpreted: worst" in done.printed
    assert " 2-3  pass" in done.printed
    assert done.printed.splitlines()[-1].startswith(
        "PASS: all 28 steps are right on cpu (reference), cpu (triton, interpreted), after"
    )


def test_the_options_restrict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = check(tmp_path, "--case=sgd-none", "--dtype=float16", "--dtype=float64")
    assert [(s["case"], s["dtype"]) for s in done.found["steps"]] == [
        ("sgd-none", "float64"),
        ("sgd-none", "float64"),
        ("sgd-none", "float16"),
        ("sgd-none", "float16"),
    ]


def test_it_leaves_torch_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        assert check(tmp_path, "--case=adam-none", "--dtype=float16").status == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as conftest.py has it
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is wrong is noticed --------------------------------------------------------------------


Step = Callable[[Any, Callable[[], None]], None]


def broken(name: str, step: Step) -> Case:
    """A case whose class steps otherwise in float32, so that the yardstick stays right."""
    case = BY_ID[name]

    def broken_step(self: Any, closure: Any = None) -> None:
        def usual() -> None:
            case.cls.step(self, closure)

        if self.param_groups[0]["params"][0].dtype == torch.float32:
            step(self, usual)
        else:
            usual()

    cls = type(case.cls.__name__, (case.cls,), {"step": broken_step})
    return Case(case.rule, case.penalty, cls, case.kwargs)


def params(optimizer: Any) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def wrong_rate(optimizer: Any, usual: Callable[[], None]) -> None:
    optimizer.param_groups[0]["lr"] *= 1 + 1e-5
    usual()


def written_grad(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    params(optimizer)[1].grad.neg_().neg_()[0, 0].mul_(2)


def other_grad(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    params(optimizer)[1].grad = params(optimizer)[1].grad.clone()


def lost_zeros(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    for param in params(optimizer):
        param.data[param == 0] = 1e-30


def nan_weight(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    params(optimizer)[2].data.fill_(math.nan)


def wrong_moment(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    optimizer.state[params(optimizer)[-2]]["momentum_buffer"][-1] *= 1 + 1e-5


def wrong_mass(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    optimizer.state[params(optimizer)[0]]["momentum_mass"] *= 1 + 1e-9


def raises(optimizer: Any, usual: Callable[[], None]) -> None:
    raise RuntimeError("no kernel image\nand more")


WRONG: dict[str, tuple[Step, str]] = {
    "rate": (wrong_rate, r"error .* ulp, bound 16"),
    "grad": (written_grad, r"\.grad was written"),
    "other grad": (other_grad, r"\.grad was written"),
    "zeros": (lost_zeros, r"weights on the wrong side of the threshold"),
    "nan": (nan_weight, r"error nan ulp, bound 16"),
    "moment": (wrong_moment, r"error .* ulp, bound 16"),
    "mass": (wrong_mass, r"step count or momentum mass"),
    "error": (raises, r"fusedreg raised RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_broken_optimizer_fails(what: str) -> None:
    step, failure = WRONG[what]
    case = broken("sgd_nesterov-l1_prox", step)
    inputs = accuracy.inputs_of(case)
    for dtype in (torch.float32, torch.float16):
        row = measure(problem(case, dtype, None, inputs.rounded(dtype)), REFERENCE)
        if dtype == torch.float16:
            assert row.failures == ()
        else:
            (found,) = row.failures
            assert re.fullmatch(failure, found)


def test_failures_are_named_and_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cases = [BY_ID["sgd-none"], broken("adam-l1_prox", wrong_rate)]
    monkeypatch.setattr(fusedreg.__main__, "CASES", cases)
    done = check(tmp_path)
    assert done.status == 1
    assert done.found["verdict"] == "fail"
    failed = [step for step in done.found["steps"] if step["failures"]]
    assert [(step["case"], step["dtype"], step["clip"]) for step in failed] == [
        ("adam-l1_prox", "float32", False),
        ("adam-l1_prox", "float32", True),
    ]
    for clip in ("not clipped", "clipped"):
        assert f"FAIL adam-l1_prox, {clip}, float32, cpu, reference path\n" in done.printed
    assert "bound 16, torch.optim -, backend reference, launches 0\n" in done.printed
    lines = done.printed.splitlines()
    assert lines[-1].startswith("FAIL: 2 of 16 steps are wrong on cpu (reference), after")
    assert [line.split()[-1] for line in lines if line.startswith(("sgd ", "adam "))] == [
        "pass",
        "FAIL",
    ]
    (command,) = {line.strip() for line in lines if "fusedreg check" in line}
    assert command == "fusedreg check --device cpu --case adam-l1_prox --dtype float32"
    assert main(command.split()[1:]) == 1
    monkeypatch.setattr(fusedreg.__main__, "CASES", CASES)
    assert main(command.split()[1:]) == 0


def test_a_path_that_was_not_taken_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `backend` says so and nothing was launched."""
    (step, *_) = accuracy.problems([BY_ID["adam-none"]], [torch.float32])
    monkeypatch.setattr(Place, "option", "reference")
    row = measure(step, KERNELS)
    assert row.failures == ("backend is reference", "0 launches")
    monkeypatch.setattr(fusedreg.Adam, "backend", "triton")
    assert measure(step, KERNELS).failures == ("0 launches",)


@needs_interpreter
def test_kernels_that_were_not_asked_for_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    (step, *_) = accuracy.problems([BY_ID["sgd-none"]], [torch.float32])
    monkeypatch.setattr(Place, "option", "fused")
    assert measure(step, REFERENCE).failures == ("backend is triton", "2 launches")


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
def test_a_wrong_yardstick_is_noticed(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is wrong in the same way as what it measures, but torch.optim is not."""
    usual = fusedreg.adam._denominator
    monkeypatch.setattr(fusedreg.adam, "_denominator", lambda *args: usual(*args) * (1 + 1e-12))
    found = accuracy.problems([BY_ID["adam-decay"]], [torch.float64])
    row = measure(list(found)[clip], REFERENCE)
    assert row.ulp == 0
    (failure,) = row.failures
    assert re.fullmatch(r"torch\.optim in float64 is .* ulp from the yardstick", failure)


def test_a_table_of_errors_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for which nothing compiles."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fusedreg.__main__, "CASES", [broken("adam-decay", raises)])
    done = check(tmp_path, "--dtype=float32", "--dtype=float16")
    assert done.status == 1
    (line,) = (line for line in done.printed.splitlines() if line.startswith("adam "))
    assert line.split() == ["adam", "decay", "nan/-", "0.5/inf", "0", "FAIL"]
    assert "bound (at most float16 0.502)" in " ".join(done.printed.split())
    assert done.printed.count("fusedreg raised RuntimeError: no kernel image\n") == 2


def test_torchs_own_error_is_said_to_be_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any, **kwargs: Any) -> None:
        raise TypeError("unexpected keyword")

    (step, *_) = accuracy.problems([BY_ID["sgd-decay"]], [torch.float32])
    monkeypatch.setattr(torch.optim, "SGD", refuses)
    row = measure(step, REFERENCE)
    assert row.failures == ("torch.optim raised TypeError: unexpected keyword",)
    assert row.ulp <= row.bound


# ---- nothing to step -----------------------------------------------------------------------------


def test_a_broken_installation_takes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    done = check(tmp_path)
    assert done.status == 2
    assert done.found["verdict"] == "broken"
    assert done.found["steps"] == []
    assert done.found["findings"][0]["name"] == "torch"
    assert "BROKEN: torch 2.6.0 is older" in done.printed
    assert done.printed.splitlines()[-1] == "BROKEN: no step was taken (torch)"


def test_nothing_to_step_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Place, "takes", lambda self, dtype: False)
    done = check(tmp_path)
    assert done.status == 2
    assert done.found["verdict"] == "broken"
    assert "no step was taken (no device has the dtypes)" in done.printed


# ---- the command line ----------------------------------------------------------------------------


def test_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("fusedreg.check")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(fusedreg, "check")
    assert main(["check"]) == 2
    assert capsys.readouterr().err == (
        "fusedreg check: rich is missing, install it with: pip install rich\n"
    )


def test_another_missing_module_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("fusedreg.check")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fusedreg.machine", None)
    monkeypatch.delattr(fusedreg, "check")
    with pytest.raises(ModuleNotFoundError, match=r"fusedreg\.machine"):
        main(["check"])


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--device", "cuda:77"]) == 2
    assert "fusedreg check: --device cuda:77: here are cpu" in capsys.readouterr().err


def test_a_device_without_an_index_is_all_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    seen: list[Any] = []
    monkeypatch.setattr(fusedreg.check, "devices", lambda: [CPU, *gpus])
    monkeypatch.setattr(fusedreg.check, "run", lambda *args: seen.append(args[0]) or 0)
    for options in ([], ["--device=cuda"], ["--device=cuda:1", "--device=cuda"]):
        assert main(["check", *options]) == 0
    assert seen == [[CPU, *gpus], gpus, [gpus[1], gpus[0]]]


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", str(tmp_path / "missing" / "file.json")]) == 2
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--device", "quark", "'quark' is no device of torch"),
        ("--dtype", "int8", "none of float64, float32, bfloat16, float16"),
        ("--case", "adam", "'adam' is none of sgd-none to adamw_amsgrad-elastic_net"),
    ],
)
def test_wrong_arguments(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["check", option, value])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_module_runs() -> None:
    command = [sys.executable, "-m", "fusedreg", "check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--device" in done.stdout
