"""From Python functions to machine code: rules and penalties as the host means them, and LLVM."""

from __future__ import annotations

import ctypes
import dis
from collections.abc import Callable
from functools import cache, partial
from types import CellType, FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

import llvmlite
import llvmlite.binding as llvm
from llvmlite import ir

from fusedreg.kernels.contract import DeviceFunction
from fusedreg.kernels.cpu import language
from fusedreg.kernels.cpu.store import stored
from fusedreg.kernels.cpu.values import INT64, Value
from fusedreg.kernels.device.language import tl

if TYPE_CHECKING:
    from ctypes import _CFunctionType

Loop: TypeAlias = "_CFunctionType"
"""A compiled function of one address."""

RULES = "fusedreg.kernels.device.rules"


@cache
def device(function: DeviceFunction) -> Callable[..., Any]:
    """A device function of the package or of a user's module, to be called with values.

    It is the same code with other globals: `tl` stands for language.py, a device function for what
    this makes of it, and one of rules.py that language.py has too, like `divide`, which is about
    registers of a GPU, for that. A function of that name in another module is another function.
    """
    source = function.fn
    of = partial(_on_host, source.__qualname__)
    loaded = {
        instruction.argval
        for instruction in dis.get_instructions(source.__code__)
        if instruction.opname == "LOAD_GLOBAL"
    }
    names = {name: of(source.__globals__[name]) for name in loaded & source.__globals__.keys()}
    closure = tuple(CellType(of(cell.cell_contents)) for cell in source.__closure__ or ())
    made = FunctionType(source.__code__, names, source.__name__, source.__defaults__, closure)
    made.__kwdefaults__ = source.__kwdefaults__
    return made


class _Module:
    """A module as device code of the host sees it, in the function called `user`."""

    def __init__(self, user: str, module: ModuleType | SimpleNamespace) -> None:
        self.user, self.module = user, module

    def __getattr__(self, name: str) -> Any:
        if self.module is tl:
            return _word(self.user, name)
        return _on_host(self.user, getattr(self.module, name))


def _word(user: str, name: str) -> Any:
    """A word of triton's language as a CPU means it."""
    if name not in language.WORDS:
        raise AttributeError(
            f"{user} calls tl.{name}, but device code of a CPU has no such word (it has: "
            f"{', '.join(language.WORDS)}): fused=False steps without it"
        )
    return getattr(language, name)


def _on_host(user: str, value: Any) -> Any:
    """What stands for a global of device code in the function called `user`."""
    if isinstance(value, (ModuleType, SimpleNamespace)):  # the latter where triton is missing
        return _Module(user, value)
    if isinstance(value, tl.constexpr):
        return value.value
    if (getattr(value, "__module__", None) or "").startswith("triton.language"):
        return _word(user, getattr(value, "__name__", str(value)))
    if not hasattr(value, "fn"):
        return value
    name = value.fn.__name__ if value.fn.__module__ == RULES else ""
    return getattr(language, name, None) or device(value)


FORMAT = 1
"""Another number wherever `_machine` or `optimised` makes other code of the same text."""


def _machine() -> llvm.TargetMachine:
    """What code is generated for; an engine takes its own and frees it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = _processor()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


@cache
def _processor() -> tuple[str, str]:
    """Name and features of the CPU of this process."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def module_of(function: Callable[[Value], None]) -> ir.Module:
    """The module of a function of one address, which writes its instructions."""
    module = ir.Module(name=function.__name__)
    module.triple = llvm.get_process_triple()
    signature = ir.FunctionType(ir.VoidType(), [INT64])
    compiled = ir.Function(module, signature, name=function.__name__)
    builder = ir.IRBuilder(compiled.append_basic_block("entry"))
    function(Value(builder, compiled.args[0]))
    builder.ret_void()
    return module


def optimised(text: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """A module from its text, optimised by LLVM."""
    parsed = llvm.parse_assembly(text)
    parsed.verify()
    tuning = llvm.PipelineTuningOptions(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def compiled_loop(function: Callable[[Value], None]) -> Loop:
    """The function for ctypes, which lets go of the interpreter's lock when it is called.

    It is written in every process, which takes a millisecond or two, and compiled where no file has
    what the same text became on the same CPU.
    """
    text, machine = str(module_of(function)), _machine()
    versions = (FORMAT, llvmlite.__version__, llvm.llvm_version_info)
    source = "\n".join(map(str, (*versions, machine.triple, *_processor(), text)))
    code = stored(source, lambda: machine.emit_object(optimised(text, machine)))
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(function.__name__)
    entry = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
    entry.engine = engine  # type: ignore[attr-defined]  # whose memory the code is in
    return entry
