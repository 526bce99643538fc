"""The kernels of a CPU: what only they have. All else meets them as the path "default"."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedreg
from fusedreg import backend

from cases import (
    KERNEL_CASES,
    SOME,
    Case,
    by_id,
    each_case,
    parameters,
    program,
    run,
    tensors,
)
from compare import assert_close, frozen, parameters_of, results

loops: Any = importlib.import_module("fusedreg.kernels.cpu.loops")
llvm: Any = importlib.import_module("fusedreg.kernels.cpu.backend")
values: Any = importlib.import_module("fusedreg.kernels.cpu.values")
compiler: Any = importlib.import_module("fusedreg.kernels.cpu.compiler")
rules: Any = importlib.import_module("fusedreg.kernels.device.rules")
own: Any = importlib.import_module("own")
words: Any = importlib.import_module("words")
tl: Any = importlib.import_module("triton.language")
where: Any = tl.where

LOW = (torch.float16, torch.bfloat16)
SIZES = [0, 1, 15, 17, 63, 65, loops.CHUNK - 1, loops.CHUNK, loops.CHUNK + 1]


# ---- one rule, two compilers ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@each_case(KERNEL_CASES)
def test_both_compilers_make_the_same_of_a_rule(case: Case, dtype: torch.dtype) -> None:
    """To the last bit, but for beta**t and norms, of which float32 does not see the last bits."""
    optimizers = [case.make(parameters(dtype=dtype), path) for path in ("default", "fused")]
    for optimizer in optimizers:
        run(optimizer, 3)
    assert [optimizer.backend for optimizer in optimizers] == ["llvm", "triton"]
    assert results(optimizers[0]) == results(optimizers[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_any_size_around_vectors_and_chunks(case: Case, dtype: torch.dtype) -> None:
    """As close as the interpreted kernels, see assert_steps_agree."""
    shapes = [(size,) for size in SIZES]
    optimizers = [
        case.make(parameters(dtype=dtype, shapes=shapes), path, max_grad_norm=1.0)
        for path in ("default", "reference")
    ]
    for optimizer in optimizers:
        run(optimizer, 2)
    assert optimizers[0].backend == "llvm"
    assert_close(*map(parameters_of, optimizers), 8)
    norms = [optimizer.grad_norm for optimizer in optimizers]
    assert_close(norms[:1], norms[1:], 1)


@pytest.mark.parametrize("offset", [0, 1, 4, 7])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_nothing_outside_of_a_view_is_read_or_written(case: Case, offset: int) -> None:
    sizes, gap = [1, 5, 100, loops.CHUNK + 3], 16
    pool = torch.full((sum(sizes) * 2 + gap * 10,), float("nan"))
    inside = torch.zeros_like(pool, dtype=torch.bool)
    place = offset
    taken = []
    shapes = [(size,) for size in sizes]
    for value in [*tensors(0, torch.float32, shapes), *tensors(1, torch.float32, shapes)]:
        taken.append(pool[place : place + value.numel()].copy_(value))
        inside[place : place + value.numel()] = True
        place += value.numel() + gap
    params = [nn.Parameter(view) for view in taken[: len(sizes)]]
    plain = [nn.Parameter(view.clone()) for view in taken[: len(sizes)]]
    for mine, other, grad in zip(params, plain, taken[len(sizes) :], strict=True):
        mine.grad, other.grad = grad, grad.clone()
    for each in (params, plain):
        case.make(each, "default", max_grad_norm=1.0).step()
    assert frozen(params) == frozen(plain)
    assert pool[~inside].isnan().all()
    assert not pool[inside].isnan().any()


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_any_dtypes_of_parameter_and_state(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    ends = []
    for fused in (None, False):
        params = parameters(dtype=dtype)
        optimizer = fusedreg.Adam(params, lr=0.1, l1=0.3, state_dtype=state_dtype, fused=fused)
        run(optimizer, 1)
        ends.append(optimizer)
    assert ends[0].backend == "llvm"
    for mine, other in zip(*map(parameters_of, ends), strict=True):
        # One step from zeros: moments and parameter are rounded once each. Twice torch's sqrt,
        # which is not IEEE's, may move the parameter by an ulp of the arithmetic.
        assert_close([mine], [other], 2)
        for name in ("exp_avg", "exp_avg_sq"):
            assert frozen(ends[0].state[mine][name]) == frozen(ends[1].state[other][name])


# ---- conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_every_16_bit_number_is_read_and_kept(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    param = nn.Parameter(every.clone())
    param.grad = torch.zeros_like(every)
    fusedreg.SGD([param], lr=1.0).step()  # w - 1.0 * 0.0
    number = ~every.isnan()
    assert frozen(param[number]) == frozen(every[number])
    assert param[~number].isnan().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_16_bit_numbers_are_rounded_as_torch_rounds(dtype: torch.dtype) -> None:
    """To nearest even, to inf and to subnormals: sums of two with other exponents."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        param, other = nn.Parameter(every.clone()), every[torch.randperm(every.numel())]
        param.grad = other.clone()
        fusedreg.SGD([param], lr=1.0).step()
        expected = (every.float() - other.float()).to(dtype)
        assert torch.equal(param.isnan(), expected.isnan())
        assert frozen(param[~expected.isnan()]) == frozen(expected[~expected.isnan()])


