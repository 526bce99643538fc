"""One step of every class beside its torch.optim namesake: `make bench`.

pytest-benchmark runs the rows of a group one after the other, so quote ratios within a group, and
not times: machines drift.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedreg

SHAPES = {
    "small": [(256, 256), (256,)] * 12 + [(1000, 256), (1000,)],  # 1 M parameters in 26 tensors
    "large": [(768, 3072)] * 4,  # 9 M parameters in 4 tensors
}
CASES = {
    "SGD momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 1e-3, "weight_decay": 1e-2}),
    "AdamW": ("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
}
IMPLEMENTATIONS = {
    "fusedreg reference": (fusedreg, {"fused": False}),
    "torch for-loop": (torch.optim, {"foreach": False}),
}


@pytest.fixture(params=SHAPES)
def params(request: pytest.FixtureRequest) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES[request.param]
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator)
    return made


@pytest.mark.parametrize("clip", [False, True], ids=["free", "clipped"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    params: list[torch.nn.Parameter],
    case: str,
    implementation: str,
    clip: bool,
) -> None:
    module, options = IMPLEMENTATIONS[implementation]
    name, kwargs = CASES[case]
    own_clip = {"max_grad_norm": 1.0} if clip and module is fusedreg else {}
    optimizer = getattr(module, name)(params, **kwargs, **options, **own_clip)

    def step() -> None:
        if clip and module is torch.optim:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    size = request.node.callspec.params["params"]
    benchmark.group = f"{case}, {size}{', clipped' if clip else ''}"
    benchmark.pedantic(step, rounds=10, iterations=1, warmup_rounds=2)
