"""What an exception in the midst of a step leaves behind, such as Ctrl-C raises."""

from __future__ import annotations

import _thread
import importlib
import time
from array import array
from collections.abc import Iterator
from typing import Any

import pytest
import torch

launch: Any = importlib.import_module("fusedreg.kernels.host.launch")


@pytest.fixture
def threads() -> Iterator[int]:
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(1)


def wait_for_threads(before: int) -> None:
    """Until those that have let go of their lock have ended, a few instructions later."""
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
        launch._on_new_threads(3, loop, 0, ())
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

    monkeypatch.setattr(launch, "start_new_thread", start)
    before = _thread._count()
    loop = Loop(30, 0, "never")
    launch._on_new_threads(3, loop, 0, ())
    assert loop.running == 0
    assert loop.done == [1] * 30
    assert len(started) == possible
    wait_for_threads(before)


def test_no_thread_outlives_a_step(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the threads hold the memory that their loop reads."""
    monkeypatch.setattr(launch, "_openmp", lambda: None)
    before = _thread._count()
    others: list[int] = []
    kept: list[Any] = []
    on_new_threads = launch._on_new_threads

    def watched(how_many: int, loop: Any, address: int, keep: Any) -> None:
        main = _thread.get_ident()

        def counting(address: int) -> None:
            others.extend({_thread.get_ident()} - {main})
            loop(address)

        kept.append((address, keep[0]))
        on_new_threads(how_many, counting, address, keep)

    monkeypatch.setattr(launch, "_on_new_threads", watched)
    param = torch.zeros(launch.CHUNK * 40, requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = importlib.import_module("fusedreg").SGD([param], lr=1.0)
    optimizer.step()
    assert param.unique().tolist() == [-1.0]
    assert len(others) == threads - 1
    ((address, work),) = kept
    assert isinstance(work, array)
    assert work.buffer_info()[0] == address
    wait_for_threads(before)
