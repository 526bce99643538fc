"""The engine: buckets, tables, and what makes a plan of addresses end.

Kernels are interpreted on the CPU here (fused=True, see lib/environment.py); on a GPU test_gpu.py
has them compiled. The arithmetic is tested by every other file, where the path "fused" is these
kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedreg
from fusedreg import backend
from fusedreg.engine import plan as engine

from cases import PATHS, SOME, Case, by_id, each_case, parameters, run, set_grads, tensors, ulp
from compare import assert_close, assert_steps_agree, frozen, pair, parameters_of, results

CPU = torch.device("cpu")
CHUNK = 8192  # elements of one program, of which one block is 1024
SIZES = [0, 1, 63, 64, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- sizes, places and launches ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_any_size_around_blocks_and_chunks(case: Case, dtype: torch.dtype) -> None:
    shapes = [(size,) for size in SIZES]
    optimizers = pair(case, lambda: parameters(dtype=dtype, shapes=shapes), max_grad_norm=1.0)
    assert_steps_agree(*optimizers)
    norms = [optimizer.grad_norm for optimizer in optimizers]
    assert_close(norms[:1], norms[1:], 1)


@pytest.mark.parametrize("offset", [0, 1, 4, 7])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_views_into_poisoned_memory_at_any_offset(case: Case, offset: int) -> None:
    """Nothing outside of a tensor is read or written, whatever its alignment."""
    sizes, gap = [1, 5, 1024, 1500], 16
    pool = torch.full((sum(sizes) * 2 + gap * 10,), float("nan"))
    inside = torch.zeros_like(pool, dtype=torch.bool)
    place = offset

    def take(values: torch.Tensor) -> torch.Tensor:
        nonlocal place
        view = pool[place : place + values.numel()]
        inside[place : place + values.numel()] = True
        place += values.numel() + gap
        return view.copy_(values)

    values = tensors(0, torch.float32, [(size,) for size in sizes])
    params = [nn.Parameter(take(value)) for value in values]
    for param, grad in zip(params, tensors(1, torch.float32, [(s,) for s in sizes]), strict=True):
        param.grad = take(grad)
    plain = [nn.Parameter(value) for value in values]
    for mine, other in zip(params, plain, strict=True):
        other.grad = mine.grad.clone()
    optimizers = case.make(params, "fused"), case.make(plain, "fused")
    for optimizer in optimizers:
        optimizer.step()
    assert frozen(params) == frozen(plain)
    assert pool[~inside].isnan().all()
    assert not pool[inside].isnan().any()


@pytest.mark.parametrize(
    ("cls", "clip", "expected"),
    [
        (fusedreg.AdamW, None, 2),
        (fusedreg.AdamW, 1.0, 3),
        (fusedreg.LAMB, None, 4),
        (fusedreg.LAMB, 1.0, 5),
    ],
)
def test_launches_do_not_depend_on_tensors_and_groups(
    cls: Any, clip: float | None, expected: int
) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
    groups = [{"params": [p], "lr": 0.1 / i} for i, p in enumerate(model.parameters(), start=1)]
    optimizer = cls(groups, max_grad_norm=clip, fused=True)
    run(optimizer, 1)
    assert optimizer.backend == "triton"
    assert optimizer.launches == expected


@pytest.mark.parametrize("case", **by_id(SOME))
def test_one_launch_gives_each_group_its_own_numbers(case: Case) -> None:
    each = [
        {"lr": 0.1 * (i + 1), "weight_decay": 0.3 * (i + 1), "l1": 0.01 * (i + 1)} for i in range(3)
    ]
    params = parameters(shapes=[(5,)] * 3)
    alone = parameters(shapes=[(5,)] * 3)
    together = case.make(
        [{"params": [p], **own} for p, own in zip(params, each, strict=True)], "fused"
    )
    apart = [case.make([p], "fused", **own) for p, own in zip(alone, each, strict=True)]
    for seed in range(2):
        set_grads(params, seed)
        for param, single in zip(params, alone, strict=True):
            single.grad = param.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert together.launches == (4 if case.cls.layerwise else 2)
    assert frozen(params) == frozen(alone)


def test_groups_with_other_rules_have_their_own_launches() -> None:
    """And those with other penalties share them."""
    options: list[dict[str, Any]] = [
        {},
        {"amsgrad": True},
        {"l1": 0.1, "l1_mode": "decoupled"},
        {"l1": 0.1, "l1_mode": "prox", "weight_decay": 0.1},
        {"l1": 0.1, "l1_mode": "subgradient", "decoupled_weight_decay": True, "weight_decay": 0.1},
    ]
    params = parameters(shapes=[(5,)] * len(options))
    groups = [{"params": [p], **more} for p, more in zip(params, options, strict=True)]
    fused = fusedreg.Adam(groups, lr=0.1, fused=True, max_grad_norm=1.0)
    copies = parameters(shapes=[(5,)] * len(options))
    groups = [{"params": [p], **more} for p, more in zip(copies, options, strict=True)]
    reference = fusedreg.Adam(groups, lr=0.1, fused=False, max_grad_norm=1.0)
    assert_steps_agree(fused, reference)
    assert fused.launches == 6


def test_dtypes_share_one_norm() -> None:
    def make() -> list[nn.Parameter]:
        return [parameters(i, dtype, [(7,)])[0] for i, dtype in enumerate(FLOATS)]

    fused = fusedreg.AdamW(make(), lr=0.1, fused=True, max_grad_norm=0.5)
    reference = fusedreg.AdamW(make(), lr=0.1, fused=False, max_grad_norm=0.5)
    assert_steps_agree(fused, reference)
    assert fused.launches == 12
    assert_close([fused.grad_norm], [reference.grad_norm], 1)


@pytest.mark.parametrize("path", ["default", "fused"])
def test_norms_of_tensors_come_from_their_own_bucket(path: str) -> None:
    """Of each tensor, whatever else is in the bucket: nothing, one without a gradient, others."""
    shapes = [(0,), (3,), (0,), (CHUNK + 5,), (7,)]

    def make(path: str) -> Any:
        params = [p for dtype in FLOATS for p in parameters(1, dtype, shapes)]
        alone = nn.Parameter(torch.zeros(0, dtype=torch.float32))  # a bucket that is empty
        states = {"state_dtype": torch.bfloat16, "params": [alone]}
        return fusedreg.LAMB([{"params": params}, states], lr=0.1, l1=0.1, **PATHS[path])

    optimizer, reference = make(path), make("reference")
    for seed in range(2):
        for each in (optimizer, reference):
            set_grads(parameters_of(each), seed)
            for param in parameters_of(each)[4::5]:
                param.grad = None if seed == 1 else param.grad
            each.step()
    # Rows, squares, their fold and the step for each bucket, also for the one without elements.
    assert optimizer.launches == 5 * 4
    for mine, other in zip(*map(parameters_of, (optimizer, reference)), strict=True):
        # In float64 beta**t is seen: 1 - 0.999**t is off by 2**-52 / 0.001, the root by half of it.
        assert_close([mine], [other], 8 + 2 * 500 * (mine.dtype == torch.float64))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_counts_of_an_empty_tensor_advance(path: str, clip: float | None) -> None:
    """Alone, beside others, and not without a gradient, as a tensor with elements has them."""
    for shapes in ([(0,)], [(3, 0), (0,), (5,)]):
        params = parameters(shapes=shapes)
        optimizer = fusedreg.RMSprop(params, momentum=0.5, l1=0.1, max_grad_norm=clip)
        optimizer.param_groups[0].update(PATHS.get(path, {"fused": False}))
        run(optimizer, 2)
        params[0].grad = None
        optimizer.step()
        states = [optimizer.state[param] for param in params]
        assert [state["step"] for state in states] == [2] + [3] * (len(params) - 1)
        assert [state["momentum_mass"] for state in states] == [1.5] + [1.75] * (len(params) - 1)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_parameters_for_both_paths_share_one_norm_and_one_skip(case: Case) -> None:
    def make() -> list[nn.Parameter]:
        complete, gaps = tensors(0, torch.float32, [(7,), (6, 4)])
        return [nn.Parameter(complete), nn.Parameter(gaps[:, ::2])]

    fused, reference = pair(case, make, max_grad_norm=0.5, skip_nonfinite=True)
    assert fused.backend == "triton and reference"
    for seed in range(3):
        for optimizer in (fused, reference):
            set_grads(parameters_of(optimizer), seed)
            if seed == 1:
                parameters_of(optimizer)[1].grad[0, 0] = float("inf")
            optimizer.step()
    assert_close(parameters_of(fused), parameters_of(reference), 8)
    assert fused.skipped_steps == reference.skipped_steps == 1


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_another_dtype(grad_dtype: torch.dtype) -> None:
    optimizers = []
    for fused in (True, False):
        params = parameters(dtype=torch.bfloat16, shapes=[(5,), (1100,)])
        optimizer = fusedreg.AdamW(params, lr=0.1, fused=fused, max_grad_norm=1.0)
        for seed in range(2):
            for param, grad in zip(params, tensors(seed, grad_dtype, [(5,), (1100,)]), strict=True):
                param.grad_dtype = grad_dtype
                param.grad = grad
            optimizer.step()
        optimizers.append(optimizer)
    assert optimizers[0].backend == "triton"
    assert_close(parameters_of(optimizers[0]), parameters_of(optimizers[1]), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_case(SOME)
def test_state_dtype_is_that_of_the_moments(case: Case, dtype: torch.dtype, path: str) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    params = parameters(dtype=dtype, shapes=[(5,), (3, 0), (1030,)])
    optimizer = case.make(params, path, state_dtype=other)
    run(optimizer, 2)
    exact = case.make(parameters(dtype=dtype, shapes=[(5,), (3, 0), (1030,)]), "reference")
    exact.param_groups[0]["state_dtype"] = other
    run(exact, 2)
    assert_close(params, parameters_of(exact), 8)
    for param in params:
        for name in optimizer.states(optimizer.param_groups[0]):
            assert optimizer.state[param][name].dtype == other


def test_state_dtype_survives_loading_whatever_the_file_has(path: str) -> None:
    params = parameters(dtype=torch.bfloat16, shapes=[(5,)])
    saved = torch.optim.AdamW(params, lr=0.1)
    run(saved, 1)
    assert saved.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    fused = None if path == "default" else path == "fused"
    optimizer = fusedreg.AdamW(params, state_dtype=torch.float32, fused=fused)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["state_dtype"] == torch.float32
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.int32, torch.complex64, "float32", torch.float8_e4m3fn])
def test_bad_state_dtype_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="Invalid state_dtype value"):
        fusedreg.SGD(parameters(), state_dtype=bad)  # type: ignore[arg-type]  # that is what is refused


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A switch that makes steps believe that they are being captured."""
    now = {"on": False}
    for module in (engine, fusedreg.stepper):
        monkeypatch.setattr(module, "is_capturing", lambda device: now["on"])
    # The list that a plan makes of its devices, while _current must not select a GPU.
    monkeypatch.setattr(engine, "is_gpu", lambda device: True)
    monkeypatch.setattr(engine, "_current", lambda device: contextlib.nullcontext())
    return now


