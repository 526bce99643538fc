"""The engine: buckets, tables, and what makes a plan of addresses end.

Kernels are interpreted on the CPU here (fused=True, see conftest.py); on a GPU test_gpu.py has them
compiled. The arithmetic is tested by every other file, where the path "fused" is these kernels.
"""

from __future__ import annotations

import copy
import importlib
import math
import subprocess
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg
from fusedreg import backend, engine

from cases import KERNEL_CASES, SOME, Case, by_id, parameters, run, set_grads, tensors, ulp
from compare import assert_close, frozen, parameters_of, results

CHUNK = 8192  # elements of one program, of which one block is 1024
SIZES = [0, 1, 63, 64, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pair(case: Case, make: Any, **options: Any) -> tuple[Any, Any]:
    """The case through kernels and by the reference, on equal parameters."""
    return case.make(make(), "fused", **options), case.make(make(), "reference", **options)


def assert_steps_agree(fused: Any, reference: Any, steps: int = 2, ulps: float = 8) -> None:
    """Some more steps of both give the same, up to `ulps` of the stored dtype.

    Both take the same operations in the same order but for the global norm (another order of
    float64 additions), beta**t (within 2 ulp of float64) and sums of two products that one writes
    the other way round: at most half an ulp for each of about ten operations, hardly ever more than
    half of them in one direction.
    """
    for optimizer in (fused, reference):
        run(optimizer, steps)
    assert fused.backend == "triton"
    assert reference.backend == "reference"
    assert_close(parameters_of(fused), parameters_of(reference), ulps)
    for mine, other in zip(parameters_of(fused), parameters_of(reference), strict=True):
        assert fused.state.get(mine, {}).keys() == reference.state.get(other, {}).keys()
        states = (
            optimizer.state.get(p, {}) for optimizer, p in [(fused, mine), (reference, other)]
        )
        first, second = (list(state.values()) for state in states)
        assert_close(first, second, ulps)


# ---- sizes, places and launches ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_any_size_around_blocks_and_chunks(case: Case, dtype: torch.dtype) -> None:
    shapes = [(size,) for size in SIZES]
    optimizers = pair(case, lambda: parameters(dtype=dtype, shapes=shapes), max_grad_norm=1.0)
    assert_steps_agree(*optimizers)
    norms = [optimizer.grad_norm for optimizer in optimizers]
    assert_close(norms[:1], norms[1:], 1)


@pytest.mark.parametrize("offset", [0, 1, 4, 7])
@pytest.mark.parametrize("case", **by_id(SOME))
def test_views_into_poisoned_memory_at_any_offset(case: Case, offset: int) -> None:
    """Nothing outside of a tensor is read or written, whatever its alignment."""
    sizes, gap = [1, 5, 1024, 1500], 16
    pool = torch.full((sum(sizes) * 2 + gap * 10,), float("nan"))
    inside = torch.zeros_like(pool, dtype=torch.bool)
    place = offset

    def take(values: torch.Tensor) -> torch.Tensor:
        nonlocal place
        view = pool[place : place + values.numel()]
        inside[place : place + values.numel()] = True
        place += values.numel() + gap
        return view.copy_(values)

    values = tensors(0, torch.float32, [(size,) for size in sizes])
    params = [nn.Parameter(take(value)) for value in values]
    for param, grad in zip(params, tensors(1, torch.float32, [(s,) for s in sizes]), strict=True):
        param.grad = take(grad)
    plain = [nn.Parameter(value) for value in values]
    for mine, other in zip(params, plain, strict=True):
        other.grad = mine.grad.clone()
    optimizers = case.make(params, "fused"), case.make(plain, "fused")
    for optimizer in optimizers:
        optimizer.step()
    assert frozen(params) == frozen(plain)
    assert pool[~inside].isnan().all()
    assert not pool[inside].isnan().any()


@pytest.mark.parametrize(("clip", "expected"), [(None, 2), (1.0, 3)])
def test_launches_do_not_depend_on_tensors_and_groups(clip: float | None, expected: int) -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(10)))
    groups = [{"params": [p], "lr": 0.1 / i} for i, p in enumerate(model.parameters(), start=1)]
    optimizer = fusedreg.AdamW(groups, max_grad_norm=clip, fused=True)
    run(optimizer, 1)
    assert optimizer.backend == "triton"
    assert optimizer.launches == expected


