"""The kernels compiled, on a CUDA GPU: what interpreting them on a CPU cannot show.

    pytest -m gpu tests/kernels/test_gpu.py

The arithmetic is that of the other files, which interpret the same kernels.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import fusedreg
from fusedreg.check.oracle import Oracle

from cases import CASES, SOME, TORCH_CASES, Case, by_id, tensors
from compare import assert_close, assert_rounds_once, frozen, parameters_of

DEVICE = torch.device("cuda")
PATH = "default"  # on a GPU nobody has to ask for the kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # torch speaks of what it does by itself in the first backward, and of a mode we ask for.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

# Around a block (1024) and a chunk (8192), with empty tensors first, in the middle and last.
SHAPES = [(0,), (5, 3), (), (1,), (3, 0, 2), (1023,), (1025,), (64, 128), (8193,), (0,)]
FULL = [shape for shape in SHAPES if 0 not in shape]
STEPS = 3


# ---- helpers -------------------------------------------------------------------------------------


def parameters(
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[tuple[int, ...]] = SHAPES,
    device: torch.device = DEVICE,
) -> list[nn.Parameter]:
    return [nn.Parameter(value.to(device)) for value in tensors(0, dtype, shapes)]


def gradients(params: Iterable[torch.Tensor], seed: int) -> list[torch.Tensor]:
    """Random gradients, the same values (rounded) for every dtype and device."""
    params = list(params)
    values = tensors(seed, shapes=[tuple(param.shape) for param in params])
    return [g.to(p.device, p.dtype) for g, p in zip(values, params, strict=True)]


def set_grads(params: Iterable[torch.Tensor], seed: int, scale: float = 1.0) -> None:
    params = list(params)
    for param, grad in zip(params, gradients(params, seed), strict=True):
        param.grad = grad * scale


def refill_grads(params: Iterable[torch.Tensor], seed: int) -> None:
    """New values in the same memory, as a captured graph needs them."""
    params = list(params)
    for param, grad in zip(params, gradients(params, seed), strict=True):
        param.grad.copy_(grad)


def run(optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for seed in range(1, steps + 1):
        set_grads(parameters_of(optimizer), seed)
        optimizer.step()


def bits(*values: torch.Tensor | None) -> Any:
    """Every bit of some tensors."""
    return frozen([None if value is None else value.detach().cpu() for value in values])


def result(optimizer: torch.optim.Optimizer) -> Any:
    """Every bit of parameters and state."""
    params = parameters_of(optimizer)
    states = [value for param in params for value in optimizer.state.get(param, {}).values()]
    return bits(*params, *states)


def outcome(optimizer: Any) -> Any:
    """The same, and what is known of the last step."""
    return result(optimizer), bits(optimizer.grad_norm, optimizer.skipped_steps)


def accuracy(case: Case, dtype: torch.dtype) -> float:
    """How many ulp one step of a case is off at most.

    2, as in test_oracle, for the operations on elements. In float64 the bias correction adds to it:
    beta**t is exp(t * log(beta)), of which a GPU rounds each function to an ulp, so 1 - beta**t, at
    least 1 - beta, is off by up to 2**-52, relatively 1 / (1 - beta) ulp, and the root of the
    second moment by half of that. Neither step nor threshold is larger than what assert_close
    compares with.

    Where coupled decay cancels every gradient of an element, Adagrad divides what rounding left of
    them by itself: of 20,000 elements one has two below 1/100, where half an ulp of 1 becomes 50 of
    the direction, times lr 25, in three steps.
    """
    if case.cls is fusedreg.Adagrad:
        return 2 + 25 / STEPS
    if dtype != torch.float64 or not issubclass(case.cls, fusedreg.Adam):
        return 2
    beta1, beta2 = case.options["betas"]
    return 2 + 1 / (1 - beta1) + 0.5 / (1 - beta2)


# ---- the same numbers as everybody ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", **by_id(CASES))
def test_steps_equal_the_papers_formulas(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = case.make(params, PATH)
    oracle = Oracle(case, params)
    for seed in range(STEPS):
        set_grads(params, seed)
        oracle.step([param.grad for param in params])
        optimizer.step()
    assert optimizer.backend == "triton"
    expected = [value.to(DEVICE, dtype) for value in oracle.values]
    assert_close(params, expected, ulps=STEPS * accuracy(case, dtype))


TORCH = {"fused": {"fused": True}, "for-loop": {"foreach": False}}
FUSED = (fusedreg.SGD, fusedreg.Adam)  # of the others torch has no fused step on a GPU
PAIRS = [
    (case, how)
    for case in TORCH_CASES
    for how in TORCH
    if how != "fused" or issubclass(case.cls, FUSED)
]


@pytest.mark.parametrize(("case", "how"), PAIRS, ids=lambda value: getattr(value, "id", value))
def test_float32_steps_equal_torchs(case: Case, how: str) -> None:
    params, theirs = parameters(shapes=FULL), parameters(shapes=FULL)
    run(case.make(params, PATH))
    run(case.torch_cls(theirs, **case.torch_kwargs, **TORCH[how]))
    # Both may be off, in opposite directions.
    assert_close(params, theirs, ulps=2 * STEPS * accuracy(case, torch.float32))


def assert_equals_the_reference(case: Case, dtype: torch.dtype) -> None:
    fused, reference = (
        case.make(parameters(dtype), path, max_grad_norm=0.5) for path in (PATH, "reference")
    )
    run(fused)
    run(reference)
    assert (fused.backend, reference.backend) == ("triton", "reference")
    ulps = 2 * STEPS * accuracy(case, dtype)
    assert_close(parameters_of(fused), parameters_of(reference), ulps)
    assert_close([fused.grad_norm], [reference.grad_norm], 1)
    for mine, other in zip(parameters_of(fused), parameters_of(reference), strict=True):
        first, second = fused.state.get(mine, {}), reference.state.get(other, {})
        assert first.keys() == second.keys()
        assert_close(first.values(), second.values(), ulps)


@pytest.mark.parametrize("case", **by_id(CASES))
def test_clipped_steps_equal_the_reference_on_the_same_gpu(case: Case) -> None:
    assert_equals_the_reference(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_every_dtype_equals_the_reference_on_the_same_gpu(case: Case, dtype: torch.dtype) -> None:
    assert_equals_the_reference(case, dtype)


@pytest.mark.parametrize("case", **by_id(CASES))
def test_low_precision_is_float32_arithmetic_rounded_once(case: Case) -> None:
    for dtype in (torch.bfloat16, torch.float16) if case in SOME else (torch.bfloat16,):
        optimizer = case.make(parameters(dtype), PATH)
        run(optimizer, 2)
        set_grads(parameters_of(optimizer), seed=5)
        assert_rounds_once(optimizer, lambda params: case.make(params, PATH))


@pytest.mark.parametrize("case", **by_id(SOME))
def test_same_inputs_give_the_same_bits(case: Case) -> None:
    seen = []
    for _ in range(3):
        optimizer = case.make(
            parameters(shapes=[*SHAPES, (300_001,)]), PATH, max_grad_norm=0.5, skip_nonfinite=True
        )
        run(optimizer)
        seen.append(outcome(optimizer))
    assert seen[0] == seen[1] == seen[2]


# ---- launches ------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 7)
    ).to(DEVICE)


def loss_of(model: nn.Module) -> torch.Tensor:
    words = torch.arange(50, device=DEVICE)
    return nn.functional.cross_entropy(model(words), words % 7)


@pytest.mark.parametrize(("clip", "expected"), [(None, 2), (1.0, 3)])
@pytest.mark.parametrize("cls", [fusedreg.AdamW, fusedreg.LAMB])
def test_an_ordinary_module_is_stepped_in_a_few_launches(
    cls: Any, clip: float | None, expected: int
) -> None:
    model = network()
    optimizer = cls(model.parameters(), lr=0.05, max_grad_norm=clip)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.backend == "triton"
    assert optimizer.launches == expected + 2 * cls.layerwise
    assert losses[-1] < losses[0] / 2


def compiled_variants() -> int:
    """How many kernels this process has compiled or loaded."""
    gpu = importlib.import_module("fusedreg.kernels.gpu.backend")
    kernels = (
        gpu.step_kernel,
        gpu.norm_kernel,
        gpu.rows_kernel,
        gpu.squares_kernel,
        gpu.fold_kernel,
    )
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


def test_changing_numbers_compile_nothing() -> None:
    """Integers that are 1 or a multiple of 16 are what triton would compile for."""
    optimizer = fusedreg.LAMB(parameters(), lr=0.1, l1=0.1, weight_decay=0.1, max_grad_norm=1.0)
    run(optimizer, 1)
    before = compiled_variants()
    assert before > 0
    for number in range(1, 101):
        optimizer.param_groups[0].update(
            lr=number, betas=(1 / number - 0.01, 0.9), weight_decay=16 * number, l1=1 / number
        )
        optimizer.max_grad_norm = float(number)
        run(optimizer, 1)
    assert compiled_variants() == before


# The compiler advises on speed and uses deprecated names of its own.
@pytest.mark.filterwarnings("ignore")
def test_compiled_train_step_learns() -> None:
    model = network()
    optimizer = fusedreg.AdamW(model.parameters(), lr=0.05, max_grad_norm=1.0)

    def train_step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    compiled = torch.compile(train_step)
    losses = [compiled().item() for _ in range(20)]
    assert optimizer.backend == "triton"
    assert losses[-1] < losses[0] / 2


# ---- the host never waits ------------------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error for whatever waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_seen() -> None:
    value = torch.ones((), device=DEVICE)
    with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("first", ["number", "tensor"])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_no_step_waits_for_the_gpu(case: Case, first: str) -> None:
    live = torch.tensor(0.1, device=DEVICE)
    rates = [0.1, live, 0.05, live] if first == "number" else [live, 0.05, live, 0.1]
    params = parameters()
    optimizer = case.make(params, PATH, max_grad_norm=0.5, skip_nonfinite=True)
    before = bits(*params)
    with no_waiting():
        for number, lr in enumerate(rates):
            optimizer.param_groups[0]["lr"] = lr
            for param in params[: 6 if number == 0 else None]:  # some gradients come late
                param.grad = torch.randn_like(param)
            optimizer.step()
            optimizer.zero_grad()
    assert bits(*params) != before
    assert optimizer.skipped_steps == 0


def test_a_loss_scaler_does_not_make_it_wait() -> None:
    params = parameters(shapes=FULL)
    optimizer = fusedreg.AdamW(params, fused=True, max_grad_norm=1.0)
    scaler = GradScaler(DEVICE.type)
    with no_waiting():
        for _ in range(3):
            loss = sum(param.square().sum() for param in params)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert optimizer.skipped_steps == 0


# ---- streams and devices -------------------------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(SOME))
def test_step_runs_on_the_current_stream(case: Case) -> None:
    optimizer, usual = (case.make(parameters(), PATH, max_grad_norm=0.5) for _ in range(2))
    for each in (optimizer, usual):
        run(each, 1)
    new = gradients(parameters_of(optimizer), seed=7)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # on any other stream the step would overtake the copies
        for param, grad in zip(parameters_of(optimizer), new, strict=True):
            param.grad.copy_(grad)
        optimizer.step()
    refill_grads(parameters_of(usual), seed=7)
    usual.step()
    torch.cuda.synchronize()
    assert outcome(optimizer) == outcome(usual)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("case", **by_id(SOME))
def test_parameters_need_not_be_on_the_current_device(case: Case) -> None:
    seen = []
    for device in (torch.device("cuda:1"), torch.device("cuda:0")):
        optimizer = case.make(parameters(device=device), PATH, max_grad_norm=0.5)
        with torch.cuda.device(0):
            run(optimizer)
        seen.append(outcome(optimizer))
    assert seen[0] == seen[1]


@two_gpus
@pytest.mark.parametrize("case", **by_id(SOME))
def test_two_devices_share_one_norm(case: Case) -> None:
    split, whole = parameters(), parameters()
    for param in split[::2]:
        param.data = param.data.to("cuda:1")
    optimizers = [case.make(params, PATH, max_grad_norm=0.5) for params in (split, whole)]
    for optimizer in optimizers:
        run(optimizer)
    assert optimizers[0].backend == "triton"
    assert_close([param.to(DEVICE) for param in split], whole, STEPS * 2)
    assert_close([optimizers[0].grad_norm.to(DEVICE)], [optimizers[1].grad_norm], 1)


# ---- CUDA graphs ---------------------------------------------------------------------------------


def capture(body: Callable[[], object]) -> Callable[[], None]:
    """Record what `body` launches; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


