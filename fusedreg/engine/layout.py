"""Tensors sorted into buckets, one launch each, and the tables of the buckets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg.dist import Sharding, sharding_of
from fusedreg.engine.watch import Watcher
from fusedreg.kernels.contract import Arrays, Backend, Call, Program
from fusedreg.kernels.layout import STEP_SCALARS
from fusedreg.kernels.table import Table

LocalStates = Sequence[Mapping[str, Tensor]]
"""The local states of each parameter of a watcher."""


class Key(NamedTuple):
    """What the tensors of one launch have in common."""

    backend: Backend
    device: torch.device
    program: Program
    sharding: Sharding | None
    """Over ranks. Norms of tensors that are sharded alike are summed alike."""


@dataclass
class Bucket:
    """The tensors of one launch."""

    key: Key
    positions: list[int]
    """Where its tensors are among the parameters of the plan."""
    table: Table
    rows: Tensor
    first_chunk: int
    """Where its chunks begin among the partial norms of the device."""
    first_tensor: int
    """Where its tensors begin among the gradient addresses of the device."""
    partials: Tensor
    """As in `Arrays`, like `squares`."""
    squares: Tensor
    slots: list[list[int]]
    """Where each address of its table is among those of the watcher."""

    def grads_in(self, grads: Tensor) -> Tensor:
        """The addresses of its gradients among those of the device."""
        return grads[self.first_tensor : self.first_tensor + len(self.positions)]

    def arrays(self, grads: Tensor, numbers: Tensor) -> Arrays:
        """What its launches read and write."""
        return Arrays(self.table, grads, numbers, self.rows, self.partials, self.squares)


@dataclass
class Memory:
    """What the buckets of one device share."""

    buckets: list[Bucket]
    grads: Tensor
    partials: Tensor
    numbers: Tensor
    views: list[Tensor] = field(init=False)
    """What each bucket has of `grads`."""
    calls: dict[Hashable, list[Call]] = field(default_factory=dict)
    """Launches that are the same in every step of a kind."""

    def __post_init__(self) -> None:
        self.views = [bucket.grads_in(self.grads) for bucket in self.buckets]


def layout(watcher: Watcher, states: LocalStates) -> dict[torch.device, Memory]:
    """Sort the tensors of a watcher into buckets and write their tables."""
    keys: dict[torch.device, dict[Key, list[int]]] = {}
    for position, param in enumerate(watcher.chosen):
        key = Key(
            watcher.backends[position],
            watcher.params[position].device,
            _program(watcher, position, states[position]),
            sharding_of(param),
        )
        keys.setdefault(key.device, {}).setdefault(key, []).append(position)
    return {device: _memory(watcher, device, of) for device, of in keys.items()}


def _program(watcher: Watcher, position: int, state: Mapping[str, Tensor]) -> Program:
    """What kernels are compiled for, to step a parameter."""
    options, group = watcher.options, watcher.group_of[position]
    structure, param = options.structure[group], watcher.params[position]
    counts = [state.get(name) for name in watcher.counts]
    storage, planes = watcher.formats[position], watcher.planes[position]
    first_state = planes[: len(storage.suffixes)]
    assert structure.rule is not None, "kernels step no parameter of a group without a device rule"
    return Program(
        rule=structure.rule,
        hooks=options.hooks_of[group],
        states=len(structure.states),
        planes=tuple(state[name].dtype for name in first_state) or (param.dtype,),
        codec=storage.codec,
        counts=tuple(torch.float64 if count is None else count.dtype for count in counts),
        options=structure.options,
        group_width=options.width,
        param=param.dtype,
        grad=watcher.grad_dtypes[position],
        aligned=watcher.is_aligned[position],
        layerwise=watcher.layerwise,
    )


def _memory(watcher: Watcher, device: torch.device, keys: Mapping[Key, list[int]]) -> Memory:
    buckets: list[Bucket] = []
    chunks = tensors = 0
    for key, positions in keys.items():
        groups = [watcher.group_of[position] for position in positions]
        numels = [watcher.numels[position] for position in positions]
        slots = _slots(watcher, positions)
        table = key.backend.build(addresses_at(watcher, slots), numels, groups, device)
        program = key.program
        rows = torch.empty(len(positions), program.row, dtype=torch.float64, device=device)
        partials, squares = (
            torch.zeros(count, 2, dtype=torch.float64, device=device)
            for count in ((table.chunks, len(positions)) if program.layerwise else (0, 0))
        )
        buckets.append(
            Bucket(key, positions, table, rows, chunks, tensors, partials, squares, slots)
        )
        chunks += table.chunks
        # An even number, because triton compiles for the alignment of where the next one begins.
        tensors += len(positions) + len(positions) % 2
    size = len(STEP_SCALARS) + sum(map(len, watcher.options.scalars))
    return Memory(
        buckets,
        grads=torch.empty(tensors, dtype=torch.int64, device=device),
        partials=torch.empty(chunks, dtype=torch.float64, device=device),
        numbers=torch.empty(size, dtype=torch.float64, device=device),
    )


def _slots(watcher: Watcher, positions: list[int]) -> list[list[int]]:
    """Places of parameters, states and counts; -1 for a count that a parameter does not have."""
    planes = zip(*(watcher.planes[position] for position in positions), strict=True)
    counts = ([name] * len(positions) for name in watcher.counts)
    places = partial(map, watcher.state_index, positions)
    return [positions, *(list(places(names)) for names in (*planes, *counts))]


def addresses_at(watcher: Watcher, slots: list[list[int]]) -> list[list[int]]:
    """The addresses that a table has, slot by slot."""
    address_at = [*watcher.addresses, 0].__getitem__  # -1 is the last, 0
    return [list(map(address_at, slot)) for slot in slots]
