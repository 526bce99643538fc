"""The README and the docs as the tests read them."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for pattern in ("*.md", "docs/*.md", "kernels/*.md", "bench/*.md")
    for page in sorted(ROOT.glob(pattern))
]

# Recipes that need what not every test has.
OF_RANKS = (
    "DistributedDataParallel",
    "FSDP2, HSDP and tensor parallelism",
    "ZeroRedundancyOptimizer, FSDP1 and pipelines",
)
OF_TRAINERS = ("Hugging Face Trainer and Accelerate", "PyTorch Lightning")
ON_A_GPU = ("CUDA graphs",)


class Example(NamedTuple):
    """A python block, and the text block that follows it at once, which is what it prints."""

    section: str
    code: str
    printed: str


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def examples(page: Path) -> list[Example]:
    """The python blocks of a page, each with the section that it stands in."""
    fence = r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    text, found = page.read_text(), []
    for match in re.finditer(fence, text, re.DOTALL | re.MULTILINE):
        headings = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)
        found.append(Example(headings[-1], match[1], match[2] or ""))
    return found


def recipe(section: str) -> Example:
    """The one block of a section of the recipes."""
    (found,) = [e for e in examples(ROOT / "docs/recipes.md") if e.section == section]
    return found


def output(example: Example) -> str:
    """Run a block as a script; what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        # The block has no `from __future__ import annotations`, as this file has.
        code = compile(example.code, f"<{example.section}>", "exec", dont_inherit=True)
        exec(code, {"__name__": "__main__"})
    return out.getvalue()


def formula(cls: type) -> str:
    """The indented block after the first `::` of a docstring."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    found = re.search(r"::\n\n((?: {4}.*\n|\n)+)", doc)
    assert found, f"{cls.__name__} states no formula"
    return inspect.cleandoc(found[1])
