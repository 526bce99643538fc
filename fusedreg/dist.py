"""Parameters of which each rank has a part: what is here, and sums over the ranks.

A DTensor says itself how it is spread. Plain tensors do not: the caller names a process group, and
what is known to split plain tensors is refused without one. This module needs `torch.distributed`
only where there is something to sum.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """How the elements of a DTensor are spread over ranks; the other dimensions have copies."""

    mesh: Any
    """torch.distributed.DeviceMesh"""
    dims: tuple[int, ...]
    """Dimensions of the mesh along which each rank has another part."""


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; any other tensor itself. Call it without grad mode."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(value: Tensor) -> Tensor:
    """A reduction over a DTensor as the plain tensor that all its ranks agree on."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def placements_of(tensor: Any) -> Any:
    """Where the parts of a DTensor are; None for any other tensor."""
    return getattr(tensor, "placements", None)


def is_sharded_alike(param: Tensor, other: Tensor) -> bool:
    """Whether the parts of two tensors that are here belong together, element by element."""
    return bool(placements_of(param) == placements_of(other))


def sharded_as(param: Any, other: Any) -> Tensor:
    """A DTensor with the placements of `param`, so that their parts belong together."""
    alike: Tensor = other
    if not is_sharded_alike(param, other):
        alike = other.redistribute(param.device_mesh, param.placements)
    return alike


def spread_of(param: Any) -> Spread | None:
    """How a parameter is spread over ranks; None for a tensor that is no DTensor."""
    placements = placements_of(param)
    if placements is None:
        return None
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    return Spread(param.device_mesh, tuple(dims))


# ---- norms over ranks --------------------------------------------------------------------------


def total_norm(norms: Mapping[Spread | None, Tensor], group: Any) -> Tensor:
    """The norm over all ranks, from the norms of what each of them has.

    All ranks must call it with the same spreads in the same order. It makes one all-reduce of
    squared norms for each mesh that spreads anything, and one for `group`. Only a mesh that spreads
    along several dimensions and is not the whole world takes one for each of them.

    Args:
        norms: the norm of all parts here with that spread, 0-dim; None for plain tensors, which
            every rank has alike, or in parts if there is a `group`.
        group: ranks whose totals are added as well, or None.
    """
    meshes: dict[Any, dict[Spread, Tensor]] = {}
    for spread, norm in norms.items():
        if spread is not None:
            meshes.setdefault(spread.mesh, {})[spread] = norm
    if group is None and not meshes:
        return norms[None]
    squares = _squares(norms[None])
    for mesh, parts in meshes.items():
        squares = squares + _sum_over_mesh(mesh, parts)
    if group is not None:
        torch.distributed.all_reduce(squares, group=group)
    return _root(squares)


SCALE = 2.0**500


def _squares(norm: Tensor) -> Tensor:
    """The square of a norm, and of a part of it that does not overflow where the norm does."""
    return torch.stack([norm, norm / SCALE]).square()


def _root(squares: Tensor) -> Tensor:
    """The norm that sums of `_squares` stand for."""
    plain, scaled = squares.sqrt()
    return torch.where(plain == torch.inf, scaled * SCALE, plain)


def _sum_over_mesh(mesh: Any, norms: Mapping[Spread, Tensor]) -> Tensor:
    """Sum of squares of all parts in a mesh, each element counted once."""
    dims = sorted({dim for spread in norms for dim in spread.dims})
    squares = torch.stack(
        [
            _squares(norm) / math.prod(mesh.size(dim) for dim in dims if dim not in spread.dims)
            for spread, norm in norms.items()
        ]
    ).sum(dim=0)
    if len(dims) == mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        torch.distributed.all_reduce(squares)
    else:
        for dim in dims:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
    return squares


# ---- plain tensors in parts --------------------------------------------------------------------


def name_of(group: Any) -> str | None:
    """What stands for a process group in an optimizer, because a name can be copied and pickled."""
    if group is None:
        return None
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"Invalid process_group value: {group!r} (expected a torch.distributed.ProcessGroup of "
            "which this rank is a member, such as torch.distributed.group.WORLD once there is one)"
        )
    return str(group.group_name)


def distributed_c10d() -> Any:
    """The module that knows process groups by name, which a build of torch may lack."""
    return torch.distributed.distributed_c10d


def group_of(name: str | None) -> Any:
    """The process group of that name; raises torch's error where there is none any more."""
    if name is None:
        return None
    return distributed_c10d()._resolve_process_group(name)


def splitter_of(params: Iterable[Tensor]) -> str | None:
    """What splits plain parameters between ranks, of all that says so; else None."""
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        return "FullyShardedDataParallel"
    return None


def constructing_splitter() -> str | None:
    """ZeroRedundancyOptimizer, if that is what constructs the optimizer that calls this.

    It leaves no mark on the parameters or the optimizer, so look at who calls.
    """
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = inspect.currentframe()
    while zero is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), zero.ZeroRedundancyOptimizer):
            return "ZeroRedundancyOptimizer"
        frame = frame.f_back
    return None
