"""Numbers that may live on a device.

A step must not wait for an accelerator, so a number that is there (a tensor learning rate, a step
count, a norm) stays a 0-dim tensor, while a number in host memory becomes a Python float. Both obey
the same arithmetic, so each formula is written once.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = "float | Tensor"
Flag: TypeAlias = "bool | Tensor"


def wide_dtype(device: torch.device) -> torch.dtype:
    """Widest floating dtype of a device: float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Count(NamedTuple):
    """A state of one number for each parameter, such as the number of its steps."""

    first: float = 0.0
    """Its value before the first step."""
    wide: bool = False
    """Whether it is float64. Otherwise it is float32, as torch's counts are."""
    least: float = 0.0
    """A checkpoint with a smaller value is refused."""

    def dtype(self, device: torch.device) -> torch.dtype:
        """Its dtype on a device. As in torch, a float64 default dtype widens it on a CPU."""
        torchs = torch.get_default_dtype() == torch.float64 and device.type == "cpu"
        return wide_dtype(device) if self.wide or torchs else torch.float32

    def create(self, param: Tensor, value: float | None = None) -> Tensor:
        """A tensor of its first value, or of another, on the device of a parameter.

        There, and not on the host as in torch, so that a skipped step can leave it alone without
        waiting for the device.
        """
        value = self.first if value is None else value
        return torch.full((), value, dtype=self.dtype(param.device), device=param.device)


def on_host(value: Tensor) -> bool:
    """Whether `value` can be read without waiting for an accelerator.

    A fake tensor has no value, and what a dispatch mode records must not hold one.
    """
    return (
        value.device.type == "cpu"
        and type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not is_traced()
    )


def is_traced() -> bool:
    """Whether a dispatch mode sees operations, as FakeTensorMode, make_fx and counters of FLOPs do.

    It sees no memory, so kernels would go past it.
    """
    return torch._C._len_torch_dispatch_stack() > 0


def number(value: Any, device: torch.device) -> Any:
    """`value` as a Python number, or, where that would wait for an accelerator, a 0-dim tensor.

    Pairs are converted element by element; what is not a tensor is returned as it is.
    """
    if isinstance(value, (tuple, list)):
        return tuple(number(element, device) for element in value)
    if not isinstance(value, Tensor):
        # A numpy scalar would make numpy booleans, which are not True and False.
        plain = isinstance(value, int) or not isinstance(value, Real)
        return value if plain else float(value)
    if on_host(value):
        return value.item()
    if value.is_floating_point():
        return value.detach().reshape(()).to(device, wide_dtype(device))
    return value.detach().reshape(()).to(device)


def is_on_device(value: object) -> bool:
    """Whether reading `value` would wait for a device."""
    return isinstance(value, Tensor) and not on_host(value)


def settled(value: Any) -> Any:
    """A number of a 0-dim array as a float; anything else as it is."""
    is_array = not isinstance(value, Tensor) and getattr(value, "ndim", None) == 0
    return float(value) if is_array and hasattr(value, "__float__") else value


def pair(values: object) -> tuple[Any, ...]:
    """Numbers of any sequence, array or tensor as a tuple: floats, or tensors as they are."""
    if isinstance(values, Tensor) and values.dim():
        values = values.tolist() if on_host(values) else values.unbind()
    if not isinstance(values, Iterable) or isinstance(values, Tensor):
        raise TypeError(f"Invalid betas: {values} (expected two numbers)")
    numbers = map(settled, values)
    return tuple(float(value) if isinstance(value, Real) else value for value in numbers)


def is_zero(value: Number) -> bool:
    """Whether `value` is known on the host to be 0 (a number on a device is not looked at)."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and on_host(value) and value.item() == 0
    return value == 0


def select(keep: Flag, target: Tensor, value: Number) -> Number:
    """What is to be written into `target`: `value`, or what is there where `keep` says so.

    `keep` selects; it never multiplies, because 0 * inf is NaN. It is False or a tensor.
    """
    if not isinstance(keep, Tensor):
        return value
    # Round before selecting: what is kept must not go through another dtype, not even a NaN.
    rounded = torch.as_tensor(value, dtype=target.dtype, device=target.device)
    return torch.where(keep, target, rounded)
