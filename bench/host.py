"""Python's part of a step, beside that of torch's fused AdamW: `python bench/host.py`.

Launches do nothing, neither ours nor torch's, and CPU tensors stand for those of a GPU, so this
needs none. Times of the four are interleaved and compared by their minimum, because machines drift.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from itertools import product
from statistics import median
from typing import Any
from unittest import mock

import torch

import fusedreg

TENSORS, GROUPS, NUMEL = 300, 2, 4
CASES = ("addresses unchanged", "addresses changed")
IMPLEMENTATIONS = {"fusedreg": fusedreg.AdamW, "torch": torch.optim.AdamW}


def nothing(*_: Any, **__: Any) -> None:  # a mock would take longer
    """In the place of a launch."""


def no_launches() -> ExitStack:
    """Where triton's kernels take the tensors of a CPU, and no launch does anything."""
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415  # never on a GPU

    stack = ExitStack()
    stack.enter_context(mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}))
    stack.enter_context(mock.patch.object(InterpretedFunction, "run", nothing))
    for name in ("_fused_adamw_", "_foreach_add_"):  # torch's step, and its step counts
        stack.enter_context(mock.patch.object(torch, name, nothing))
    return stack


def make(cls: Any) -> tuple[Any, list[list[torch.Tensor]]]:
    """An optimizer that has stepped, and two sets of gradients at different addresses."""
    params = [torch.nn.Parameter(torch.zeros(NUMEL)) for _ in range(TENSORS)]
    grads = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    groups = [{"params": params[group::GROUPS]} for group in range(GROUPS)]
    optimizer = cls(groups, lr=1e-3, weight_decay=1e-2, fused=True)
    set_grads(optimizer, grads[0])
    optimizer.step()
    return optimizer, grads


def set_grads(optimizer: Any, grads: list[torch.Tensor]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def measure(repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each step, by case and implementation."""
    times: dict[tuple[str, str], list[float]] = {key: [] for key in product(CASES, IMPLEMENTATIONS)}
    with no_launches():
        made = {name: make(cls) for name, cls in IMPLEMENTATIONS.items()}
        for repeat in range(repeats):
            for (case, name), of in times.items():
                optimizer, grads = made[name]
                if case == CASES[1]:
                    set_grads(optimizer, grads[(repeat + 1) % 2])
                begin = time.perf_counter()
                optimizer.step()
                of.append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"AdamW, {TENSORS} parameters in {GROUPS} groups; microseconds of the host")
    print(f"{'':<46}{'min':>8}{'median':>8}")
    for (case, name), times in measure(1000).items():
        print(f"{f'{name}, {case}':<46}{min(times) * 1e6:>8.0f}{median(times) * 1e6:>8.0f}")
