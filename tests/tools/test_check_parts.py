"""How `fusedreg check` measures a step, and what it finds of an installation."""

from __future__ import annotations

import importlib
import io
import math
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusedreg import backend
from fusedreg.check import accuracy, installation, places, report
from fusedreg.check.accuracy import Place, Row, dtype_name, ulps
from fusedreg.check.installation import Finding

from cases import CASES, DTYPES

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REFERENCE, HOST, KERNELS = (Place(CPU, path) for path in ("reference", "llvm", "triton"))
BY_ID = {case.id: case for case in CASES}


# ---- how it is measured --------------------------------------------------------------------------


def test_errors_are_in_ulp_of_the_larger_of_before_and_after() -> None:
    eps = torch.finfo(torch.float32).eps
    one, two, small = (torch.tensor([x], dtype=torch.float64) for x in (1.0, 2.0, 2.0**-20))
    off = eps * torch.ones(1, dtype=torch.float64)

    def error(got: torch.Tensor, exact: torch.Tensor, before: torch.Tensor) -> float:
        return float(ulps([got], [exact], [before], torch.float32))

    assert error(one + off, one, one) == 1
    assert error(one + off, one, two) == 0.5
    assert error(small + off, small, one) == 1  # what cancelled
    assert error(small + off, small, small) == 2**20
    assert math.isnan(error(one * math.nan, one, one))
    both = torch.cat([one, small]), torch.cat([one, small + off])
    # Alone it would be 2**20; what is smaller than an eighth of the largest has cancelled.
    assert float(ulps([both[1]], [both[0]], [both[0]], torch.float32)) == 8


def test_inputs_have_what_is_hard() -> None:
    inputs = accuracy.inputs_of(BY_ID["adam-none"], steps=2)
    sizes = [weight.numel() for weight in inputs.weights]
    assert sizes[0] == sizes[-1] == 0
    assert any(weight.dim() == 0 for weight in inputs.weights)
    assert max(sizes) > 8192  # a chunk, which the interpreter here makes smaller
    large = sizes.index(max(sizes))
    weight, grad = inputs.weights[large], inputs.grads[large]
    unseen = inputs.moments[large]["exp_avg_sq"] == 0
    assert (weight == 0).any()
    assert (grad == 0).any()
    assert (unseen & (grad == 0) & (weight != 0)).any()
    assert all(count["step"] == 2 for count in inputs.counts)
    # A gradient against a penalty is smaller.
    for values, least in ((weight, accuracy.SMALLEST), (grad, accuracy.SMALLEST**2)):
        assert values[values != 0].abs().min() >= least
        assert values.abs().max() <= 1
    rounded = inputs.rounded(torch.bfloat16)
    assert torch.equal(rounded.weights[large], weight.bfloat16().double())
    assert not torch.equal(rounded.weights[large], weight)


def test_a_class_that_raises_is_a_failure_and_no_traceback() -> None:
    def raises(self: Any, closure: Any = None) -> None:
        raise RuntimeError("no step")

    usual = BY_ID["adam-none"]
    case = replace(usual, cls=type("Adam", (usual.cls,), {"step": raises}))
    for step in accuracy.problems([case], [torch.float32]):
        assert accuracy.measure(step, REFERENCE).failures == (
            "fusedreg raised RuntimeError: no step",
        )


@pytest.mark.parametrize("steps", accuracy.STEPS_BEFORE)
@pytest.mark.parametrize("name", ["adam-decay", "adam_maximize-l1_subgradient"])
def test_no_penalty_cancels_the_gradient(name: str, steps: int) -> None:
    """Clipped or not: both signs meet, and at least 7/8 or 1/4 of what a penalty adds is left."""
    case = BY_ID[name]
    inputs = accuracy.inputs_of(case, steps)
    weight, grad = (torch.cat([x.flatten() for x in xs]) for xs in (inputs.weights, inputs.grads))
    assert min((weight * grad < 0).sum(), (weight * grad > 0).sum()) > 100
    grad = -grad if case.options["maximize"] else grad
    kept = {"decay": 0.7 * weight.abs(), "l1_subgradient": torch.full_like(weight, 0.3 / 4)}
    added = {"decay": 0.9 * weight, "l1_subgradient": 0.3 * weight.sign()}[case.penalty]
    least = kept[case.penalty]
    for clipped in (1.0, 0.5, 0.0):
        assert ((clipped * grad + added).abs() >= least)[weight != 0].all()