@pytest.mark.parametrize("case", **by_id(SOME))
def test_one_launch_gives_each_group_its_own_numbers(case: Case) -> None:
    each = [
        {"lr": 0.1 * (i + 1), "weight_decay": 0.3 * (i + 1), "l1": 0.01 * (i + 1)} for i in range(3)
    ]
    params = parameters(shapes=[(5,)] * 3)
    alone = parameters(shapes=[(5,)] * 3)
    together = case.make(
        [{"params": [p], **own} for p, own in zip(params, each, strict=True)], "fused"
    )
    apart = [case.make([p], "fused", **own) for p, own in zip(alone, each, strict=True)]
    for seed in range(2):
        set_grads(params, seed)
        for param, single in zip(params, alone, strict=True):
            single.grad = param.grad.clone()
        for optimizer in (together, *apart):
            optimizer.step()
    assert together.launches == 2
    assert frozen(params) == frozen(alone)


def test_groups_with_other_rules_have_their_own_launches() -> None:
    params = parameters(shapes=[(5,)] * 3)
    options: list[dict[str, Any]] = [{}, {"amsgrad": True}, {"l1": 0.1, "l1_mode": "decoupled"}]
    groups = [{"params": [p], **more} for p, more in zip(params, options, strict=True)]
    fused = fusedreg.Adam(groups, lr=0.1, fused=True, max_grad_norm=1.0)
    copies = parameters(shapes=[(5,)] * 3)
    groups = [{"params": [p], **more} for p, more in zip(copies, options, strict=True)]
    reference = fusedreg.Adam(groups, lr=0.1, fused=False, max_grad_norm=1.0)
    assert_steps_agree(fused, reference)
    assert fused.launches == 9


def test_dtypes_share_one_norm() -> None:
    def make() -> list[nn.Parameter]:
        return [parameters(i, dtype, [(7,)])[0] for i, dtype in enumerate(FLOATS)]

    fused = fusedreg.AdamW(make(), lr=0.1, fused=True, max_grad_norm=0.5)
    reference = fusedreg.AdamW(make(), lr=0.1, fused=False, max_grad_norm=0.5)
    assert_steps_agree(fused, reference)
    assert fused.launches == 12
    assert_close([fused.grad_norm], [reference.grad_norm], 1)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_parameters_for_both_paths_share_one_norm_and_one_skip(case: Case) -> None:
    def make() -> list[nn.Parameter]:
        complete, gaps = tensors(0, torch.float32, [(7,), (6, 4)])
        return [nn.Parameter(complete), nn.Parameter(gaps[:, ::2])]

    fused, reference = pair(case, make, max_grad_norm=0.5, skip_nonfinite=True)
    assert fused.backend == "triton and reference"
    for seed in range(3):
        for optimizer in (fused, reference):
            set_grads(parameters_of(optimizer), seed)
            if seed == 1:
                parameters_of(optimizer)[1].grad[0, 0] = float("inf")
            optimizer.step()
    assert_close(parameters_of(fused), parameters_of(reference), 8)
    assert fused.skipped_steps == reference.skipped_steps == 1


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_another_dtype(grad_dtype: torch.dtype) -> None:
    optimizers = []
    for fused in (True, False):
        params = parameters(dtype=torch.bfloat16, shapes=[(5,), (1100,)])
        optimizer = fusedreg.AdamW(params, lr=0.1, fused=fused, max_grad_norm=1.0)
        for seed in range(2):
            for param, grad in zip(params, tensors(seed, grad_dtype, [(5,), (1100,)]), strict=True):
                param.grad_dtype = grad_dtype
                param.grad = grad
            optimizer.step()
        optimizers.append(optimizer)
    assert optimizers[0].backend == "triton"
    assert_close(parameters_of(optimizers[0]), parameters_of(optimizers[1]), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_state_dtype_is_that_of_the_moments(case: Case, dtype: torch.dtype, path: str) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    params = parameters(dtype=dtype, shapes=[(5,), (3, 0), (1030,)])
    optimizer = case.make(params, path, state_dtype=other)
    run(optimizer, 2)
    exact = case.make(parameters(dtype=dtype, shapes=[(5,), (3, 0), (1030,)]), "reference")
    exact.param_groups[0]["state_dtype"] = other
    run(exact, 2)
    assert_close(params, parameters_of(exact), 8)
    for param in params:
        for name in optimizer.states(optimizer.param_groups[0]):
            assert optimizer.state[param][name].dtype == other


def test_state_dtype_survives_loading_whatever_the_file_has(path: str) -> None:
    params = parameters(dtype=torch.bfloat16, shapes=[(5,)])
    saved = torch.optim.AdamW(params, lr=0.1)
    run(saved, 1)
    assert saved.state[params[0]]["exp_avg"].dtype == torch.bfloat16
    fused = None if path == "default" else path == "fused"
    optimizer = fusedreg.AdamW(params, state_dtype=torch.float32, fused=fused)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["state_dtype"] == torch.float32
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.int32, torch.complex64, "float32", torch.float8_e4m3fn])
def test_bad_state_dtype_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="Invalid state_dtype value"):
        fusedreg.SGD(parameters(), state_dtype=bad)  # type: ignore[arg-type]


