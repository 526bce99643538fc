"""The machine and the versions that measured numbers belong to, and how many threads they take."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import torch

import fusedreg

CPU_INFO = Path("/proc/cpuinfo")
"""Where Linux says what the processor is called; nowhere else is it as cheap to ask."""


Record: TypeAlias = dict[str, Any]
"""What is written to JSON."""


def facts() -> Record:
    """Processor, cores, system and, where there is one, the GPU."""
    found: Record = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python, torch, fusedreg and other packages, None for one that is not installed.

    llvmlite is always among them, since it compiles what steps on a CPU.
    """
    own: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedreg": fusedreg.__version__,
        "llvmlite": _version("llvmlite"),
    }
    return own | {package: _version(package) for package in packages}


def environment(*packages: str) -> dict[str, Record]:
    """Both, for a JSON file."""
    return {"machine": facts(), "versions": versions(*packages)}


def caption(*packages: str) -> str:
    """Both in one line, to stand inside a figure."""
    return describe(environment(*packages))


def describe(found: dict[str, Record]) -> str:
    """An `environment` in one line."""
    machine = found["machine"]
    names = [machine.get("gpu"), machine["cpu"], machine["architecture"]]
    where = ", ".join([*filter(None, names), f"{machine['cores']} cores"])
    numbers = [f"{name} {number}" for name, number in found["versions"].items() if number]
    return " · ".join([where, *numbers])


@contextmanager
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and lose much where others compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else None
