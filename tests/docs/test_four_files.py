"""What an optimizer takes, as CONTRIBUTING.md says it of Lion: four files, and so many lines."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUR = (
    "fusedreg/optimizers/lion.py",
    "kernels/device/rules.py",
    "fusedreg/__init__.py",
    "fusedreg/check/cases.py",
)


def names_in(file: Path) -> set[str]:
    """All names and short strings of the code; docstrings and comments may speak of anything."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        found |= {str(getattr(node, key)) for key in ("id", "attr", "name") if hasattr(node, key)}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.add(node.value)
    return found


def lines_of(path: str) -> int:
    """The lines of a file that are there for Lion."""
    text = (ROOT / path).read_text()
    if path == FOUR[0]:
        return len(text.splitlines())
    functions = [
        node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("lion")
    ]
    rows = re.findall(
        r'^ +"lion": .*|^ +fusedreg\.Lion: .*|^.*import Lion$|^ +"Lion",$', text, re.M
    )
    return sum(functions) + len(rows)


def test_lion_stands_in_four_files_of_the_package() -> None:
    files = [*(ROOT / "fusedreg").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    mention = {
        file.relative_to(ROOT).as_posix()
        for file in files
        if any(re.match(r"(fusedreg\.)?lion(_|$)", name, re.I) for name in names_in(file))
    }
    assert mention == set(FOUR)


def test_contributing_tells_their_lines() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    told = dict(re.findall(r"^\| `(\S+)` \| (\d+) \|", page, re.M))
    assert told == {path: str(lines_of(path)) for path in FOUR}
