"""What the kernels compile to, and when: on GPUs that need not be here; see compiled.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import fusedreg
from fusedreg.kernels.gpu.backend import LAUNCH_OPTIONS, block_of

import compiled
from cases import CASES, DTYPES, KERNEL_CASES, SOME, Case, by_id, each_case
from compiled import TARGETS, Binary

BY_ID = {case.id: case for case in CASES}
# Every device function in every dtype for one GPU, for the others in those that most people train
# in. What differs there is how many registers it takes, most in float64, which one rule shows.
GATE = [
    pytest.param(
        *(case, target, dtype),
        marks=[] if target == "sm_90" and dtype == torch.float32 else pytest.mark.slow,
    )
    for case in KERNEL_CASES
    for target in TARGETS
    for dtype in DTYPES
    if target == "sm_90" or case.rule == "adam" or dtype in (torch.float32, torch.bfloat16)
]
# Of a layerwise rule some hooks are compiled twice.
LAMB = [case.penalty for case in CASES if case.rule == "lamb" and case not in KERNEL_CASES]

WIDE_LOAD = r"ld\.global\.(.*\.)?(v4\.\w32|v2\.\w64)"
WIDE_STORE = r"st\.global\.(.*\.)?(v4\.\w32|v2\.\w64)"
AMD_STORE = r"(global|buffer)_store_dwordx{}"
AMD_LOAD = r"(global|buffer)_load_dwordx{}"
CONTRACTED = r"fma\..*|v_(pk_)?(fma|fmac|mad|mac)_f(32|64).*"
APPROXIMATE = r"div\.(full|approx).*|sqrt\.approx.*|rsqrt.*|rcp.*"

LAYERWISE = ("norm_kernel", "rows_kernel", "squares_kernel", "fold_kernel", "step_kernel")

Compile = Callable[..., dict[str, Binary]]


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Runs a function of compiled.py in a process that compiles."""
    cache = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        cache = cache.parent  # so that no worker compiles what another has
    with compiled.worker(cache / "triton") as pool:
        yield lambda *args, **kwargs: pool.submit(*args, **kwargs).result()


@pytest.fixture
def binaries(submit: Callable[..., Any]) -> Compile:
    return lambda *args, **kwargs: submit(compiled.binaries, *args, **kwargs)


# ---- what a kernel is made of --------------------------------------------------------------------


