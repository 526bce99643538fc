"""Fixtures shared by all tests; the case table is in cases.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cases import PATHS


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> str:
    """How the optimizer is asked to run; see cases.PATHS."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype
