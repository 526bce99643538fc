"""What figures and files say of the machine and the versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fusedreg
from fusedreg import machine


def test_caption_names_machine_and_versions() -> None:
    found = machine.environment("numpy", "no-such-package")
    assert found["machine"]["cores"] >= 1
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["no-such-package"] is None
    caption = machine.caption("numpy", "no-such-package")
    assert f"fusedreg {fusedreg.__version__}" in caption
    assert "numpy" in caption
    assert f"llvmlite {found['versions']['llvmlite']}" in caption
    assert found["versions"]["llvmlite"] is not None
    assert "no-such-package" not in caption


def test_caption_without_a_processor_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "missing")
    assert machine.facts()["cpu"] is None
    assert "None" not in machine.caption()