# ---- a plan ends when something moves ------------------------------------------------------------


def replace_state(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def move_state_data(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()


def move_params(optimizer: Any) -> None:
    for param in parameters_of(optimizer):
        param.data = param.data.clone()


def swap_params(optimizer: Any) -> None:
    for param in parameters_of(optimizer):
        param.grad = None
        state = optimizer.state.pop(param, None)
        torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))
        if state is not None:
            optimizer.state[param] = state


def load_own_state(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": parameters(9, shapes=[(6,)]), "lr": 0.01})


def drop_state(optimizer: Any) -> None:
    for param in parameters_of(optimizer)[:2]:
        optimizer.state.pop(param, None)


def restride(optimizer: Any) -> None:
    for param in parameters_of(optimizer):
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()


def add_extra_state(optimizer: Any) -> None:
    for param in parameters_of(optimizer):
        optimizer.state[param]["note"] = "mine"
    optimizer.state["of no parameter"] = {"count": 3}


def turn_on(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(l1=0.2, weight_decay=0.0)
        group.update({"momentum": 0.5} if "momentum" in group else {"amsgrad": True})


def turn_off(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(l1=0.0, weight_decay=0.0, maximize=True)


def change_numbers(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group.update(lr=0.05, l1=0.01)
        group.update({"betas": [0.5, 0.75]} if "betas" in group else {"momentum": 0.25})


EVENTS = [
    replace_state, move_state_data, move_params, swap_params, load_own_state, add_group, drop_state,
    restride, add_extra_state, turn_on, turn_off, change_numbers,
]  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("case", **by_id(SOME))
def test_no_step_uses_what_is_no_longer_there(case: Case, event: Any) -> None:
    optimizers = pair(case, lambda: parameters(shapes=[(5, 3), (7,), (0,), ()]))
    assert_steps_agree(*optimizers)
    for optimizer in optimizers:
        event(optimizer)
    for optimizer in optimizers:
        run(optimizer, 2, first_seed=50)
    assert_close(*map(parameters_of, optimizers), 8)
    old = [list(map(frozen, optimizer.state.values())) for optimizer in optimizers]
    assert len(old[0]) == len(old[1])
    event(optimizers[0])  # memory of the first event may have been given to something else
    event(optimizers[1])
    for optimizer in optimizers:
        run(optimizer, 1, first_seed=60)
    assert_close(*map(parameters_of, optimizers), 8)


def test_parameter_moved_to_another_group_takes_its_numbers() -> None:
    a, b, c = params = parameters(shapes=[(3,)] * 3)
    optimizer = fusedreg.SGD(
        [{"params": [a, b], "lr": 1.0}, {"params": [c], "lr": 0.5}], fused=True
    )
    run(optimizer, 1)
    first, second = optimizer.param_groups
    first["params"].pop()
    second["params"].insert(0, b)
    before = b.detach().clone()
    set_grads(params, 5)
    optimizer.step()
    assert torch.equal(b, before - 0.5 * b.grad)


def test_parameter_in_two_groups_is_refused() -> None:
    optimizer = fusedreg.SGD(parameters(shapes=[(3,)]), fused=True)
    optimizer.param_groups.append(dict(optimizer.param_groups[0]))
    with pytest.raises(ValueError, match="more than one parameter group"):
        run(optimizer, 1)


def test_new_object_on_the_same_memory_has_its_own_state() -> None:
    (old,) = parameters(shapes=[(3,)])
    optimizer = fusedreg.SGD([old], lr=0.1, momentum=0.5, fused=True)
    run(optimizer, 1)
    new = nn.Parameter(old.data)
    optimizer.param_groups[0]["params"][0] = new
    run(optimizer, 1)
    assert new in optimizer.state


@pytest.mark.parametrize("how", ["data", "in place"])
def test_transposed_in_place(how: str) -> None:
    optimizers = pair(SOME[0], lambda: parameters(shapes=[(3, 3)]))
    for optimizer in optimizers:
        run(optimizer, 1)
        (param,) = parameters_of(optimizer)
        with torch.no_grad():
            if how == "data":
                param.data = param.data.t()
            else:
                param.t_()
        run(optimizer, 1, first_seed=7)
    assert_close(*map(parameters_of, optimizers), 8)


def test_gradient_or_state_of_another_size_is_not_read_beyond_its_end() -> None:
    (param,) = parameters(shapes=[(6,)])
    optimizer = fusedreg.SGD([param], lr=0.1, momentum=0.5, fused=True)
    run(optimizer, 1)
    param.grad.data = param.grad.data[:2]
    with pytest.raises(RuntimeError, match="size of the gradient"):
        optimizer.step()
    param.grad = None
    param.data = torch.zeros(12, dtype=param.dtype)  # the buffer has 6 entries
    param.grad = torch.ones_like(param)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_states_swapped_between_parameters() -> None:
    optimizers = pair(SOME[0], lambda: parameters(shapes=[(5,), (5,)]))
    for optimizer in optimizers:
        run(optimizer, 2)
        first, second = parameters_of(optimizer)
        states = optimizer.state.pop(first), optimizer.state.pop(second)
        optimizer.state[second], optimizer.state[first] = states
        run(optimizer, 1, first_seed=7)
    assert_close(*map(parameters_of, optimizers), 8)


def test_state_of_another_dtype_at_the_same_address() -> None:
    (param,) = parameters(dtype=torch.float32, shapes=[(4,)])
    optimizer = fusedreg.SGD([param], lr=0.1, momentum=0.5, fused=True)
    run(optimizer, 1)
    state = optimizer.state[param]
    memory = state["momentum_buffer"].view(torch.bfloat16)
    memory.fill_(3.0)
    state["momentum_buffer"] = memory[:4]
    param.grad = torch.zeros(4)
    optimizer.step()
    assert (memory[:4] == 1.5).all()
    assert (memory[4:] == 3.0).all()


def test_lazily_negated_gradient(path: str) -> None:
    param = nn.Parameter(torch.zeros(()))
    torch.complex(torch.zeros(()), param).conj().imag.backward()
    assert param.grad == -1
    fusedreg.SGD([param], lr=1.0, fused=path == "fused").step()
    assert param == 1.0
    view = nn.Parameter(torch.zeros(3))
    view.grad = torch._neg_view(torch.ones(3))
    fusedreg.SGD([view], lr=1.0, fused=True).step()
    assert (view == 1.0).all()


@pytest.mark.parametrize("loaded", [False, True])
def test_option_turned_on_while_a_parameter_has_no_gradient(loaded: bool) -> None:
    """Its state gets what the option needs although it is not stepped."""
    ends = []
    for fused in (True, False):
        params = parameters(shapes=[(3,), (2,)])
        optimizer = fusedreg.SGD(params, lr=0.1, momentum=0.9, fused=fused)
        run(optimizer, 2)
        if loaded:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["l1"] = 1.0
        for seed in (1, 2):
            set_grads(params, seed)
            if seed == 1:
                params[1].grad = None
            optimizer.step()
        ends.append(optimizer)
    assert_close(parameters_of(ends[0]), parameters_of(ends[1]), 8)
    assert ends[0].state[ends[0].param_groups[0]["params"][1]].keys() == {
        "momentum_buffer",
        "momentum_mass",
    }


def test_backward_through_parameters_of_a_skipped_step_works() -> None:
    param = nn.Parameter(torch.ones(3))
    loss = (param**3).sum()
    param.grad = torch.full((3,), math.nan)
    fusedreg.SGD([param], skip_nonfinite=True).step()
    loss.backward()


def test_backward_through_stepped_parameters_fails(path: str) -> None:
    param = nn.Parameter(torch.ones(3))
    fused = path == "fused"
    loss = (param**3).sum()
    loss.backward(retain_graph=True)
    fusedreg.SGD([param], fused=fused).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_skip_on_the_device_ends_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.inventory):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    lr = torch.zeros((), dtype=torch.float64)
    param = nn.Parameter(torch.zeros(2))
    optimizer = fusedreg.SGD([param], lr=lr, fused=True)
    param.grad = torch.zeros(2)
    optimizer.step()  # only creates state, which the device finds out
    lr.fill_(1.0)
    for _ in range(3):
        param.grad = torch.ones(2)
        optimizer.step()
    assert (param == -3).all()


def test_count_of_an_integer_dtype_takes_the_reference_path() -> None:
    (param,) = parameters(shapes=[(3,)])
    optimizer = fusedreg.Adam([param], fused=True)
    run(optimizer, 1)
    optimizer.state[param]["step"] = optimizer.state[param]["step"].to(torch.int64)
    run(optimizer, 1)
    assert optimizer.state[param]["step"] == 2
    assert optimizer.launches == 0


def test_no_gradients_after_loading_launch_nothing() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(3,)]), fused=True)
    run(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.launches == 0
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_rate_of_zero_and_experts_of_other_gradient_dtypes_keep_the_plan() -> None:
    params = parameters(dtype=torch.bfloat16, shapes=[(3,), (4,)])
    for param in params:
        param.grad_dtype = torch.float32
    optimizer = fusedreg.AdamW(params, lr=0.0, fused=True)
    plans = set()
    for step in range(6):
        optimizer.zero_grad()
        for param in params if step == 0 else params[step % 2 :][:1]:
            param.grad = torch.ones(param.shape)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        plans.add(id(optimizer._plan))
    assert len(plans) == 1


def test_capture_of_what_has_not_run_before_is_refused(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    run(optimizer, 1)
    optimizer.max_grad_norm = 1.0
    capturing["on"] = True
    with pytest.raises(RuntimeError, match=r"load kernels: take one step .* before the capture"):
        run(optimizer, 1)


def test_plan_holds_while_nothing_moves() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,), (3,)]), fused=True, max_grad_norm=1.0)
    run(optimizer, 1)
    plan = optimizer._plan
    for lr in (0.1, 0.2, 0.3):
        optimizer.param_groups[0].update(lr=lr, weight_decay=lr / 2, betas=(lr, 0.9))
        run(optimizer, 1)
    assert optimizer._plan is plan


