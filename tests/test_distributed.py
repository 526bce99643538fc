"""A distributed step is the step of one process that has all: DDP, FSDP, ZeRO, DTensors.

Each scenario trains a model over four ranks beside one whole copy of it and compares after every
step. The model's gradient is a number that the test chose, so nothing but the optimizer can differ.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fusedreg

from cases import CASES, PATHS, SOME, Case, by_id, parameters, set_grads, tensors
from compare import frozen, parameters_of, refused
from ranks import WORLD, on_every_rank, while_a_rank_dies

with warnings.catch_warnings():
    # The package uses what torch itself calls deprecated.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.optim import _apply_optimizer_in_backward as apply_in_backward

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
SGD, ADAM, ADAMW = SOME


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


# ---- wrappers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", **by_id(SOME))
@wrappers
@on_every_rank
def test_wrapped_model_trains_as_one_process(wrapper: str, case: Case) -> None:
    """With decay, proximal L1, clipping and momentum."""
    train_both(wrapper, case, "reference")


# An interpreted step is slow, so each class meets one way of splitting parameters.
@needs_interpreter
@pytest.mark.parametrize(
    ("wrapper", "case"), [("zero", SGD), ("fsdp2", ADAMW), ("fsdp1", ADAM)], ids=name
)
@on_every_rank
def test_kernels_train_a_wrapped_model_as_one_process(wrapper: str, case: Case) -> None:
    train_both(wrapper, case, "fused")


@pytest.mark.parametrize("wrapper", ["zero", "hsdp"])
@on_every_rank
def test_wrapped_model_trains_alike_where_numbers_are_on_the_device(wrapper: str) -> None:
    """As on an accelerator, where the host does not read the norm; see conftest.path."""
    with ExitStack() as patches:
        for module in (fusedreg.scalars, fusedreg.checks, fusedreg.inventory):
            patches.enter_context(mock.patch.object(module, "on_host", return_value=False))
        train_both(wrapper, ADAMW, "device", skip_nonfinite=True)


def train_both(wrapper: str, case: Case, path: str, **more: Any) -> None:
    model, optimizer = wrapped(wrapper, case, path, max_grad_norm=MAX_NORM, **more)
    assert inner(optimizer).backend == ("triton" if path == "fused" else "reference")
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
@on_every_rank
def test_low_precision_trains_as_one_process(wrapper: str, dtype: torch.dtype) -> None:
    """Rounding alone would show: these numbers are compared to 1e-12."""
    model, optimizer = wrapped(wrapper, ADAMW, dtype=dtype, max_grad_norm=MAX_NORM)
    alone = ADAMW.make(parameters(0, dtype, SHAPES), max_grad_norm=MAX_NORM)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))


@wrappers
@on_every_rank
def test_without_a_norm_no_collective_is_needed_nor_a_group(wrapper: str) -> None:
    model = WRAPPERS[wrapper](Given(parameters(shapes=SHAPES)))
    if wrapper == "zero":
        optimizer = ZeroRedundancyOptimizer(list(model.parameters()), ADAMW.cls, **ADAMW.kwargs)
    else:
        optimizer = ADAMW.make(model.parameters())
    alone = ADAMW.make(parameters(shapes=SHAPES))
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))
    for lr in (0.1, 0.0):  # which is no sign that the step is there to create state
        backward(model, seed=0)
        optimizer.param_groups[0]["lr"] = lr
        with Collectives() as collectives:
            inner(optimizer).step()
        assert not collectives.seen, collectives.seen


@paths
@wrappers
@on_every_rank
def test_a_norm_takes_one_all_reduce(wrapper: str, path: str) -> None:
    model, optimizer = wrapped(wrapper, ADAMW, path, max_grad_norm=MAX_NORM, skip_nonfinite=True)
    for seed in range(2):  # the first creates state
        backward(model, seed)
        with Collectives() as collectives:
            inner(optimizer).step()
        expected = {} if wrapper == "ddp" else {"allreduce": 1}
        assert collectives.seen == expected, collectives.seen


@paths
@wrappers
@on_every_rank
def test_nan_on_one_rank_skips_the_step_on_all(wrapper: str, path: str) -> None:
    model, optimizer = wrapped(wrapper, ADAMW, path, skip_nonfinite=True, max_grad_norm=MAX_NORM)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    for step in range(2):
        backward(model, seed=7, bad=math.nan)
        before = held(inner(optimizer))
        optimizer.step()
        assert step == 0 or held(inner(optimizer)) == before  # the first creates state
        assert inner(optimizer).skipped_steps == step + 1
        assert not inner(optimizer).grad_norm.isfinite()
        follow(optimizer, alone, lambda s: backward(model, s), lambda: wholes(model), [step])


@paths
@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
@on_every_rank
def test_overflow_on_one_rank_skips_the_step_of_a_scaler_on_all(wrapper: str, path: str) -> None:
    """Also where the optimizer takes the scale and what overflowed, as fused=True asks for."""
    model, optimizer = wrapped(wrapper, ADAMW, path)
    alone = ADAMW.make(parameters(shapes=SHAPES))
    make = ShardedGradScaler if wrapper == "fsdp1" else torch.amp.GradScaler
    scaler = make(device="cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # makes the scale, as the loss would
    backward(model, seed=7, bad=math.inf)
    before = wholes(model)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_close(wholes(model), before, rtol=0, atol=0)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model), range(2))


@wrappers
@on_every_rank
def test_warm_up_from_lr_0_counts_the_first_step_on_all_ranks_or_none(wrapper: str) -> None:
    """Also where the gradients of some ranks are all zeros: the bias corrections stay together."""
    model, optimizer = wrapped(wrapper, ADAMW, max_grad_norm=0.1)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=0.1)

    def one_row(seed: int) -> list[Tensor]:
        """Zeros but for the first row, as of an embedding of which one row was used."""
        grads = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
        grads[0][0] = tensors(seed, shapes=[(3,)])[0]
        return grads

    for seed in range(3):
        for each in (optimizer, alone):
            each.param_groups[0]["lr"] = 0.1 * seed
        model.zero_grad()
        model([2 * (dist.get_rank() % 2) * grad for grad in one_row(seed)]).backward()
        for param, grad in zip(parameters_of(alone), one_row(seed), strict=True):
            param.grad = grad
        optimizer.step()
        alone.step()
        assert_close(wholes(model), parameters_of(alone))
    steps = {float(state["step"]) for state in inner(optimizer).state.values()}
    assert steps == {3.0}, steps


# ---- what needs a process group -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("wrapper", NEED_GROUP)
@on_every_rank
def test_a_norm_over_parts_is_refused_without_a_group(
    wrapper: str, options: dict[str, Any]
) -> None:
    """By every rank, also one that has no part of any parameter."""
    model = WRAPPERS[wrapper](Given(parameters(shapes=[(1,)])))
    make: Callable[..., Any] = fusedreg.AdamW
    if wrapper == "zero":
        make = functools.partial(ZeroRedundancyOptimizer, optimizer_class=make)
    with pytest.raises(RuntimeError, match="process_group"):
        make(list(model.parameters()), **options)
    optimizer = make(list(model.parameters()))
    model([torch.ones(1, dtype=torch.float64)]).backward()
    for option, value in options.items():
        setattr(inner(optimizer), option, value)
    with refused(inner(optimizer), RuntimeError, "process_group"):
        optimizer.step()
    inner(optimizer).process_group = dist.group.WORLD
    optimizer.step()
    assert inner(optimizer).grad_norm == 1


@on_every_rank
def test_parameters_may_be_split_after_the_optimizer_was_made() -> None:
    """With use_orig_params the optimizer goes on with parameters that are now views."""
    model = Given(parameters(shapes=SHAPES))
    optimizer = fusedreg.AdamW(model.parameters(), max_grad_norm=MAX_NORM)
    model = WRAPPERS["fsdp1_views"](model)
    backward(model, seed=0)
    with refused(optimizer, RuntimeError, "process_group"):
        optimizer.step()


@paths
@on_every_rank
def test_stages_of_a_pipeline_share_a_norm_in_their_group_only(path: str) -> None:
    """Ranks 0 and 1 train one model, 2 and 3 another; each rank has every other parameter."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, stage = divmod(dist.get_rank(), 2)
    mine, others = (parameters(pair, shapes=SHAPES) for _ in range(2))
    optimizer = ADAMW.make(mine[stage::2], path, process_group=pairs[pair], max_grad_norm=MAX_NORM)
    alone = ADAMW.make(others, max_grad_norm=MAX_NORM)

    def gradients(seed: int) -> None:
        set_grads(mine, seed)

    for seed in range(10 * pair, 10 * pair + STEPS):
        gradients(seed)
        set_grads(others, seed)
        optimizer.step()
        alone.step()
        assert_close([optimizer.grad_norm], [alone.grad_norm], rtol=1e-7)
        assert_close(mine[stage::2], others[stage::2])