@contextmanager
def side_stream() -> Iterator[None]:
    """Where torch wants the passes before a capture that has a backward in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def with_live_lr(case: Case, **options: Any) -> tuple[Any, torch.Tensor]:
    lr = torch.tensor(0.1, device=DEVICE)
    return case.make(parameters(), PATH, lr=lr, max_grad_norm=0.5, **options), lr


@pytest.mark.parametrize("case", **by_id(SOME))
def test_replay_equals_eager_steps(case: Case) -> None:
    pairs = [with_live_lr(case, skip_nonfinite=True) for _ in range(2)]
    (graphed, _), (eager, _) = pairs
    for optimizer, _ in pairs:
        run(optimizer, 1)
    replay = capture(graphed.step)
    assert outcome(graphed)[0] == outcome(eager)[0]  # capturing runs nothing
    for seed in range(5):
        for optimizer, lr in pairs:
            lr.fill_(0.1 / (seed + 1))
            refill_grads(parameters_of(optimizer), seed)
            if seed == 2:
                parameters_of(optimizer)[1].grad.fill_(math.inf)
        replay()
        eager.step()
        assert outcome(graphed) == outcome(eager)
    assert graphed.skipped_steps == 1
    for optimizer, _ in pairs:  # and eager steps go on from there
        run(optimizer)
    assert outcome(graphed) == outcome(eager)


# torch compares the stream of a parameter's gradient with that of its use: both are the graph's.
@pytest.mark.filterwarnings("ignore:.*AccumulateGrad")
@pytest.mark.parametrize("case", **by_id(SOME))
def test_backward_and_step_in_one_graph(case: Case) -> None:
    """The gradients are the graph's own, made anew in its memory pool."""
    pairs = [with_live_lr(case) for _ in range(2)]
    (graphed, _), (eager, _) = pairs
    target = torch.tensor(0.5, device=DEVICE)

    def train_step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        params = parameters_of(optimizer)
        sum((param - target).square().sum() for param in params).backward()
        optimizer.step()

    for optimizer, _ in pairs:
        with side_stream():
            train_step(optimizer)
            train_step(optimizer)
    replay = capture(lambda: train_step(graphed))
    for number in range(1, 4):
        target.fill_(number)
        for _, lr in pairs:
            lr.fill_(0.1 / number)
        replay()
        train_step(eager)
        assert outcome(graphed) == outcome(eager)


