"""What the kernels walk: addresses and the map from chunks to tensors. Torch only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 8192
"""Elements of one program of the step and of the norm on a GPU."""


class Table(NamedTuple):
    """Tensors that one launch walks, on their device."""

    addresses: Tensor
    """int64, (1 + tensor states + counts, tensors): parameter, tensor states, counts; 0: absent."""
    numels: Tensor
    """int64, (tensors,)."""
    groups: Tensor
    """int32, (tensors,): the line of numbers of each tensor."""
    first_chunks: Tensor
    """int32, (tensors,)."""
    owners: Tensor
    """int32, (chunks,): the tensor of each chunk. Each has one at least, which may be empty."""
    tensors: int
    chunks: int
    elements: int


class Walk(NamedTuple):
    """What a kernel that walks all elements of a table is compiled for."""

    rule: Any
    states: int
    """How many tensor states the table has."""
    subgradient: bool
    """Whether any of the groups needs that hook, like `coupled`."""
    coupled: bool
    scaled: bool
    """Whether clipping or a loss scale may have changed the scale from 1."""
    param: torch.dtype
    """In memory, like `grad` and `state`. The arithmetic is float64 where this is."""
    grad: torch.dtype
    state: torch.dtype
    aligned: bool
    """Whether every address is a multiple of 16 bytes."""


def build(
    addresses: Sequence[Sequence[int]],
    numels: Sequence[int],
    groups: Sequence[int],
    device: torch.device,
    chunk: int | None = None,
) -> Table:
    """The table of some tensors.

    Args:
        addresses: one sequence for each slot, with the address of every tensor.
        numels: elements of every tensor; 0 is fine.
        groups: index of every tensor's param group.
        device: where it shall be.
        chunk: elements of a chunk, where those of a GPU are not meant.

    Raises:
        RuntimeError: a mode is active in which new tensors have no memory.
    """
    chunk = chunk or CHUNK
    host = torch.device("cpu")  # whatever the default device is
    sizes = torch.tensor(numels, dtype=torch.int64, device=host)
    counts = (sizes + (chunk - 1)).div(chunk, rounding_mode="floor").clamp(min=1)
    first_chunks = counts.cumsum(0) - counts
    owners = torch.repeat_interleave(torch.arange(len(numels), device=host), counts)
    table = Table(
        addresses=_upload(torch.tensor(addresses, dtype=torch.int64, device=host), device),
        numels=_upload(sizes, device),
        groups=_upload(torch.tensor(groups, dtype=torch.int32, device=host), device),
        first_chunks=_upload(first_chunks.to(torch.int32), device),
        owners=_upload(owners.to(torch.int32), device),
        tensors=len(numels),
        chunks=owners.numel(),
        elements=sum(numels),
    )
    if type(table.addresses) is not Tensor or not table.addresses.data_ptr():
        raise RuntimeError(
            "Cannot make tables for kernels where new tensors have no memory, as inside a "
            "FakeTensorMode or torch.func.functionalize: step outside of it, or with fused=False"
        )
    return table


def send(values: Tensor, target: Tensor) -> None:
    """Copy a CPU tensor into one on a device, without waiting for it."""
    # The pinned copy may go at once: torch's host allocator reuses it only after the transfer.
    target.copy_(values if target.device.type == "cpu" else values.pin_memory(), non_blocking=True)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device`."""
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
