"""Fixtures shared by all tests; the case table is in lib/cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from zlib import crc32

import pytest
import torch

import fusedreg

import environment  # noqa: F401  # before the first optimizer, which cases.py makes
from cases import ON_PATH, QUICK


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked sampled(n), some n-th of the items is for `make test`, the rest is slow."""
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and crc32(item.nodeid.encode()) % mark.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(
    params=[pytest.param(path, marks=[] if QUICK[path] else [pytest.mark.slow]) for path in ON_PATH]
)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the optimizer is asked to run: by one of cases.PATHS, or as on an accelerator.

    On a CPU "default" and "foreach" are LLVM's kernels, and "fused" is triton's, interpreted. As on
    an accelerator, every number looks as if it lay on the device: the host reads none of them.
    """
    if request.param != "device":
        return request.param
    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.engine.numbers, fusedreg.stepper):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    return "reference"


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