@pytest.mark.parametrize("cls", [fusedreg.AdamW, fusedreg.LAMB])
def test_a_graph_keeps_its_numbers_and_an_eager_step_takes_the_new_ones(cls: Any) -> None:
    graphed, eager = (cls(parameters(), lr=0.1, max_grad_norm=1.0) for _ in range(2))
    for optimizer in (graphed, eager):
        run(optimizer, 1)
        optimizer.param_groups[0]["lr"] = 0.2  # after the last eager step, so not yet sent
    replay = capture(graphed.step)
    replay()
    eager.step()
    for lr, step in [(0.3, graphed.step), (0.2, replay), (0.4, graphed.step), (0.2, replay)]:
        for optimizer in (graphed, eager):
            optimizer.param_groups[0]["lr"] = lr
        step()
        eager.step()
        assert outcome(graphed)[0] == outcome(eager)[0]


def test_capture_without_a_step_before_it_says_what_to_do() -> None:
    optimizer = fusedreg.AdamW(parameters(), lr=0.1)
    params = parameters_of(optimizer)
    set_grads(params, 0)
    before = bits(*params)

    def body() -> None:
        params[1].grad.mul_(1.0)  # torch warns of an empty graph
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"take one step .* before the capture"):
        capture(body)
    assert bits(*params) == before
    assert not optimizer.state
    optimizer.step()
    capture(body)()
    torch.cuda.synchronize()
    assert optimizer.state[params[1]]["step"] == 2


