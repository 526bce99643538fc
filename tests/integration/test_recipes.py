"""The recipes of docs/recipes.md that need a trainer."""

from __future__ import annotations

import pytest

import pages


@pytest.mark.parametrize("section", pages.OF_TRAINERS)
def test_recipe_runs(section: str) -> None:
    pages.output(pages.recipe(section))  # trainers print what they like
