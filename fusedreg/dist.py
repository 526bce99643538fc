"""Parameters that are split over ranks: their local parts, and sums over the ranks.

A DTensor says itself how it is sharded. Plain tensors do not: the caller names a process group, and
what is known to split plain tensors is refused without one. This module needs `torch.distributed`
only where there is something to sum.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

if torch.distributed.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup  # noqa: PLC0414  # exported
else:  # constructors name it in their signature
    ProcessGroup = Any  # type: ignore[assignment, misc]

from fusedreg.scalars import wide_dtype

Mesh: TypeAlias = Any
"""A torch.distributed.DeviceMesh, which not every build of torch has; None for no mesh."""
Where: TypeAlias = tuple[Mesh, tuple[Any, ...]]
"""The mesh and the placements of a DTensor."""


class Sharding(NamedTuple):
    """How the elements of a parameter are sharded over ranks; in other dimensions are copies."""

    mesh: Mesh
    """torch.distributed.DeviceMesh"""
    dims: tuple[int, ...]
    """Dimensions of the mesh along which each rank has another part."""


FLATTENED = Sharding(None, ())
"""A part that FullyShardedDataParallel made; over which ranks, only the caller can say."""


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; any other tensor itself. Call it without grad mode."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(value: Tensor) -> Tensor:
    """A reduction over a DTensor as the plain tensor that all its ranks agree on."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def where_of(tensor: object) -> Where | None:
    """Mesh and placements of a DTensor, which say what part is where; None for other tensors."""
    placements = getattr(tensor, "placements", None)
    return None if placements is None else (mesh_of(tensor), placements)


def mesh_of(tensor: object) -> Mesh:
    """The mesh of a DTensor; None for other tensors."""
    return getattr(tensor, "device_mesh", None)


def is_sharded_alike(param: Tensor, other: Tensor) -> bool:
    """Whether the parts of two tensors that are here belong together, element by element."""
    return bool(where_of(param) == where_of(other))


def sharded_as(param: Any, other: Any) -> Tensor:
    """A tensor with the placements of `param`, so that their parts belong together."""
    alike: Tensor = other
    if not is_sharded_alike(param, other):
        if mesh_of(param) != mesh_of(other):
            raise RuntimeError(
                "got mixed torch.Tensor and DTensor, or DTensors of different meshes: state on "
                f"{mesh_of(other)} for a parameter on {mesh_of(param)}; distribute both over one"
            )
        alike = other.redistribute(param.device_mesh, param.placements)
    return alike


def sharding_of(param: Tensor) -> Sharding | None:
    """How a parameter is sharded over ranks; None for one that is not, as far as is known."""
    where = where_of(param)
    if where is None:
        return FLATTENED if getattr(param, "_fsdp_flattened", False) else None
    mesh, placements = where
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    return Sharding(mesh, tuple(dims))


# ---- norms over ranks --------------------------------------------------------------------------


def total_norm(norms: Mapping[Sharding | None, Tensor], group: ProcessGroup | None) -> Tensor:
    """The norm over all ranks, from the norms of what each of them has.

    All ranks must call it with the same shardings in the same order. It makes one all-reduce of
    squared norms for each mesh that shards anything, and one for `group`. Only a mesh that shards
    along several dimensions and is not the whole world takes one for each of them.

    Args:
        norms: the norm of all parts here with that sharding, 0-dim; None for plain tensors, which
            every rank has alike, or in parts if there is a `group` and nothing is FLATTENED.
        group: ranks whose parts make a whole, or None.
    """
    meshes: dict[Mesh, dict[Sharding, Tensor]] = {}
    for sharding, norm in norms.items():
        if sharding is not None and sharding is not FLATTENED:
            meshes.setdefault(sharding.mesh, {})[sharding] = norm
    if group is None and norms.keys() == {None}:
        return norms[None]
    squares = _squares(norms[None])
    for mesh, parts in meshes.items():
        squares = squares + _sum_over_mesh(mesh, parts)
    if FLATTENED in norms:
        flattened = _squares(norms[FLATTENED])
        squares = squares + (flattened if group is None else _sum_over(group, flattened))
    elif group is not None:
        squares = _sum_over(group, squares)
    return _root(squares)


def has_parts(sharding: Sharding | None) -> bool:
    """Whether ranks have different parts of a DTensor that is sharded so."""
    return sharding is not None and bool(sharding.dims)


def sum_over_parts(params: Iterable[Tensor], here: Mapping[Tensor, Tensor]) -> None:
    """Sum vectors that belong to DTensors over the ranks that have parts of them, in place.

    It makes one all-reduce for each way to be sharded and dimension of a mesh, over all `params` in
    their order, also where this rank has nothing of them: so all ranks call alike.

    Args:
        params: all of the optimizer, the same on all ranks.
        here: two numbers for each of those that are stepped here.
    """
    shardings: dict[Sharding, list[Tensor]] = {}
    for param in params:
        sharding = sharding_of(param)
        if sharding is not None and sharding.dims:
            shardings.setdefault(sharding, []).append(param)
    for sharding, alike in shardings.items():
        device = alike[0].device
        nothing = torch.zeros(2, dtype=wide_dtype(device), device=device)
        summed = torch.stack([here.get(param, nothing).to(nothing) for param in alike])
        for dim in sharding.dims:
            summed = _sum_over(sharding.mesh.get_group(dim), summed)
        places = [i for i, param in enumerate(alike) if param in here]
        if places:  # one launch for all
            torch._foreach_copy_([here[alike[i]] for i in places], [summed[i] for i in places])


