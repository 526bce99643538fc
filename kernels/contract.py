"""What the engine and the two compilers agree on.

The engine sorts tensors into buckets, one for each `Program`. A backend compiles a program and
launches it over the `Table` of the bucket. Triton's backend is in gpu/ and LLVM's in cpu/. Both run
the device functions in device/. A step of one bucket is

    norms    the norm of each chunk of the gradients, if a norm is asked for
    rows     one row of numbers for each tensor: whether it moves, scale, scalars, counts
    squares  for a layerwise rule: two sums of squares for each tensor
    step     parameters, states and counts

Each is one launch (`squares` is two) for any number of tensors and param groups. A method of a
backend returns calls, which may be made again in any step with the same tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fusedreg.kernels.layout import GROUP_SCALARS, ROW
from fusedreg.kernels.table import Table

Call: TypeAlias = Callable[[], None]
"""A launch with all its arguments."""

Stage: TypeAlias = Literal["gradient", "decay", "prox"]
"""Where in a step a penalty acts: see device/step.py."""

SLOTS: dict[Stage, int] = {"gradient": 2, "decay": 1, "prox": 2}
"""How many penalties act at each stage in one launch.

Each slot is an argument of its own of the kernels, because triton's key of a compiled kernel does
not see the functions inside a tuple.
"""


class DeviceFunction(Protocol):
    """A Python function under `@triton.jit`."""

    fn: Any
    """The function itself."""

    def __hash__(self) -> int: ...


class Rule(NamedTuple):
    """The two device functions of a rule and how many scalars pass from one to the other."""

    scalars: DeviceFunction
    tile: DeviceFunction
    width: int


class Hook(NamedTuple):
    """A device function of a penalty and where its numbers are among the group scalars."""

    stage: Stage
    function: DeviceFunction
    first: int
    width: int


class Codec(NamedTuple):
    """The device functions of a format: from what is stored of a state to its value, and back."""

    decode: DeviceFunction
    encode: DeviceFunction


class Program(NamedTuple):
    """What kernels are compiled for. The tensors of one program make one bucket."""

    rule: Rule
    hooks: tuple[Hook, ...]
    states: int
    """How many tensor states a parameter has."""
    planes: tuple[torch.dtype, ...]
    """The dtypes of the tensors that store one state; all states are stored alike."""
    codec: Codec | None
    """None: a state is stored as one tensor of its values."""
    counts: tuple[torch.dtype, ...]
    options: int
    """How many options the rule takes. They are the last of the group scalars."""
    group_width: int
    """How many numbers a group has."""
    param: torch.dtype
    """In memory, like `grad`. The arithmetic is float64 where this is, else float32."""
    grad: torch.dtype
    aligned: bool
    """Whether every address is a multiple of the backend's `alignment`."""
    layerwise: bool
    """Whether lr is multiplied by the trust ratio of each tensor."""

    @property
    def first_option(self) -> int:
        """Where among the group scalars the options of the rule begin."""
        return self.group_width - self.options

    @property
    def first_count(self) -> int:
        """Where in a table the addresses of the counts begin."""
        return 1 + self.states * len(self.planes)

    @property
    def row(self) -> int:
        """How many numbers a row has."""
        return len(ROW) + self.rule.width + len(self.counts)

    def slots(self, stage: Stage) -> list[Hook | None]:
        """The hooks of a stage, and None for each slot that is left."""
        hooks: list[Hook | None] = [hook for hook in self.hooks if hook.stage == stage]
        return hooks + [None] * (SLOTS[stage] - len(hooks))


FIRST_NUMBER = len(GROUP_SCALARS)
"""Where among the group scalars the numbers of penalties begin."""


class Arrays(NamedTuple):
    """What the launches of one bucket read and write, on its device."""

    table: Table
    grads: Tensor
    """int64, (tensors,), addresses of the gradients, 0 where there is none."""
    numbers: Tensor
    """float64, the step scalars, then the group scalars of each param group; see layout.py."""
    rows: Tensor
    """float64, (tensors, program.row), written by `rows`."""
    partials: Tensor
    """float64, (chunks, 2), written by `squares`: sums of squares of parameters and updates."""
    squares: Tensor
    """float64, (tensors, 2), written by `squares`: the same of each tensor; summed over ranks.

    Empty like `partials` unless the rule is layerwise.
    """

    def walked(self, sums: Tensor | None) -> tuple[Tensor | int | None, ...]:
        """What the two launches over all elements take, `step` and `squares`, in their order."""
        table = self.table
        tables = table.addresses, self.grads, table.numels, table.groups, table.first_chunks
        return (*tables, table.owners, self.numbers, self.rows, sums, table.tensors)


class Backend(Protocol):
    """A compiler and the device that its kernels run on."""

    name: str
    """As `FusedOptimizer.backend` says it."""
    alignment: int
    """Bytes of the widest access. Where all addresses are multiples of it, kernels are faster."""

    def rule(self, rule: Rule | str, *, states: int, counts: int, options: int) -> Rule:
        """The device functions of a rule.

        Args:
            rule: they themselves, or their name in `device.rules.RULES`.
            states, counts, options: how many of each an optimizer has.

        Raises:
            ValueError: there is no such rule, or it returns another number of states, counts or
                scalars than it should. A GPU's compiler finds the latter in the first launch.
            TypeError: the rule is something else.
        """

    def hook(self, function: DeviceFunction | str) -> DeviceFunction:
        """The device function of a penalty, itself or by its name in device/penalties.py."""

    def build(
        self,
        addresses: Sequence[Sequence[int]],
        numels: Sequence[int],
        groups: Sequence[int],
        device: torch.device,
    ) -> Table:
        """The table of some tensors; see table.py."""

    def norms(
        self, program: Program, table: Table, grads: Tensor, partials: Tensor, first: int
    ) -> Call:
        """Writes the norm of every chunk of the gradients.

        Args:
            program: what is compiled.
            table: the tensors, with at least one chunk.
            grads: as in `Arrays`.
            partials: float64, written from index `first` on, one entry for each chunk.
            first: where the chunks of this table begin.
        """

    def rows(
        self,
        program: Program,
        arrays: Arrays,
        *,
        partials: Tensor | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> Call:
        """Writes the row of every tensor, with its new counts, which `step` stores.

        Args:
            program: what is compiled.
            arrays: what is read and written.
            partials: norms of all chunks of this device, of other tables too; None: no norm.
            grad_scale, found_inf: one-element tensors on this device, or None.
            grad_norm, skipped: 0-dim float32 and int64, written where given.
        """

    def squares(self, program: Program, arrays: Arrays, *, scaled: bool) -> list[Call]:
        """Writes the sums of squares of every tensor and of its update; changes nothing else."""

    def step(self, program: Program, arrays: Arrays, *, scaled: bool) -> Call:
        """Steps every tensor that has a gradient, and its counts with it.

        Args:
            program: what is compiled.
            arrays: what is read and written; `rows` and `squares` have been.
            scaled: whether clipping or a loss scale may have changed the scale from 1 or -1.
        """
