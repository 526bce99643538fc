"""`fusedreg check` of the CPU's kernels, which LLVM compiles: what is missing, broken or wrong."""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedreg import backend
from fusedreg.__main__ import main
from fusedreg.check import accuracy, places
from fusedreg.check.accuracy import Place, measure
from fusedreg.check.installation import LLVMLITE, examine

from cases import CASES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HOST = Place(CPU, "llvm")
BY_ID = {case.id: case for case in CASES}
ONE_STEP = ["check", "--device=cpu", "--case=sgd-none", "--dtype=float32"]


@pytest.fixture(autouse=True)
def found_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`backend` looks for llvmlite once; here before and after."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.host_kernels.cache_clear()
    yield
    backend.host_kernels.cache_clear()


def forget_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "llvmlite"]:
        monkeypatch.delitem(sys.modules, name)


def host_findings() -> list[Any]:
    return [finding for finding in examine([CPU]) if finding.name == "llvm"]


# ---- the installation ----------------------------------------------------------------------------


def test_the_path_of_a_cpu_is_said() -> None:
    (found,) = host_findings()
    assert re.fullmatch(
        r"note: steps on the CPU take the path llvm \(llvmlite 0\.\d+\.\d+\)\.", str(found)
    )
    assert not any(finding.name == "llvm" for finding in examine([CUDA]))
    assert places([CPU]) == [Place(CPU, "reference"), HOST]


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("raise OSError('no libstdc++')", "llvmlite cannot be imported (OSError: no libstdc++)"),
        ("import sys; sys.absent", "llvmlite cannot be imported (AttributeError: module 'sys'"),
        ("", "llvmlite cannot be imported (ModuleNotFoundError: No module named 'llvmlite.b"),
        (None, "llvmlite cannot be imported (ModuleNotFoundError: No module named 'llvmlite.b"),
    ],
)
def test_an_llvmlite_that_is_none(
    code: str | None, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A finding and the reference path, never a traceback; None is any folder of that name."""
    (tmp_path / "llvmlite").mkdir()
    if code is not None:
        (tmp_path / "llvmlite" / "__init__.py").write_text(code, encoding="utf-8")
    forget_llvmlite(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (found,) = host_findings()
    assert not found.broken
    assert what in found.what
    assert "so steps on the CPU take the slow reference path" in found.what
    assert found.cure == "Install it: pip install 'llvmlite>=0.44'"
    assert places([CPU]) == [Place(CPU, "reference")]
    assert BY_ID["sgd-none"].make([torch.nn.Parameter(torch.ones(1))], "default").backend == (
        "reference"
    )


def test_an_old_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its passes are run otherwise."""
    llvmlite = importlib.import_module("llvmlite")
    monkeypatch.setattr(llvmlite, "__version__", "0.43.0")
    monkeypatch.delattr(importlib.import_module("llvmlite.binding"), "create_pass_builder")
    (found,) = host_findings()
    assert not found.broken
    assert found.what.startswith("llvmlite 0.43.0 is too old, so steps on the CPU take")
    assert backend.host_kernels() is None


def test_a_cpu_without_float16_has_no_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    binding = importlib.import_module("llvmlite.binding")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binding, "get_host_cpu_features", dict)
    (found,) = host_findings()
    assert not found.broken
    assert found.what.startswith("this CPU has no instructions for float16 (F16C), so steps on")
    assert not found.cure


def test_the_floor_is_the_one_that_is_declared() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{LLVMLITE}"' in declared


def test_no_llvmlite_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("llvmlite", "llvmlite.binding", "llvmlite.ir"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*ONE_STEP, f"--json={tmp_path / 'check.json'}"]) == 0
    assert "llvmlite cannot be imported" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert {step["backend"] for step in found["steps"]} == {"reference"}


@pytest.mark.parametrize(
    "triton", [None, types.SimpleNamespace(__version__="3.2.0"), types.ModuleType("triton")]
)
def test_no_triton_is_no_reason_either(
    triton: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    importlib.import_module("torch._dynamo")  # which may need the triton that is here
    monkeypatch.setitem(sys.modules, "triton", triton)
    assert main([*ONE_STEP, f"--json={tmp_path / 'check.json'}"]) == 0
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert [finding["name"] for finding in found["findings"]] == ["llvm", "triton"]
    assert {step["backend"] for step in found["steps"]} == {"reference", "llvm"}


def test_an_llvmlite_that_does_not_compile_stops_its_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else; the exit status says that steps of a CPU would raise."""

    def refuses(*_: object) -> None:
        raise RuntimeError("no such target")

    loops = importlib.import_module("fusedreg.kernels.cpu.loops")
    monkeypatch.setattr(loops, "norm_loop", refuses)
    assert main([*ONE_STEP, f"--json={tmp_path / 'check.json'}"]) == 2
    printed = capsys.readouterr().out
    said = "llvmlite does not compile the kernels of the CPU (RuntimeError: no such target)"
    assert f"BROKEN: {said}" in " ".join(printed.split())
    assert printed.splitlines()[-1].startswith("BROKEN: llvm; all ")
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert {step["path"] for step in found["steps"]} == {"reference"}
    assert not any(step["failures"] for step in found["steps"])


# ---- what is wrong is noticed --------------------------------------------------------------------

FAULTS: dict[str, tuple[str, Any, str]] = {
    "divide": ("language", lambda a, b: a / b * (1 + 1e-5), "adam-decay"),
    "square_root": ("language", lambda x: x, "adam-decay"),
    "power": ("language", lambda base, exponent: base, "adam-decay"),
    "CHUNK": ("loops", 32768, "sgd-none"),  # half of what chunks are counted by
}
"""Name -> where in kernels/cpu it is, what it wrongly is, and a case that meets it."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_host_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of code that only the host has; rules and penalties are those of triton's kernels."""
    module, fault, case = FAULTS[name]
    found = accuracy.problems([BY_ID[case]], [torch.float32], accuracy.LARGE)
    (step,) = (each for each in found if each.inputs.steps and HOST.takes(each))
    assert measure(step, HOST).failures == ()
    monkeypatch.setattr(importlib.import_module(f"fusedreg.kernels.cpu.{module}"), name, fault)
    forget_kernels(monkeypatch)
    (failure,) = measure(step, HOST).failures
    assert re.fullmatch(r"error .* ulp, bound 16", failure)


def forget_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the kernels compiled anew; those that are there stay for later."""
    llvm, loops, compiler = (
        importlib.import_module(f"fusedreg.kernels.cpu.{name}")
        for name in ("backend", "loops", "compiler")
    )
    for module, name in ((llvm, "norm_loop"), (loops, "_rows_loop"), (llvm, "step_loop")):
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))
    anew = cache(compiler.device.__wrapped__)
    monkeypatch.setattr(compiler, "device", anew)
    monkeypatch.setattr(loops, "device", anew)
