"""A griffe extension: docstrings and signatures, as `help()` has them, for the API reference."""

from __future__ import annotations

import inspect
import pydoc
import re
from typing import Any

import griffe

REWRITTEN = [
    # A literal block of reStructuredText is an indented block of Markdown.
    (r"::\n\n(?= {4})", ":\n\n"),
    # Examples, which Markdown would take for quotations.
    (r"(?m)^((?:>>> .*\n?)(?:.+\n?)*)", r"```pycon\n\1\n```\n"),
    # Paragraphs that begin with what they are about.
    (r"(?m)^(State|State and errors|Source|Differs from [\w.]+):", r"**\1:**"),
    # A range at the beginning of a description, which is another way to quote.
    (r"(?<=: )>=", r"\>="),
    (r":class:`(?:fusedreg\.)?(\w+)`", r"[`\1`][fusedreg.\1]"),
    (r"docs/([\w-]+)\.md", r"[docs/\1.md](\1.md)"),
]


def to_markdown(docstring: str) -> str:
    """A docstring of this package with the markup of Markdown."""
    for pattern, replacement in REWRITTEN:
        docstring = re.sub(pattern, replacement, docstring)
    return docstring


def spell_out_options(init: Any) -> None:
    """Replace `**options: Unpack[...]` of a constructor by the parameters that Python shows.

    They are declared elsewhere, so the class is imported for them.
    """
    shown = inspect.signature(pydoc.locate(init.parent.path)).parameters
    *_, last = init.parameters
    del init.parameters[last.name]
    for name, parameter in shown.items():
        if name not in init.parameters:
            hint = inspect.formatannotation(parameter.annotation)
            init.parameters.add(
                griffe.Parameter(
                    name,
                    annotation=re.sub(r"(\w+\.)+(?=[A-Z])", "", hint),  # without modules
                    kind=griffe.ParameterKind.keyword_only,
                    default=repr(parameter.default),
                )
            )


class Docstrings(griffe.Extension):
    """Rewrites every docstring and constructor that the reference shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with each object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
        parameters = obj.parameters if isinstance(obj, griffe.Function) else ()
        if any(str(each.annotation).startswith("Unpack[") for each in parameters):
            spell_out_options(obj)