def test_gradients_may_come_and_go_without_a_new_plan() -> None:
    """As experts do: a parameter without a gradient stays as it is, and so does its step count."""
    fused, reference = pair(SOME[1], lambda: parameters(shapes=[(5,), (1500,), (3,), (0,)]))
    plans = []
    pattern = [(0, 1), (0, 1, 2, 3), (1,), (2, 3), (), (0, 1, 2, 3)]
    for seed, present in enumerate(pattern):
        for optimizer in (fused, reference):
            set_grads(parameters_of(optimizer), seed)
            for index, param in enumerate(parameters_of(optimizer)):
                if index not in present:
                    param.grad = None
            optimizer.step()
        plans.append(fused._plan)
    assert_close(parameters_of(fused), parameters_of(reference), 8)
    counts = [optimizer.state[p]["step"] for optimizer in (fused, reference)
              for p in parameters_of(optimizer)]  # fmt: skip
    assert counts == [3, 4, 3, 3] * 2
    assert len({id(plan) for plan in plans[1:]}) == 1


def test_gradients_may_change_layout_and_alignment() -> None:
    def make() -> list[nn.Parameter]:
        square, image = tensors(0, torch.float32, [(6, 6), (2, 3, 4, 4)])
        return [nn.Parameter(square), nn.Parameter(image.to(memory_format=torch.channels_last))]

    def odd(grad: torch.Tensor, seed: int) -> torch.Tensor:
        if seed % 3 == 1:
            return grad.transpose(0, -1).contiguous().transpose(0, -1)
        if seed % 3 == 2:
            return torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape)
        return grad

    fused, reference = pair(SOME[1], make, max_grad_norm=1.0)
    for seed in range(6):
        for optimizer in (fused, reference):
            params = parameters_of(optimizer)
            set_grads(params, seed)
            for param in params:
                param.grad = odd(param.grad, seed)
            optimizer.step()
    assert fused.backend == "triton"
    assert_close(parameters_of(fused), parameters_of(reference), 8)