def test_process_group_must_be_one() -> None:
    param = nn.Parameter(torch.ones(1))
    optimizer = fusedreg.SGD([param])
    assert optimizer.process_group is None
    for wrong in ("gloo", 0, [0, 1], dist.group):
        with pytest.raises(TypeError, match="process_group"):
            fusedreg.SGD([param], process_group=wrong)
        with refused(optimizer, TypeError, "process_group"):
            optimizer.process_group = wrong


@on_every_rank
def test_process_group_may_change_and_survives_a_copy() -> None:
    (param,) = parameters(shapes=[(1,)])
    optimizer = fusedreg.AdamW([param], max_grad_norm=math.inf, process_group=dist.group.WORLD)
    twin = copy.deepcopy(optimizer)
    assert twin.process_group is optimizer.process_group is dist.group.WORLD
    (copied,) = parameters_of(twin)
    for each, its in ((optimizer, param), (twin, copied)):
        its.grad = torch.ones_like(its)
        each.step()
        assert each.grad_norm == math.sqrt(WORLD)
    optimizer.process_group = None
    optimizer.step()
    assert optimizer.grad_norm == 1


@on_every_rank
def test_group_of_others_is_refused() -> None:
    """A rank gets no group when it is no member of the one that it helps to make."""
    first = dist.new_group([0])
    optimizer = fusedreg.SGD(parameters(shapes=[(1,)]))
    if dist.get_rank():
        with refused(optimizer, TypeError, "member"):
            optimizer.process_group = first


