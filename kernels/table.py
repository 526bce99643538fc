"""What the kernels walk: addresses and the map from chunks to tensors. Torch only."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"i": torch.int32, "q": torch.int64}
"""Of an array's typecodes."""


class Table(NamedTuple):
    """Tensors that one launch walks, on their device."""

    addresses: Tensor
    """int64, (1 + tensor states + counts, tensors): parameter, tensor states, counts; 0: absent."""
    numels: Tensor
    """int64, (tensors,)."""
    groups: Tensor
    """int32, (tensors,): the param group of each tensor."""
    first_chunks: Tensor
    """int32, (tensors,)."""
    owners: Tensor
    """int32, (chunks,): the tensor of each chunk. Each has one at least, which may be empty."""
    tensors: int
    chunks: int
    elements: int


def build(
    addresses: Sequence[Sequence[int]],
    numels: Sequence[int],
    groups: Sequence[int],
    device: torch.device,
    chunk: int,
) -> Table:
    """The table of some tensors.

    Args:
        addresses: one sequence for each slot, with the address of every tensor.
        numels: elements of every tensor; 0 is fine.
        groups: index of every tensor's param group.
        device: where it shall be.
        chunk: elements of a chunk.

    Raises:
        RuntimeError: a mode is active in which new tensors have no memory.
    """
    _check_memory(device)
    # Python's lists, because a parallel operation of torch would wake all its threads.
    counts = [max(1, -(-numel // chunk)) for numel in numels]
    return Table(
        addresses=_upload(_flat(addresses), device).view(len(addresses), len(numels)),
        numels=_upload(_vector("q", numels), device),
        groups=_upload(_vector("i", groups), device),
        first_chunks=_upload(_vector("i", accumulate(counts[:-1], initial=0)), device),
        owners=_upload(_vector("i", _repeated(counts)), device),
        tensors=len(numels),
        chunks=sum(counts),
        elements=sum(numels),
    )


def move(table: Table, addresses: Sequence[Sequence[int]]) -> None:
    """Send other addresses, as `build` takes them, into the table of tensors that have moved."""
    _check_memory(table.addresses.device)
    send(_flat(addresses), table.addresses.view(-1))


def _flat(addresses: Sequence[Sequence[int]]) -> Tensor:
    return _vector("q", chain.from_iterable(addresses))


def _repeated(counts: Sequence[int]) -> Iterable[int]:
    """Each index as often as its count says."""
    return chain.from_iterable(map(repeat, range(len(counts)), counts))


def _vector(code: str, values: Iterable[int]) -> Tensor:
    """A vector of the host, in the memory of an array."""
    return torch.frombuffer(array(code, values), dtype=DTYPES[code])


def _check_memory(device: torch.device) -> None:
    """Raise where new tensors have no memory, though that of an array would not show it."""
    new = torch.empty(1, device=device)
    if type(new) is not Tensor or not new.data_ptr():
        raise RuntimeError(
            "Cannot make tables for kernels where new tensors have no memory, as inside a "
            "FakeTensorMode or torch.func.functionalize: step outside of it, or with fused=False"
        )


def send(values: Tensor, target: Tensor) -> None:
    """Copy a CPU tensor into one on a device, without waiting for it."""
    # The pinned copy may go at once: torch's host allocator reuses it only after the transfer.
    target.copy_(values if target.device.type == "cpu" else values.pin_memory(), non_blocking=True)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device`; for a CPU the tensor itself."""
    if device.type == "cpu":
        return values
    target = torch.empty_like(values, device=device)
    send(values, target)
    return target


def constants(values: Sequence[float], device: torch.device) -> Tensor:
    """A float64 vector on `device`, sent as kernel arguments instead of copied from the host.

    So a captured graph holds the values themselves and replays without any host memory. Addresses
    are exact too: they are below 2**53.
    """
    vector = torch.zeros(len(values), dtype=torch.float64, device=device)
    torch._foreach_add_(vector.unbind(), list(map(float, values)))
    return vector