@pytest.mark.parametrize("case", **by_id(KERNEL_CASES))
def test_numbers_on_the_device_are_live_and_equal_those_of_the_host(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = [0.1, 0.0, 0.3]
    plain = case.make(parameters(shapes=[(5,), (7,)]), "fused", max_grad_norm=0.5)
    for seed, rate in enumerate(rates):
        plain.param_groups[0]["lr"] = rate
        run(plain, 1, first_seed=seed)

    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.inventory):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    optimizer = case.make(parameters(shapes=[(5,), (7,)]), "fused", max_grad_norm=0.5)
    group = optimizer.param_groups[0]
    for name in {"lr", "weight_decay", "l1"} & case.kwargs.keys():
        group[name] = torch.tensor(group[name], dtype=torch.float64)
    for seed, rate in enumerate(rates):
        group["lr"].fill_(rate)  # read in each step, without anyone telling
        run(optimizer, 1, first_seed=seed)
    assert frozen(parameters_of(optimizer)) == frozen(parameters_of(plain))


# ---- CUDA graphs ---------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A switch that makes steps believe that they are being captured."""
    now = {"on": False}
    for module in (engine, fusedreg.optimizer):
        monkeypatch.setattr(module, "is_capturing", lambda device: now["on"])
    return now


def test_capture_of_a_step_that_needs_the_host_is_refused(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    set_grads(parameters_of(optimizer), 0)
    before = results(optimizer)
    capturing["on"] = True
    with pytest.raises(RuntimeError, match=r"take one step .* before the capture"):
        optimizer.step()
    assert results(optimizer) == before
    assert not optimizer.state


def test_captured_step_owns_all_that_it_reads(capturing: dict[str, bool]) -> None:
    """Fresh gradients and new floats go into the graph, and the shared memory stays as it was."""
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,), (3,)]), fused=True, max_grad_norm=1.0)
    twin = fusedreg.AdamW(parameters(shapes=[(5,), (3,)]), fused=True, max_grad_norm=1.0)
    for each in (optimizer, twin):
        run(each, 1)
    plan = optimizer._plan
    memory = next(iter(plan.memory.values()))
    shared = frozen([memory.grads, memory.numbers])
    capturing["on"] = True
    for each in (optimizer, twin):
        each.param_groups[0]["lr"] = 0.5
        run(each, 1, first_seed=5)
    assert optimizer._captured == (plan,)
    assert frozen([memory.grads, memory.numbers]) == shared
    capturing["on"] = False
    for each in (optimizer, twin):
        run(each, 1, first_seed=6)
    reference = fusedreg.AdamW(parameters(shapes=[(5,), (3,)]), fused=False, max_grad_norm=1.0)
    run(reference, 1)
    reference.param_groups[0]["lr"] = 0.5
    run(reference, 1, first_seed=5)
    run(reference, 1, first_seed=6)
    assert_close(parameters_of(optimizer), parameters_of(reference), 8)
    optimizer.load_state_dict(optimizer.state_dict())
    run(optimizer, 1)
    assert optimizer._captured == (plan,), "a graph may still replay the old plan"


