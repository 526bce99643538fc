"""Recipes that need several processes or a GPU; the others run in test_docs.py and integration/."""

from __future__ import annotations

import pytest
import torch

import pages
from ranks import on_every_rank


@pytest.mark.parametrize("section", pages.OF_RANKS)
@on_every_rank
def test_recipe_of_several_ranks_runs_in_each(section: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        # The rank has a process group, as under torchrun, and needs it for the next test.
        patch.setattr(torch.distributed, "init_process_group", lambda backend: None)
        patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
        assert pages.output(pages.recipe(section)) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("section", pages.ON_A_GPU)
def test_recipe_runs_on_a_gpu(section: str) -> None:
    assert pages.output(pages.recipe(section)) == ""