SCALE = {torch.float64: 2.0**530, torch.float32: 2.0**70}


def _squares(norm: Tensor) -> Tensor:
    """The square of a norm, and of a part of it that does not overflow where the norm does."""
    return torch.stack([norm, norm / SCALE[norm.dtype]]).square()


def _root(squares: Tensor) -> Tensor:
    """The norm that sums of `_squares` stand for."""
    plain, scaled = squares.sqrt()
    return torch.where(plain == torch.inf, scaled * SCALE[plain.dtype], plain)


def _sum_over_mesh(mesh: Mesh, norms: Mapping[Sharding, Tensor]) -> Tensor:
    """Sum of squares of all parts in a mesh, each element counted once."""
    if mesh.get_coordinate() is None:
        raise RuntimeError(f"this rank has DTensors of {mesh}, but is no member of it")
    dims = sorted({dim for sharding in norms for dim in sharding.dims})
    squares = torch.stack(
        [
            _squares(norm) / math.prod(mesh.size(dim) for dim in dims if dim not in sharding.dims)
            for sharding, norm in norms.items()
        ]
    ).sum(dim=0)
    if len(dims) == mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        world = torch.distributed.group.WORLD
        assert world is not None
        return _sum_over(world, squares)
    for dim in dims:
        squares = _sum_over(mesh.get_group(dim), squares)
    return squares


def _sum_over(group: ProcessGroup, values: Tensor) -> Tensor:
    """The sum over the ranks of a group, on a device that the group can talk from."""
    devices = [device.type for device in group._device_types]
    summed = values if values.device.type in devices else values.to(devices[0])
    torch.distributed.all_reduce(summed, group=group)
    return summed.to(values.device)


# ---- plain tensors in parts --------------------------------------------------------------------


class Group(NamedTuple):
    """What stands for a process group in an optimizer, because it can be copied and pickled."""

    name: str
    ranks: tuple[int, ...]  # elsewhere another group may have that name


def description_of(group: object) -> Group | None:
    """What stands for a process group; None for None."""
    if group is None:
        return None
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"Invalid process_group value: {group!r} (expected a torch.distributed.ProcessGroup of "
            "which this rank is a member, such as torch.distributed.group.WORLD once there is one)"
        )
    ranks = torch.distributed.get_process_group_ranks(group)
    return Group(str(group.group_name), tuple(ranks))


def group_of(description: Group | None) -> ProcessGroup | None:
    """The process group; raises torch's error where there is none any more."""
    if description is None:
        return None
    found = torch.distributed.distributed_c10d._resolve_process_group(description.name)  # type: ignore[attr-defined, arg-type]  # no public way
    if tuple(torch.distributed.get_process_group_ranks(found)) != description.ranks:
        raise RuntimeError(
            f"the process group {description.name!r} that the optimizer was copied with had ranks "
            f"{description.ranks}, and here has others: assign optimizer.process_group"
        )
    return found


def constructing_splitter() -> str | None:
    """ZeroRedundancyOptimizer, if that constructs the optimizer that calls this, else None.

    It leaves no mark on parameters or optimizer.
    """
    module = "torch.distributed.optim.zero_redundancy_optimizer"
    found = _is_running(module, "ZeroRedundancyOptimizer", "_init_local_optimizer")
    return "ZeroRedundancyOptimizer" if found else None


def checkpoint_creates_state() -> bool:
    """Whether torch.distributed.checkpoint steps an optimizer only to have it create its state.

    It does so with lr 0 and gradients of zeros. Counted, that step would change the bias correction
    of every later one.
    """
    return _is_running("torch.distributed.checkpoint.state_dict", "_init_optim_state")


def checkpoint_reads_keys() -> bool:
    """Whether torch.distributed.checkpoint asks for a state_dict, and will not flatten it.

    A flattened one it reads back by the keys of the present param groups, so it must have them all.
    """

    def is_nested(frame: FrameType) -> bool:
        flatten = getattr(frame.f_locals.get("info"), "flatten_optimizer_state_dict", True)
        return not flatten

    return _is_running(
        "torch.distributed.checkpoint.state_dict", "_get_optim_state_dict", also=is_nested
    )


def _is_running(
    module: str, *names: str, also: Callable[[FrameType], bool] = lambda frame: True
) -> bool:
    """Whether a function is among those that led here; False where nobody has imported it."""
    found: Any = sys.modules.get(module)
    for name in names:
        found = getattr(found, name, None)
    code = None if found is None else getattr(inspect.unwrap(found), "__code__", None)
    frame = None if code is None else sys._getframe(1)
    try:
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        return frame is not None and also(frame)
    finally:
        del frame  # it holds the locals of its function, and the callers' too