def test_capture_of_what_has_not_run_before_is_refused(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    run(optimizer, 1)
    optimizer.max_grad_norm = 1.0
    capturing["on"] = True
    with pytest.raises(RuntimeError, match=r"load kernels: take one step .* before the capture"):
        run(optimizer, 1)


def test_capture_of_a_first_clip_is_refused(capturing: dict[str, bool]) -> None:
    """Kernels without a scale were loaded, although the norm was computed."""
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True, max_grad_norm=float("inf"))
    run(optimizer, 1)
    capturing["on"] = True
    run(optimizer, 1)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match=r"load kernels: take one step .* before the capture"):
        run(optimizer, 1)


def test_capture_of_a_step_that_needs_the_host_is_refused(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    set_grads(parameters_of(optimizer), 0)
    before = results(optimizer)
    capturing["on"] = True
    with pytest.raises(RuntimeError, match=r"take one step .* before the capture"):
        optimizer.step()
    assert results(optimizer) == before
    assert not optimizer.state


@pytest.mark.parametrize("cls", [fusedreg.AdamW, fusedreg.LAMB])
def test_captured_step_owns_all_that_it_reads(cls: Any, capturing: dict[str, bool]) -> None:
    """Fresh gradients and new floats go into the graph, and the shared memory stays as it was."""
    options: dict[str, Any] = {"betas": (0.5, 0.75), "max_grad_norm": 1.0}
    optimizer = cls(parameters(shapes=[(5,), (3,)]), fused=True, **options)
    twin = cls(parameters(shapes=[(5,), (3,)]), fused=True, **options)
    for each in (optimizer, twin):
        run(each, 1)
    plan = optimizer._stepper.plan
    memory = next(iter(plan.memory.values()))
    shared = frozen([memory.grads, memory.numbers])
    capturing["on"] = True
    for each in (optimizer, twin):
        each.param_groups[0]["lr"] = 0.5
        run(each, 1, first_seed=5)
    assert optimizer._stepper.captured == (plan,)
    assert frozen([memory.grads, memory.numbers]) == shared
    capturing["on"] = False
    for each in (optimizer, twin):
        run(each, 1, first_seed=6)
    reference = cls(parameters(shapes=[(5,), (3,)]), fused=False, **options)
    run(reference, 1)
    reference.param_groups[0]["lr"] = 0.5
    run(reference, 1, first_seed=5)
    run(reference, 1, first_seed=6)
    assert_close(parameters_of(optimizer), parameters_of(reference), 8)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, 1)
    assert optimizer._stepper.captured == (plan,), "a graph may still replay the old plan"


