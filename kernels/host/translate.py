"""Device functions as numba compiles them: the same Python, with other meanings of a few names.

A rule or penalty says what happens to a tile of elements, in a subset of Python that also says it
of one element. So `tl` stands for language.py here, and so does every function that this has by the
same name (`divide` of rules.py, which is about registers of a GPU); a constexpr is its value. The
loop around them, in engine.py, is vectorised by LLVM.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import numba
import numpy as np
import torch

from fusedreg.kernels.host import language
from fusedreg.kernels.host.memory import next_piece, row_loader
from fusedreg.kernels.language import tl

Dtype = type[np.float32] | type[np.float64]


@cache
def device(function: Any, dtype: Dtype) -> Any:
    """A function of rules.py or penalty.py for one element, its numbers in `dtype`.

    Without that, `0.0` is a float64, and what meets it becomes one.
    """
    return language.compiled(_translated(function.fn, dtype))


def loop(function: Callable[..., None]) -> Any:
    """Compile a function of integers alone.

    Returns:
        The function for ctypes, which lets go of the interpreter's lock.
    """
    signature = numba.void(*[numba.int64] * function.__code__.co_argcount)
    return numba.cfunc(signature, error_model="numpy")(_translated(function, np.float64)).ctypes


def shared(function: Callable[..., None]) -> Any:
    """Compile a loop over chunks that threads share: `function(*args, chunk, stop)`.

    Returns:
        A function of the address of int64 numbers: the piece to take next, their size in chunks,
        the number of chunks, and `args`. Each thread that calls it takes pieces until all are done.
    """
    count = function.__code__.co_argcount - 2
    load = row_loader(torch.int64, torch.int64, count)
    body = language.compiled(_translated(function, np.float64))

    def take(work):
        size, chunks = header(work, 1, 1)
        args = load(work, 3, 1)
        chunk = next_piece(work) * size
        while chunk < chunks:
            body(*args, chunk, min(chunk + size, chunks))
            chunk = next_piece(work) * size

    header = row_loader(torch.int64, torch.int64, 2)
    return numba.cfunc(numba.void(numba.int64), error_model="numpy")(take).ctypes


def _translated(function: Any, dtype: Dtype) -> FunctionType:
    code = function.__code__
    constants = tuple(dtype(c) if isinstance(c, float) else c for c in code.co_consts)
    names = {
        name: _for_host(name, function.__globals__[name], dtype)
        for name in code.co_names
        if name in function.__globals__
    }
    return FunctionType(
        code.replace(co_consts=constants),
        {**names, "__name__": function.__module__},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


def _for_host(name: str, value: Any, dtype: Dtype) -> Any:
    if value is tl:
        return language
    if isinstance(value, tl.constexpr):
        return value.value
    if hasattr(value, "fn"):
        return getattr(language, name) if name in language.__all__ else device(value, dtype)
    return value
