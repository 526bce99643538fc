"""Launches of real steps, compiled for GPUs that need not be here.

The functions run in a process of their own, made by `worker`, because a process either interprets
kernels or compiles them. There triton's own launcher does all it does before a launch: it
specialises the arguments, looks into its caches and compiles. Only the launch itself is left out.
"""

# A process that compiles says so before it imports triton, so imports stand in the functions.
# ruff: noqa: PLC0415

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
FULL, PARTIAL = 4096, 67
"""Elements of two tensors, so that kernels have full blocks and partial ones."""


@dataclass(frozen=True)
class Binary:
    """What triton made of one launch."""

    instructions: Counter[str]
    """Of the PTX or of AMD's assembly, each with how often it stands there."""
    registers: int
    stack: int
    """Bytes of each thread."""

    def count(self, pattern: str) -> int:
        """Instructions whose whole name matches."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def worker(cache: Path) -> ProcessPoolExecutor:
    """A process that compiles, with a cache on disk that others may share."""
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=(cache,))


class _Driver:
    """Stands for the driver of a GPU; triton asks it no more than this before a launch."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])

    def get_current_device(self) -> str:
        return self.target  # so that triton's caches keep the targets apart

    def get_current_stream(self, device: str) -> int:
        return 0


_made: list[Any] = []
"""What triton's launcher returned since `_use` was called."""


def _start(cache: Path) -> None:
    """Make this process one that compiles and does not launch."""
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from triton.runtime.jit import JITFunction

    from fusedreg import backend
    from fusedreg.kernels.gpu import backend as launch

    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        _made.append(original(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = run
    backend.device_kernels = lambda device, fused: launch.BACKEND


def _use(target: str) -> None:
    from triton.runtime import driver

    driver.set_active(_Driver(target))
    _made.clear()


def _step(optimizer: Any, target: str) -> list[Any]:
    """What triton compiled, or found compiled, for one step on a target."""
    _use(target)
    optimizer.step()
    return list(_made)


def params(dtype: Any, sizes: list[int], offset: int = 0) -> list[Any]:
    """Parameters that begin `offset` elements after an aligned address, with gradients."""
    import torch

    made = [torch.nn.Parameter(torch.ones(size + offset, dtype=dtype)[offset:]) for size in sizes]
    for param in made:
        param.grad = torch.ones_like(param)
    return made


def binaries(
    case: Any, dtype: Any, target: str, *, offset: int = 0, contract: bool = False, **options: Any
) -> dict[str, Binary]:
    """The kernels of one step of a case; `contract` asks for contraction, which we never do."""
    from fusedreg.kernels.gpu import backend as launch

    tensors = params(dtype, [FULL, PARTIAL], offset)
    before = launch.LAUNCH_OPTIONS
    launch.LAUNCH_OPTIONS = {**before, "enable_fp_fusion": contract or before["enable_fp_fusion"]}
    try:
        made = _step(case.make(tensors, "default", **{"max_grad_norm": 1.0, **options}), target)
    finally:
        launch.LAUNCH_OPTIONS = before
    return {one.name: _read(one) for one in made}


def _read(compiled: Any) -> Binary:
    """Instructions of the assembly, registers and stack of the machine code."""
    if "ptx" in compiled.asm:
        text = compiled.asm["ptx"]
        registers, stack = _resources(compiled.asm["cubin"])
    else:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        stack = int(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)[0])
    opcodes = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.:]*)", text, re.MULTILINE)
    return Binary(Counter(opcodes), registers, stack)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread, from triton's own cuobjdump."""
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump*"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found is not None, report
    return int(found[1]), int(found[2])


def hashes_after(edit: tuple[str, str, str] | None, case: Any, **options: Any) -> dict[str, str]:
    """Hash of each kernel of a step, where (module, old, new) was edited in a file of functions."""
    import torch

    with _edited(edit):
        made = _step(case.make(params(torch.float32, [FULL]), "default", **options), "sm_90")
    return {one.name: one.hash for one in made}


def hashes_of_own(old: str, new: str) -> dict[str, str]:
    """The same of the optimizer in own.py, where `old` was edited in that file."""
    import torch

    own = importlib.import_module("own")
    source = inspect.getsource(own)
    assert source.count(old) == 1, f"own.py must have {old!r} once"
    with tempfile.TemporaryDirectory() as folder:
        edited = _imported(Path(folder, "own_copy.py"), source.replace(old, new))
        made = _step(edited.Own(params(torch.float32, [FULL]), l1=0.1), "sm_90")
    return {one.name: one.hash for one in made}


def numbers_of_words(dtype: Any) -> dict[str, set[float]]:
    """The float64 constants of each kernel of the optimizer in words.py, before optimisation."""
    words = importlib.import_module("words")
    made = _step(words.Words(params(dtype, [FULL])), "sm_90")
    constant = re.compile(r"constant (?:dense<)?([-+.e\d]+)>? : (?:tensor<\w+x)?f64")
    return {one.name: set(map(float, constant.findall(one.asm["ttir"]))) for one in made}


KERNELS = ("rows_kernel", "squares_kernel", "fold_kernel", "step_kernel")


@contextmanager
def _edited(edit: tuple[str, str, str] | None) -> Iterator[None]:
    """Take device functions, and the kernels that call them, from copies, one of them edited."""
    from fusedreg.kernels.device import penalties, rules, step
    from fusedreg.kernels.gpu import backend as launch
    from fusedreg.kernels.gpu import rows, walk

    copies: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for module in (rules, penalties, step, rows, walk):
            name = module.__name__.rpartition(".")[2]
            source = inspect.getsource(module)
            if edit is not None and edit[0] == name:
                assert source.count(edit[1]) == 1, f"{name}.py must have {edit[1]!r} once"
                source = source.replace(edit[1], edit[2])
            source = source.replace("fusedreg.kernels.device.step", "step_copy")
            copies[name] = _imported(Path(folder, f"{name}_copy.py"), source)
        names = ("rules", "penalties", *KERNELS)
        before = {name: getattr(launch, name) for name in names}
        kernels = {**vars(copies["rows"]), **vars(copies["walk"])}
        for name in names:
            setattr(launch, name, kernels[name] if name in KERNELS else copies[name])
        try:
            yield
        finally:
            for name, usual in before.items():
                setattr(launch, name, usual)


def _imported(file: Path, source: str) -> Any:
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def used(action: Callable[[], None]) -> dict[str, int]:
    """How many binaries of each kernel the steps of `action` take on a target."""
    _use("sm_90")
    action()
    return Counter(one.name for one in {id(one): one for one in _made}.values())
