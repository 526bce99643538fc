"""What every trainer's test needs: no network, one thread, the same random state."""

from __future__ import annotations

import os

import pytest
import torch

# Models are built from their configuration. Read when transformers is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
torch.set_num_threads(1)  # models this small gain nothing from threads


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
