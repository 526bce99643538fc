"""`fusedreg check`: that it passes here, and that it notices each thing that can be wrong."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusedreg
import fusedreg.__main__
from fusedreg import backend
from fusedreg.__main__ import main
from fusedreg.check import accuracy, installation, report
from fusedreg.check.accuracy import Place, Row, measure
from fusedreg.check.installation import Finding

from cases import CASES, DTYPES, Case

CPU = torch.device("cpu")
REFERENCE, HOST, KERNELS = (Place(CPU, path) for path in ("reference", "llvm", "triton"))
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
    steps = len(whole.found["steps"])
    assert whole.printed.splitlines()[-1].startswith(f"PASS: all {steps} steps are right on cpu")
    assert "FAIL" not in whole.printed


def test_table_is_whole_in_80_columns(whole: Check) -> None:
    lines = whole.printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in whole.printed
    for rule in {case.rule for case in CASES}:
        assert any(line.startswith(f"{rule} ") for line in lines)
    passed = sum(line.endswith(" pass") for line in lines)
    assert passed == 2 * 3 * len({case.rule for case in CASES})  # two paths, three kinds


def test_it_says_what_was_not_run(whole: Check) -> None:
    said = " ".join(whole.printed.split())
    assert "steps on the CPU take the path llvm (llvmlite 0." in said
    assert "no GPU is checked here, so none of triton's kernels is launched" in said
    assert "cpu, reference:" in said
    assert "cpu, llvm:" in said
    assert "triton:" not in said


def test_json_holds_everything(whole: Check) -> None:
    found = whole.found
    assert found["verdict"] == "pass"
    assert found["seconds"] > 0
    assert found["versions"]["fusedreg"] == fusedreg.__version__
    assert {"torch", "triton", "llvmlite", "python"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert [finding["broken"] for finding in found["findings"]] == [False] * len(found["findings"])
    steps = found["steps"]
    given = ("path", "weights", "case", "first", "clip", "dtype")
    names = {tuple(step[name] for name in given) for step in steps}
    assert len(names) == len(steps)
    for path in ("reference", "llvm"):
        kinds = {(s["case"], s["clip"], s["dtype"]) for s in steps if s["path"] == path}
        # Of the kernels not each, but each rule with each penalty, and either with each dtype.
        assert path == "llvm" or len(kinds) == len(CASES) * len(DTYPES) * 2
        assert {case for case, *_ in kinds} == set(BY_ID)
        rules = {(BY_ID[case].rule, clip, dtype) for case, clip, dtype in kinds}
        penalties = {(BY_ID[case].penalty, dtype) for case, _, dtype in kinds}
        assert len(rules) == len({case.rule for case in CASES}) * len(DTYPES) * 2
        assert len(penalties) == len({case.penalty for case in CASES}) * len(DTYPES)
    for step in steps:
        assert set(step) == set(Row._fields)
        assert step["backend"] == step["path"] in ("reference", "llvm")
        launches = 2 + step["clip"] + 2 * BY_ID[step["case"]].cls.layerwise
        assert step["launches"] == (0 if step["path"] == "reference" else launches)
        assert (step["torch_ulp"] is None) == (BY_ID[step["case"]].torch_kwargs is None)
        assert 0 <= step["ulp"] <= step["bound"]
        assert step["failures"] == []


def test_some_steps_have_work_for_threads(whole: Check) -> None:
    """The host's kernels take chunks of 65,536 elements, and a thread 32,768 at least."""
    large = [step for step in whole.found["steps"] if step["weights"] > 2 * 65536]
    assert {step["path"] for step in large} == {"llvm"}
    assert {step["dtype"] for step in large} == {accuracy.dtype_name(dtype) for dtype in DTYPES}
    assert {step["clip"] for step in large} == {False, True}


