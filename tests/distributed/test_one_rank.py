"""What needs one process only: groups of one, and a step inside a backward pass."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
)

import fusedreg

from cases import PATHS, Case, parameters, tensors
from spread import (
    ADAM,
    ADAMW,
    LAMB,
    MAX_NORM,
    SGD,
    SHAPES,
    STEPS,
    Given,
    ZeroRedundancyOptimizer,
    apply_in_backward,
    assert_close,
    follow,
    name,
    needs_interpreter,
    paths,
    whole,
)

# ---- one process, which coverage sees -----------------------------------------------------------


@pytest.fixture
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as ranks.py
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@paths
@pytest.mark.parametrize("case", [ADAMW, LAMB], ids=name)
@pytest.mark.usefixtures("world_of_one")
def test_one_rank_trains_as_without_ranks(case: Case, path: str) -> None:
    """As where a script for many ranks runs on one; gradients are placed otherwise than weights."""
    devices = init_device_mesh("cpu", (1, 1))
    params: list[Any] = parameters(shapes=SHAPES)
    params[::2] = [nn.Parameter(distribute_tensor(p, devices, [Shard(0)] * 2)) for p in params[::2]]
    options = {"max_grad_norm": MAX_NORM, "process_group": dist.group.WORLD}
    optimizer = case.make(params, path, **options)
    alone = case.make(parameters(shapes=SHAPES), max_grad_norm=MAX_NORM)

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
    with pytest.raises(RuntimeError, match=r"functools\.partial\(AdamW, process_group="):
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


@pytest.mark.parametrize("options", [{"lr": 0.0, "fused": False}, {"skip_nonfinite": True}])
@pytest.mark.usefixtures("world_of_one")
def test_backward_works_after_a_step_of_a_dtensor_that_changed_nothing(options: Any) -> None:
    devices = init_device_mesh("cpu", (1,))
    param = nn.Parameter(distribute_tensor(torch.ones(2), devices, [Shard(0)]))
    loss = (param * param).sum()
    param.grad = torch.full_like(param, math.nan)
    fusedreg.SGD([param], **options).step()
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_of_parts_is_finite_where_its_square_is_not(dtype: torch.dtype) -> None:
    """float32 is the widest dtype of some devices."""
    norm = torch.tensor(torch.finfo(dtype).max / 4, dtype=dtype)
    found = fusedreg.dist._root(4 * fusedreg.dist._squares(norm))
    torch.testing.assert_close(found, 2 * norm)