def test_no_sign_is_a_roundings() -> None:
    """What Lion takes the sign of is 0, or further from it than three roundings of 0.1."""
    for case in (case for case in CASES if case.rule == "lion"):
        for found in accuracy.problems([case], [torch.float64, torch.float32]):
            for before, after in zip(found.inputs.moments, found.states, strict=True):
                # 0.99 m + 0.01 g and m give 0.9 m + 0.1 g.
                new = after["exp_avg"]
                m = before.get("exp_avg", torch.zeros_like(new))
                mixed = m + 10 * (new - m)
                limit = 0.4 * torch.finfo(found.dtype).eps
                # In float64 the difference itself is rounded.
                assert ((mixed.abs() < 1e-14) | (mixed.abs() > max(limit, 1e-13))).all()


def test_every_step_has_two_groups() -> None:
    case = BY_ID["adam-none"]
    first, second = accuracy.groups(case, accuracy.values(0))
    assert first["lr"] != second["lr"]
    for group in (first, second):
        assert any(param.numel() for param in group["params"])


def test_a_clipped_step_is_another_one() -> None:
    free, clipped, *_ = accuracy.problems([BY_ID["sgd-none"]], [torch.float64])
    assert free.max_norm is None
    assert not torch.equal(free.weights[-2], clipped.weights[-2])


def test_thresholds_make_zeros_that_must_be_there() -> None:
    for name in ("sgd-l1_prox", "adam-l1_decoupled", "adamw-elastic_net"):
        *_, step, _ = accuracy.problems([BY_ID[name]], [torch.float32])
        zero, nonzero = (
            torch.cat([x.flatten() for x in step.zero]),
            torch.cat([x.flatten() for x in step.nonzero]),
        )
        assert zero.sum() > 100
        assert nonzero.sum() > 100
        assert 0 <= (~zero & ~nonzero).sum() < 10  # too near to say


@pytest.mark.parametrize(
    ("name", "dtype", "place", "clip", "bound"),
    [
        ("adam-none", torch.float32, REFERENCE, True, 16),
        ("adam-none", torch.float64, REFERENCE, False, 16),
        ("adam-none", torch.float64, REFERENCE, True, 16 + math.sqrt(9233) / 3),
        ("adam-none", torch.float64, KERNELS, False, 16 + 10 + 500),
        ("adam-none", torch.float64, HOST, False, 16),
        ("lion-none", torch.float64, KERNELS, False, 16),
        ("lamb-none", torch.float64, HOST, False, 16 + math.sqrt(8193) / 3),
        ("lamb-none", torch.float32, HOST, True, 16),
        ("adam_amsgrad-none", torch.float64, Place(CUDA, "reference"), False, 16 + 5 + 5),
        ("adam-none", torch.float32, Place(CUDA, "triton"), True, 16),
        ("sgd-none", torch.float64, KERNELS, False, 16),
        ("adam-none", torch.bfloat16, REFERENCE, True, 0.5 + 16 * 2**-16),
        ("adam-none", torch.float16, KERNELS, True, 0.5 + 16 * 2**-13),
    ],
)
def test_bounds(name: str, dtype: torch.dtype, place: Place, clip: bool, bound: float) -> None:
    case = BY_ID[name]
    found = list(accuracy.problems([case], [dtype]))[clip]
    optimizer = case.make([torch.nn.Parameter(torch.ones(1))])
    assert accuracy.bound_of(found, place, optimizer) == pytest.approx(bound)


def test_places_and_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which no GPU is asked for
    asked = places([CPU, CUDA])
    gpu = [place for place in asked if place.device == CUDA]
    assert [place.path for place in gpu] == ["reference", "triton"]
    assert [place.option for place in gpu] == ["reference", "default"]
    steps = list(accuracy.problems([BY_ID["sgd-none"]], DTYPES))
    assert all(place.takes(step) for place in (*gpu, REFERENCE) for step in steps)
    assert KERNELS.option == "fused"
    assert HOST.option == "default"
    double, _, bfloat16, _ = steps[::2][:4]
    assert (double.dtype, bfloat16.dtype) == (torch.float64, torch.bfloat16)
    assert not KERNELS.takes(bfloat16)
    assert not Place(torch.device("mps"), "reference").takes(double)
    taken = [(step.dtype, step.max_norm is not None) for step in steps if HOST.takes(step)]
    # Clipping in every other dtype, in the first step and in the third.
    assert taken == [(dtype, i % 2 == 1) for i, dtype in enumerate(DTYPES)] * 2


def test_every_accelerator_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert installation.devices() == [CPU]
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert installation.devices() == [CPU, torch.device("xpu", 0), torch.device("xpu", 1)]