def test_the_numbers_say_something(whole: Check) -> None:
    """Rounding shows, once in low precision, and torch's for-loop rounds more often."""
    # Without those whose bound has a sum of float64 in it.
    steps = [step for step in whole.found["steps"] if step["bound"] <= accuracy.ROUNDINGS]
    worst = {
        dtype: max(step["ulp"] for step in steps if step["dtype"] == dtype)
        for dtype in ("float64", "float32", "bfloat16", "float16")
    }
    assert worst["float64"] > 1  # the yardstick has other code
    assert worst["float32"] > 1
    assert 0.49 < worst["bfloat16"] < 0.501
    assert 0.49 < worst["float16"] < 0.502
    theirs = [s["torch_ulp"] for s in whole.found["steps"] if s["dtype"] == "bfloat16"]
    assert max(ulp for ulp in theirs if ulp is not None) > 1


def test_what_is_not_finite_is_a_string_in_json(whole: Check) -> None:
    """Adam of torch divides 0 by 0 in float16, where its eps is 0."""
    theirs = {
        step["torch_ulp"]
        for step in whole.found["steps"]
        if (step["case"], step["dtype"], step["clip"]) == ("adam-none", "float16", False)
    }
    assert "nan" in theirs
    assert "0.5/nan" in whole.printed
    assert "torch.optim's own step gave no finite number" in " ".join(whole.printed.split())


@needs_interpreter
def test_kernels_are_checked_where_they_run(tmp_path: Path) -> None:
    ids = ["sgd_nesterov-elastic_net", "adamw-decay"]
    done = check(tmp_path, *(f"--case={name}" for name in ids))
    assert done.status == 0
    steps = [step for step in done.found["steps"] if step["path"] == "triton"]
    assert {(step["case"], step["dtype"]) for step in steps} == {
        (name, dtype) for name in ids for dtype in ("float64", "float32", "float16")
    }  # the interpreter truncates to bfloat16
    assert {(step["backend"], step["clip"], step["launches"]) for step in steps} == {
        ("triton", False, 2),
        ("triton", True, 3),
    }
    assert "cpu, triton, interpreted: worst" in done.printed
    assert " 2-3  pass" in done.printed
    assert done.printed.splitlines()[-1].startswith(
        f"PASS: all {len(done.found['steps'])} steps are right on cpu (reference), cpu (llvm), "
        "cpu (triton, interpreted), after"
    )


def test_the_options_restrict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = check(tmp_path, "--case=sgd-none", "--dtype=float16", "--dtype=float64")
    asked = [(s["case"], s["dtype"]) for s in done.found["steps"]]
    assert list(dict.fromkeys(asked)) == [("sgd-none", "float64"), ("sgd-none", "float16")]


def test_it_leaves_torch_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    try:
        assert check(tmp_path, "--case=adam-none", "--dtype=float16").status == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as environment.py has it
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is wrong is noticed --------------------------------------------------------------------


Step = Callable[[Any, Callable[[], None]], None]


def broken(name: str, step: Step) -> Case:
    """A case whose class steps otherwise in float32, and alone as it should.

    The yardstick asks it with a single parameter which states it keeps.
    """
    case = BY_ID[name]

    def broken_step(self: Any, closure: Any = None) -> None:
        def usual() -> None:
            case.cls.step(self, closure)

        if len(params(self)) > 1 and params(self)[0].dtype == torch.float32:
            step(self, usual)
        else:
            usual()

    cls = type(case.cls.__name__, (case.cls,), {"step": broken_step})
    return Case(case.rule, case.penalty, cls, case.kwargs)


def params(optimizer: Any) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def largest(optimizer: Any) -> torch.Tensor:
    return max(params(optimizer), key=torch.numel)


def wrong_rate(optimizer: Any, usual: Callable[[], None]) -> None:
    optimizer.param_groups[0]["lr"] *= 1 + 1e-5
    usual()


