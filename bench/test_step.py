"""The same contenders and methods by pytest-benchmark: `pytest bench --benchmark-only`.

pytest-benchmark runs the rows of a group one after the other, not in turns: machines drift, so
quote run.py's ratios. What does not match the reference is not timed.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from contenders import OTHERS, REFERENCE, TORCH, Task, contenders, make_groups, params_of
from methods import DTYPES, METHODS
from shapes import SMALL
from verify import check, expected, max_norm, set_grads, start

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cases() -> list[Any]:
    """All methods on the first model with clipping, and AdamW on all models in all ways."""
    first, *_ = SMALL
    return [
        pytest.param(*case, id=f"{case[1]}, {case[0]}, {case[2]}{', clipped' * case[3]}")
        for case in product(SMALL, METHODS, DTYPES, (True, False))
        if case[1] == "AdamW" or (case[0], *case[2:]) == (first, "float32", True)
    ]


@cache
def prepared(model: str, method: str, dtype: str, clip: bool) -> Any:
    """What all contenders of a case begin with."""
    groups = make_groups(SMALL[model], DTYPES[dtype], DEVICE)
    task = Task(METHODS[method], max_norm(groups) if clip else None)
    begin = start(groups, task)
    return groups, task, begin, expected(begin, groups, task)


@pytest.mark.parametrize("implementation", ["fusedreg", REFERENCE, *TORCH, *OTHERS])
@pytest.mark.parametrize(("model", "method", "dtype", "clip"), cases())
def test_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    model: str,
    method: str,
    dtype: str,
    clip: bool,
    implementation: str,
) -> None:
    makers, missing = contenders(METHODS[method])
    if implementation not in makers:
        pytest.skip(missing.get(implementation, f"has no {method}"))
    groups, task, begin, must_be = prepared(model, method, dtype, clip)
    contender = makers[implementation](groups, task)
    verdict = check(contender, groups, begin, must_be)
    if not verdict.matches:
        assert implementation != "fusedreg", verdict
        pytest.skip(str(verdict))
    backend = getattr(contender.optimizer, "backend", None)
    benchmark.group = request.node.callspec.id.removesuffix(f"-{implementation}")
    benchmark.extra_info |= {"backend": backend, "tensors": len(params_of(groups))}

    def step() -> None:
        contender.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def again() -> None:
        set_grads(params_of(groups), begin.grads)

    benchmark.pedantic(step, setup=again, rounds=10, iterations=1, warmup_rounds=1)