def test_a_table_of_a_gpu_is_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    rows = [
        Row(
            *(case.id, case.rule, case.penalty, clip, dtype_name(dtype), "cuda:0", "triton"),
            backend="triton",
            launches=2 + clip,
            ulp=0.5 if dtype.itemsize == 2 else 123.4,
            torch_ulp=1.5,
            bound=526.5,
        )
        for case in CASES
        for clip in (False, True)
        for dtype in DTYPES
    ]
    console = Console(file=io.StringIO(), width=80)
    console.print(report.table(rows))
    printed = console.file.getvalue()
    assert "cuda:0 (NVIDIA H200), triton: worst" in printed
    assert " 123/1.5  123/1.5   0.5/1.5  0.5/1.5    2-3  pass" in printed
    assert "…" not in printed


# ---- the installation ----------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A machine where a GPU would have nothing to complain of."""
    importlib.import_module("torch._dynamo")  # before a test hides the triton that it needs
    headers = tmp_path / "Python.h"
    headers.touch()
    monkeypatch.setattr(installation.sysconfig, "get_paths", lambda *_: {"include": str(tmp_path)})
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(installation, "NVIDIA", tmp_path / "no driver")
    monkeypatch.setattr(installation.sys, "platform", "linux")
    for name in ("TRITON_INTERPRET", "CC", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    backend.kernels.cache_clear()  # and after, since it is found anew here
    yield
    backend.kernels.cache_clear()


def examine(checked: list[torch.device]) -> list[Finding]:
    """Without what is said of a CPU's own kernels, see test_check_host.py."""
    return [finding for finding in installation.examine(checked) if finding.name != "llvm"]


def names(found: list[Finding]) -> list[tuple[str, bool]]:
    return [(finding.name, finding.broken) for finding in found]


def test_a_whole_installation(gpu: None) -> None:
    assert examine([CPU, CUDA]) == []
    (note,) = examine([CPU])
    assert names([note]) == [("kernels", False)]
    assert str(note).startswith("note: triton's kernels import (triton 3.")


def test_old_torch(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.1+cu124")
    (found,) = examine([CUDA])
    assert names([found]) == [("torch", True)]
    assert str(found) == (
        "BROKEN: torch 2.6.1+cu124 is older than 2.7. Install it: pip install -U 'torch>=2.7'"
    )
    for version in ("2.7.0", "2.13.0+cpu", "3.0"):
        monkeypatch.setattr(torch, "__version__", version)
        assert examine([CUDA]) == []


def test_floors_are_those_that_are_declared() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"torch>={}.{}"'.format(*installation.TORCH_FLOOR) in declared
    assert f'"{backend.NEEDED};' in declared


@pytest.mark.parametrize(
    ("triton", "what"),
    [
        (None, "triton cannot be imported"),
        (types.SimpleNamespace(__version__="3.2.0"), "triton 3.2.0 is too old"),
    ],
)
def test_no_triton(triton: Any, what: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", triton)
    (found,) = examine([CPU, CUDA])
    assert names([found]) == [("triton", True)]
    assert what in found.what
    assert "steps on a GPU take the slow reference path" in found.what
    assert found.cure == "Install it: pip install 'triton>=3.3'"
    (found,) = examine([CPU])
    assert names([found]) == [("triton", False)]
    assert what in found.what
    assert "none of triton's kernels is launched" in found.what


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("raise OSError('no libcuda.so')", "triton cannot be imported (OSError: no libcuda.so)"),
        ("import sys; sys.absent", "triton cannot be imported (AttributeError: module 'sys'"),
        ("", "without a version"),
        ("__version__ = None", "without a version"),
        ("__version__ = (3, 6)", "triton (3, 6) is too old"),
        (None, "without a version"),  # any folder of that name
    ],
)
def test_a_triton_that_is_none(
    code: str | None, what: str, gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It raises what it likes, and has not what triton has: a finding, never a traceback."""
    folder = tmp_path / "only" / "triton"
    folder.mkdir(parents=True)
    if code is not None:
        (folder / "__init__.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(folder.parent)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    (found,) = examine([CPU, CUDA])
    assert names([found]) == [("triton", True)]
    assert what in found.what
    assert what != "without a version" or str(folder) in found.what
    assert found.cure == "Install it: pip install 'triton>=3.3'"
    assert names(examine([CPU])) == [("triton", False)]
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert "triton" not in {place.path for place in places([CPU, CUDA])}


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_triton_is_not_asked_for_off_linux(
    system: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in pyproject.toml; what works there works."""
    monkeypatch.setattr(sys, "platform", system)
    assert examine([CPU, CUDA]) == []
    monkeypatch.setitem(sys.modules, "triton", None)
    for checked in ([CPU, CUDA], [CPU]):
        (found,) = examine(checked)
        assert str(found) == "note: triton is for Linux; GPUs take the reference path."
        assert not found.broken


def test_a_repository_that_is_not_installed(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fusedreg.kernels.gpu.backend", None)
    for device, is_broken in ((CUDA, True), (CPU, False)):
        (found,) = examine([device])
        assert names([found]) == [("kernels", is_broken)]
        assert "as in a repository that is not installed" in found.what
        assert found.cure == "In the repository: pip install -e ."


def test_kernels_that_this_triton_cannot_import(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    @cache
    def refuses() -> None:
        raise AttributeError("module 'triton.language' has no attribute 'tensor'")

    monkeypatch.setattr(backend, "kernels", refuses)
    for device, is_broken in ((CUDA, True), (CPU, False)):
        (found,) = examine([device])
        assert names([found]) == [("kernels", is_broken)]
        assert "(AttributeError: module 'triton.language' has no attribute" in found.what
        assert found.cure == "Install torch and triton anew"
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert "triton" not in {place.path for place in places([CPU, CUDA])}


def test_the_interpreter(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device, is_broken, why in (
        (CUDA, True, "cannot read a GPU's memory"),
        (CPU, False, "slow"),
    ):
        (found,) = examine([device])
        assert names([found]) == [("interpreter", is_broken)]
        assert why in found.what
        assert found.cure == "Unset TRITON_INTERPRET"


@pytest.mark.parametrize("asked", [None, "", "icc"])
def test_no_compiler(asked: str | None, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked is not None:
        monkeypatch.setenv("CC", asked)
    there = set() if asked is None else {"gcc", "clang"}  # which triton then does not look for
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    (found,) = examine([CUDA])
    assert names([found]) == [("compiler", True)]
    assert ("neither gcc nor clang" if asked is None else f"CC is '{asked}'") in found.what
    assert names(examine([CPU])) == [("kernels", False)]
    monkeypatch.setattr(installation.sys, "platform", "win32")
    assert examine([CUDA]) == []


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_one_compiler_will_do(name: str, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda asked: asked if asked == name else None)
    assert examine([CUDA]) == []
    monkeypatch.setenv("CC", name)
    assert examine([CUDA]) == []


def test_no_headers(gpu: None, tmp_path: Path) -> None:
    (tmp_path / "Python.h").unlink()
    (found,) = examine([CUDA])
    assert names([found]) == [("headers", True)]
    assert "python3-dev" in found.cure


@pytest.mark.parametrize(
    ("scheme", "looked_in"),
    [("posix_local", "posix_prefix"), ("posix_prefix", "posix_prefix"), ("nt", "nt")],
)
def test_headers_are_looked_for_where_triton_does(
    scheme: str, looked_in: str, gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Debian's default scheme names /usr/local/include, where python3-dev installs nothing."""

    def paths(scheme: str) -> dict[str, str]:
        return {"include": str(tmp_path if scheme == looked_in else tmp_path / scheme)}

    monkeypatch.setattr(installation.sysconfig, "get_default_scheme", lambda: scheme)
    monkeypatch.setattr(installation.sysconfig, "get_paths", paths)
    assert examine([CUDA]) == []


def test_no_cache(gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (found,) = examine([CUDA])
    assert names([found]) == [("cache", True)]
    assert str(tmp_path / "file" / "cache") in found.what
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "new"))
    assert installation.cache_folder() == tmp_path / "new" / ".triton" / "cache"
    assert examine([CUDA]) == []
    monkeypatch.setattr(installation.os, "access", lambda folder, mode: folder != tmp_path)
    assert names(examine([CUDA])) == [("cache", True)]
    monkeypatch.setattr(installation.os.path, "expanduser", lambda path: path)  # as with no home
    (found,) = examine([CUDA])
    assert "has no home" in found.what
    assert "TRITON_CACHE_DIR" in found.cure


def test_a_gpu_that_torch_does_not_see(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(installation, "NVIDIA", tmp_path / "Python.h")
    first, _ = examine([CPU])
    assert names([first]) == [("gpu", False)]
    assert "built without CUDA, sees no GPU" in first.what
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    first, _ = examine([CPU])
    assert "built for CUDA 13.0, sees no GPU" in first.what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # somebody hides it
    assert names(examine([CPU])) == [("kernels", False)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert examine([CUDA]) == []


@pytest.mark.parametrize("missing", ["triton", "fusedreg.kernels.gpu.backend"])
def test_interpreting_what_is_missing(
    missing: str, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, missing, None)
    assert places([CPU]) == [REFERENCE, HOST]
