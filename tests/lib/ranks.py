"""Tests that run in several processes at once, in a pool of gloo ranks that stays up between them.

The body of a test decorated with `on_every_rank` runs in all ranks. It fails where any of them
fails, with the traceback of each; one that waits in vain for another is ended and prints where it
was. A pool in which a test failed is not used again, because its ranks may be out of step.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import importlib
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 4
TIMEOUT = 120.0  # seconds for one test; the first starts the pool, maybe on a busy machine
DIED = "died"
GRACE = 3.0  # seconds that ranks have to end by themselves after one of them failed

# Importing torch takes seconds, so one process does it and every rank is a fork of it. That process
# runs no tensor operation, hence has no threads that a fork would lose.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "fusedreg",
        "triton",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
    ]
)


def on_every_rank(body: Callable[..., None]) -> Callable[..., None]:
    """A test whose body runs in every rank; its arguments must pickle."""

    @functools.wraps(body)
    def test(**arguments: Any) -> None:
        __tracebackhide__ = True
        problems = POOL.run(body, arguments)
        _fail(problems)

    return test


def while_a_rank_dies(body: Callable[..., None]) -> Callable[..., None]:
    """A test whose body runs in every rank and ends the process of the last one."""

    @functools.wraps(body)
    def test(**arguments: Any) -> None:
        __tracebackhide__ = True
        problems = POOL.run(body, arguments)
        assert problems.pop(WORLD - 1, None) == DIED
        _fail(problems)

    return test


def _fail(problems: dict[int, str]) -> None:
    """Fail the test if there are problems, showing once what several ranks say."""
    __tracebackhide__ = True
    ranks_of: dict[str, list[int]] = {}
    for rank, problem in sorted(problems.items()):
        ranks_of.setdefault(problem, []).append(rank)
    if problems:
        shown = [f"on ranks {ranks}: {problem}" for problem, ranks in ranks_of.items()]
        pytest.fail("\n\n".join(shown), pytrace=False)


class Pool:
    """`WORLD` processes with a default process group, started when first used."""

    def __init__(self) -> None:
        self.store: dist.TCPStore | None = None
        self.ranks: dict[Connection, BaseProcess] = {}

    def run(self, body: Callable[..., None], arguments: dict[str, Any]) -> dict[int, str]:
        """Run `body` in all ranks; returns what went wrong in which."""
        if not self.ranks:
            self._start()
        for pipe in self.ranks:
            pipe.send((body.__module__, body.__qualname__, arguments))
        problems = self._problems()
        if problems:
            self.close()
        return problems

    def close(self) -> None:
        """End all ranks. The next test starts others, which takes a tenth of a second."""
        for pipe, process in self.ranks.items():
            process.kill()
            process.join()
            pipe.close()
        self.ranks.clear()
        self.store = None

    def _start(self) -> None:
        # The store is here, at a port that the system chose, so that it outlives every rank.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(WORLD):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, self.store.port, there), daemon=True
            )
            process.start()
            there.close()  # so that its end is noticed here
            self.ranks[here] = process

    def _problems(self) -> dict[int, str]:
        """Wait for all ranks, but not long for the others once one has failed."""
        problems: dict[int, str] = {}
        rank_of = {pipe: rank for rank, pipe in enumerate(self.ranks)}
        waiting = list(self.ranks)
        deadline = time.monotonic() + TIMEOUT
        while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                waiting.remove(pipe)
                try:
                    problem = pipe.recv()
                except EOFError:
                    problem = DIED
                if problem is not None:
                    problems[rank_of[pipe]] = problem
                    deadline = min(deadline, time.monotonic() + GRACE)
        for pipe in waiting:
            problems[rank_of[pipe]] = "did not end; stderr has where it was"
            self.ranks[pipe].terminate()
            self.ranks[pipe].join(GRACE)
        return problems


POOL = Pool()
atexit.register(POOL.close)


def _serve(rank: int, port: int, pipe: Connection) -> None:
    """One rank: run what comes through the pipe, answer with a traceback or None."""
    faulthandler.register(signal.SIGTERM, chain=True)
    if "TRITON_INTERPRET" in os.environ:
        importlib.import_module("interpreter")
    torch.set_num_threads(1)  # as environment.py
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the name of this machine need not resolve
    dist.init_process_group(
        "cpu:gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        module, name, arguments = pipe.recv()
        torch.manual_seed(0)
        problem = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # FSDP1 asks by a function that torch itself calls deprecated.
                warnings.filterwarnings("ignore", "`_get_pg_default_device`", UserWarning)
                getattr(importlib.import_module(module), name).__wrapped__(**arguments)
        except BaseException:  # pytest.fail raises no Exception
            problem = traceback.format_exc()
        pipe.send(problem)