def test_capture_does_not_create_the_counter_of_skipped_steps(capturing: dict[str, bool]) -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,)]), fused=True)
    run(optimizer, 1)
    capturing["on"] = optimizer.skip_nonfinite = True
    with pytest.raises(RuntimeError, match=r"take one step .* before the capture"):
        run(optimizer, 1)
    capturing["on"] = False
    run(optimizer, 1)
    capturing["on"] = True
    run(optimizer, 1)
    assert optimizer.skipped_steps == 0


def test_addresses_pass_through_kernel_arguments_exactly() -> None:
    table = backend.kernels()
    addresses = [0, 16, 2**47 - 16, 2**52 + 1, 2**53 - 1]
    sent = table.constants(addresses, torch.device("cpu"))
    assert sent.to(torch.int64).tolist() == addresses


# ---- which path ----------------------------------------------------------------------------------


def test_backend_says_what_runs() -> None:
    params = parameters(shapes=[(5,)])
    assert fusedreg.SGD(params).backend == "reference"  # a CPU interprets only if asked
    assert fusedreg.SGD(params, fused=False).backend == "reference"
    assert fusedreg.SGD(params, fused=True).backend == "triton"
    assert fusedreg.SGD([torch.zeros(2, dtype=torch.complex64)], fused=True).backend == "reference"
    assert fusedreg.SGD([{"params": []}]).backend == "reference"


