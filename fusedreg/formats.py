"""How the tensor states of a parameter are stored.

A state is a tensor of numbers, shaped like its parameter. A format keeps it in one or more tensors,
its planes, and has the ways from the numbers to the planes and back, twice: in torch operations for
the reference path, and as a pair of device functions for the kernels, its codec. An optimizer says
which format a parameter's states have in `state_format`. In `optimizer.state` the planes of a state
NAME are called NAME plus a suffix each; a checkpoint holds the state itself, as NAME.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedreg.kernels.contract import Codec
from fusedreg.scalars import Number, is_zero


class Format(ABC):
    """Base class of formats whose planes have the shape of the parameter."""

    suffixes: tuple[str, ...] = ("",)
    """What the planes are called, after the name of the state."""
    dtype: torch.dtype | None = None
    """Of a state that was read from a file, before `from_checkpoint`; None is the wider of the
    file's and the parameter's."""

    @property
    def codec(self) -> Codec | None:
        """The device functions; None leaves parameters with such states to the reference path."""
        return None

    @abstractmethod
    def create(self, param: Tensor, value: Number) -> Sequence[Tensor]:
        """The planes of a state whose entries are all `value`."""

    @abstractmethod
    def load(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The state in the dtype of the arithmetic. Complex planes are pairs of reals here."""

    @abstractmethod
    def store(self, value: Tensor, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        """What each plane has to hold for the state to be `value`. It writes into none of them."""

    @abstractmethod
    def to_checkpoint(self, planes: Sequence[Tensor]) -> Tensor:
        """What a checkpoint holds: a tensor of numbers that torch.optim loads too."""

    @abstractmethod
    def from_checkpoint(self, value: Tensor) -> Sequence[Tensor]:
        """The planes, of what a checkpoint held."""


class Plain(Format):
    """One tensor of the numbers themselves.

    Args:
        dtype: of the states that it creates; None is the parameter's.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def create(self, param: Tensor, value: Number) -> Sequence[Tensor]:
        """A tensor laid out like the parameter."""
        dtype = self.dtype
        if dtype is not None and param.is_complex():
            dtype = dtype.to_complex()
        state = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if not is_zero(value):
            as_real(state).fill_(value)
        return (state,)

    def load(self, planes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Its own memory where that has the dtype."""
        (state,) = planes
        return state if state.dtype == dtype else state.to(dtype)

    def store(self, value: Tensor, planes: Sequence[Tensor]) -> Sequence[Tensor]:
        """The value, which is rounded once, when it is copied."""
        return (value,)

    def to_checkpoint(self, planes: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        return planes[0]

    def from_checkpoint(self, value: Tensor) -> Sequence[Tensor]:
        """The tensor itself."""
        return (value,)


def planes_of(format: Format, names: Sequence[str]) -> tuple[str, ...]:
    """What the planes of some states are called, state by state."""
    return tuple(name + suffix for name in names for suffix in format.suffixes)


def planes_in(format: Format, state: Mapping[str, Tensor], name: str) -> list[Tensor] | None:
    """The tensors that a state is stored in, complex ones as pairs of reals; None: not there."""
    names = planes_of(format, [name])
    return [as_real(state[plane]) for plane in names] if names[0] in state else None


def as_real(x: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, sharing its memory; a real one as it is."""
    return torch.view_as_real(x) if x.is_complex() else x
