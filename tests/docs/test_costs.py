"""What it costs to add something, as CONTRIBUTING.md says it: these files, and so many lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = sorted([*(ROOT / "fusedreg").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


class Part(NamedTuple):
    """An optimizer or a penalty of the package, known by the names that came with it."""

    names: str
    rows: str
    """The lines outside of functions and classes that name it."""
    files: tuple[str, ...]
    """The first has nothing else in it."""


PARTS = {
    "Lion": Part(
        r"(fusedreg\.)?[Ll]ion(_scalars)?",
        r'^ +"lion": .*$|^ +fusedreg\.Lion: .*$|^.*import Lion$|^ +"Lion",$',
        (
            "fusedreg/optimizers/lion.py",
            "kernels/device/rules.py",
            "fusedreg/__init__.py",
            "fusedreg/cases.py",
        ),
    ),
    "L2": Part(
        r"L2(Options)?|l2_(gradient|decay|decay_over_lr)",
        r"^.*\bL2(?:Options)?\b.*$",
        (
            "fusedreg/penalties/l2.py",
            "kernels/device/penalties.py",
            "fusedreg/penalties/__init__.py",
        ),
    ),
}
OWN = {
    "NAdam": ("tests/steps/test_contract.py", r"OwnNAdam|nadam(_momentum|_scalars)?"),
    "Adadelta": ("tests/steps/test_contract.py", r"OwnAdadelta|adadelta(_scalars)?"),
    "a bound": ("tests/steps/test_own_penalty.py", r"Bound(Options)?|project|check_bound"),
    "bits": ("tests/kernels/test_own_format.py", r"Bits|decode|encode"),
}
"""What tests define as users do: the file, and the names of its functions and classes."""


def text_of(path: str) -> str:
    return (ROOT / path).read_text()


def names_in(file: Path) -> set[str]:
    """All names and short strings of the code; docstrings and comments may speak of anything."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        found |= {str(getattr(node, key)) for key in ("id", "attr", "name") if hasattr(node, key)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.add(node.value)
    return found


def definitions(path: str, names: str) -> int:
    """The lines of some functions and classes, with their decorators."""
    return sum(
        (node.end_lineno or 0) - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1
        for node in ast.parse(text_of(path)).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and re.fullmatch(names, node.name)
    )


def lines_of(part: Part, path: str) -> int:
    """The lines of a file that are there for a part."""
    if path == part.files[0]:
        return len(text_of(path).splitlines())
    return definitions(path, part.names) + len(re.findall(part.rows, text_of(path), re.MULTILINE))


@pytest.mark.parametrize("part", PARTS.values(), ids=[*PARTS])
def test_a_part_is_named_in_its_files_only(part: Part) -> None:
    naming = {
        file.relative_to(ROOT).as_posix()
        for file in PACKAGE
        if any(re.fullmatch(part.names, name) for name in names_in(file))
    }
    assert naming == set(part.files)


@pytest.mark.parametrize("name", PARTS)
def test_contributing_tells_the_lines_of_a_part(name: str) -> None:
    table = text_of("CONTRIBUTING.md").split(f"\n| {name} | lines | what |\n")[1].split("\n\n")[0]
    told = dict(re.findall(r"^\| `(\S+)` \| (\d+) \|", table, re.MULTILINE))
    assert told == {path: str(lines_of(PARTS[name], path)) for path in PARTS[name].files}


@pytest.mark.parametrize("name", OWN)
def test_contributing_tells_the_lines_of_what_a_user_writes(name: str) -> None:
    path, names = OWN[name]
    row = f"| {name} | {definitions(path, names)} | `{path}` |"
    assert row in text_of("CONTRIBUTING.md")
