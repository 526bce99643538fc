"""How the reference path steps: in blocks on a CPU, and a parameter wholly or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import ceil, prod
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedreg
from fusedreg import reference

from cases import CASES, DTYPES, PLAIN, SOME, Case, by_id, each_case, parameters, run, set_grads
from compare import assert_close, frozen, parameters_of, results
from problems import elementwise, few_paths

PACKAGE = str(Path(fusedreg.__file__).parent)
BLOCK = 64
"""Elements of the blocks of these tests, in the dtype of the arithmetic."""


@contextmanager
def blocks(dtype: torch.dtype, numel: int = BLOCK) -> Iterator[list[int]]:
    """Blocks of so many elements; yields how many each stepped block has."""
    wide = reference.compute_dtype(torch.empty(0, dtype=dtype))
    stepped: list[int] = []
    new_values = reference._new_values

    def recorded(rule: Any, settings: Any, block: Any, *more: Any) -> Any:
        stepped.append(block[0].numel())
        return new_values(rule, settings, block, *more)

    with (
        mock.patch.object(reference, "BLOCK_BYTES", numel * wide.itemsize),
        mock.patch.object(reference, "_new_values", recorded),
    ):
        yield stepped


# ---- blocks ------------------------------------------------------------------------------------


def dense(dtype: torch.dtype) -> list[nn.Parameter]:
    """Without gaps: contiguous, transposed, channels_last, beginning off an alignment, small."""
    vector, matrix, image, slice_, scalar, small = parameters(
        dtype=dtype, shapes=[(1000,), (30, 11), (3, 4, 7, 5), (211,), (), (BLOCK,)]
    )
    data = [vector, matrix.t(), image.to(memory_format=torch.channels_last), slice_[1:]]
    return [nn.Parameter(value.detach()) for value in [*data, scalar, small]]


def gappy(dtype: torch.dtype) -> list[nn.Parameter]:
    """A parameter with gaps in its memory, and one whose gradient is laid out otherwise."""
    strided, matrix = parameters(dtype=dtype, shapes=[(40, 10), (30, 11)])
    return [nn.Parameter(strided.detach()[:, ::2]), nn.Parameter(matrix.detach().t())]


def step(optimizer: Any, dtype: torch.dtype, steps: int = 3) -> None:
    """Step with gradients that are laid out like the parameters, as autograd leaves them."""
    for seed in range(steps):
        set_grads(parameters_of(optimizer), seed)
        for param in parameters_of(optimizer):
            param.grad = torch.empty_like(param).copy_(param.grad)
        optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clipped"])
@each_case(elementwise(CASES))
def test_blocks_give_the_bits_of_the_whole(case: Case, clip: float | None) -> None:
    complex_dtypes = [] if case.options["l1"] else [torch.complex64, torch.complex128]
    for dtype in [*DTYPES, *complex_dtypes]:
        check_blocks_give_the_bits_of_the_whole(case, dtype, clip)


def check_blocks_give_the_bits_of_the_whole(
    case: Case, dtype: torch.dtype, clip: float | None
) -> None:
    whole, blockwise = (case.make(dense(dtype), max_grad_norm=clip) for _ in range(2))
    step(whole, dtype)
    with blocks(dtype) as stepped:
        step(blockwise, dtype)
    assert results(blockwise) == results(whole)
    reals = [p.numel() * (2 if p.is_complex() else 1) for p in dense(dtype)]
    assert len(stepped) == 3 * sum(ceil(numel / BLOCK) for numel in reals)
    assert max(stepped) == BLOCK


@each_case(elementwise(SOME))
def test_default_block_gives_the_bits_of_the_whole(case: Case) -> None:
    """Long enough for the threads and the vectors of torch, and with a rest."""
    shapes = [(3 * reference.BLOCK_BYTES // 4 + 13,)]
    blockwise, whole = (case.make(parameters(0, torch.float32, shapes)) for _ in range(2))
    step(blockwise, torch.float32, 2)
    with blocks(torch.float32, prod(shapes[0])) as stepped:
        step(whole, torch.float32, 2)
    assert stepped == [prod(shapes[0])] * 2
    assert results(blockwise) == results(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_what_is_not_laid_out_alike_is_stepped_as_a_whole(case: Case, dtype: torch.dtype) -> None:
    whole, blockwise = (case.make(gappy(dtype)) for _ in range(2))
    for seed in range(3):
        for optimizer in (whole, blockwise):
            set_grads(parameters_of(optimizer), seed)  # contiguous
        whole.step()
        with blocks(dtype) as stepped:
            blockwise.step()
        assert stepped == [param.numel() for param in gappy(dtype)]
    assert results(blockwise) == results(whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_case([case for case in CASES if case.cls.layerwise])
def test_norms_of_layerwise_rules_are_those_of_the_whole(case: Case, dtype: torch.dtype) -> None:
    """The sums of the blocks are added in another order."""
    whole, blockwise = (case.make(dense(dtype)) for _ in range(2))
    step(whole, dtype, 1)
    with blocks(dtype):
        step(blockwise, dtype, 1)
    # Each sum of n squares is off by less than n ulp of float64 in any order. Of the two sums the
    # roots keep half each, so r is off by n ulp. For a float32 step that is nothing, but it may tip
    # the rounding of lr * r * u and of the difference.
    ulps = 1000 if dtype == torch.float64 else 1
    assert_close(parameters_of(blockwise), parameters_of(whole), ulps)


def test_a_rule_without_a_device_rule_sees_the_whole() -> None:
    """It may be anything, and not elementwise."""

    class Normalised(fusedreg.FusedOptimizer):
        def device_rule(self, group: Any) -> Any:
            return None

        def update(self, settings: Any, state: Any, grad: Tensor) -> Any:
            assert grad.shape == (30, 11)
            return grad / grad.norm(), 1.0, {}

    params = parameters(shapes=[(30, 11)])
    before = params[0].detach().clone()
    optimizer = Normalised(params, {"lr": 0.5})
    with blocks(torch.float64) as stepped:
        step(optimizer, torch.float64, 1)
    assert stepped == [330]
    grad = params[0].grad
    assert grad is not None
    assert torch.equal(params[0], before - 0.5 * (grad / grad.norm()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_on_an_accelerator_there_are_no_blocks(device: str) -> None:
    """They would be nothing but more launches."""
    param = nn.Parameter(torch.ones(1000, device=device))
    param.grad = torch.ones_like(param)
    with blocks(torch.float32) as stepped:
        fusedreg.AdamW([param], fused=False).step()
    assert len(stepped) == (ceil(1000 / BLOCK) if device == "cpu" else 1)


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that an operation makes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


@each_case([*SOME, *PLAIN.values()])
def test_no_temporary_is_as_large_as_a_parameter(case: Case) -> None:
    for dtype in DTYPES:
        params = parameters(dtype=dtype, shapes=[(50 * BLOCK,)])
        optimizer = case.make(params)
        with blocks(dtype):
            step(optimizer, dtype, 1)
            grads = [param.grad for param in params if param.grad is not None]
            with Largest([*params, *grads, *optimizer.state[params[0]].values()]) as largest:
                optimizer.step()
        # Two sums of squares of each block, in float64, are twice a block of float64.
        assert 0 < largest.bytes <= 2 * 8 * BLOCK


# ---- before or after, never between ------------------------------------------------------------

STEPPED_IN_BLOCKS = [(3,), (3, 3)]
"""Of 4 elements: one block, and three."""
RULES = ["sgd_momentum-l1_prox", "adam-none", "rmsprop_both-none", "lamb-none"]
INTERRUPTED = [case for case in CASES if case.id in RULES]
"""Momentum with its mass, moments with a step count, all states that there are, a norm."""


class Raiser:
    """Raises once: at the k-th line of the package, and instruction of what writes."""

    CAREFUL: tuple[CodeType, ...] = (reference.update.__code__, reference._write.__code__)

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if frame.f_code in self.CAREFUL:
            frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def at_line(optimizer: Any, k: int) -> bool:
    """Step, interrupted at the k-th place; whether there were so many."""
    old = sys.gettrace()
    sys.settrace(Raiser(k))
    try:
        optimizer.step()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(old)
    return False


class Failing(TorchDispatchMode):
    """Raises once: before or after the k-th operation."""

    def __init__(self, at: int, after: bool) -> None:
        super().__init__()
        self.left, self.after = at, after

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise MemoryError
        made = func(*args, **(kwargs or {}))
        if self.left == 0:
            raise MemoryError
        return made


def at_operation(optimizer: Any, k: int, after: bool) -> bool:
    """As `at_line`, where an operation of torch raises."""
    try:
        with Failing(k, after):
            optimizer.step()
    except MemoryError:
        return True
    return False


def pieces(optimizer: Any) -> list[Any]:
    """The bits of every parameter with its state."""
    return [frozen([p, dict(optimizer.state.get(p, {}))]) for p in parameters_of(optimizer)]


def check_every_interruption(
    case: Case,
    steps_before: int,
    interrupted: Callable[[Any, int], bool],
    mode: Callable[[], Any] = nullcontext,
) -> None:
    """Each parameter has stepped or not, and the next step goes on from there.

    The same gradients come in every step, so that a parameter which the interrupted step has left
    alone is where it would be after one step, and any other after two. All steps are taken in the
    same mode: a dispatch mode sees numbers as tensors, whose powers may differ in the last place.
    """

    def made(steps: int) -> Any:
        optimizer = case.make(parameters(shapes=STEPPED_IN_BLOCKS, dtype=torch.float32))
        set_grads(parameters_of(optimizer), 7)
        for _ in range(steps):
            with mode():
                optimizer.step()
        return optimizer

    with blocks(torch.float32, 4):
        before, once, twice = (made(steps_before + more) for more in range(3))
        before, once, twice = pieces(before), pieces(once), pieces(twice)
        seen = set()
        k = 0
        while True:
            k += 1
            optimizer = made(steps_before)
            if not interrupted(optimizer, k):
                break
            assert torch.is_grad_enabled()
            found = pieces(optimizer)
            stepped = tuple(mine == after for mine, after in zip(found, once, strict=True))
            seen.add(stepped)
            for mine, has_stepped, old in zip(found, stepped, before, strict=True):
                # Before the first step there may be states already, which are those of no step.
                of = slice(None) if steps_before else slice(1)
                assert has_stepped or mine[of] == old[of], f"between, at {k}"
            with mode():
                optimizer.step()
            expected = [two if s else one for s, one, two in zip(stepped, once, twice, strict=True)]
            assert pieces(optimizer) == expected, f"after {k}"
    # Parameters are stepped in their order, and something raised before, between and after them.
    assert len(INTERRUPTED) == len(RULES)
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.slow
@pytest.mark.no_cover  # which traces too
@pytest.mark.parametrize("steps_before", [0, 1])
@each_case(INTERRUPTED)
def test_an_interrupted_step_is_whole_for_each_parameter(case: Case, steps_before: int) -> None:
    check_every_interruption(case, steps_before, at_line)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@each_case(INTERRUPTED)
def test_an_operation_that_fails_leaves_each_parameter_whole(case: Case, after: bool) -> None:
    check_every_interruption(
        case, 1, lambda optimizer, k: at_operation(optimizer, k, after), lambda: Failing(0, after)
    )


@few_paths
def test_a_rule_may_exchange_its_states(path: str) -> None:
    """New values are all known before the first is written."""

    class Exchanging(fusedreg.FusedOptimizer):
        tensor_states = ("first", "second")

        def device_rule(self, group: Any) -> Any:
            return None

        def update(self, settings: Any, state: Any, grad: Tensor) -> Any:
            new = {"first": state["second"], "second": state["first"]}
            return state["first"] + grad, 1.0, new

    params = parameters(shapes=[(7,)])
    optimizer = Exchanging(params, {"lr": 0.5}, fused=False)
    run(optimizer, steps=1)
    state = optimizer.state[params[0]]
    state["first"].fill_(1.0)
    state["second"].fill_(2.0)
    optimizer.step()
    assert (state["first"] == 2.0).all()
    assert (state["second"] == 1.0).all()