def test_backend_of_a_lazy_module_is_not_known_yet() -> None:
    optimizer = fusedreg.SGD(nn.LazyLinear(2).parameters(), fused=True)
    assert optimizer.backend == "reference"


def test_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        params = [nn.Parameter(torch.ones(5, device="cpu"))]
        optimizer = fusedreg.AdamW(params, lr=0.1, fused=True, max_grad_norm=1.0)
        for _ in range(2):
            params[0].grad = torch.ones(5, device="cpu")
            optimizer.step()
    assert optimizer.launches == 3
    assert (params[0] < 1).all()


def test_reference_path_launches_nothing() -> None:
    optimizer = fusedreg.SGD(parameters(), fused=False)
    run(optimizer, 1)
    assert optimizer.launches == 0


def test_launches_are_those_of_the_last_step() -> None:
    optimizer = fusedreg.SGD(parameters(), fused=True)
    run(optimizer, 2)
    assert optimizer.launches == 2
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.launches == 0


def test_neither_import_nor_a_step_on_a_cpu_loads_kernels() -> None:
    code = (
        "import sys, torch, fusedreg\n"
        "assert 'triton' not in sys.modules\n"
        "w = torch.nn.Parameter(torch.ones(2)); w.grad = torch.ones(2)\n"
        "fusedreg.AdamW([w], fused=True).step()\n"
        "assert 'fusedreg.kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"TRITON_INTERPRET": "0"})


@pytest.fixture
def fresh_backend() -> Any:
    """Forget which triton was found, before and after."""
    backend.kernels.cache_clear()
    yield
    backend.kernels.cache_clear()


CUDA = torch.device("cuda")


def test_missing_triton_means_the_reference_with_one_warning(
    fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(UserWarning, match=r"triton cannot be imported.*triton>=3\.\d.*fused=False"):
        assert backend.device_kernels(CUDA, fused=None) is None
    with warnings.catch_warnings(action="error"):
        assert backend.device_kernels(CUDA, fused=True) is None


@pytest.mark.parametrize("version", ["2.3.1", "3.2.0"])
def test_old_triton_means_the_reference_with_one_warning(
    version: str, fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    with pytest.warns(UserWarning, match=f"triton {version} is too old"):
        assert backend.device_kernels(CUDA, fused=None) is None


def test_fused_false_asks_for_no_triton(
    fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.device_kernels(CUDA, fused=False) is None


@pytest.mark.parametrize("version", ["3.6.0", "3.10.0", "4.0.0+git1234"])
def test_new_triton_is_taken(
    version: str, fresh_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = importlib.import_module("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert backend.device_kernels(CUDA, fused=None).__name__ == "fusedreg.kernels.launch"


# ---- arithmetic that only a device has -----------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("step", [1, 2, 3, 10, 1000, 1_000_000])
def test_bias_correction_for_any_count(beta: float, step: int) -> None:
    """1 - beta**t is formed in float64; a float32 beta would show at 1e-5."""
    params = parameters(dtype=torch.float32, shapes=[(3,)])
    optimizer = fusedreg.Adam(params, lr=0.1, betas=(beta, beta), eps=0.0, fused=True)
    run(optimizer, 1)
    state = optimizer.state[params[0]]
    state["step"].fill_(step - 1)
    state["exp_avg"].zero_()
    state["exp_avg_sq"].zero_()
    before = params[0].detach().clone()
    params[0].grad = torch.ones(3)
    optimizer.step()
    correction = 1 - beta**step
    first, second = (1 - beta) / correction, (1 - beta) / correction
    moved = (before - params[0]).double() / 0.1
    # The subtraction from w rounds to half an ulp of w, the direction itself to a few ulp.
    bound = ulp(torch.float32, before.abs().max().item()) / 0.1 + 8 * 2.0**-24 * first / second**0.5
    assert (moved - first / second**0.5).abs().max() <= bound
    assert state["step"] == step
