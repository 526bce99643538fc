"""The environment of every test: import it before the first optimizer is made."""

from __future__ import annotations

import importlib
import os
import tempfile

import torch

if "PYTEST_XDIST_WORKER" not in os.environ or "FUSEDREG_CACHE" not in os.environ:
    # What one test has compiled for the CPU, all processes of this run take from here.
    _kernels = tempfile.TemporaryDirectory(prefix="fusedreg-")
    os.environ["FUSEDREG_CACHE"] = _kernels.name

if not torch.cuda.is_available():
    # Without a GPU, fused=True has its kernels interpreted. Triton reads this when it is imported,
    # which the first optimizer does, and those are made for the table of cases.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("interpreter")

torch.set_num_threads(1)  # the suite runs in two processes; small tensors gain nothing from threads
