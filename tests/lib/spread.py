"""A model and tensors spread over ranks, and the whole copy beside which they are trained.

Each scenario trains a model over four ranks beside one whole copy of it and compares after every
step. The model's gradient is a number that the test chose, so nothing but the optimizer can differ.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fusedreg

from cases import CASES, PATHS, SOME, Case, parameters, set_grads, tensors
from compare import frozen, parameters_of
from ranks import WORLD

with warnings.catch_warnings():
    # The package uses what torch itself calls deprecated. Tests take its names from here.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_in_backward  # noqa: F401  # for test_one_rank


STEPS = 5
MAX_NORM = 2.0  # of gradients whose norm is about 9
# Over four ranks: even, uneven with an empty shard, one row for one rank, uneven, and two for four.
SHAPES = [(8, 3), (5, 3), (1, 7), (6,), (2, 3, 5)]
# Only the order of the norm's float64 sum differs, 1e-16 each step; all else is elementwise.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

needs_interpreter = pytest.mark.skipif(
    not fusedreg.backend.interpreted(), reason="kernels step CPU parameters only where interpreted"
)
paths = pytest.mark.parametrize(
    "path", ["reference", pytest.param("fused", marks=needs_interpreter)]
)
BY_ID = {case.id: case for case in CASES}
SGD, ADAM, ADAMW, LAMB = (
    BY_ID[f"{rule}-elastic_net"] for rule in ("sgd_nesterov", "adam_amsgrad", "adamw", "lamb")
)
OTHERS = [case for case in SOME if case.cls not in {c.cls for c in (SGD, ADAM, ADAMW, LAMB)}]
"""One case of each further class, which has nothing to do with ranks but its states."""


def name(value: Any) -> str | None:
    """What stands for a case in the name of a test."""
    return getattr(value, "id", None)


# ---- a model, spread over the ranks and whole ---------------------------------------------------


class Given(nn.Module):
    """A model whose gradients are its input."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, grads: Iterable[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.params, grads, strict=True))