def test_capture_does_not_create_the_counter_of_skipped_steps(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    run(optimizer, 1)
    capturing["on"] = optimizer.skip_nonfinite = True
    with pytest.raises(RuntimeError, match=r"take one step .* before the capture"):
        run(optimizer, 1)
    capturing["on"] = False
    run(optimizer, 1)
    capturing["on"] = True
    run(optimizer, 1)
    assert optimizer.skipped_steps == 0


def test_addresses_pass_through_kernel_arguments_exactly() -> None:
    table = importlib.import_module("fusedreg.kernels.table")
    addresses = [0, 16, 2**47 - 16, 2**52 + 1, 2**53 - 1]
    sent = table.constants(addresses, torch.device("cpu"))
    assert sent.to(torch.int64).tolist() == addresses


# ---- which path ----------------------------------------------------------------------------------


def test_backend_says_what_runs() -> None:
    params = parameters(shapes=[(5,)])
    assert fusedreg.SGD(params).backend == "llvm"  # a CPU interprets only if asked
    assert fusedreg.SGD(params, fused=False).backend == "reference"
    assert fusedreg.SGD(params, fused=True).backend == "triton"
    assert fusedreg.SGD([torch.zeros(2, dtype=torch.complex64)], fused=True).backend == "reference"
    assert fusedreg.SGD([{"params": []}]).backend == "reference"


def test_backend_of_a_lazy_module_is_not_known_yet() -> None:
    optimizer = fusedreg.SGD(nn.LazyLinear(2).parameters(), fused=True)
    assert optimizer.backend == "reference"


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        params = [nn.Parameter(torch.ones(5, device="cpu"))]
        optimizer = fusedreg.AdamW(params, lr=0.1, fused=True, max_grad_norm=1.0)
        for _ in range(2):
            params[0].grad = torch.ones(5, device="cpu")
            optimizer.step()
    assert optimizer.launches == 3
    assert (params[0] < 1).all()


def test_reference_path_launches_nothing() -> None:
    optimizer = fusedreg.SGD(parameters(), fused=False)
    run(optimizer, 1)
    assert optimizer.launches == 0


def test_launches_are_those_of_the_last_step() -> None:
    optimizer = fusedreg.SGD(parameters(), fused=True)
    run(optimizer, 2)
    assert optimizer.launches == 2
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.launches == 0


def test_neither_import_nor_a_reference_step_loads_kernels() -> None:
    code = (
        "import sys, torch, fusedreg\n"
        "kernels = {f'fusedreg.kernels.{folder}' for folder in ('device', 'cpu', 'gpu')}\n"
        "assert not {'triton', 'llvmlite', *kernels} & sys.modules.keys()\n"
        "w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)\n"
        "fusedreg.AdamW([w], fused=False).step()\n"  # in which torch imports triton
        "assert not {'llvmlite', *kernels} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"TRITON_INTERPRET": "0"})


@pytest.fixture
def fresh_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a GPU: nothing is interpreted. Forget which triton was found, before and after."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.kernels.cache_clear()
    yield
    backend.kernels.cache_clear()


CUDA = torch.device("cuda")


def test_missing_triton_means_the_reference_with_one_warning(
    fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=r"triton cannot be imported.*triton>=3\.\d.*fused=False"):
        assert backend.device_kernels(CUDA, fused=None) is None
    with warnings.catch_warnings(action="error"):
        assert backend.device_kernels(CUDA, fused=True) is None


@pytest.mark.parametrize("version", ["2.3.1", "3.2.0"])
def test_old_triton_means_the_reference_with_one_warning(
    version: str, fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    with pytest.warns(UserWarning, match=f"triton {version} is too old"):
        assert backend.device_kernels(CUDA, fused=None) is None


def test_interpreter_is_given_no_addresses_of_a_gpu(
    fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.device_kernels(CUDA, fused=True) is None


def test_fused_false_asks_for_no_triton(
    fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.device_kernels(CUDA, fused=False) is None


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0+git1234"])
def test_new_triton_is_taken(
    version: str, fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = importlib.import_module("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert backend.device_kernels(CUDA, fused=None).name == "triton"


# ---- arithmetic that only a device has -----------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 1_000_000])
def test_bias_correction_for_any_count(beta: float, step: int) -> None:
    """1 - beta**t is formed in float64; a float32 beta would show at 1e-5."""
    params = parameters(dtype=torch.float32, shapes=[(3,)])
    optimizer = fusedreg.Adam(params, lr=0.1, betas=(beta, beta), eps=0.0, fused=True)
    run(optimizer, 1)
    state = optimizer.state[params[0]]
    state["step"].fill_(step - 1)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3)
    optimizer.step()
    correction = 1 - beta**step
    first, second = (1 - beta) / correction, (1 - beta) / correction
    moved = (before - params[0]).double() / 0.1
    # The subtraction from w rounds to half an ulp of w, the direction itself to a few ulp.
    bound = ulp(torch.float32, before.abs().max().item()) / 0.1 + 8 * 2.0**-24 * first / second**0.5
    assert (moved - first / second**0.5).abs().max() <= bound
    assert state["step"] == step


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_says_which_tensor_each_chunk_is_of() -> None:
    table = importlib.import_module("fusedreg.kernels.table")
    numels = [3, 0, 20, 7, 8, 0]
    built = table.build([range(6), range(6, 12)], numels, [0, 1, 0, 1, 0, 1], CPU, chunk=7)
    assert built.addresses.tolist() == [[*range(6)], [*range(6, 12)]]
    assert built.numels.tolist() == numels
    assert built.groups.tolist() == [0, 1, 0, 1, 0, 1]
    assert built.owners.tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 5]
    assert built.first_chunks.tolist() == [0, 1, 2, 5, 6, 8]
    assert (built.tensors, built.chunks, built.elements) == (6, 9, 38)
    dtypes = [value.dtype for value in built if isinstance(value, torch.Tensor)]
    assert dtypes == [torch.int64] * 2 + [torch.int32] * 3


def test_a_table_is_told_where_its_tensors_have_moved() -> None:
    table = importlib.import_module("fusedreg.kernels.table")
    built = table.build([[16, 32], [0, 48]], [3, 4], [0, 0], CPU, chunk=7)
    place = built.addresses.data_ptr()
    table.move(built, [[64, 32], [2**53 - 1, 80]])
    assert built.addresses.tolist() == [[64, 32], [2**53 - 1, 80]]
    assert built.addresses.data_ptr() == place
    with FakeTensorMode(), pytest.raises(RuntimeError, match="no memory"):
        table.move(built, [[1, 2], [3, 4]])
    with pytest.raises(RuntimeError, match="no memory"):
        torch.func.functionalize(lambda x: (table.move(built, [[1, 2], [3, 4]]), x)[1])(
            torch.ones(2)
        )
    assert built.addresses.tolist() == [[64, 32], [2**53 - 1, 80]]


PARALLEL = """
import torch, fusedreg
from fusedreg.kernels.table import build, move
torch.set_num_threads(4)
threads = lambda: len(__import__("os").listdir("/proc/self/task"))
before = threads()
addresses = [[16] * 1000] * 4
table = build(addresses, [8192 * 160] * 1000, [0] * 1000, torch.device("cpu"), chunk=8192)
assert table.chunks == 160_000
move(table, addresses)
assert threads() == before, "an operation of torch went parallel"
torch.ones(2**20).exp()
assert threads() > before  # as one would have
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it asks Linux for the threads of a process")
def test_a_table_is_made_on_one_thread() -> None:
    """Threads of torch would have to be woken, which takes milliseconds on a busy machine."""
    subprocess.run([sys.executable, "-c", PARALLEL], check=True)
