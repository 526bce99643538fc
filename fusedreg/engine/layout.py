"""Tensors sorted into buckets, of which each takes one launch, and the tables of the buckets."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusedreg.dist import Spread, spread_of
from fusedreg.engine.watch import Inventory
from fusedreg.kernels.contract import Backend, Call, Program
from fusedreg.kernels.layout import HEADER
from fusedreg.kernels.table import Table

LocalStates = Sequence[Mapping[str, Tensor]]
"""The local states of each parameter of an inventory."""


class Key(NamedTuple):
    """What the tensors of one launch have in common."""

    backend: Backend
    device: torch.device
    program: Program
    spread: Spread | None
    """Over ranks. Norms of tensors that are spread alike are summed alike."""


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
    """For a layerwise rule: sums of squares of each chunk, of the parameter and of its update."""
    squares: Tensor | None
    """The same of each tensor; None for any other rule."""
    slots: list[list[int]]
    """Where each address of its table is among those of the inventory."""

    def grads_in(self, grads: Tensor) -> Tensor:
        """The addresses of its gradients among those of the device."""
        return grads[self.first_tensor : self.first_tensor + len(self.positions)]


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


def layout(inventory: Inventory, states: LocalStates) -> dict[torch.device, Memory]:
    """Sort the tensors of an inventory into buckets and write their tables."""
    keys: dict[torch.device, dict[Key, list[int]]] = {}
    for position, param in enumerate(inventory.chosen):
        key = Key(
            inventory.backends[position],
            inventory.params[position].device,
            _program(inventory, position, states[position]),
            spread_of(param),
        )
        keys.setdefault(key.device, {}).setdefault(key, []).append(position)
    return {device: _memory(inventory, device, of) for device, of in keys.items()}


def _program(inventory: Inventory, position: int, state: Mapping[str, Tensor]) -> Program:
    """What kernels are compiled for, to step a parameter."""
    options, group = inventory.options, inventory.group_of[position]
    structure, param = options.structure[group], inventory.params[position]
    counts = [state.get(name) for name in inventory.counts]
    storage, planes = inventory.formats[position], inventory.planes[position]
    first_state = planes[: len(storage.suffixes)]
    assert structure.rule is not None, "kernels step no parameter of a group without a device rule"
    return Program(
        rule=structure.rule,
        hooks=options.hooks_of[group],
        states=len(structure.states),
        planes=tuple(state[name].dtype for name in first_state) or (param.dtype,),
        codec=storage.codec,
        counts=tuple(torch.float64 if count is None else count.dtype for count in counts),
        options=options.options,
        line=options.width,
        param=param.dtype,
        grad=inventory.grad_dtypes[position],
        aligned=inventory.is_aligned[position],
        layerwise=inventory.layerwise,
    )


def _memory(inventory: Inventory, device: torch.device, keys: Mapping[Key, list[int]]) -> Memory:
    buckets: list[Bucket] = []
    chunks = tensors = 0
    for key, positions in keys.items():
        groups = [inventory.group_of[position] for position in positions]
        numels = [inventory.numels[position] for position in positions]
        slots = _slots(inventory, positions)
        table = key.backend.build(addresses_at(inventory, slots), numels, groups, device)
        program = key.program
        rows = torch.empty(len(positions), program.row, dtype=torch.float64, device=device)
        partials, squares = (
            torch.zeros(count, 2, dtype=torch.float64, device=device)
            for count in ((table.chunks, len(positions)) if program.layerwise else (0, 0))
        )
        buckets.append(
            Bucket(
                key,
                positions,
                table,
                rows,
                chunks,
                tensors,
                partials,
                squares if program.layerwise else None,
                slots,
            )
        )
        chunks += table.chunks
        # An even number, because triton compiles for the alignment of where the next one begins.
        tensors += len(positions) + len(positions) % 2
    size = len(HEADER) + sum(map(len, inventory.options.lines))
    return Memory(
        buckets,
        grads=torch.empty(tensors, dtype=torch.int64, device=device),
        partials=torch.empty(chunks, dtype=torch.float64, device=device),
        numbers=torch.empty(size, dtype=torch.float64, device=device),
    )


def _slots(inventory: Inventory, positions: list[int]) -> list[list[int]]:
    """Places of parameters, states and counts; -1 for a count that a parameter does not have."""
    planes = zip(*(inventory.planes[position] for position in positions), strict=True)
    counts = ([name] * len(positions) for name in inventory.counts)
    places = partial(map, inventory.state_index, positions)
    return [positions, *(list(places(names)) for names in (*planes, *counts))]


def addresses_at(inventory: Inventory, slots: list[list[int]]) -> list[list[int]]:
    """The addresses that a table has, slot by slot."""
    address_at = [*inventory.addresses, 0].__getitem__  # -1 is the last, 0
    return [list(map(address_at, slot)) for slot in slots]
