"""The faults of `make faults` can still be planted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    file = Path(__file__).parents[1] / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_fault_finds_the_text_that_it_replaces(faults: ModuleType) -> None:
    """Exactly once, in a file that is still there, and it changes something."""
    assert len(faults.FAULTS) >= 40
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)
    for fault in faults.FAULTS:
        assert faults.planted(fault) != (faults.ROOT / fault.file).read_text()


def test_each_fault_names_tests_that_there_are(faults: ModuleType) -> None:
    tests = Path(faults.__file__).parent
    for fault in faults.FAULTS:
        assert any((tests / word).exists() for word in fault.tests.split())
