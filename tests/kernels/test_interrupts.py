"""What an exception in the midst of a step leaves behind, such as Ctrl-C raises."""

from __future__ import annotations

import _thread
import importlib
import itertools
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedreg

from cases import parameters, set_grads
from compare import parameters_of

llvm: Any = importlib.import_module("fusedreg.kernels.cpu.backend")


@pytest.fixture
def threads() -> Iterator[int]:
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(1)


def wait_for_threads(before: int) -> None:
    """Until no more threads than `before` are there: an ended one goes a moment later."""
    deadline = time.monotonic() + 10
    while _thread._count() > before:
        assert time.monotonic() < deadline
        time.sleep(0)


# ---- threads of our own --------------------------------------------------------------------------


class Loop:
    """Takes chunks like a compiled loop; on the main thread it is interrupted a few times."""

    def __init__(self, chunks: int, interrupts: int, when: str) -> None:
        self.left, self.done = list(range(chunks)), [0] * chunks
        self.interrupts, self.when = interrupts, when
        self.main, self.running = _thread.get_ident(), 0

    def __call__(self, address: int) -> None:
        self.running += 1
        try:
            self._interrupt("before")
            while self.left:
                chunk = self.left.pop()
                time.sleep(0.001)
                self.done[chunk] += 1
            self._interrupt("after")
        finally:
            self.running -= 1

    def _interrupt(self, when: str) -> None:
        if _thread.get_ident() == self.main and when == self.when and self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("interrupts", [0, 1, 2, 5])
def test_a_loop_ends_before_an_interrupt_goes_on(interrupts: int, when: str) -> None:
    """Each chunk is done once, and no thread is left."""
    before = _thread._count()
    loop = Loop(30, interrupts, when)
    try:
        llvm._on_new_threads(3, loop, 0, ())
        raised = False
    except KeyboardInterrupt:
        raised = True
    assert loop.running == 0
    assert raised == (interrupts > 0)
    assert loop.done == [1] * 30
    assert loop.interrupts == 0
    wait_for_threads(before)


@pytest.mark.parametrize("possible", [0, 1, 2])
def test_fewer_threads_do_the_loop_where_no_more_can_start(
    possible: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []

    def start(*args: Any) -> int:
        if len(started) == possible:
            raise RuntimeError("can't start new thread")
        started.append(_thread.start_new_thread(*args))
        return started[-1]

    monkeypatch.setattr(llvm, "start_new_thread", start)
    before = _thread._count()
    loop = Loop(30, 0, "never")
    llvm._on_new_threads(3, loop, 0, ())
    assert loop.running == 0
    assert loop.done == [1] * 30
    assert len(started) == possible
    wait_for_threads(before)


def test_no_thread_outlives_a_step(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the threads hold the memory that their loop reads."""
    monkeypatch.setattr(llvm, "_openmp", lambda: None)
    before = _thread._count()
    others: list[int] = []
    kept: list[Any] = []
    on_new_threads = llvm._on_new_threads

    def watched(how_many: int, loop: Any, address: int, keep: Any) -> None:
        main = _thread.get_ident()

        def counting(address: int) -> None:
            others.extend({_thread.get_ident()} - {main})
            loop(address)

        kept.append((address, keep[0]))
        on_new_threads(how_many, counting, address, keep)

    monkeypatch.setattr(llvm, "_on_new_threads", watched)
    param = torch.zeros(llvm.CHUNK * 40, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = fusedreg.SGD([param], lr=1.0)
    optimizer.step()
    assert param.unique().tolist() == [-1.0]
    assert len(others) == threads - 1
    ((address, work),) = kept
    assert isinstance(work, array)
    assert work.buffer_info()[0] == address
    wait_for_threads(before)


# ---- a step --------------------------------------------------------------------------------------

ROOT = Path(fusedreg.__file__).resolve().parent.parent
OURS = tuple(f"{ROOT / folder}{os.sep}" for folder in ("fusedreg", "kernels"))
EVERY = 2
"""Lines from one interrupt to the next that is tried."""


class Interrupted(KeyboardInterrupt):
    """No other code raises it."""


def interrupted(action: Callable[[], Any], at: int) -> bool:
    """Whether `action` has a line of this package with that number, before which it is interrupted.

    As by Ctrl-C, an exception comes between any two lines.
    """
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def everything(optimizer: Any) -> list[list[torch.Tensor]]:
    """Value, moments and counts of each parameter."""
    return [[p.detach(), *optimizer.state[p].values()] for p in parameters_of(optimizer)]


def copies(of: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[value.clone() for value in values] for values in of]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


RUNS = {
    "AdamW": lambda params: fusedreg.AdamW(params, amsgrad=True, max_grad_norm=1.0, l1=0.1),
    "SGD": lambda params: fusedreg.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda params: fusedreg.RMSprop(params, momentum=0.5, skip_nonfinite=True),
    "LAMB": lambda params: fusedreg.LAMB(params, max_grad_norm=1.0),
}


# Each of these takes some hundred steps. In one of them every kind of launch stands.
EVERY_RUN = [
    pytest.param(
        *(name, threaded), marks=[] if (name, threaded) == ("LAMB", "openmp") else pytest.mark.slow
    )
    for name in RUNS
    for threaded in ("one thread", "openmp", "own threads")
]


@pytest.mark.parametrize(("name", "threaded"), EVERY_RUN)
def test_a_parameter_is_stepped_with_its_states_or_not_at_all(
    name: str, threaded: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a step is interrupted: counts, moments and value are all before it or all after."""
    if threaded == "one thread":
        torch.set_num_threads(1)
    if threaded == "own threads":
        monkeypatch.setattr(llvm, "_openmp", lambda: None)
        monkeypatch.setattr(llvm, "START", 1)
    running = _thread._count()
    size = llvm.CHUNK + 5
    params = [*parameters(0, torch.float32, [(size,), (0,), (7,)]), *parameters(1)]
    optimizer = RUNS[name](params)
    set_grads(params, 0)
    optimizer.step()
    assert optimizer.backend == "llvm"
    live, before = everything(optimizer), copies(everything(optimizer))
    optimizer.step()
    after = copies(live)
    seen: set[str] = set()
    for at in itertools.count(1, EVERY):
        for values, old in zip(live, before, strict=True):
            for value, saved in zip(values, old, strict=True):
                value.copy_(saved)
        if not interrupted(optimizer.step, at):
            break
        found = copies(live)
        wait_for_threads(running)
        assert all(map(equal, found, live)), f"interrupted before line {at}, a thread went on"
        for values, old, new in zip(live, before, after, strict=True):
            where = "before" if equal(values, old) else "after" if equal(values, new) else "between"
            assert where != "between", f"interrupted before line {at}"
            seen.add(where)
    assert seen == {"before", "after"}
    assert at > 100
    assert all(map(equal, live, after)), "the step after an interrupt is like any other"
