"""Two commits bit for bit: `python bench/bits.py --base REF`.

Every case of the table of `fusedreg check` takes three steps by LLVM's kernels and by triton's,
interpreted, in four dtypes, with clipping and without. Parameters and states that differ are
printed, and the exit status is 1. Each commit has a process, a table of cases and tests of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {"default": [(37,), (5, 7), (1,), (0,), (40, 33)], "fused": [(37,), (5, 7), (1100,)]}
"""By path; an interpreter takes its time."""


def digest(tensor: torch.Tensor) -> str:
    bits = tensor.detach().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()


def digests() -> dict[str, dict[str, str]]:
    """Of parameters and states by step, in the version that is imported here."""
    import_module("interpreter")  # rounds to bfloat16 as a GPU does
    # Older commits have the table elsewhere.
    table = "fusedreg.check.cases" if find_spec("fusedreg.check.cases") else "fusedreg.cases"
    cases = import_module(table).CASES
    found = {}
    for path, case, dtype, clip in product(SHAPES, cases, DTYPES, (None, 0.5)):
        generator = torch.Generator().manual_seed(3)
        values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES[path]]
        params = list(map(torch.nn.Parameter, values))
        second = {"params": params[2:], "lr": 0.03, "weight_decay": 0.0}
        optimizer = case.make([{"params": params[:2]}, second], path, max_grad_norm=clip)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
        key = f"{optimizer.backend}, {case.id}, {dtype}{', clipped' * bool(clip)}"
        found[key] = {
            f"{name} {i}": digest(x)
            for i, param in enumerate(params)
            for name, x in {"parameter": param, **optimizer.state[param]}.items()
        }
    return found


def digests_of(*paths: Path) -> dict[str, dict[str, str]]:
    """The same in a process whose modules come from these folders first."""
    more = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--digests"]
    return json.loads(subprocess.check_output(command, env=os.environ | more))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", metavar="REF", default="HEAD", help="a commit (default: HEAD)")
    parser.add_argument("--digests", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.digests:
        print(json.dumps(digests()))
        return
    from versions import ROOT, resolve, tree_of  # noqa: PLC0415  # a version imports only itself

    with TemporaryDirectory() as folder:
        tree = tree_of(resolve(arguments.base), Path(folder))
        base = digests_of(tree, tree / "tests", tree / "tests/lib")
    this = digests_of(ROOT / "tests", ROOT / "tests/lib")
    both = sorted(base.keys() & this.keys())
    differing = [key for key in both if base[key] != this[key]]
    for key in differing:
        names = {**base[key], **this[key]}
        print(f"{key}:", *(n for n in names if base[key].get(n) != this[key].get(n)), sep="  ")
    for key in sorted(base.keys() ^ this.keys()):
        print(f"{key}: only in {arguments.base if key in base else 'this tree'}")
    print(f"{len(both)} programs in both, {len(differing)} of them differ in some bit")
    raise SystemExit(min(len(differing), 1))


if __name__ == "__main__":
    main()
