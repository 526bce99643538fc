"""A step under DDP, ZeRO, FSDP1 and FSDP2 is the step of one process that has all."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fusedreg

from cases import Case, parameters, set_grads, tensors
from compare import parameters_of, refused
from ranks import WORLD, on_every_rank, while_a_rank_dies
from spread import (
    ADAM,
    ADAMW,
    LAMB,
    MAX_NORM,
    NEED_GROUP,
    OTHERS,
    SGD,
    SHAPES,
    STEPS,
    WRAPPERS,
    Collectives,
    Given,
    ZeroRedundancyOptimizer,
    assert_close,
    backward,
    follow,
    held,
    inner,
    name,
    needs_interpreter,
    paths,
    set_spread_grads,
    spread_all,
    wholes,
    wrapped,
    wrappers,
)

# ---- wrappers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [
        *((wrapper, case) for wrapper in WRAPPERS for case in (SGD, ADAM, ADAMW)),
        *((wrapper, LAMB) for wrapper in WRAPPERS if not wrapper.startswith("fsdp1")),
    ],
    ids=name,
)
@on_every_rank
def test_wrapped_model_trains_as_one_process(wrapper: str, case: Case) -> None:
    """With decay, proximal L1, clipping and momentum."""
    train_both(wrapper, case, "reference")


@pytest.mark.parametrize(
    ("wrapper", "case"),
    [("zero", LAMB), ("hsdp", LAMB), *(("fsdp2", case) for case in [LAMB, *OTHERS])],
    ids=name,
)
@on_every_rank
def test_kernels_of_the_host_train_a_wrapped_model_as_one_process(wrapper: str, case: Case) -> None:
    train_both(wrapper, case, "default")


@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp1_views"])
@on_every_rank
def test_norms_of_flattened_tensors_are_refused(wrapper: str) -> None:
    model, optimizer = wrapped(wrapper, LAMB, "default")
    for _ in range(2):
        backward(model, seed=0)
        with refused(optimizer, RuntimeError, "LAMB needs the norm of each tensor", "fully_shard"):
            optimizer.step()
    assert not optimizer.state


# An interpreted step is slow, so each class meets one way of splitting parameters.
@needs_interpreter
@pytest.mark.parametrize(
    ("wrapper", "case"), [("zero", SGD), ("fsdp2", LAMB), ("fsdp1", ADAM)], ids=name
)
@on_every_rank
def test_kernels_train_a_wrapped_model_as_one_process(wrapper: str, case: Case) -> None:
    train_both(wrapper, case, "fused")


@pytest.mark.parametrize("wrapper", ["zero", "hsdp"])
@on_every_rank
def test_wrapped_model_trains_alike_where_numbers_are_on_the_device(wrapper: str) -> None:
    """As on an accelerator, where the host does not read the norm; see conftest.path."""
    with ExitStack() as patches:
        for module in (fusedreg.scalars, fusedreg.checks, fusedreg.engine.numbers):
            patches.enter_context(mock.patch.object(module, "on_host", return_value=False))
        train_both(wrapper, ADAMW, "reference", skip_nonfinite=True)


def train_both(wrapper: str, case: Case, path: str, **more: Any) -> None:
    model, optimizer = wrapped(wrapper, case, path, max_grad_norm=MAX_NORM, **more)
    backends = {"default": "llvm", "fused": "triton", "reference": "reference"}
    assert inner(optimizer).backend == backends[path]
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
def test_scaler_asks_all_ranks_also_where_parameters_were_split_later() -> None:
    """It asks before the first step whether the optimizer does without it."""
    net = nn.Linear(4, 4)
    optimizer = fusedreg.SGD(net.parameters(), lr=0.1, fused=True)
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    scaler = ShardedGradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    if dist.get_rank() == 0:
        next(p.grad for p in net.parameters() if p.grad is not None and p.numel())[0] = math.inf
    before = [param.detach().clone() for param in net.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    assert_close(net.parameters(), before, rtol=0, atol=0)


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
