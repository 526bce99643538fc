"""The layers: imports run downwards only, and the device code knows nothing of the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fusedreg

from cases import CLASSES

ROOT = Path(__file__).parents[2]
# Each module may import those before it. A folder without its modules here is one layer.
LAYERS = [
    "scalars",
    "types",
    "dist",
    "penalty",
    "checks",
    "options",
    "penalties",
    "formats",
    "contract",
    "states",
    "norms",
    "checkpoint",
    "reference",
    "backend",
    "engine.numbers",
    "engine.watch",
    "engine.layout",
    "engine.plan",
    "stepper",
    "amp",
    "hooks",
    "parametrized",
    "groups",
    "optimizer",
    "optimizers",
    "__init__",
    "cases",
    "machine",
    "check",
    "demo",
    "__main__",
]
SHARED = ("layout", "table", "contract")
"""The modules of the kernels that all of fusedreg may import: they need no compiler."""
# What all agree on, then what both compilers take, then the two, which do not know each other.
KERNEL_LAYERS = [
    *SHARED,
    "device.language",
    "device.step",
    "device.penalties",
    "device.rules",
    "language",
    "rules",
    "cpu.values",
    "cpu.language",
    "cpu.store",
    "cpu.compiler",
    "cpu.loops",
    "cpu.backend",
    "gpu.memory",
    "gpu.norms",
    "gpu.rows",
    "gpu.walk",
    "gpu.backend",
]
COMPILERS = {"cpu": "llvmlite", "gpu": "triton", "device": "triton"}
"""What the modules of a folder may import beside torch and typing_extensions, which torch needs."""


def imported(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, fusedreg's own with their module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str, layers: list[str], package: str) -> str | None:
    """The layer that an imported name belongs to, None outside the package."""
    if name != package and not name.startswith(f"{package}."):
        return None
    within = name.removeprefix(package).removeprefix(".")
    found = [layer for layer in layers if f"{within}.".startswith(f"{layer}.")]
    return found[0] if found else "__init__"


def module_of(file: Path, folder: Path) -> str:
    """The dotted name of a file within a package; that of a package itself ends in __init__."""
    return ".".join(file.relative_to(folder).with_suffix("").parts)


FILES = sorted((ROOT / "fusedreg").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    layer = layer_of(f"fusedreg.{module_of(file, ROOT / 'fusedreg')}", LAYERS, "fusedreg")
    assert layer is not None
    for name in imported(file):
        other = layer_of(name, LAYERS, "fusedreg")
        if other is not None and other != layer and not name.startswith("fusedreg.kernels."):
            assert LAYERS.index(other) < LAYERS.index(layer), f"{layer} imports {name}"


@pytest.mark.parametrize("file", KERNELS, ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_import_downwards_and_torch_and_their_compiler_only(file: Path) -> None:
    module = module_of(file, ROOT / "kernels")
    folder = module.rpartition(".")[0]
    known = sys.stdlib_module_names | {"torch", "typing_extensions", COMPILERS.get(folder)}
    for name in imported(file):
        other = layer_of(name, KERNEL_LAYERS, "fusedreg.kernels")
        if other is None:
            assert name.split(".")[0] in known, f"{module} imports {name}"
        elif other != "__init__":
            layers = KERNEL_LAYERS
            assert layers.index(other) < layers.index(module), f"{module} imports {name}"
            assert other.partition(".")[0] in {folder, "device", *SHARED}, module
            # A loop takes the rule and the penalties of any program.
            of_rules = other in {"device.rules", "device.penalties"}
            assert not of_rules or module in {"rules", "cpu.backend", "gpu.backend"}, module


def test_every_module_of_the_kernels_has_a_layer() -> None:
    modules = {module_of(file, ROOT / "kernels") for file in KERNELS}
    assert {module for module in modules if not module.endswith("__init__")} == set(KERNEL_LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_package_imports_of_the_kernels_what_needs_no_compiler(file: Path) -> None:
    names = {name for name in imported(file) if name.startswith("fusedreg.kernels")}
    assert {layer_of(name, KERNEL_LAYERS, "fusedreg.kernels") for name in names} <= {*SHARED}


def test_only_the_backend_names_the_modules_of_a_compiler() -> None:
    """It imports them by name, in a call."""
    for compiler in ("cpu", "gpu"):
        found = [file.name for file in FILES if f"fusedreg.kernels.{compiler}" in file.read_text()]
        assert found == ["backend.py"]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_imports_another_only_to_inherit_from_it(cls: type) -> None:
    inherited = {base.__module__ for base in cls.__mro__}
    modules = {each.__module__ for each in CLASSES}
    file = Path(sys.modules[cls.__module__].__file__ or "")
    assert {name.rpartition(".")[0] for name in imported(file)} & modules <= inherited


def test_every_public_optimizer_is_in_the_table_of_cases() -> None:
    base = fusedreg.FusedOptimizer
    public = {getattr(fusedreg, name) for name in fusedreg.__all__}
    found = {each for each in public if isinstance(each, type) and issubclass(each, base)}
    assert found - {base} == set(CLASSES)
