"""Parameters that are DTensors of any layout and mesh are stepped as whole tensors are."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fusedreg

from cases import CASES, PATHS, Case, parameters, set_grads, tensors
from compare import frozen, parameters_of
from ranks import WORLD, on_every_rank
from spread import (
    ADAMW,
    LAMB,
    LAYOUTS,
    MAX_NORM,
    OTHERS,
    SHAPES,
    STEPS,
    Collectives,
    assert_close,
    follow,
    held,
    local,
    mesh,
    name,
    needs_interpreter,
    paths,
    set_spread_grads,
    spread,
    spread_all,
    whole,
)


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


def sums(params: list[nn.Parameter]) -> int:
    """All-reduces of a layerwise step: one for each dimension of each way to be spread."""
    spreads = set(map(fusedreg.dist.sharding_of, params))
    return sum(len(spread.dims) for spread in spreads if spread is not None)


def assert_all_ranks_have(params: list[nn.Parameter]) -> None:
    """The same bits."""
    mine = frozen(list(map(whole, params)))
    others: list[Any] = [None] * WORLD
    dist.all_gather_object(others, mine)
    assert all(other == mine for other in others)


@pytest.mark.parametrize(
    ("layout", "path"),
    [
        *((layout, "default") for layout in LAYOUTS),
        ("two_meshes", "reference"),
        pytest.param("some_dimensions", "fused", marks=needs_interpreter),
    ],
)
@on_every_rank
def test_norms_of_tensors_are_those_of_whole_tensors(layout: str, path: str) -> None:
    """And take one all-reduce for each dimension of each way to be spread.

    The sums differ in their order: 1e-16, of which the trust ratio hands on a half.
    """
    all_reduces, layouts = LAYOUTS[layout]
    params, twins = spread_all(layouts), parameters(shapes=SHAPES)
    optimizer, alone = (
        LAMB.make(
            [{"params": each[:2], "lr": 0.05}, {"params": each[2:]}], how, max_grad_norm=MAX_NORM
        )
        for each, how in ((params, path), (twins, "reference"))
    )

    def gradients(seed: int) -> None:
        set_spread_grads(params, layouts, seed)

    follow(optimizer, alone, gradients, lambda: list(map(whole, params)))
    assert_all_ranks_have(params)
    with Collectives() as collectives:
        optimizer.step()
    expected = all_reduces + sums(params)
    assert collectives.seen == Counter(allreduce=expected), collectives.seen


@on_every_rank
def test_norms_of_tensors_agree_where_ranks_take_different_paths() -> None:
    _, layouts = LAYOUTS["some_dimensions"]
    params, twins = spread_all(layouts), parameters(shapes=SHAPES)
    optimizer = LAMB.make(params, "reference" if dist.get_rank() == 1 else "default")
    alone = LAMB.make(twins)

    def gradients(seed: int) -> None:
        set_spread_grads(params, layouts, seed)

    follow(optimizer, alone, gradients, lambda: list(map(whole, params)))


@on_every_rank
def test_a_rank_without_gradients_keeps_no_other_waiting() -> None:
    """What is there of a tensor decides its norms, and where there is no gradient nothing moves."""
    _, layouts = LAYOUTS["some_dimensions"]
    params = spread_all(layouts)
    optimizer = LAMB.make(params, "default")
    for step, without in enumerate(({0, 1, 2, 3, 4}, {0, 3}, set(), {1, 2})):
        set_spread_grads(params, layouts, step)
        before = frozen([param.to_local() for param in params if hasattr(param, "to_local")])
        if dist.get_rank() == 1:
            for index in without:
                params[index].grad = None
        optimizer.step()
        after = frozen([param.to_local() for param in params if hasattr(param, "to_local")])
        stays = dist.get_rank() == 1 and len(without) == len(params)
        assert (after == before) == stays


@on_every_rank
def test_norms_of_tensors_on_two_paths_and_of_some_that_come_and_go() -> None:
    """Complex parameters and those of a group with fused=False are the reference's."""
    layouts = ["4:0", "22:01", "", "4:R", "4:2"]

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        numbers = [nn.Parameter(p.detach().to(torch.complex128)) for p in params[:3]]
        plain = {"params": numbers, "l1": 0.0}  # of a complex number there is no L1
        return [{"params": params[:3]}, {"params": params[3:], "fused": False}, plain]

    optimizer = LAMB.make(groups(spread_all(layouts)), "default")
    alone = LAMB.make(groups(parameters(shapes=SHAPES)))
    assert optimizer.backend == "llvm and reference"
    pairs = list(zip(parameters_of(optimizer), parameters_of(alone), strict=True))
    for step, idle in enumerate([{0, 4, 6}, set(), {1, 3}, set(range(8)), {0, 4, 6}]):
        set_grads(parameters_of(alone), step)
        for index, (param, twin) in enumerate(pairs):
            layout = (layouts + layouts[:3])[index]
            param.grad = None if index in idle else spread(twin.grad, layout)
            twin.grad = None if index in idle else twin.grad
        optimizer.step()
        alone.step()
        assert_close([whole(param) for param, _ in pairs], [twin for _, twin in pairs])
    assert_all_ranks_have(parameters_of(optimizer))


@pytest.mark.parametrize("case", OTHERS, ids=name)
@on_every_rank
def test_states_of_every_class_are_placed_as_their_parameter(case: Case) -> None:
    _, layouts = LAYOUTS["some_dimensions"]
    params, twins = spread_all(layouts), parameters(shapes=SHAPES)
    optimizer, alone = case.make(params, "default"), case.make(twins)
    follow(
        optimizer,
        alone,
        lambda seed: set_spread_grads(params, layouts, seed),
        lambda: list(map(whole, params)),
    )
    for param, twin in zip(params, twins, strict=True):
        for kind in optimizer.tensor_states:
            state = optimizer.state[param][kind]
            assert (state.device_mesh, state.placements) == (param.device_mesh, param.placements)
            assert_close([whole(state)], [alone.state[twin][kind]])


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
def test_rank_outside_the_mesh_of_a_parameter_is_told() -> None:
    pair = DeviceMesh("cpu", [0, 1])
    param = nn.Parameter(distribute_tensor(torch.ones(4), pair, [Shard(0)]))
    param.grad = torch.ones_like(param)
    optimizer = fusedreg.SGD([param], max_grad_norm=1.0)
    if dist.get_rank() < 2:
        optimizer.step()
        assert optimizer.grad_norm == 2
    else:
        with pytest.raises(RuntimeError, match="but is no member of it"):
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
    else:  # the second never has a gradient, and is on a mesh of its own
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
