"""Triton's interpreter, mended and made faster: import it before kernels run.

- It truncates to bfloat16 where every GPU rounds to nearest even, and takes the bits of a bfloat16
  for an integer when it converts to float64.
- Before 3.7 it makes an int of an array with one entry, which numpy 2.4 refuses.
- It takes as long for an operation on nothing, so that most of a step would be the blocks of a
  chunk that small tensors do not have. A chunk of four blocks has all there is to a longer one.
- It patches the whole language again at every call of a device function, which takes half of its
  time, and looks up every dtype in a dictionary that it makes for that. Once for each module and
  launch, and once for each dtype, is enough.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter

from fusedreg.kernels.gpu import backend as kernels

FLOATS = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}
_cast_impl = interpreter.InterpreterBuilder.cast_impl
_patch_lang = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_np_dtype = interpreter._get_np_dtype
_np_dtype_of = cache(interpreter._get_np_dtype)
_patched: set[int] = set()


def cast_impl(self: Any, source: Any, target: Any) -> Any:
    """Convert to and from bfloat16 as a GPU does."""
    old, new = source.dtype.scalar, target.scalar
    if old == tl.bfloat16 and new in FLOATS:
        wide = torch.from_numpy(source.data.view("int16")).view(torch.bfloat16).to(FLOATS[new])
        return interpreter.TensorHandle(wide.numpy(), new)
    if old in FLOATS and new == tl.bfloat16:
        narrow = torch.from_numpy(source.data.copy()).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(narrow.numpy().view("uint16"), new)
    return _cast_impl(self, source, target)


def patch_lang(fn: Any) -> Any:
    """Patch what a function sees of the language, once in a launch."""
    module = id(fn.__globals__)
    if module in _patched:
        return None  # of a device function; only the scope of the kernel itself is used
    _patched.add(module)
    scope = _patch_lang(fn)
    tl.tensor.__index__ = index  # which the scope takes back
    return scope


def index(self: Any) -> int:
    """A scalar as a bound of a loop."""
    return int(self.handle.data.item())


def launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Interpret one launch."""
    _patched.clear()
    _launch(self, *args, **kwargs)


def np_dtype(dtype: Any) -> Any:
    """The numpy dtype that holds elements of a dtype."""
    scalar = dtype.scalar
    return _np_dtype(scalar) if scalar.is_ptr() else _np_dtype_of(scalar)


interpreter.InterpreterBuilder.cast_impl = cast_impl
interpreter._patch_lang = patch_lang
interpreter.GridExecutor.__call__ = launch
interpreter._get_np_dtype = np_dtype
kernels.CHUNK = 2048
