"""Fixtures shared by all tests; the case table is in cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fusedreg

from cases import PATHS

torch.set_num_threads(1)  # the suite runs in two processes; small tensors gain nothing from threads


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the optimizer is asked to run; see cases.PATHS."""
    if request.param == "device":
        monkeypatch.setattr(fusedreg.scalars, "on_host", lambda value: False)
        monkeypatch.setattr(fusedreg.checks, "on_host", lambda value: False)
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