# ---- DTensors -----------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("layout", "path"),
    [(layout, "reference") for layout in LAYOUTS]
    + [
        pytest.param(layout, "fused", marks=needs_interpreter)
        for layout in ("beside_plain", "some_dimensions")
    ],
)
@on_every_rank
def test_dtensors_of_any_layout_train_as_one_process(layout: str, path: str) -> None:
    """And take one all-reduce for each mesh that splits anything."""
    all_reduces, layouts = LAYOUTS[layout]
    params = spread_all(layouts)
    optimizer = ADAMW.make(params, path, max_grad_norm=MAX_NORM)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(
        optimizer,
        alone,
        lambda seed: set_spread_grads(params, layouts, seed),
        lambda: list(map(whole, params)),
    )
    with Collectives() as collectives:
        optimizer.step()
    assert collectives.seen == Counter(allreduce=all_reduces), collectives.seen


@paths
@pytest.mark.parametrize("kind", ["replicated", "split_otherwise", "partial"])
@on_every_rank
def test_gradient_may_be_placed_otherwise_than_its_parameter(kind: str, path: str) -> None:
    """As autograd leaves it where a replicated weight met a split batch."""
    (param,), (twin,) = parameters(shapes=[(8, 4)]), parameters(shapes=[(8, 4)])
    layout = "4:R" if kind == "partial" else "4:0"
    param = nn.Parameter(spread(param.detach(), layout))
    optimizer = ADAMW.make([param], path, max_grad_norm=MAX_NORM)
    alone = ADAMW.make([twin], max_grad_norm=MAX_NORM)

    def gradient(seed: int) -> None:
        (grad,) = tensors(seed, shapes=[(8, 4)])
        if kind == "partial":
            parts = grad * (0.5 * (dist.get_rank() % 2))  # of four ranks two have a half
            param.grad = DTensor.from_local(parts, mesh(WORLD), [Partial()])
        else:
            param.grad = spread(grad, "4:R" if kind == "replicated" else "4:1")

    follow(optimizer, alone, gradient, lambda: [whole(param)])