@functools.cache
def mesh(*sizes: int) -> DeviceMesh:
    """All ranks in rows and columns."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("rows", "columns")[-len(sizes) :])


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "zero": DistributedDataParallel,
    "fsdp2": lambda model: fully_shard(model, mesh=mesh(WORLD)),
    "hsdp": lambda model: fully_shard(model, mesh=mesh(2, 2)),
    "fsdp1": functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu")),
    "fsdp1_views": functools.partial(
        FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True
    ),
}
NEED_GROUP = ("zero", "fsdp1", "fsdp1_views")
wrappers = pytest.mark.parametrize("wrapper", list(WRAPPERS))


def wrapped(
    wrapper: str,
    case: Case,
    path: str = "reference",
    dtype: torch.dtype = torch.float64,
    **more: Any,
) -> tuple[nn.Module, Any]:
    """A model with its optimizer, distributed by `wrapper`."""
    model = WRAPPERS[wrapper](Given(parameters(0, dtype, SHAPES)))
    params = list(model.parameters())
    if wrapper == "zero":
        options = {**case.kwargs, **PATHS[path], **more}
        return model, ZeroRedundancyOptimizer(params, with_group(case.cls), **options)
    if wrapper in NEED_GROUP:
        more["process_group"] = dist.group.WORLD
    return model, case.make(params, path, **more)


def with_group(cls: type) -> Callable[..., Any]:
    """For ZeroRedundancyOptimizer, which has a keyword `process_group` of its own."""
    return functools.partial(cls, process_group=dist.group.WORLD)


def backward(model: nn.Module, seed: int, bad: float | None = None) -> None:
    """Gradients of a seed, as the mean of what the ranks have: zeros or the double.

    Where `bad` is given, one rank has it in one place.
    """
    dtype = next(model.parameters()).dtype
    grads = [2 * (dist.get_rank() % 2) * grad for grad in tensors(seed, dtype, SHAPES)]
    if bad is not None and dist.get_rank() == 1:
        grads[0][-1, -1] = bad
    model.zero_grad()
    model(grads).backward()


def wholes(model: nn.Module) -> list[Tensor]:
    """The parameters, put together again."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return [param.detach().clone() for param in model.module.params]
    return list(map(whole, model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(optimizer: Any) -> list[Any]:
    """Every bit that this rank has of parameters and state."""
    return [
        frozen([local(value.detach()) for value in (param, *optimizer.state[param].values())])
        for param in parameters_of(optimizer)
    ]


def inner(optimizer: Any) -> Any:
    """What ZeroRedundancyOptimizer steps this rank's share with; else the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


def follow(
    optimizer: Any,
    alone: Any,
    backward: Callable[[int], None],
    wholes: Callable[[], list[Tensor]],
    seeds: Iterable[int] = range(STEPS),
) -> None:
    """Step both with the gradients of each seed: every norm and parameter is the same."""
    for seed in seeds:
        backward(seed)
        set_grads(parameters_of(alone), seed)
        optimizer.step()
        alone.step()
        if alone.max_grad_norm is None:
            assert inner(optimizer).grad_norm is None
        else:
            assert alone.grad_norm > alone.max_grad_norm  # or there were nothing to show
            assert_close([inner(optimizer).grad_norm], [alone.grad_norm], rtol=1e-7)  # of float32
        assert_close(wholes(), parameters_of(alone))


def assert_close(actual: Iterable[Tensor], expected: Iterable[Tensor], **tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach(), **{**CLOSE, **tolerance})


class Collectives(TorchDispatchMode):
    """Counts the collective operations in its block by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if types and any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # come back for what the DTensor makes of it
        space, _, operation = func.name().partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in operation:
            self.seen[operation.replace("_", "").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


# ---- DTensors of any layout ---------------------------------------------------------------------

# For each shape the mesh and the placements of parameter and gradient, "" for a plain tensor. Each
# letter is one dimension of the mesh: replicated, summed up, or the dimension that is split.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "beside_plain": (1, ["4:0", "", "4:1", "", "4:2"]),
    "plain_first": (1, ["", "4:0", "4:0", "", "4:0"]),
    "replicated": (0, ["4:R", "22:RR", "4:R", "", "22:RR"]),
    "both_dimensions": (1, ["22:01", "22:10", "22:01", "22:00", "22:21"]),
    "some_dimensions": (1, ["22:0R", "22:R1", "22:01", "22:RR", "22:R0"]),
    "one_dimension": (1, ["22:R0", "22:R1", "22:R0", "22:RR", "22:R2"]),
    "two_meshes": (2, ["4:0", "22:R0", "4:1", "", "22:R1"]),
    "rows_and_columns": (2, ["r:0", "c:0", "r:1", "c:0", "c:1"]),
    "rows_and_all": (2, ["r:0", "22:01", "r:R", "", "22:10"]),
    "only_one_row": (1, ["", "", "4:0", "", ""]),
}


def spread(tensor: Tensor, layout: str) -> Tensor:
    """A tensor that every rank has whole, as one of `layout`."""
    where, _, letters = layout.partition(":")
    if not where:
        return tensor.clone()
    meshes = {
        "4": lambda: mesh(WORLD),
        "22": lambda: mesh(2, 2),
        "r": lambda: mesh(2, 2)["rows"],
        "c": lambda: mesh(2, 2)["columns"],
    }
    placements = [placement(letter) for letter in letters]
    return distribute_tensor(tensor.clone(), meshes[where](), placements, src_data_rank=None)


def placement(letter: str) -> Placement:
    return Replicate() if letter == "R" else Shard(int(letter))


def spread_all(layouts: list[str]) -> list[nn.Parameter]:
    return [
        nn.Parameter(spread(param.detach(), layout))
        for param, layout in zip(parameters(shapes=SHAPES), layouts, strict=True)
    ]


def set_spread_grads(params: list[nn.Parameter], layouts: list[str], seed: int) -> None:
    for param, grad, layout in zip(params, tensors(seed, shapes=SHAPES), layouts, strict=True):
        param.grad = spread(grad, layout)
