"""Nothing lives longer than its owner, with the garbage collector off."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.state_dict
from torch import nn

import fusedreg

import spread  # imports ZeroRedundancyOptimizer, which like checkpoint is looked for among callers
from cases import FULL, PLAIN, Case, each_case

assert spread.ZeroRedundancyOptimizer
EACH = [*PLAIN.values(), *FULL.values()]


class Big:
    """What a function of the user has beside the optimizer."""


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def train(case: Case, path: str, lr: Any, **options: Any) -> list[weakref.ref[Any]]:
    """Weak references to what a training had."""
    big = Big()
    param = nn.Parameter(torch.ones(3))
    optimizer = case.make([param], path, lr=lr, **options)
    for _ in range(2):
        batch = torch.ones(3)
        param.grad = batch.clone()
        optimizer.step()
    states = [weakref.ref(value) for value in optimizer.state[param].values()]
    return [*map(weakref.ref, (big, param, optimizer, batch)), *states]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("clip", [pytest.param(None, marks=pytest.mark.slow), 1.0])
@each_case(EACH)
def test_all_of_a_training_is_freed_with_its_last_reference(
    case: Case, path: str, clip: float | None
) -> None:
    """lr 0 looks like the step of a checkpoint, for which callers are looked at."""
    train(case, path, 0.1)  # what is compiled or cached once
    for lr in (0.1, 0.0):
        kept = [ref() for ref in train(case, path, lr, max_grad_norm=clip)]
        assert not any(value is not None for value in kept)


@pytest.mark.parametrize("cls", [fusedreg.SGD, fusedreg.Adam])
def test_a_step_keeps_no_batch(cls: Any, path: str) -> None:
    model = nn.Linear(8, 1)
    optimizer = case_of(cls).make(model.parameters(), path, lr=0.0)
    alive: list[weakref.ref[Any]] = []

    def train_step(x: torch.Tensor) -> None:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        alive.append(weakref.ref(x))

    for _ in range(5):
        train_step(torch.randn(4, 8))
        assert sum(ref() is not None for ref in alive) == 0


def case_of(cls: Any) -> Case:
    return PLAIN[cls]


def test_an_interrupted_step_keeps_nothing(path: str) -> None:
    def interrupted() -> list[weakref.ref[Any]]:
        big = Big()
        param = nn.Parameter(torch.ones(3))
        optimizer = PLAIN[fusedreg.Adam].make([param], path)
        param.grad = torch.ones(3)
        optimizer.step()

        def closure() -> float:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        return [*map(weakref.ref, (big, param, optimizer))]

    kept = interrupted()
    gc.collect()  # pytest's record of the exception is a cycle
    assert not any(ref() is not None for ref in kept)