class Parallel(nn.Module):
    """A block whose first layer is split by columns and whose last by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.first = nn.Linear(6, 10, dtype=torch.float64)
        self.last = nn.Linear(10, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(torch.tanh(self.first(self.norm(x)))))


@pytest.mark.parametrize("data_parallel", [False, True])
@on_every_rank
def test_tensor_parallel_model_trains_as_one_process(data_parallel: bool) -> None:
    """On 2 x 2 ranks, alone and with FSDP2; biases and norm are replicated or not split at all."""
    model, twin = Parallel(), Parallel()
    twin.load_state_dict(model.state_dict())
    plan = {"first": ColwiseParallel(), "last": RowwiseParallel()}
    parallelize_module(model, mesh(2, 2)["columns"], plan)
    if data_parallel:
        fully_shard(model, mesh=mesh(2, 2)["rows"])
    optimizer = ADAMW.make(model.parameters(), lr=0.01, max_grad_norm=0.5)
    alone = ADAMW.make(twin.parameters(), lr=0.01, max_grad_norm=0.5)
    for seed in range(STEPS):
        (x,) = tensors(seed, shapes=[(8, 6)])
        row = mesh(2, 2).get_local_rank("rows")
        part = x.chunk(2)[row] if data_parallel else x
        for each, its, batch in ((model, optimizer, part), (twin, alone, x)):
            its.zero_grad()
            each(batch).square().mean().mul(100).backward()
            its.step()
        assert alone.grad_norm > alone.max_grad_norm
        # The products are summed in other orders, and Adam divides small gradients by their size.
        assert_close([optimizer.grad_norm], [alone.grad_norm], rtol=1e-7)
        assert_close(map(whole, model.parameters()), twin.parameters(), rtol=1e-9, atol=1e-9)


@on_every_rank
def test_clipping_is_right_where_the_square_of_a_norm_is_no_double() -> None:
    """The sum over ranks does not lose what the norm of each keeps."""
    (param,), (twin,) = parameters(shapes=[(8, 3)]), parameters(shapes=[(8, 3)])
    param = nn.Parameter(spread(param.detach(), "4:0"))
    options = {"lr": 1e-200, "max_grad_norm": 1e200, "skip_nonfinite": True}
    for seed in range(2):
        grad = tensors(seed, shapes=[(8, 3)])[0] * 1e200
        for each, its in ((param, spread(grad, "4:0")), (twin, grad)):
            each.grad = its
            fusedreg.SGD([each], **options).step()
        assert_close([whole(param)], [twin])


@on_every_rank
def test_stages_of_a_pipeline_that_are_sharded_share_a_norm() -> None:
    """A row of the mesh splits the parameters of a stage, a column has all stages."""
    stage, layouts = mesh(2, 2).get_local_rank("rows"), ["c:0"] * len(SHAPES)
    params = spread_all(layouts)
    options = {"process_group": mesh(2, 2).get_group("rows"), "max_grad_norm": MAX_NORM}
    optimizer = ADAMW.make(params[stage::2], **options)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    for seed in range(STEPS):
        set_spread_grads(params, layouts, seed)
        set_grads(parameters_of(alone), seed)
        optimizer.step()
        alone.step()
        assert_close([optimizer.grad_norm], [alone.grad_norm], rtol=1e-7)
        assert_close(map(whole, params[stage::2]), parameters_of(alone)[stage::2])


@on_every_rank
def test_stages_of_a_pipeline_may_have_other_learning_rates() -> None:
    rank = dist.get_rank()
    (param,) = parameters(shapes=[(3,)])
    options = {"lr": 0.1 * (rank % 2), "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = fusedreg.SGD([param], process_group=dist.group.WORLD, **options)
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert_close([optimizer.grad_norm], [torch.tensor(3.0 * WORLD).sqrt()], rtol=1e-7)
    assert optimizer.skipped_steps == 0


@on_every_rank
def test_frozen_stage_of_a_pipeline_is_saved_after_a_step() -> None:
    model = nn.Linear(2, 1).requires_grad_(dist.get_rank() > 0)
    optimizer = fusedreg.AdamW(model.parameters(), process_group=dist.group.WORLD)
    if dist.get_rank() > 0:
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with Collectives() as collectives:
        get_optimizer_state_dict(model, optimizer)
    assert "allreduce" not in collectives.seen


@on_every_rank
def test_what_fsdp1_leaves_whole_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    cpu = torch.device("cpu")
    model = FullyShardedDataParallel(model, device_id=cpu, ignored_modules=[model[1]])
    options = {"process_group": dist.group.WORLD, "max_grad_norm": math.inf}
    optimizer = fusedreg.SGD(model.parameters(), lr=0.0, **options)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    expected = model.clip_grad_norm_(1e9)
    # FSDP sums squares of float32 norms in float32: three roundings, of 6e-8 each, and a root.
    assert_close([optimizer.grad_norm], [expected], rtol=2e-7)


@on_every_rank
def test_rank_outside_the_mesh_of_a_parameter_is_told() -> None:
    pair = DeviceMesh("cpu", [0, 1])
    param = nn.Parameter(distribute_tensor(torch.ones(4), pair, [Shard(0)]))
    param.grad = torch.ones_like(param)
    optimizer = fusedreg.SGD([param], max_grad_norm=1.0)
    if dist.get_rank() < 2:
        optimizer.step()
        assert optimizer.grad_norm == 2
    else:
        with pytest.raises(RuntimeError, match="of which it is no member"):
            optimizer.step()


@on_every_rank
def test_gradient_and_state_of_another_mesh_are_refused() -> None:
    rows, columns = (mesh(2, 2)[name] for name in ("rows", "columns"))
    value = tensors(0, shapes=[(4, 2)])[0]
    one, other = (
        nn.Parameter(distribute_tensor(value, each, [Shard(0)], src_data_rank=None))
        for each in (rows, columns)
    )
    plain = nn.Parameter(value.clone())
    optimizers = [fusedreg.SGD([param], momentum=0.9) for param in (one, other, plain)]
    one.grad = one.detach().clone()
    optimizers[0].step()
    for optimizer in optimizers[1:]:
        with pytest.raises(ValueError, match=r"'momentum_buffer' on .* for parameter 0"):
            optimizer.load_state_dict(optimizers[0].state_dict())
    other.grad = one.detach().clone()
    before = held(optimizers[1])
    with pytest.raises(RuntimeError, match="DTensors of different meshes"):
        optimizers[1].step()
    assert held(optimizers[1]) == before


@paths
@on_every_rank
def test_state_placed_otherwise_than_its_parameter_is_moved(path: str) -> None:
    value = tensors(0, shapes=[(4, 4)])[0]
    param = nn.Parameter(distribute_tensor(value, mesh(2, 2), [Shard(0), Shard(1)]))
    twin = nn.Parameter(value.clone())
    optimizer, alone = (
        fusedreg.SGD([each], lr=0.1, momentum=0.9, **PATHS[path]) for each in (param, twin)
    )
    for _ in range(3):
        param.grad, twin.grad = param.detach().clone(), twin.detach().clone()
        optimizer.step()
        alone.step()
        assert_close([whole(param)], [twin])
        state = optimizer.state[param]
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(
            placements=[Shard(1), Shard(0)]
        )


@on_every_rank
def test_gradient_and_parameter_are_both_dtensors_or_none_is() -> None:
    (plain,), (other,) = parameters(shapes=[(8, 3)]), parameters(shapes=[(8, 3)])
    param = nn.Parameter(spread(other.detach(), "4:0"))
    plain.grad, other.grad = torch.ones_like(plain), torch.ones_like(other)
    # As a parameter that was moved keeps an old gradient: `.grad` itself would refuse it.
    with mock.patch.object(DTensor, "grad", other.grad, create=True):
        optimizer = fusedreg.SGD([plain, param], max_grad_norm=1.0)
        before = held(optimizer)
        with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
            optimizer.step()
    assert held(optimizer) == before


@paths
@pytest.mark.parametrize("who", ["rank 2", "all"])
@pytest.mark.parametrize("kind", ["dtensors", "group"])
@on_every_rank
def test_rank_without_any_gradient_joins_in(kind: str, who: str, path: str) -> None:
    """Else the others would wait for ever."""
    case = next(case for case in CASES if case.id == "sgd_momentum-none")
    rank, idle = dist.get_rank(), who == "all" or dist.get_rank() == 2
    (start, *_), (grad, *_) = (tensors(seed, shapes=[(8, 3)]) for seed in range(2))
    part = grad.chunk(WORLD)[rank]
    more: dict[str, Any] = {}
    if kind == "group":
        params = [nn.Parameter(start.chunk(WORLD)[rank].clone())]
        more["process_group"] = dist.group.WORLD
    else:  # of which the second has never a gradient, and is on a mesh of its own
        params = [nn.Parameter(spread(start, layout)) for layout in ("4:0", "22:R0")]
        part = spread(grad, "4:0")
    optimizer = case.make(params, path, max_grad_norm=MAX_NORM, **more)
    twin = nn.Parameter(start.clone())
    alone = case.make([twin], max_grad_norm=MAX_NORM)
    twin.grad = grad.clone()
    twin.grad.chunk(WORLD)[2].zero_()  # without decay, no gradient is a gradient of zeros
    if who == "all":
        twin.grad.zero_()
    for _ in range(STEPS):
        params[0].grad = None if idle else part
        optimizer.step()
        alone.step()
        assert_close([optimizer.grad_norm], [alone.grad_norm], rtol=1e-7)
        assert_close([local(params[0])], [twin.chunk(WORLD)[rank]])


@on_every_rank
def test_ranks_agree_on_what_the_first_step_is_after_loading() -> None:
    """A scheduler may start again from lr 0, and a rank without a part has no state to load."""
    has_part = dist.get_rank() % 2
    params = [nn.Parameter(torch.ones(has_part))]
    optimizer = fusedreg.AdamW(params, max_grad_norm=1.0, process_group=dist.group.WORLD)
    old = fusedreg.AdamW(params)
    params[0].grad = torch.ones(1) if has_part else None
    old.step()
    optimizer.load_state_dict(old.state_dict())
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * step
        optimizer.step()
        assert_close([optimizer.grad_norm], [torch.tensor(math.sqrt(2))], rtol=1e-7)


# ---- a group that died --------------------------------------------------------------------------


def assert_fails_and_changes_nothing(optimizer: Any) -> None:
    before = held(optimizer)
    with pytest.raises(RuntimeError, match=r"Timed out|Connection|Read error|not resolve"):
        optimizer.step()
    assert held(optimizer) == before, "a failed step changed something"


@paths
@on_every_rank
def test_step_that_waits_in_vain_changes_nothing(path: str) -> None:
    group = dist.new_group()
    params = parameters(shapes=SHAPES)
    optimizer = ADAMW.make(params, path, max_grad_norm=MAX_NORM, process_group=group)
    set_grads(params, 0)
    optimizer.step()
    _set_pg_timeout(timedelta(seconds=0.1), group)  # from now on
    if dist.get_rank() != WORLD - 1:
        set_grads(params, 1)
        assert_fails_and_changes_nothing(optimizer)
    dist.destroy_process_group(group)
    assert_fails_and_changes_nothing(optimizer)
    optimizer.process_group = None
    optimizer.step()
    dist.barrier()


@while_a_rank_dies
def test_step_whose_peer_died_changes_nothing() -> None:
    """The last rank dies, and the one before it shares a mesh with it."""
    layouts = ["c:0"] * len(SHAPES)
    params = spread_all(layouts)
    optimizer = ADAMW.make(params, max_grad_norm=MAX_NORM)
    set_spread_grads(params, layouts, 0)
    optimizer.step()
    if dist.get_rank() == WORLD - 1:
        os._exit(0)
    if dist.get_rank() == WORLD - 2:
        assert_fails_and_changes_nothing(optimizer)


# ---- torch.distributed.checkpoint ---------------------------------------------------------------

FULL = {"full_state_dict": True}
OPTIONS: dict[str, dict[str, bool]] = {
    "sharded": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": FULL,
    "full_from_rank0": {**FULL, "cpu_offload": True, "broadcast_from_rank0": True},
}


def transfer(source: tuple[nn.Module, Any], target: tuple[nn.Module, Any], how: str) -> None:
    """Optimizer state by torch.distributed.checkpoint."""
    options = OPTIONS[how]
    saving = {option: on for option, on in options.items() if option != "broadcast_from_rank0"}
    state = get_optimizer_state_dict(*source, options=StateDictOptions(**saving))
    if "broadcast_from_rank0" in options and dist.get_rank():
        state = {}
    set_optimizer_state_dict(*target, state, options=StateDictOptions(**options))


@pytest.mark.parametrize(
    ("wrapper", "case", "how"),
    [
        *(("fsdp2", ADAMW, how) for how in OPTIONS),
        ("fsdp2", SGD, "full"),
        ("hsdp", ADAM, "sharded"),
        ("fsdp1", ADAM, "full"),
        ("fsdp1_views", SGD, "full"),
    ],
    ids=name,
)
@on_every_rank
def test_training_goes_on_from_a_distributed_checkpoint(wrapper: str, case: Case, how: str) -> None:
    first = wrapped(wrapper, case, max_grad_norm=MAX_NORM)
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(first[1], alone, lambda seed: backward(first[0], seed), lambda: wholes(first[0]))
    second = wrapped(wrapper, case, max_grad_norm=MAX_NORM, lr=1e-9)
    with torch.no_grad():
        for param, old in zip(second[0].parameters(), first[0].parameters(), strict=True):
            param.copy_(old)
    transfer(first, second, how)
    seeds = range(STEPS, 2 * STEPS)
    follow(second[1], alone, lambda s: backward(second[0], s), lambda: wholes(second[0]), seeds)


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [*(("fsdp2", case) for case in SOME), ("ddp", SGD), ("fsdp1", ADAMW), ("fsdp1_views", SGD)],
    ids=name,
)
@on_every_rank
def test_checkpoint_before_training_changes_no_training(wrapper: str, case: Case) -> None:
    """Asking for the state takes a step with lr 0, which is to count for nothing."""
    model, optimizer = wrapped(wrapper, case, max_grad_norm=MAX_NORM)
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    before = wholes(model)
    get_optimizer_state_dict(model, optimizer)
    assert_close(wholes(model), before, rtol=0, atol=0)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))


@pytest.mark.parametrize("how", ["full", "full_from_rank0"])
@on_every_rank
def test_distributed_checkpoint_of_torch_adamw_goes_on_here(how: str) -> None:
    case = next(case for case in CASES if case.id == "adamw-decay")
    first = wrapped("fsdp2", case)
    theirs = first[0], torch.optim.AdamW(first[0].parameters(), **case.torch_kwargs)
    alone = case.make(parameters(shapes=SHAPES))
    for seed in range(STEPS):
        backward(theirs[0], seed)
        theirs[1].step()
        set_grads(parameters_of(alone), seed)
        alone.step()
    theirs[0].zero_grad()  # torch asks for no state where there are gradients
    second = theirs[0], case.make(theirs[0].parameters(), lr=1e-9)
    transfer(theirs, second, how)
    seeds = range(STEPS, 2 * STEPS)
    follow(second[1], alone, lambda s: backward(second[0], s), lambda: wholes(second[0]), seeds)


@on_every_rank
def test_consolidated_state_of_zero_redundancy_loads_in_one_process() -> None:
    model, optimizer = wrapped("zero", ADAMW, max_grad_norm=MAX_NORM)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)
    follow(optimizer, alone, lambda seed: backward(model, seed), lambda: wholes(model))
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        one = ADAMW.make(wholes(model), lr=1e-9, max_grad_norm=MAX_NORM)
        one.load_state_dict(optimizer.state_dict())
        for each in (one, alone):
            set_grads(parameters_of(each), STEPS)
            each.step()
        assert_close(parameters_of(one), parameters_of(alone))
    dist.barrier()


# ---- one process, which coverage sees -----------------------------------------------------------


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as ranks.py
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@paths
@pytest.mark.usefixtures("world_of_one")
def test_one_rank_trains_as_without_ranks(path: str) -> None:
    """As where a script for many ranks runs on one; gradients are placed otherwise than weights."""
    devices = init_device_mesh("cpu", (1, 1))
    params: list[Any] = parameters(shapes=SHAPES)
    params[::2] = [nn.Parameter(distribute_tensor(p, devices, [Shard(0)] * 2)) for p in params[::2]]
    options = {"max_grad_norm": MAX_NORM, "process_group": dist.group.WORLD}
    optimizer = ADAMW.make(params, path, **options)
    alone = ADAMW.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)

    def gradients(seed: int) -> None:
        for param, grad in zip(params, tensors(seed, shapes=SHAPES), strict=True):
            is_spread = isinstance(param, DTensor)
            placed = [Shard(0), Replicate()]
            param.grad = distribute_tensor(grad, devices, placed) if is_spread else grad

    follow(optimizer, alone, gradients, lambda: list(map(whole, params)), range(2))


@pytest.mark.usefixtures("world_of_one")
def test_zero_redundancy_is_told_how_to_name_the_group() -> None:
    """The remedy of the error is followed to the letter."""
    params = parameters(shapes=SHAPES)
    with pytest.raises(RuntimeError, match=r"optimizer_class=functools.partial"):
        ZeroRedundancyOptimizer(params, fusedreg.AdamW, max_grad_norm=1.0)
    partial = functools.partial(fusedreg.AdamW, process_group=dist.group.WORLD)
    ZeroRedundancyOptimizer(params, optimizer_class=partial, lr=0.1, max_grad_norm=1.0)


# ---- a step inside a backward pass --------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "path"),
    [
        (SGD, "reference"),
        (ADAM, "reference"),
        pytest.param(ADAMW, "fused", marks=needs_interpreter),
    ],
)
def test_optimizer_in_backward_equals_plain_training(case: Case, path: str) -> None:
    model, twin = (Given(parameters(shapes=SHAPES)) for _ in range(2))
    apply_in_backward(case.cls, model.parameters(), {**case.kwargs, **PATHS[path]})
    optimizer = case.make(twin.parameters(), path)
    for seed in range(STEPS):
        model(tensors(seed, shapes=SHAPES)).backward()
        optimizer.zero_grad()
        twin(tensors(seed, shapes=SHAPES)).backward()
        optimizer.step()
        assert_close(model.parameters(), twin.parameters(), rtol=0, atol=0)


@paths
@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 1.0}, {"max_grad_norm": math.inf}, {"skip_nonfinite": True}],
    ids=str,
)
def test_norm_inside_backward_is_refused(options: dict[str, Any], path: str) -> None:
    """There it would be that of one parameter, before the others have their gradient."""
    model = Given(parameters(shapes=SHAPES))
    before = [param.detach().clone() for param in model.parameters()]
    apply_in_backward(fusedreg.AdamW, model.parameters(), {**PATHS[path], **options})
    with pytest.raises(RuntimeError, match="backward"):
        model(tensors(0, shapes=SHAPES)).backward()
    assert_close(model.parameters(), before, rtol=0, atol=0)


@paths
def test_step_after_backward_with_a_norm_is_none_inside_it(path: str) -> None:
    """What is refused is a step in a hook, not one in a closure that runs a backward pass."""
    (param,) = parameters(shapes=[(3,)])
    optimizer = fusedreg.AdamW([param], max_grad_norm=1.0, **PATHS[path])

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert optimizer.grad_norm > 0


@pytest.mark.usefixtures("world_of_one")
def test_copied_group_that_is_another_here_is_refused() -> None:
    """A name stands for it, and every program numbers its groups anew."""
    param = nn.Parameter(torch.ones(2))
    options = {"max_grad_norm": 1.0, "process_group": dist.group.WORLD}
    optimizer = copy.deepcopy(fusedreg.SGD([param], **options))
    assert optimizer.process_group is dist.group.WORLD
    optimizer._own.process_group = optimizer._own.process_group._replace(ranks=(0, 1))
    with pytest.raises(RuntimeError, match=r"assign optimizer\.process_group"):
        _ = optimizer.process_group


def test_sum_is_formed_where_the_group_can_talk() -> None:
    """A rank without parameters has its norm on the CPU, and NCCL talks from GPUs."""
    group = mock.Mock(_device_types=[torch.device("meta")])
    talk = mock.patch.object(dist, "all_reduce", side_effect=InterruptedError)
    with talk as all_reduce, pytest.raises(InterruptedError):
        fusedreg.dist.total_norm({None: torch.ones(())}, group)
    assert all_reduce.call_args.args[0].device.type == "meta"


@pytest.mark.usefixtures("world_of_one")
def test_optimizer_that_a_zero_redundancy_subclass_makes_for_itself_is_no_part() -> None:
    class Own(ZeroRedundancyOptimizer):
        def another(self) -> Any:
            return fusedreg.SGD([nn.Parameter(torch.ones(1))], max_grad_norm=1.0)

    Own([nn.Parameter(torch.ones(1))], fusedreg.SGD, lr=0.1).another()


def test_refused_group_leaves_no_trace() -> None:
    param, part = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    part._fsdp_flattened = True
    optimizer = fusedreg.SGD([param], lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.add_param_group({"params": [part], "lr": -1.0})
    param.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(math.sqrt(2))