@pytest.mark.parametrize("size", [3, 20_000])
@pytest.mark.parametrize("entry", [1e200, 1e-200, 5e-324, 1.7e308, 0.0, float("inf"), float("nan")])
def test_norms_of_float64_neither_overflow_nor_vanish(entry: float, size: int) -> None:
    param = nn.Parameter(torch.ones(size, dtype=torch.float64))
    param.grad = torch.zeros_like(param)
    param.grad[0] = param.grad[-1] = entry
    launcher = backend.host_kernels()
    assert launcher is not None
    table = launcher.build([[param.data_ptr()]], [size], [0], torch.device("cpu"))
    partials = torch.empty(table.chunks, dtype=torch.float64)
    addresses = torch.tensor([param.grad.data_ptr()])
    launcher.norms(program(rules.RULES["sgd"], torch.float64), table, addresses, partials, 0)()
    exact = entry * 2**0.5  # inf where that is above the largest number
    expected = torch.tensor([exact], dtype=torch.float64)
    # A root, a product and each square round by half an ulp.
    torch.testing.assert_close(partials, expected, rtol=2e-16 * 4, atol=1e-323, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_nan_is_kept(dtype: torch.dtype) -> None:
    """By the largest second moment, and by a store of any NaN, also one that rounding overflows."""
    param = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = fusedreg.Adam([param], lr=0.1, amsgrad=True)
    run(optimizer, 1)
    optimizer.state[param]["max_exp_avg_sq"].fill_(float("nan"))
    run(optimizer, 1)
    assert optimizer.backend == "llvm"
    assert optimizer.state[param]["max_exp_avg_sq"].isnan().all()
    assert param.isnan().all()

    param = nn.Parameter(torch.ones(5, dtype=dtype))
    momentum = fusedreg.SGD([param], lr=0.1, momentum=0.9, state_dtype=torch.float32)
    run(momentum, 1)
    bits = torch.full((5,), 2**31 - 1, dtype=torch.int32)
    momentum.state[param]["momentum_buffer"].copy_(bits.view(torch.float32))
    run(momentum, 1)
    assert param.isnan().all()


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam])
@pytest.mark.parametrize("weight", [float("inf"), -float("inf"), float("nan")])
def test_subgradient_of_what_is_not_finite(cls: Any, weight: float) -> None:
    ends = []
    for fused in (None, False):
        param = nn.Parameter(torch.full((3,), weight))
        param.grad = torch.ones(3)
        optimizer = cls([param], lr=0.1, l1=0.1, l1_mode="subgradient", fused=fused)
        optimizer.step()
        ends.append([param, *optimizer.state[param].values()])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(ends[0][0], torch.full((3,), weight), equal_nan=True)


