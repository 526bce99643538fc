"""The layers: imports run downwards only, and the device code knows nothing of the package."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import fusedreg

from cases import CLASSES

ROOT = Path(__file__).parent.parent
# Each module may import those before it. The modules that have an optimizer are one layer.
LAYERS = [
    "scalars",
    "dist",
    "penalty",
    "norms",
    "checks",
    "options",
    "checkpoint",
    "reference",
    "backend",
    "lines",
    "inventory",
    "tables",
    "engine",
    "parametrized",
    "groups",
    "momentum",
    "optimizer",
    "optimizers",
    "__init__",
    "cases",
    "machine",
    "check",
    "demo",
    "__main__",
]
# Rules know triton and the columns of a row; the engine does not know the rules; launch.py joins
# them.
KERNEL_LAYERS = {
    "": ["language", "table", "columns", "memory", "rules", "penalty", "norms", "rows", "engine"],
    "host": ["values", "language", "store", "build", "engine"],
}


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


def module_of(cls: type) -> str:
    """Where the package defines a class, "" outside it."""
    package, _, module = cls.__module__.rpartition(".")
    return module if package == "fusedreg" else ""


OPTIMIZERS = {module_of(cls) for cls in CLASSES}


def layer_of(name: str) -> str | None:
    """The layer that an imported name belongs to, None outside the package."""
    if name == "fusedreg":
        return "__init__"
    if not name.startswith("fusedreg."):
        return None
    first = name.split(".")[1]
    if first in OPTIMIZERS:
        return "optimizers"
    return first if first in LAYERS else "__init__"


FILES = sorted((ROOT / "fusedreg").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    module = file.relative_to(ROOT / "fusedreg").parts[0].removesuffix(".py")
    layer = "optimizers" if module in OPTIMIZERS else module
    for name in imported(file):
        other = layer_of(name)
        if other is not None and other != layer:
            assert LAYERS.index(other) < LAYERS.index(layer), f"{layer} imports {name}"


@pytest.mark.parametrize(("folder", "compiler"), [("", "triton"), ("host", "llvmlite")])
def test_kernels_import_torch_and_their_compiler_only(folder: str, compiler: str) -> None:
    for file in (ROOT / "kernels" / folder).glob("*.py"):
        for name in imported(file):
            known = name.split(".")[0] in sys.stdlib_module_names | {"torch", compiler}
            assert known or name.startswith("fusedreg.kernels."), f"{file}: {name}"


@pytest.mark.parametrize("folder", KERNEL_LAYERS)
def test_kernels_import_downwards(folder: str) -> None:
    files = {file.stem: file for file in (ROOT / "kernels" / folder).glob("*.py")}
    layers = [*KERNEL_LAYERS[folder], "launch"]
    assert set(files) == {*layers, "__init__"}
    package = f"fusedreg.kernels.{folder}." if folder else "fusedreg.kernels."
    for stem in layers:
        for name in imported(files[stem]):
            if name.startswith("fusedreg.kernels."):
                within, _, other = name.rpartition(package)
                if not within and (other := other.split(".")[0]) in layers:
                    assert layers.index(other) < layers.index(stem), f"{stem}: {name}"
                rule = name.split(".")[2] in {"rules", "penalty"}
                assert stem == "launch" or not rule, f"{stem}: {name}"


def test_only_the_backend_knows_the_kernels() -> None:
    for file in FILES:
        if file.name != "backend.py":
            found = [name for name in imported(file) if name.startswith("fusedreg.kernels")]
            assert not found, f"{file.name} imports {found}"


@pytest.mark.parametrize("module", sorted(OPTIMIZERS))
def test_an_optimizer_imports_another_only_to_inherit_from_it(module: str) -> None:
    classes = [cls for cls in CLASSES if module_of(cls) == module]
    inherited = {module_of(base) for cls in classes for base in cls.__mro__}
    names = imported(ROOT / "fusedreg" / f"{module}.py")
    known = {name.split(".")[1] for name in names if name.startswith("fusedreg.")}
    assert known & OPTIMIZERS <= inherited


def test_every_public_optimizer_is_in_the_table_of_cases() -> None:
    base = fusedreg.FusedOptimizer
    public = {getattr(fusedreg, name) for name in fusedreg.__all__}
    found = {each for each in public if isinstance(each, type) and issubclass(each, base)}
    assert found - {base} == set(CLASSES)
