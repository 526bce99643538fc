"""The faults of `make faults` can still be planted."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS)
        return importlib.import_module("faults")


def test_each_fault_finds_the_text_that_it_replaces(faults: ModuleType) -> None:
    """Exactly once, in a file that is still there, and it changes something."""
    assert len(faults.FAULTS) >= 40
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    for fault in faults.FAULTS:
        assert faults.planted(fault) != (faults.ROOT / fault.file).read_text()


def test_each_fault_names_tests_that_there_are(faults: ModuleType) -> None:
    for fault in faults.FAULTS:
        assert any((TESTS / word).exists() for word in fault.tests.split())