# ---- threads -------------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def ends(threads: int, case: Case) -> Any:
    torch.set_num_threads(threads)
    shapes = [(loops.CHUNK * 3 + 5,), (7,), (1000, 70)]
    optimizer = case.make(parameters(dtype=torch.float32, shapes=shapes), max_grad_norm=0.5)
    optimizer.param_groups[0]["fused"] = None
    run(optimizer, 2)
    assert optimizer.backend == "llvm"
    return results(optimizer), frozen(optimizer.grad_norm)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_results_do_not_depend_on_threads(
    case: Case, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ends(1, case)
    assert ends(2, case) == alone
    assert ends(5, case) == alone
    monkeypatch.setattr(llvm, "_openmp", lambda: None)  # as where it has no such entry
    assert ends(2, case) == alone
    assert ends(5, case) == alone


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch may have another OpenMP")
def test_torchs_openmp_is_found_on_linux() -> None:
    assert llvm._openmp() is not None


def test_every_chunk_is_taken_once(two_threads: None) -> None:
    """By one of two threads, 200,000 times."""
    params = [nn.Parameter(torch.zeros(64)) for _ in range(4000)]
    for param in params:
        param.grad = torch.ones(64)
    optimizer = fusedreg.SGD(params, lr=1.0)
    for _ in range(50):
        optimizer.step()
    assert torch.stack(params).unique().tolist() == [-50.0]


def test_two_optimizers_step_at_once(two_threads: None) -> None:
    made = [fusedreg.AdamW(parameters(shapes=[(400_000,)]), max_grad_norm=1.0) for _ in range(4)]
    run(made[-1], 10)
    workers = [threading.Thread(target=run, args=(each, 10)) for each in made[:-1]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for each in made[:-1]:
        assert results(each) == results(made[-1])


FORK = """
import os, torch, fusedreg
import fusedreg.kernels.cpu.backend as llvm
llvm._openmp = lambda: None  # after a fork, torch's own operations hang where OpenMP is GNU's
torch.set_num_threads(2)
w = torch.nn.Parameter(torch.ones(400_000))
w.grad = torch.ones(400_000)
optimizer = fusedreg.SGD([w], lr=0.25, max_grad_norm=float("inf"))
optimizer.step()
child = os.fork()
optimizer.step()
kept = w[0].item() == w[-1].item() == 0.5
if child == 0:
    os._exit(0 if kept else 1)
assert kept and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_makes_its_own_threads() -> None:
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


# ---- which path ----------------------------------------------------------------------------------


def test_what_kernels_cannot_walk_goes_to_the_reference_silently() -> None:
    holes = torch.zeros(4, 6)[:, ::2]
    odd = [holes, torch.zeros(3, dtype=torch.complex64), torch.zeros(3).expand(2, 3)]
    with warnings.catch_warnings(action="error"):
        for tensor in odd:
            assert fusedreg.SGD([tensor]).backend == "reference"
        mixed = fusedreg.SGD([*odd, torch.zeros(3)])
    assert mixed.backend == "llvm and reference"


def test_one_norm_over_both_paths() -> None:
    plain, odd = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    plain.grad, odd.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0j])
    optimizer = fusedreg.SGD([plain, odd], lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 5.0
    assert_close([plain, odd], [torch.tensor([-0.6, 0.0]), torch.tensor([0.0, -0.8j])], 2)


def test_a_cpu_without_float16_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM's code for it calls what is not there, and ends the process."""
    binding = importlib.import_module("llvmlite.binding")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"avx": True, "f16c": False})
    assert backend.host_problem() == "this CPU has no instructions for float16 (F16C)"
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert backend.host_problem() is None


def test_a_step_inside_functionalize_is_refused() -> None:
    params = parameters(shapes=[(3,)])
    params[0].grad = torch.ones(3, dtype=params[0].dtype)
    optimizer = fusedreg.SGD(params)
    with pytest.raises(RuntimeError, match="no memory"):
        torch.func.functionalize(lambda x: (optimizer.step(), x + 1)[1])(torch.ones(2))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_where_tensors_have_no_memory_is_refused(clip: float | None) -> None:
    params = parameters(shapes=[(3,)])
    params[0].grad = torch.ones(3, dtype=params[0].dtype)
    before = frozen(params)
    optimizer = fusedreg.SGD(params, max_grad_norm=clip)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(RuntimeError, match=r"^SGD cannot step .* inside a FakeTensorMode"),
    ):
        optimizer.step()
    assert frozen(params) == before


def test_without_llvmlite_the_reference_steps_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    backend.host_kernels.cache_clear()
    try:
        with warnings.catch_warnings(action="error"):
            optimizer = fusedreg.AdamW(parameters())
            run(optimizer, 1)
        assert optimizer.backend == "reference"
        assert optimizer.launches == 0
    finally:
        backend.host_kernels.cache_clear()


def test_a_cpu_needs_no_triton() -> None:
    """The rules are triton's functions where there is one, and plain ones where there is none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fusedreg\n"
        "w = torch.nn.Parameter(torch.tensor([1.0, 0.05])); w.grad = torch.tensor([2.0, 0.5])\n"
        "optimizer = fusedreg.Adam([w], lr=0.1, l1=1.0)\n"
        "optimizer.step()\n"
        "assert optimizer.backend == 'llvm' and optimizer.launches == 2\n"
        "assert [round(x, 4) for x in w.tolist()] == [0.85, 0.0]"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# ---- what is compiled ----------------------------------------------------------------------------


@each_case(KERNEL_CASES)
def test_steps_are_vectorised_and_never_contracted(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product and a sum stay two roundings, and no float32 becomes a float64 on its way."""
    modules: list[str] = []
    optimised = compiler.optimised

    def keep(text: str, machine: Any) -> Any:
        modules.append(str(optimised(text, machine)))
        return optimised(text, machine)

    monkeypatch.setenv("FUSEDREG_CACHE", "0")
    monkeypatch.setattr(compiler, "optimised", keep)
    for loop in (loops.norm_loop, loops.step_loop):
        loop.cache_clear()
    run(case.make(parameters(dtype=torch.float32), "default", max_grad_norm=None), 1)
    (step,) = (module for module in modules if "@step" in module)
    assert re.search(r"fsub <\d+ x float>", step)
    assert not re.search(r"\b(fma|fmuladd|contract|fast)\b", step)
    assert not re.search(r"(fmul|fdiv|fadd|fsub)[a-z ]* <\d+ x double>", step)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
def test_sums_of_squares_are_vectorised(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = compiler._machine()
    monkeypatch.setattr(
        loops,
        "compiled_loop",
        lambda function: compiler.optimised(str(compiler.module_of(function)), machine),
    )
    norms = loops.norm_loop.__wrapped__(dtype)
    adam = program(rules.RULES["adam"], dtype, states=2)
    squares = loops.squares_loop.__wrapped__(adam, scaled=True)
    for code in map(str, (norms, squares)):
        assert re.search(r"fadd reassoc <\d+ x double>", code)
    arithmetic = "double" if dtype == torch.float64 else "float"
    assert re.search(rf"fdiv <\d+ x {arithmetic}>", str(squares))


def test_nothing_is_compiled_when_a_number_changes() -> None:
    optimizer = fusedreg.LAMB(parameters(), lr=0.1, l1=0.1, max_grad_norm=1.0)
    run(optimizer, 2)
    cached = (
        loops.norm_loop,
        loops._rows_loop,
        loops.squares_loop,
        loops.fold_loop,
        loops.step_loop,
    )
    before = [loop.cache_info().misses for loop in cached]
    optimizer.max_grad_norm = 0.3
    optimizer.param_groups[0].update(lr=0.2, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3, l1=0.2)
    run(optimizer, 2)
    assert [loop.cache_info().misses for loop in cached] == before


def branches(x: Any) -> Any:
    return x if x > 0 else -x


def mixes(x: Any) -> Any:
    return x + x.to(values.FLOAT)


@pytest.mark.parametrize(
    ("function", "words"), [(branches, "use tl.where"), (mixes, "double and float")]
)
def test_what_a_rule_cannot_say_is_refused(function: Any, words: str) -> None:
    def kernel(work: Any) -> None:
        function(work.constant(1.0))

    with pytest.raises(TypeError, match=words):
        compiler.compiled_loop(kernel)
