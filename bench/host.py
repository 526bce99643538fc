"""Python's part of a step, beside that of torch's fused AdamW: `python bench/host.py`.

Launches do nothing, neither ours nor torch's, and CPU tensors stand for those of a GPU, so this
needs none. Times of the four are interleaved and compared by their minimum, because machines drift.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import fusedreg
from fusedreg import backend
from fusedreg.engine import numbers as lines
from fusedreg.engine import plan as engine
from fusedreg.engine import watch as inventory

TENSORS, GROUPS, NUMEL = 300, 2, 4
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2, "fused": True}
CASES = ("addresses unchanged", "addresses changed")
IMPLEMENTATIONS = {"fusedreg": fusedreg.AdamW, "torch": torch.optim.AdamW}
PARTS = {
    "options": (lines.Lines, "refresh"),
    "tensors": (inventory.Inventory, "_take_tensors"),
    "sending addresses": (engine.Plan, "_send_grads"),
    "sending numbers": (engine.Plan, "_send_numbers"),
    "launching": (engine.Plan, "_do"),
}


@contextmanager
def no_launches() -> Iterator[None]:
    """Kernels step CPU parameters, and no launch does anything."""
    launch = backend.kernels()
    assert launch is not None, "needs triton"

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    with (
        mock.patch.object(backend, "device_kernels", return_value=launch),
        mock.patch.object(launch, "run", nothing),
        mock.patch.object(torch, "_fused_adamw_", nothing),
        mock.patch.object(torch, "_foreach_add_", nothing),  # torch's step counts: one launch too
    ):
        yield


def make(cls: Any) -> tuple[Any, list[list[torch.Tensor]]]:
    """An optimizer that has stepped, and two sets of gradients at different addresses."""
    params = [torch.nn.Parameter(torch.zeros(NUMEL)) for _ in range(TENSORS)]
    grads = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    size = TENSORS // GROUPS
    groups = [{"params": params[i : i + size]} for i in range(0, TENSORS, size)]
    optimizer = cls(groups, **OPTIONS)
    set_grads(optimizer, grads[0])
    optimizer.step()
    return optimizer, grads


def set_grads(optimizer: Any, grads: list[torch.Tensor]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


def measure(repeats: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of each step, by case and implementation."""
    times: dict[tuple[str, str], list[float]] = {
        (case, name): [] for case in CASES for name in IMPLEMENTATIONS
    }
    with no_launches():
        made = {name: make(cls) for name, cls in IMPLEMENTATIONS.items()}
        for repeat in range(repeats):
            for (case, name), of in times.items():
                optimizer, grads = made[name]
                if case == CASES[1]:
                    set_grads(optimizer, grads[(repeat + 1) % 2])
                of.append(seconds(optimizer.step))
    return times


def seconds(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def measure_parts(repeats: int) -> dict[str, list[float]]:
    """Seconds of each part of a step whose addresses changed."""
    times: dict[str, list[float]] = {name: [] for name in PARTS}
    with no_launches():
        optimizer, grads = make(fusedreg.AdamW)
        for repeat in range(repeats):
            for name, (owner, method) in PARTS.items():
                set_grads(optimizer, grads[repeat % 2])
                optimizer.step()
                set_grads(optimizer, grads[(repeat + 1) % 2])
                with timed(owner, method, times[name]):
                    optimizer.step()
    return times


@contextmanager
def timed(owner: Any, method: str, times: list[float]) -> Iterator[None]:
    """Append the time that all calls of a method took together."""
    original, taken = getattr(owner, method), []

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            taken.append(time.perf_counter() - begin)

    with mock.patch.object(owner, method, call):
        yield
    times.append(sum(taken))


def row(name: str, times: list[float]) -> str:
    return f"{name:<46}{min(times) * 1e6:>8.0f}{statistics.median(times) * 1e6:>8.0f}"


def main() -> None:
    torch.set_num_threads(1)
    print(f"AdamW, {TENSORS} parameters in {GROUPS} groups; microseconds of the host")
    print(f"{'':<46}{'min':>8}{'median':>8}")
    for (case, name), times in measure(1000).items():
        print(row(f"{name}, {case}", times))
    print("of which, addresses changed:")
    for name, times in measure_parts(200).items():
        print(row(f"  {name}", times))


if __name__ == "__main__":
    main()
