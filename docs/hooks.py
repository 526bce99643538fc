"""mkdocs hooks: what a page shows of the source, and links that leave the folder of the pages.

A line `<!-- KIND: NAME -->` in a page stands for something that is never typed twice. Where pages
are read without being built, the lines directly below it say where to look; here they are replaced.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^<!-- (formula|source|include): (\S+) -->\n(?:.+\n?)*", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def formula(name: str) -> str:
    """The indented block after the first `::` of a docstring."""
    found = re.search(r"::\n\n((?: {4}.*\n|\n)+)", _load(name).docstring.value)
    if found is None:
        raise ValueError(f"{name} states no formula")
    return _fenced("text", inspect.cleandoc(found[1]))


def source(name: str) -> str:
    """The lines that define a function, a class or a variable."""
    return _fenced("python", _load(name).source)


def include(path: str) -> str:
    """A file of the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def retarget(text: str, folder: str, shown: Mapping[str, str]) -> str:
    """Links of a text that stands in `folder`, as links between pages; others become plain text.

    `shown` maps a file outside the folder of the pages to the page that includes it.
    """

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], normpath(f"{folder}/{match[2]}"), match[3] or ""
        if target in shown:
            return f"[{label}]({shown[target]}{anchor})"
        if PurePosixPath(target).is_relative_to("docs"):
            return f"[{label}]({relpath(target, 'docs')}{anchor})"
        return label

    return LINK.sub(link, text)


def on_page_markdown(markdown: str, *, files: Any, **_: Any) -> str:
    """Called by mkdocs with the text of a page before it is rendered."""
    shown = {
        match[2]: file.src_uri
        for file in files.documentation_pages()
        for match in MARKER.finditer(file.content_string)
        if match[1] == "include"
    }

    def fill(match: re.Match[str]) -> str:
        kind, name = match.groups()
        if kind == "include":
            return retarget(include(name), str(PurePosixPath(name).parent), shown)
        return {"formula": formula, "source": source}[kind](name)

    return retarget(MARKER.sub(fill, markdown), "docs", shown)


def _load(name: str) -> Any:
    """An object by its dotted name, read from the source and not imported."""
    return griffe.load(name, search_paths=[ROOT])


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"
