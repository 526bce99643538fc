"""Which path runs a parameter: triton's kernels, LLVM's, or the reference.

This is the only importer of triton's and LLVM's backends, and imports one only when a parameter is
stepped by it. So a machine without triton needs nothing and waits for nothing.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fusedreg.contract import UpdateRule
from fusedreg.dist import is_sharded_alike, local
from fusedreg.formats import Format, Plain
from fusedreg.kernels.contract import Backend
from fusedreg.types import ParamGroup, Settings

FLOOR = (3, 3)
"""The oldest triton that compiles and interprets the kernels."""

NEEDED = f"triton>={FLOOR[0]}.{FLOOR[1]}"
"""As pip is told."""

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of numbers that kernels load and store."""
STORED = (*DTYPES, torch.int32, torch.int16, torch.int8)
"""Dtypes of what a format stores."""


def problem() -> str | None:
    """Why triton cannot run the kernels, None where it can."""
    try:
        triton = importlib.import_module("triton")
    except Exception as error:  # whatever a broken triton raises
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    version = getattr(triton, "__version__", None)
    if version is None:  # as of any folder of that name on sys.path
        where = getattr(triton, "__file__", None) or [*getattr(triton, "__path__", ())]
        return f"what is imported as triton is another module, without a version ({where})"
    found = re.match(r"(\d+)\.(\d+)", str(version))
    if found and tuple(map(int, found.groups())) >= FLOOR:
        return None
    return f"triton {version} is too old"


@cache
def kernels() -> Backend | None:
    """Triton's backend, or None after one warning where triton cannot be used."""
    found = problem()
    if found is None:
        # A missing module of our own is an error, never a silent slow path.
        return _backend("fusedreg.kernels.gpu.backend")
    warnings.warn(
        f"{found}, so fusedreg steps GPU parameters on its slow reference path. Install "
        f"'{NEEDED}', or pass fused=False to choose the reference without this warning.",
        stacklevel=2,
    )
    return None


def interpreted() -> bool:
    """Whether triton interprets kernels on the CPU, as its own tests and ours do."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def host_problem() -> str | None:
    """Why llvmlite cannot compile the kernels of a CPU, None where it can."""
    try:
        llvmlite = importlib.import_module("llvmlite")
        binding = importlib.import_module("llvmlite.binding")
        importlib.import_module("llvmlite.ir")
    except Exception as error:  # whatever a broken llvmlite raises
        return f"llvmlite cannot be imported ({type(error).__name__}: {error})"
    if not hasattr(binding, "create_pass_builder"):  # since 0.44
        return f"llvmlite {getattr(llvmlite, '__version__', 'of no version')} is too old"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and not binding.get_host_cpu_features().get("f16c"):
        # LLVM would call functions for float16 that no library here has. Since 2012 CPUs have it.
        return "this CPU has no instructions for float16 (F16C)"
    return None


@cache
def host_kernels() -> Backend | None:
    """LLVM's backend, or None where llvmlite cannot be used."""
    if host_problem() is not None:
        return None
    return _backend("fusedreg.kernels.cpu.backend")


def compile_for_host() -> None:
    """Compile one kernel of a CPU; raises whatever a broken llvmlite raises only then."""
    importlib.import_module("fusedreg.kernels.cpu.loops").norm_loop(torch.float32)


def _backend(module: str) -> Backend:
    found: Backend = importlib.import_module(module).BACKEND
    return found


def device_kernels(device: torch.device, fused: bool | None) -> Backend | None:
    """The kernels that step parameters of a device, None for the reference.

    Triton's on a GPU and LLVM's on a CPU, unless `fused` is False; with fused=True triton's on a
    CPU too, where it interprets.
    """
    if fused is False:
        return None
    if device.type == "cuda":
        # The interpreter runs on the host, which cannot read the addresses of a GPU.
        return None if interpreted() else kernels()
    if device.type != "cpu":
        return None
    return kernels() if fused and interpreted() else host_kernels()


def kernels_of(rule: UpdateRule, group: Settings, param: Tensor) -> Backend | None:
    """What steps a parameter of an optimizer, None for the reference path."""
    kernels = kernels_for(param, group["fused"])
    if kernels is None or rule.kernel_rule(group) is None:
        return None
    return kernels if not rule.states(group) or reads(rule.state_format(group, param)) else None


def reads(storage: Format) -> bool:
    """Whether kernels read states in this format."""
    return type(storage) is Plain or storage.codec is not None


def names_of(rule: UpdateRule, groups: Iterable[ParamGroup]) -> str:
    """What steps the parameters: "triton", "llvm", "reference", or several, with "and"."""
    backends = (kernels_of(rule, group, param) for group in groups for param in group["params"])
    found = {"reference" if kernels is None else kernels.name for kernels in backends}
    order = ("triton", "llvm", "reference")
    return " and ".join(name for name in order if name in found) or "reference"


def kernels_for(param: Tensor, fused: bool | None) -> Backend | None:
    """The kernels that step `param`, None for the reference path."""
    launch = device_kernels(param.device, fused)
    grad = param.grad
    if launch is None or not is_dense(param):
        return None
    fits = grad is None or (is_plain(grad) and is_sharded_alike(param, grad))
    return launch if fits else None


def is_plain(tensor: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> bool:
    """Whether `tensor` is strided memory of a real dtype that kernels load.

    Complex tensors and subclasses that dispatch by themselves are not; of a DTensor the local part
    counts.
    """
    if is_lazy(tensor):
        return False
    tensor = local(tensor)
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and tensor.dtype in dtypes
        and not tensor.is_neg()  # lazily negated
        and not tensor._is_zerotensor()
    )


def is_dense(tensor: Tensor, dtypes: Collection[torch.dtype] = DTYPES) -> bool:
    """Whether `tensor` is plain and without gaps, so that kernels can walk it in storage order."""
    plain = is_plain(tensor, dtypes)
    return plain and (local(tensor).is_contiguous() or _fills_memory(local(tensor)))


def is_dense_with(
    param: Tensor, storage: Format, planes: Sequence[Tensor], counts: Sequence[Tensor]
) -> bool:
    """Whether kernels can walk the states along with `param`, once they are laid out like it.

    Args:
        param: the parameter.
        storage: how its states are stored.
        planes: the tensors that they are stored in, state by state.
        counts: its counts.
    """
    if planes and not reads(storage):
        return False
    dtypes = DTYPES if type(storage) is Plain else STORED
    each = len(storage.suffixes)
    return (
        all(
            plane.shape == param.shape
            and plane.device == param.device
            and is_dense(plane, dtypes)
            and is_sharded_alike(param, plane)
            for plane in planes
        )
        and all(count.device == param.device and count.dtype in DTYPES for count in counts)
        and all(len({plane.dtype for plane in planes[k::each]}) <= 1 for k in range(each))
    )


def _fills_memory(tensor: Tensor) -> bool:
    """Whether the elements fill one range of memory, each location once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape have each element at the same place in memory."""
    strides = zip(first.shape, first.stride(), second.stride(), strict=True)
    return first.numel() == 0 or all(size == 1 or one == two for size, one, two in strides)
