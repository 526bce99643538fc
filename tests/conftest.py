"""Fixtures shared by all tests; the case table is in cases.py."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch

import fusedreg

from cases import CASES, KERNEL_CASES, PATHS

if not torch.cuda.is_available():
    # Without a GPU, fused=True has its kernels interpreted. Triton reads this when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("interpreter")
torch.set_num_threads(1)  # the suite runs in two processes; small tensors gain nothing from threads


@pytest.fixture(params=[*PATHS, "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the optimizer is asked to run: cases.PATHS, and the reference as on an accelerator.

    On a CPU "default" and "foreach" are LLVM's kernels, and "fused" is triton's, interpreted. As on
    an accelerator, every number looks as if it lay on the device: the host reads none of them.
    """
    if request.param != "device":
        return request.param
    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.inventory):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    return "reference"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype


SAME_CODE = ("foreach", "fused")
"""Paths that run what another runs: "default" by another flag, and its rules, interpreted."""
NO_OTHER_CODE = set(CASES) - set(KERNEL_CASES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All cases meet the oracle; KERNEL_CASES, which run all the code, meet the rest.

    The others are left out on paths that are slow, or run the code of another, and are not measured
    for coverage, which takes as long again.
    """
    kept, left_out = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        again = params.get("case") in NO_OTHER_CODE
        if again:
            item.add_marker("no_cover")
        again = again and params.get("path") in SAME_CODE and item.path.stem != "test_oracle"
        (left_out if again else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