# ---- loss scaling --------------------------------------------------------------------------------

SCALE = 2.0**12


def scaler_of() -> GradScaler:
    scaler = GradScaler(DEVICE.type, init_scale=SCALE)
    scaler.scale(torch.ones((), device=DEVICE))  # makes its scale a tensor
    return scaler


def step_by(scaler: GradScaler, optimizer: Any, unscale: bool) -> None:
    """One step that must not write a gradient, unless the user unscales them before."""
    if unscale:
        scaler.unscale_(optimizer)
    grads = [param.grad for param in parameters_of(optimizer)]
    before = bits(*grads)
    scaler.step(optimizer)
    scaler.update()
    assert bits(*grads) == before


@pytest.mark.parametrize("unscale", [False, True], ids=["ready", "unscaled"])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_steps_of_a_scaler_are_those_without_one(case: Case, unscale: bool) -> None:
    scaled, plain = (case.make(parameters(), "fused", max_grad_norm=1.0) for _ in range(2))
    scaler = scaler_of()
    for seed in range(3):
        set_grads(parameters_of(scaled), seed, SCALE)
        step_by(scaler, scaled, unscale)
        set_grads(parameters_of(plain), seed)
        plain.step()
    assert outcome(scaled) == outcome(plain)


@pytest.mark.parametrize("unscale", [False, True], ids=["ready", "unscaled"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_a_scaler_that_finds_an_overflow_changes_nothing(
    case: Case, bad: float, unscale: bool
) -> None:
    optimizer = case.make(parameters(), "fused")
    run(optimizer)
    scaler = scaler_of()
    before = result(optimizer)
    set_grads(parameters_of(optimizer), 7, SCALE)
    parameters_of(optimizer)[1].grad[2, 1] = bad
    step_by(scaler, optimizer, unscale)
    assert result(optimizer) == before
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == SCALE / 2


# ---- memory --------------------------------------------------------------------------------------


class Poisoned:
    """Memory full of NaN, of which tensors are views.

    Args:
        numel: its size.
        dtype: its dtype.
        offset: how many elements after a multiple of 16 bytes each view begins.
    """

    def __init__(self, numel: int, dtype: torch.dtype, offset: int) -> None:
        self.memory = torch.full((numel,), math.nan, dtype=dtype, device=DEVICE)
        self.outside = torch.ones(numel, dtype=torch.bool, device=DEVICE)
        self.place = offset

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of `values` inside."""
        piece = slice(self.place, self.place + values.numel())
        assert piece.stop <= self.memory.numel()
        self.outside[piece] = False
        self.place += values.numel() // 16 * 16 + 32
        return self.memory[piece].view(values.shape).copy_(values.detach())

    def assert_intact(self) -> None:
        """Nothing was written outside, and nothing from there came in."""
        assert self.memory[self.outside].isnan().all()
        assert not self.memory[~self.outside].isnan().any()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_nothing_outside_of_a_tensor_is_read_or_written(
    case: Case, dtype: torch.dtype, offset: int
) -> None:
    shapes = [(1,), (5,), (1024,), (1500,), (8192,), (8199,)]
    pool = Poisoned(6 * 25_000, dtype, offset)
    usual = case.make(parameters(dtype, shapes), PATH, max_grad_norm=0.5)
    inside = case.make(
        [nn.Parameter(pool.take(param)) for param in parameters_of(usual)], PATH, max_grad_norm=0.5
    )
    for seed in range(3):
        for param, grad in zip(
            parameters_of(inside), gradients(parameters_of(usual), seed), strict=True
        ):
            param.grad = pool.take(grad) if seed == 0 else param.grad.copy_(grad)
        if seed == 1:  # from now on the states are inside, too
            for param in parameters_of(inside):
                for name in inside.states(inside.param_groups[0]):
                    inside.state[param][name] = pool.take(inside.state[param][name])
        set_grads(parameters_of(usual), seed)
        for optimizer in (inside, usual):
            optimizer.step()
    assert inside.backend == "triton"
    assert outcome(inside) == outcome(usual)
    pool.assert_intact()


def free_memory_of(needed: int) -> None:
    """Skip the test where the GPU has less."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, of {free / 1e9:.0f}")


HUGE = 2**31 + 1000
PROBES = [0, 1, 2**31 - 1, 2**31, 2**31 + 1, HUGE - 1]


def huge_gradient(numel: int, probes: list[int]) -> torch.Tensor:
    """0.5 but at the probes, which are 1, 2, 3..."""
    grad = torch.full((numel,), 0.5, dtype=torch.bfloat16, device=DEVICE)
    for value, place in enumerate(probes, start=1):
        grad[place] = value
    return grad


def assert_stepped(param: torch.Tensor, probes: list[int]) -> None:
    """Every 1 went down by the gradient of its place times 0.5."""
    assert [param[place].item() for place in probes] == [
        1 - 0.5 * value for value in range(1, len(probes) + 1)
    ]
    assert (param != 0.75).sum() == len(probes)


def test_tensor_of_more_than_2_31_elements() -> None:
    free_memory_of(4 * 2 * HUGE)
    param = nn.Parameter(torch.ones(HUGE, dtype=torch.bfloat16, device=DEVICE))
    param.grad = huge_gradient(HUGE, PROBES)
    optimizer = fusedreg.SGD([param], lr=0.5, max_grad_norm=math.inf)
    optimizer.step()
    assert_stepped(param.detach(), PROBES)
    squares = sum(value**2 for value in range(1, len(PROBES) + 1))
    expected = math.sqrt(0.25 * (HUGE - len(PROBES)) + squares)
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=2**-23)


def test_tensors_of_more_than_2_31_elements_together() -> None:
    numel, count = 2**29 + 9, 5
    free_memory_of((count + 3) * 2 * numel)
    probes = [0, 8191, 8192, 2**28, numel - 1]
    grad = huge_gradient(numel, probes)
    params = [
        nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)) for _ in range(count)
    ]
    for param in params:
        param.grad = grad
    fusedreg.SGD(params, lr=0.5).step()
    for param in params:
        assert_stepped(param.detach(), probes)


@pytest.mark.parametrize("cls", [fusedreg.AdamW, fusedreg.LAMB])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clipped"])
def test_a_step_allocates_next_to_nothing(cls: Any, clip: float | None) -> None:
    shapes = [(50257, 768), *[(768, 3072)] * 36]  # 124 M parameters, as GPT-2
    params = [nn.Parameter(torch.ones(shape, device=DEVICE)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = cls(params, max_grad_norm=clip)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 2**20