def accesses(dtype: torch.dtype, stored: torch.dtype, target: str) -> tuple[int, int]:
    """How many times each thread accesses a full block of `stored`, and 4-byte words of each time.

    The thread has some neighbouring elements of a block whose size depends on `dtype`, the
    parameter's; 16 bytes is the widest access.
    """
    threads = LAUNCH_OPTIONS["num_warps"] * TARGETS[target][2]
    words = block_of(dtype, aligned=True) // threads * stored.itemsize // 4
    return max(1, words // 4), min(4, words)


def check_resources(kernels: dict[str, Binary]) -> None:
    for name, binary in kernels.items():
        assert binary.stack == 0, f"{name} spills"
        # 128 registers for 128 threads are a quarter of the 65536 that a multiprocessor has: four
        # programs run on it at least.
        assert 0 < binary.registers <= 128, name


def check_accesses(
    binary: Binary,
    dtype: torch.dtype,
    states: list[torch.dtype],
    at: str,
    stored: bool = True,
    counts: int = 0,
) -> None:
    """Full blocks of parameter and states are loaded, and `stored`, and those of the gradient.

    Beside them `counts` numbers of 8 bytes are stored, which on an NVIDIA GPU is no wide access.
    """
    elements = [accesses(dtype, each, at) for each in (dtype, *states)]
    loads = [*elements, accesses(dtype, dtype, at)]
    stores = elements if stored else []
    if at.startswith("sm_"):
        assert {words for _, words in loads} == {4}
        assert binary.count(WIDE_LOAD) == sum(times for times, _ in loads)
        assert binary.count(WIDE_STORE) == sum(times for times, _ in stores)
        return
    # AMD's compiler may unroll the loop over blocks, and loads neighbouring numbers of a row at
    # once.
    for words in {words for _, words in loads}:
        assert binary.count(AMD_LOAD.format(words)) >= sum(n for n, w in loads if w == words)
    for words in {words for _, words in stores}:
        expected = sum(times for times, w in stores if w == words)
        found = binary.count(AMD_STORE.format(words)) - (counts if words == 2 else 0)
        assert found >= expected
        assert found % expected == 0


def check_arithmetic(binary: Binary, case: Case, target: str) -> None:
    """Each operation is rounded once, as IEEE 754 has it."""
    divides = case.cls not in (fusedreg.SGD, fusedreg.Lion)
    if target.startswith("sm_"):
        assert binary.count(CONTRACTED) == 0
        assert binary.count(APPROXIMATE) == 0
        assert (binary.count(r"div\.rn\.f\d+") > 0) == divides
        assert (binary.count(r"sqrt\.rn\.f\d+") > 0) == divides
    else:  # an IEEE division ends with a fixup, and is made of fused operations
        assert (binary.count(r"v_div_fixup_f\d+.*") > 0) == divides
        assert divides or binary.count(CONTRACTED) == 0


def check_squares(
    kernels: dict[str, Binary], case: Case, dtype: torch.dtype, states: list[torch.dtype], at: str
) -> None:
    """The kernels before the step of a layerwise rule store two sums each, and no element."""
    check_accesses(kernels["squares_kernel"], dtype, states, at, stored=False)
    check_arithmetic(kernels["squares_kernel"], case, at)
    for name in ("squares_kernel", "fold_kernel"):
        stores = {"sm": r"st\.global\.", "gf": r"(global|buffer)_store_"}[at[:2]]
        two_doubles = {"sm": r"st\.global\.b64", "gf": "global_store_dwordx2"}[at[:2]]
        assert kernels[name].count(stores + ".*") == kernels[name].count(two_doubles) == 2


def states_of(case: Case) -> int:
    optimizer = case.make([torch.ones(1)])
    return len(optimizer.states(optimizer.param_groups[0]))


def check(
    kernels: dict[str, Binary],
    case: Case,
    dtype: torch.dtype,
    target: str,
    state: torch.dtype | None = None,
    norm: bool = True,
) -> None:
    squares = ["squares_kernel", "fold_kernel"] if case.cls.layerwise else []
    assert list(kernels) == ["norm_kernel"] * norm + ["rows_kernel", *squares, "step_kernel"]
    states = [state or dtype] * states_of(case)
    check_resources(kernels)
    doubles = sum(count.wide for count in case.cls.counts.values())
    check_accesses(kernels["step_kernel"], dtype, states, target, counts=doubles)
    check_arithmetic(kernels["step_kernel"], case, target)
    if squares:
        check_squares(kernels, case, dtype, states, target)


@pytest.mark.parametrize(
    ("case", "target", "dtype"), GATE, ids=lambda value: getattr(value, "id", str(value))
)
def test_step(binaries: Compile, case: Case, target: str, dtype: torch.dtype) -> None:
    check(binaries(case, dtype, target), case, dtype, target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", LAMB)
def test_any_penalty_in_both_kernels_of_a_layerwise_step(
    binaries: Compile, penalty: str, dtype: torch.dtype
) -> None:
    case = BY_ID[f"lamb-{penalty}"]
    check(binaries(case, dtype, "sm_90"), case, dtype, "sm_90")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case([c for c in SOME if c.cls in (fusedreg.SGD, fusedreg.LAMB)])
def test_step_without_clipping(binaries: Compile, case: Case, dtype: torch.dtype) -> None:
    kernels = binaries(case, dtype, "sm_90", max_grad_norm=None)
    check(kernels, case, dtype, "sm_90", norm=False)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_wider_states(binaries: Compile, case: Case) -> None:
    kernels = binaries(case, torch.bfloat16, "sm_90", state_dtype=torch.float32)
    check(kernels, case, torch.bfloat16, "sm_90", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_reads_full_blocks_16_bytes_at_a_time(binaries: Compile, dtype: torch.dtype) -> None:
    times, words = accesses(dtype, dtype, "sm_90")
    assert words == 4
    assert binaries(SOME[0], dtype, "sm_90")["norm_kernel"].count(WIDE_LOAD) == times


ODD = [("lamb", "sm_80"), ("lamb", "sm_90"), ("rmsprop_both", "sm_90")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "target"), ODD)
def test_no_wide_access_where_an_address_is_odd(
    binaries: Compile, rule: str, target: str, dtype: torch.dtype
) -> None:
    kernels = binaries(BY_ID[f"{rule}-elastic_net"], dtype, target, offset=1)
    check_resources(kernels)
    for name in set(kernels) - {"rows_kernel", "fold_kernel"}:
        assert kernels[name].count(r"(ld|st)\.global\.(.*\.)?v\d.*") == 0


@pytest.mark.parametrize("target", TARGETS)
def test_products_and_sums_are_contracted_only_on_request(binaries: Compile, target: str) -> None:
    case = BY_ID["sgd_momentum-decay"]
    assert binaries(case, torch.float32, target)["step_kernel"].count(CONTRACTED) == 0
    contracted = binaries(case, torch.float32, target, contract=True)["step_kernel"]
    assert contracted.count(CONTRACTED) > 0


# ---- when a kernel is compiled -------------------------------------------------------------------

EDITS = {  # what is edited: case, kernels that change, file, old and new text
    "layerwise rule": (
        "lamb-none", "squares step", "rules",
        "return direction, gain, (m, v)\n", "return m, gain, (m, v)\n",
    ),
    "trust ratio": ("lamb-none", "step", "step", "1.0, ratio)", "2.0, ratio)"),
    "rule": (
        "adam-none", "step", "rules", "return direction, gain, (m, v)\n", "return m, gain, (m, v)\n"
    ),
    "called by a rule": (
        "adam-none", "step", "rules",
        "+ where(weight < 0.5, weight,", "- where(weight < 0.5, weight,",
    ),
    "called by what a rule calls": (
        "adam-none", "step", "rules", "tl.div_rn(a, b)", "tl.div_rn(b, a)"
    ),
    "scalars": ("adam-none", "rows", "rules", "t = counts[0] + 1.0", "t = counts[0] + 2.0"),
    "called by scalars": (
        "adam-none", "rows", "rules", "tl.exp(exponent * tl.log(base))", "tl.exp(exponent)"
    ),
    "coupled": (
        "adam-decay", "step", "penalties", "0.0, g, g + weight_decay * w)", "0.0, g, g - w)"
    ),
    "decoupled": (
        "adamw-decay", "step", "penalties", "return numbers[0]\n", "return 2.0 * numbers[0]\n"
    ),
    "order of a step": (
        "adamw-decay", "step", "step", "1.0, w, w * keep)", "1.0, w, w + keep)"
    ),
    "clip factor": ("adam-none", "rows", "step", "factor > 1.0, 1.0", "factor > 2.0, 2.0"),
    "subgradient": (
        "adam-l1_subgradient", "step", "penalties",
        "0.0, g, g + l1 * sign)", "0.0, g, g - l1 * sign)",
    ),
    "prox": (
        "adam-l1_prox", "step", "penalties", "(w, threshold * gain)", "(w, threshold + gain)"
    ),
    "called by prox": ("adam-l1_prox", "step", "penalties", "w + threshold", "w - threshold"),
    "shrink": (
        "adam-l1_decoupled", "step", "penalties",
        "w, soft_threshold(w, threshold))", "w, threshold)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_function_is_compiled_anew(submit: Callable[..., Any], edit: str) -> None:
    case, kernels, *text = EDITS[edit]
    before, copied, after = (
        submit(compiled.hashes_after, change, BY_ID[case]) for change in (None, None, tuple(text))
    )
    assert copied == before  # it is not the file's name that counts
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {f"{kernel}_kernel" for kernel in kernels.split()}


OWN_EDITS = {  # kernels that change: old and new text
    "rows": ("t = counts[0] + 1.0", "t = counts[0] + 2.0"),
    "step": ("return x * x", "return x * x * x"),
}


@pytest.mark.parametrize("kernel", OWN_EDITS)
def test_an_edited_function_of_a_user_is_compiled_anew(
    submit: Callable[..., Any], kernel: str
) -> None:
    old, new = OWN_EDITS[kernel]
    before, after = (submit(compiled.hashes_of_own, old, text) for text in (old, new))
    assert {name for name in before if after[name] != before[name]} == {f"{kernel}_kernel"}


def change_numbers() -> None:
    """Fifty steps, each with other numbers; runs where kernels are compiled."""
    params = compiled.params(torch.float32, [compiled.FULL, compiled.PARTIAL])
    groups = [{"params": [param]} for param in params]
    optimizer = fusedreg.LAMB(groups, l1=1e-3, max_grad_norm=1.0, skip_nonfinite=True)
    for step in range(1, 51):
        for group in optimizer.param_groups:
            group["lr"] = group["l1"] = 1 / step
            group["betas"] = (1 - 1 / (step + 1), 1 - 1 / (step + 2))
            group["eps"] = group["weight_decay"] = step
        optimizer.max_grad_norm = step
        optimizer.step()


def change_tensors() -> None:
    """Triton compiles for an integer that is 1, and for multiples of 16, unless told not to."""
    for tensors in (1, 2, 3, 16, 17, 48, 300):
        params = compiled.params(torch.float32, [compiled.PARTIAL] * tensors)
        fusedreg.LAMB(params, lr=0.1, l1=1e-3, max_grad_norm=1.0).step()


def scale_gradients() -> None:
    """What GradScaler says is read on the device."""
    optimizer = fusedreg.LAMB(compiled.params(torch.float16, [compiled.PARTIAL]), fused=True)
    optimizer.max_grad_norm = 1.0
    with mock.patch.object(fusedreg.engine.numbers, "on_host", return_value=False):
        for scale in (2.0, 4.0):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            optimizer.step()


@pytest.mark.parametrize("action", [change_numbers, change_tensors, scale_gradients])
def test_one_binary_serves_all(submit: Callable[..., Any], action: Callable[[], None]) -> None:
    assert submit(compiled.used, action) == dict.fromkeys(LAYERWISE, 1)


def two_buckets() -> None:
    """Buckets whose chunks begin at 0 and elsewhere among the partial norms."""
    for first in (1, 15, 16):
        wide = compiled.params(torch.float32, [compiled.PARTIAL] * first)
        narrow = compiled.params(torch.bfloat16, [compiled.PARTIAL] * 3)
        fusedreg.LAMB([*wide, *narrow], lr=0.1, max_grad_norm=1.0).step()


def test_one_binary_for_each_bucket(submit: Callable[..., Any]) -> None:
    used = submit(compiled.used, two_buckets)
    # Only the rows of the first bucket of a device store the norm, and sums have one dtype.
    assert used == {**dict.fromkeys(LAYERWISE, 2), "fold_kernel": 1}


def test_plain_numbers_in_a_rule_are_not_rounded_to_float32(submit: Callable[..., Any]) -> None:
    """Where the arithmetic is float64; see words.py."""
    for name, numbers in submit(compiled.numbers_of_words, torch.float64).items():
        narrow = {x for x in numbers if torch.tensor(x, dtype=torch.float32).item() == x}
        assert len(numbers - narrow) > 3, name
        assert all(x * 4 == int(x * 4) for x in narrow), name  # float32 has every quarter
