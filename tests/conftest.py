"""Fixtures shared by all tests; the case table is in lib/cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusedreg

import environment  # noqa: F401  # before the first optimizer, which cases.py makes
from cases import CASES, INTERPRETED_CASES, PATHS, PROPERTY_CASES, SOME, Case


@pytest.fixture(params=[*PATHS, "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the optimizer is asked to run: cases.PATHS, and the reference as on an accelerator.

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


ALL_PATHS = ("test_oracle", "test_torch_parity", "test_gpu")
"""The files in which every product of rule and penalty counts."""
REFERENCE = ("test_l1", "test_decay")
"""Those in which it does on the path that reads like the formula."""


def _taken(path: str | None, file: str) -> list[Case]:
    """The cases that the tests of a file take on a path; see cases.py."""
    if path == "foreach":  # what "default" runs, by another flag
        return SOME
    if path == "fused" and file != "test_oracle":  # the rules of "default", interpreted
        return INTERPRETED_CASES
    if path == "device":  # what "reference" runs, with numbers that nobody may read
        return PROPERTY_CASES
    everything = file in ALL_PATHS or (file in REFERENCE and path in ("reference", None))
    return CASES if everything else PROPERTY_CASES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that would only take time.

    What is not in INTERPRETED_CASES runs no other code, nor does another way to the same kernels
    but for SOME. It is not measured for coverage, which takes as long again.
    """
    kept, left_out = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("case")
        path = params.get("path")
        known = isinstance(case, Case) and case in CASES
        covered = INTERPRETED_CASES if path in ("reference", "default", None) else SOME
        if isinstance(case, Case) and case not in covered:
            item.add_marker("no_cover")
        taken = not known or case in _taken(path, item.path.stem)
        (kept if taken else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
