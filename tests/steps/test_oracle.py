"""Every case against the float64 oracle: the paper's formula, independent of the package."""

from __future__ import annotations

import pytest
import torch

from fusedreg.check.oracle import Oracle

from cases import CASES, Case, each_case, parameters, set_grads, ulp

CLIPS = {"free": None, "clipped": 1.0}


@pytest.mark.parametrize("max_grad_norm", CLIPS.values(), ids=CLIPS)
@each_case(CASES, all_on=("reference", "default", "fused"))
def test_float64_trajectory_equals_paper_equations(
    case: Case, max_grad_norm: float | None, path: str
) -> None:
    params = parameters()
    optimizer = case.make(params, path, max_grad_norm=max_grad_norm)
    oracle = Oracle(case, params, max_grad_norm)
    steps = 4 if path == "fused" else 25  # kernels are interpreted, at a tenth of a second a step
    for seed in range(steps):
        set_grads(params, seed)
        oracle.step([p.grad for p in params])
        optimizer.step()
    for param, expected in zip(params, oracle.values, strict=True):
        largest = max([1.0, *expected.abs().flatten().tolist()])
        # About 10 roundings a step, each at most half an ulp of what is at most a few times the
        # largest weight, and a quarter of them in the same direction: 2 ulp a step.
        bound = steps * 2 * ulp(torch.float64, largest)
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=bound)
        # A threshold cuts at the same place, so zeros are zeros in both.
        assert torch.equal(param == 0, expected == 0)
