"""Tensors sorted into buckets, of which each takes one launch, and the tables of the buckets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedreg.dist import Spread, spread_of
from fusedreg.engine.watch import Inventory

States = Sequence[Mapping[str, Tensor]]
"""What is here of the states of each parameter of an inventory."""


class Kind(NamedTuple):
    """What the tensors of one launch have in common."""

    launch: Any  # the module that does
    device: torch.device
    rule: Any
    layerwise: bool
    states: tuple[str, ...]
    shrink: bool  # one L1 threshold for all elements, whatever the gain of each
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    counts: tuple[torch.dtype, ...]
    aligned: bool
    spread: Spread | None  # over ranks; the norms of those alike are summed alike


@dataclass
class Bucket:
    """The tensors of one kind."""

    kind: Kind
    positions: list[int]
    """Where its tensors stand among the parameters of the plan."""
    hooks: dict[str, bool]
    """Which penalties any of its groups has."""
    table: Any
    rows: Tensor
    first_chunk: int
    """Where its chunks begin among the partial norms of the device."""
    first_tensor: int
    """Where its tensors begin among the gradient addresses of the device."""
    partials: Tensor | None
    """Of a layerwise rule: sums of squares of each chunk, of the parameter and of its update."""
    squares: Tensor | None
    """The same of each tensor."""
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
    calls: dict[Any, list[Callable[[], None]]] = field(default_factory=dict)
    """Launches that are the same in every step of a kind."""

    def __post_init__(self) -> None:
        self.views = [bucket.grads_in(self.grads) for bucket in self.buckets]


def layout(inventory: Inventory, states: States) -> dict[torch.device, Memory]:
    """Sort the tensors of an inventory into buckets and write their tables."""
    kinds: dict[torch.device, dict[Kind, list[int]]] = {}
    for position, param in enumerate(inventory.chosen):
        kind = _kind(inventory, position, states[position], spread_of(param))
        kinds.setdefault(kind.device, {}).setdefault(kind, []).append(position)
    return {device: _memory(inventory, device, of) for device, of in kinds.items()}


def _kind(
    inventory: Inventory, position: int, state: Mapping[str, Tensor], spread: Spread | None
) -> Kind:
    param = inventory.params[position]
    rule, names, shrink, *_ = inventory.options.structure[inventory.group_of[position]]
    counts = [state.get(name) for name in inventory.scalar_states]
    return Kind(
        launch=inventory.launchers[position],
        device=param.device,
        rule=rule,
        layerwise=inventory.layerwise,
        states=names,
        shrink=shrink,
        param=param.dtype,
        grad=inventory.grad_dtypes[position],
        state=state[names[0]].dtype if names else param.dtype,
        counts=tuple(torch.float64 if count is None else count.dtype for count in counts),
        aligned=inventory.is_aligned[position],
        spread=spread,
    )


def _memory(inventory: Inventory, device: torch.device, kinds: Mapping[Kind, list[int]]) -> Memory:
    launch = inventory.launch
    buckets: list[Bucket] = []
    chunks = tensors = 0
    for kind, positions in kinds.items():
        groups = [inventory.group_of[position] for position in positions]
        numels = [inventory.numels[position] for position in positions]
        slots = _slots(inventory, kind, positions)
        table = kind.launch.build(addresses_at(inventory, slots), numels, groups, device)
        rows = torch.empty(len(positions), launch.ROW, dtype=torch.float64, device=device)
        hooks = launch.penalties([inventory.options.lines[group] for group in set(groups)])
        partials, squares = (
            torch.zeros(count, 2, dtype=torch.float64, device=device) if kind.layerwise else None
            for count in (table.chunks, len(positions))
        )
        buckets.append(
            Bucket(kind, positions, hooks, table, rows, chunks, tensors, partials, squares, slots)
        )
        chunks += table.chunks
        # An even number, because triton compiles for the alignment of where the next one begins.
        tensors += len(positions) + len(positions) % 2
    size = launch.HEADER + sum(map(len, inventory.options.lines))
    return Memory(
        buckets,
        grads=torch.empty(tensors, dtype=torch.int64, device=device),
        partials=torch.empty(chunks, dtype=torch.float64, device=device),
        numbers=torch.empty(size, dtype=torch.float64, device=device),
    )


def _slots(inventory: Inventory, kind: Kind, positions: list[int]) -> list[list[int]]:
    """Places of parameters, moments and counts; -1 for a count that a parameter has not."""
    names = (*kind.states, *inventory.scalar_states)
    states = [[inventory.state_index(position, name) for position in positions] for name in names]
    return [positions, *states]


def addresses_at(inventory: Inventory, slots: list[list[int]]) -> list[list[int]]:
    """The addresses that a table has, slot by slot."""
    address_at = [*inventory.addresses, 0].__getitem__  # -1 is the last, 0
    return [list(map(address_at, slot)) for slot in slots]
