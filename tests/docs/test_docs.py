"""What the README and the docs say is so: blocks run, formulas are those of the docstrings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedreg

import pages
from cases import CLASSES
from pages import PAGES, ROOT, Example, blocks, examples, formula, output


def examples_here() -> list[object]:
    """The python blocks that need neither several processes nor a GPU nor other packages."""
    elsewhere = {*pages.OF_RANKS, *pages.OF_TRAINERS, *pages.ON_A_GPU}
    return [
        pytest.param(example, id=f"{page.relative_to(ROOT)}-{index}")
        for page in PAGES
        for index, example in enumerate(examples(page))
        if example.section not in elsewhere
    ]


@pytest.mark.parametrize("example", examples_here())
def test_python_block_prints_what_the_page_says(example: Example) -> None:
    assert output(example) == example.printed


@pytest.mark.parametrize("cls", CLASSES)
def test_semantics_page_takes_the_formula_from_the_docstring(cls: type) -> None:
    page = (ROOT / "docs/semantics.md").read_text()
    section = page.split(f"\n## {cls.__name__}\n", 1)[1].split("\n## ", 1)[0]
    assert section.startswith(f"\n<!-- formula: fusedreg.{cls.__name__} -->\n")
    assert formula(cls).splitlines()[0] not in page  # nor is it typed again


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_runs_in_ci(page: Path) -> None:
    ci = (ROOT / ".ci/run").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            command = line.split("#")[0].strip()
            assert not command or command in ci or command in makefile, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text())
    for target in (first or second for first, second in targets):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_tests_named_in_the_pages_exist() -> None:
    sources = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in sources, f"{page.name} names {name}"


def test_readme_fits_and_its_first_screen_shows_the_import() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any("from fusedreg import" in line for line in lines[:40])


def test_changelog_has_the_version() -> None:
    assert f"## {fusedreg.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_import_is_light_and_needs_neither_triton_nor_the_extras() -> None:
    heavy = {"triton", "sklearn", "matplotlib", "rich", "torch._dynamo"}
    code = f"""
import sys, torch
before = set(sys.modules)
import fusedreg
print(sorted({heavy!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