def written_grad(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    largest(optimizer).grad.neg_().neg_()[0].add_(1)


def other_grad(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    largest(optimizer).grad = largest(optimizer).grad.clone()


def lost_zeros(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    for param in params(optimizer):
        param.data[param == 0] = 1e-30


def nan_weight(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    weight = largest(optimizer).data
    weight[weight.abs().argmax()] = math.nan  # where the threshold makes no 0


def wrong_moment(optimizer: Any, usual: Callable[[], None]) -> None:
    usual()
    optimizer.state[largest(optimizer)]["momentum_buffer"] *= 1 + 1e-5


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
    "mass": (wrong_mass, r"0-dim state"),
    "error": (raises, r"fusedreg raised RuntimeError: no kernel image"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_broken_optimizer_fails(what: str) -> None:
    step, failure = WRONG[what]
    case = broken("sgd_nesterov-l1_prox", step)
    free = [
        each
        for each in accuracy.problems([case], [torch.float32, torch.float16])
        if each.max_norm is None
    ]
    assert {each.dtype for each in free} == {torch.float32, torch.float16}
    for each in free:
        row = measure(each, REFERENCE)
        if each.dtype == torch.float16:
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
    assert {(s["case"], s["dtype"], s["clip"], s["path"]) for s in failed} == {
        ("adam-l1_prox", "float32", False, "reference"),
        ("adam-l1_prox", "float32", True, "reference"),
        ("adam-l1_prox", "float32", True, "llvm"),
    }
    assert len(failed) > report.SHOWN
    for step in failed[: report.SHOWN]:
        which = "first step" if step["first"] else "later step"
        clip = "clipped" if step["clip"] else "not clipped"
        where = f"cpu, {step['path']} path, {step['weights']} weights"
        named = f"FAIL adam-l1_prox, {which}, {clip}, float32, {where}\n"
        assert done.printed.count(named) == 1
    for backend_of_it in ("backend reference, launches 0", "backend llvm, launches 3"):
        assert f"bound 16, torch.optim -, {backend_of_it}\n" in done.printed
    lines = done.printed.splitlines()
    counted = f"FAIL: {len(failed)} of {len(done.found['steps'])} steps are wrong"
    assert lines[-1].startswith(f"{counted} on cpu (reference), cpu (llvm), after")
    assert [line.split()[-1] for line in lines if line.startswith(("sgd ", "adam "))] == [
        *("pass", "FAIL"),
        *("pass", "FAIL"),
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
    assert measure(step, HOST).failures == ("backend is reference", "0 launches")
    monkeypatch.setattr(fusedreg.Adam, "backend", "triton")
    assert measure(step, KERNELS).failures == ("0 launches",)


@needs_interpreter
def test_kernels_that_were_not_asked_for_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    (step, *_) = accuracy.problems([BY_ID["sgd-none"]], [torch.float32])
    monkeypatch.setattr(Place, "option", "fused")
    assert measure(step, REFERENCE).failures == ("backend is triton", "2 launches")
    assert measure(step, HOST).failures == ("backend is triton",)


@pytest.mark.parametrize("penalty", ["decay", "l1_prox"])
def test_a_wrong_formula_is_noticed(penalty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch.optim has no equal: the yardstick shares no code with the package."""
    usual = fusedreg.Adam.update

    def wrong(*args: Any) -> Any:
        direction, gain, state = usual(*args)
        return direction / (1 + 1e-12), gain / (1 + 1e-12), state

    monkeypatch.setattr(fusedreg.Adam, "update", wrong)
    for step in accuracy.problems([BY_ID[f"adam-{penalty}"]], [torch.float64]):
        (failure,) = measure(step, REFERENCE).failures
        assert re.fullmatch(r"error .* ulp, bound .*", failure)


def test_a_wrong_yardstick_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to be as far from torch.optim as from fusedreg."""
    usual = accuracy.by_oracle

    def wrong(*args: Any) -> Any:
        weights, states = usual(*args)
        return [weight * (1 + 1e-12) for weight in weights], states

    monkeypatch.setattr(accuracy, "by_oracle", wrong)
    for step in accuracy.problems([BY_ID["adam-decay"]], [torch.float64]):
        ours, theirs = measure(step, REFERENCE).failures
        assert re.fullmatch(r"error .* ulp, bound .*", ours)
        assert re.fullmatch(r"torch\.optim in float64 is .* ulp from the yardstick", theirs)


def test_a_table_of_errors_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for which nothing compiles."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fusedreg.__main__, "CASES", [broken("adam-decay", raises)])
    done = check(tmp_path, "--dtype=float32", "--dtype=float16")
    assert done.status == 1
    first, second = (line for line in done.printed.splitlines() if line.startswith("adam "))
    assert first.split() == ["adam", "decay", "nan/-", "0.5/nan", "0", "FAIL"]
    assert second.split()[:3] == ["adam", "decay", "nan/-"]
    assert second.split()[-1] == "FAIL"
    assert "bound (at most float16 0.502)" in " ".join(done.printed.split())
    failed = [step for step in done.found["steps"] if step["failures"]]
    assert len(failed) == sum(step["dtype"] == "float32" for step in done.found["steps"])
    told = done.printed.count("fusedreg raised RuntimeError: no kernel image\n")
    assert told == min(len(failed), report.SHOWN)


def test_many_failures_do_not_bury_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = [f"adam-{penalty}" for penalty in ("none", "decay", "l1_prox", "elastic_net")]
    monkeypatch.setattr(fusedreg.__main__, "CASES", [broken(name, raises) for name in names])
    done = check(tmp_path, "--dtype=float32")
    failed = len(done.found["steps"])
    assert failed > report.SHOWN
    lines = done.printed.splitlines()
    assert sum(line.startswith("FAIL adam-") for line in lines) == report.SHOWN
    assert lines[-2:] == [
        f"and {failed - report.SHOWN} more, all of them with --json FILE",
        lines[-1],
    ]
    assert lines[-1].startswith(f"FAIL: {failed} of {failed} steps are wrong")
    last_table = max(i for i, line in enumerate(lines) if line.startswith("adam "))
    assert len(lines) - last_table < 40


def test_torchs_own_error_is_said_to_be_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(params: Any, lr: float, weight_decay: float, foreach: bool) -> None:
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that has no C compiler beside it; its steps are those of the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(fusedreg.check, "devices", lambda: [CPU, cuda])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    finding = Finding("compiler", True, "triton finds no C compiler", "Install gcc")
    monkeypatch.setattr(installation, "examine", lambda checked: [finding])

    def on_cpu(problem: Any, place: Place) -> Row:
        return measure(problem, place._replace(device=CPU))._replace(device=str(place.device))

    monkeypatch.setattr(accuracy, "measure", on_cpu)
    backend.kernels.cache_clear()  # and after, since it is found anew here
    yield
    backend.kernels.cache_clear()


def test_what_is_broken_stops_only_what_it_concerns(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of the GPU; the reference path steps everywhere, and says how well."""
    asked = ("--device=cuda", "--case=sgd-none", "--dtype=float32")
    done = check(tmp_path, *asked)
    assert done.status == 2
    assert done.found["verdict"] == "broken"
    steps = done.found["steps"]
    assert {(step["device"], step["path"]) for step in steps} == {
        ("cpu", "reference"),
        ("cpu", "llvm"),
        ("cuda:0", "reference"),
    }
    assert "cuda:0 (NVIDIA H200), reference: worst" in " ".join(done.printed.split())
    last = done.printed.splitlines()[-1]
    where = "on cpu (reference), cpu (llvm), cuda:0 (reference), after"
    right = f"all {len(steps)} steps that were taken are right {where}"
    assert last.startswith(f"BROKEN: compiler; {right}")

    monkeypatch.setattr(fusedreg.__main__, "CASES", [broken("sgd-none", wrong_rate)])
    done = check(tmp_path, *asked)
    assert (done.status, done.found["verdict"]) == (2, "broken")
    wrong = f"{len(steps)} of {len(steps)} steps that were taken are wrong {where}"
    assert done.printed.splitlines()[-1].startswith(f"BROKEN: compiler; {wrong}")

    note = Finding("triton", False, "triton is for Linux")  # a note stops nothing
    monkeypatch.setattr(installation, "examine", lambda checked: [note])
    cuda = torch.device("cuda", 0)
    assert fusedreg.check.places([cuda]) == [Place(cuda, "reference"), Place(cuda, "triton")]
    assert fusedreg.check.places([cuda], ["compiler"]) == [Place(cuda, "reference")]
    with_llvm_broken = [Place(cuda, "reference"), Place(cuda, "triton"), REFERENCE]
    assert fusedreg.check.places([cuda, CPU], ["llvm"]) == with_llvm_broken
