"""What is wrong with an installation, so that steps are not right or not fast, and its cure."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fusedreg import backend
from fusedreg.machine import versions

TORCH_FLOOR = (2, 7)
"""The oldest torch that the package declares."""

LLVMLITE = "llvmlite>=0.44"
"""As pyproject.toml declares it."""

NVIDIA = Path("/proc/driver/nvidia/version")
"""Where Linux says that NVIDIA's driver is loaded."""


class Finding(NamedTuple):
    """One sentence on what is found, one on the cure; `broken`: steps would not run as meant.

    What is wrong with torch concerns every step, with llvm the kernels of a CPU, all else those of
    a GPU.
    """

    name: str
    broken: bool
    what: str
    cure: str = ""

    def __str__(self) -> str:
        kind = "BROKEN" if self.broken else "note"
        return f"{kind}: {self.what}." + (f" {self.cure}" if self.cure else "")


def devices() -> list[torch.device]:
    """The CPU, and every accelerator of the kind that torch has here."""
    found = [torch.device("cpu")]
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        found += [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    return found


def examine(checked: Sequence[torch.device]) -> list[Finding]:
    """What is worth knowing before steps run on these devices."""
    gpu = any(device.type == "cuda" for device in checked)  # a ROCm GPU is called so too
    cpu = any(device.type == "cpu" for device in checked)
    return [
        *_torch(),
        *(_host() if cpu else ()),
        *_kernels(gpu),
        *(_compiling() if gpu else ()),
    ]


def _torch() -> Iterator[Finding]:
    floor = ".".join(map(str, TORCH_FLOOR))
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if not found or tuple(map(int, found.groups())) < TORCH_FLOOR:
        yield Finding(
            "torch",
            True,
            f"torch {torch.__version__} is older than {floor}",
            f"Install it: pip install -U 'torch>={floor}'",
        )
    try:
        importlib.import_module("torch._dynamo")  # as torch does when it makes an optimizer
    except Exception as error:  # whatever a broken triton raises, except an ImportError
        yield Finding(
            "torch",
            True,
            f"torch makes no optimizer, not even its own ({type(error).__name__}: {error})",
            "Install torch and triton anew, or remove what is imported as triton instead",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if NVIDIA.exists() and not hidden and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding(
            "gpu",
            False,
            f"an NVIDIA driver is loaded, but torch {torch.__version__}, built {built}, sees "
            "no GPU",
            "Install the torch that https://pytorch.org gives for the driver's CUDA version",
        )


def _host() -> Iterator[Finding]:
    """Which path a CPU takes, and what keeps it from the kernels that LLVM compiles."""
    problem = backend.host_problem()
    if problem is not None:
        # An old CPU has no cure, and its steps are right.
        cure = f"Install it: pip install '{LLVMLITE}'" if problem.startswith("llvmlite") else ""
        what = f"{problem}, so steps on the CPU take the slow reference path"
        yield Finding("llvm", False, what, cure)
        return
    try:
        backend.compile_for_host()
    except Exception as error:  # whatever a broken llvmlite raises only now
        yield Finding(
            "llvm",
            True,
            f"llvmlite does not compile the kernels of the CPU ({type(error).__name__}: {error}), "
            "and steps there raise this without fused=False",
            f"Install it anew: pip install --force-reinstall '{LLVMLITE}'",
        )
        return
    found = versions()["llvmlite"]
    yield Finding("llvm", False, f"steps on the CPU take the path llvm (llvmlite {found})")


def _kernels(gpu: bool) -> Iterator[Finding]:
    """Whether the Triton kernels can be had: at least one sentence without a GPU."""
    unused = "no GPU is checked here, so none of triton's kernels is launched"
    problem = backend.problem()
    if problem is not None and sys.platform != "linux":  # where ours asks for no triton either
        yield Finding("triton", False, "triton is for Linux; GPUs take the reference path")
        return
    if problem is not None:
        cost = "steps on a GPU take the slow reference path" if gpu else unused
        use = "Install it" if gpu else "For a GPU"
        cure = f"{use}: pip install '{backend.NEEDED}'"
        yield Finding("triton", gpu, f"{problem}, and {cost}", cure)
        return
    try:
        backend.kernels()
    except Exception as error:  # whatever a broken triton raises only now
        ours = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("fusedreg.")
        why = f"{type(error).__name__}: {error}"
        as_in = ", as in a repository that is not installed" if ours else ""
        harm = "steps on a GPU raise this without fused=False" if gpu else unused
        yield Finding(
            "kernels",
            gpu,
            f"fusedreg.kernels cannot be imported ({why}){as_in}, and {harm}",
            "In the repository: pip install -e ." if ours else "Install torch and triton anew",
        )
        return
    if backend.interpreted():
        harm = (
            "they cannot read a GPU's memory: its steps take the slow reference path"
            if gpu
            else "they are slow and truncate bfloat16; only fused=True takes them"
        )
        yield Finding(
            "interpreter",
            gpu,
            f"TRITON_INTERPRET is set, so triton interprets kernels on the CPU, where {harm}",
            "Unset TRITON_INTERPRET",
        )
    elif not gpu:
        triton = versions("triton")["triton"]
        yield Finding("kernels", False, f"triton's kernels import (triton {triton}); {unused}")


def _compiling() -> Iterator[Finding]:
    """What triton compiles its launchers with, and where it keeps them."""
    if sys.platform != "linux":  # others bring a compiler along
        return
    asked = os.environ.get("CC")
    if not any(map(shutil.which, ["gcc", "clang"] if asked is None else [asked])):
        seen = "neither gcc nor clang is on PATH" if asked is None else f"CC is {asked!r}"
        yield Finding(
            "compiler",
            True,
            f"triton compiles its launchers and finds no C compiler ({seen})",
            "Install gcc or set CC to a compiler",
        )
    scheme = sysconfig.get_default_scheme()
    # As triton looks for them: Debian's own scheme names a folder that has none.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").exists():
        yield Finding(
            "headers",
            True,
            f"triton compiles its launchers and finds no Python.h in {headers}",
            "Install the headers of this Python (python3-dev or python3-devel)",
        )
    cache = cache_folder()
    if cache is None:
        what = "triton has no folder for what it compiles, since this user has no home"
    elif not _is_writable(cache):
        what = f"triton cannot write what it compiles into {cache}"
    else:
        return
    yield Finding("cache", True, what, "Set TRITON_CACHE_DIR to a folder that can be written")


def cache_folder() -> Path | None:
    """Where triton keeps what it compiles; None where it has nowhere."""
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder)
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    return None if home.startswith("~") else Path(home, ".triton", "cache")


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which itself may have to be made."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
