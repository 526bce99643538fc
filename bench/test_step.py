"""The same contenders and methods by pytest-benchmark: `pytest bench --benchmark-only`.

pytest-benchmark runs the rows of a group one after the other, not in turns: machines drift, so
quote run.py's ratios. What does not match the oracle is not timed.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from contenders import OTHERS, REFERENCE, TORCH, contenders
from jobs import DTYPES, METHODS, SMALL
from verify import Setting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# All methods on the first model with clipping, and AdamW on all models in all ways.
CASES = [
    pytest.param(*case, id=f"{case[1]}, {case[0]}, {case[2]}{', clipped' * case[3]}")
    for case in product(SMALL, METHODS, DTYPES, (True, False))
    if case[1] == "AdamW" or (case[0], *case[2:]) == (next(iter(SMALL)), "float32", True)
]


@cache
def setting_of(model: str, dtype: str) -> Setting:
    return Setting(SMALL[model], DTYPES[dtype], DEVICE)


@pytest.mark.parametrize("implementation", ["fusedreg", REFERENCE, *TORCH, *OTHERS])
@pytest.mark.parametrize(("model", "method", "dtype", "clip"), CASES)
def test_step(benchmark, request, model, method, dtype, clip, implementation) -> None:
    makers, missing = contenders(METHODS[method])
    if implementation not in makers:
        pytest.skip(missing.get(implementation, f"has no {method}"))
    setting = setting_of(model, dtype)
    task = setting.task(METHODS[method], clip)
    contender = makers[implementation](setting.groups, task)
    verdict = setting.check(contender, task)
    if not verdict.matches:
        assert implementation != "fusedreg", verdict
        pytest.skip(verdict.text)  # a time of other results would compare nothing
    benchmark.group = request.node.callspec.id.removesuffix(f"-{implementation}")
    benchmark.extra_info |= {"backend": contender.backend, "tensors": len(setting.params)}

    def step() -> None:
        contender.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=setting.set_grads, rounds=10, iterations=1, warmup_rounds=1)
