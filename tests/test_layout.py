"""The layers: imports run downwards only, and the device code knows nothing of the package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each module may import those before it.
LAYERS = [
    "scalars",
    "penalty",
    "norms",
    "checks",
    "checkpoint",
    "reference",
    "groups",
    "optimizer",
    "sgd",
    "adam",
    "__init__",
    "demo",
    "__main__",
]


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


def layer_of(name: str) -> str | None:
    """The layer that an imported name belongs to, None outside the package."""
    if name == "fusedreg":
        return "__init__"
    if not name.startswith("fusedreg."):
        return None
    first = name.split(".")[1]
    return first if first in LAYERS else "__init__"


FILES = sorted((ROOT / "fusedreg").rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    layer = file.relative_to(ROOT / "fusedreg").parts[0].removesuffix(".py")
    for name in imported(file):
        other = layer_of(name)
        if other is not None and other != layer:
            assert LAYERS.index(other) < LAYERS.index(layer), f"{layer} imports {name}"


def test_kernels_import_torch_and_triton_only() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] in {"__future__", "torch", "triton"}, f"{file}: {name}"


def test_optimizers_do_not_know_each_other() -> None:
    classes = {"sgd", "adam"}
    for module in classes:
        others = classes - {module}
        found = {layer_of(name) for name in imported(ROOT / "fusedreg" / f"{module}.py")}
        assert not found & others
