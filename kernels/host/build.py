"""From Python functions to machine code: rules and penalties as the host means them, and LLVM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from fusedreg.kernels.host import language
from fusedreg.kernels.host.values import INT64, Value
from fusedreg.kernels.language import tl


@cache
def device(function: Any) -> Callable[..., Any]:
    """A function of rules.py or penalty.py, to be called with values.

    It is the same code; `tl` stands for language.py in it, and so does every function that this has
    by the same name, like `divide`, which is about registers of a GPU in rules.py.
    """
    source = function.fn
    names = {
        name: _on_host(name, source.__globals__[name])
        for name in source.__code__.co_names
        if name in source.__globals__
    }
    return FunctionType(source.__code__, names, source.__name__, source.__defaults__)


def _on_host(name: str, value: Any) -> Any:
    if value is tl:
        return language
    if hasattr(value, "fn"):
        return getattr(language, name, None) or device(value)
    return value


def _machine() -> llvm.TargetMachine:
    """What code is generated for; an engine takes its own and frees it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        jit=True,
    )


def assembled(function: Callable[[Value], None]) -> llvm.ModuleRef:
    """LLVM's optimised module of a function of one address, which writes its instructions."""
    module = ir.Module(name=function.__name__)
    module.triple = llvm.get_process_triple()
    signature = ir.FunctionType(ir.VoidType(), [INT64])
    compiled = ir.Function(module, signature, name=function.__name__)
    builder = ir.IRBuilder(compiled.append_basic_block("entry"))
    function(Value(builder, compiled.args[0]))
    builder.ret_void()

    machine = _machine()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    tuning = llvm.PipelineTuningOptions(speed_level=3)
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return parsed


def built(function: Callable[[Value], None]) -> Any:
    """The function for ctypes, which lets go of the interpreter's lock when it is called."""
    engine = llvm.create_mcjit_compiler(assembled(function), _machine())
    engine.finalize_object()
    address = engine.get_function_address(function.__name__)
    entry: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)
    entry.engine = engine  # whose memory the code is in
    return entry
