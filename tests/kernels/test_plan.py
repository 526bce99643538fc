"""A plan of kernels holds until something moves, and no step uses what is no longer there."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fusedreg

from cases import KERNEL_CASES, PATHS, SOME, Case, each_case, parameters, run, set_grads, tensors
from compare import assert_close, assert_steps_agree, frozen, pair, parameters_of


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


# Those with states that an option turns on, and one that launches more.
EVENTFUL = (fusedreg.SGD, fusedreg.Adam, fusedreg.RMSprop, fusedreg.LAMB)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@each_case([case for case in SOME if case.cls in EVENTFUL])
def test_no_step_uses_what_is_no_longer_there(case: Case, event: Any) -> None:
    """In float32, which does not see the last bits of beta**t.

    No tensor has one element: where the decay happens to cancel its direction, the trust ratio is
    large and so are its roundings.
    """
    shapes = [(5, 3), (7,), (0,), (6,)]
    optimizers = pair(case, lambda: parameters(dtype=torch.float32, shapes=shapes))
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


@pytest.mark.parametrize("fused", [True, False])
def test_parameters_without_gradient_get_no_state(fused: bool) -> None:
    """A frozen one with a note, and one whose state was deleted."""
    params = parameters(shapes=[(3,), (2,), (4,)])
    optimizer = fusedreg.Adam(params, fused=fused)
    optimizer.state[params[1]]["note"] = "frozen"
    for seed in range(3):
        set_grads(params, seed)
        params[1].grad = None
        if seed:
            optimizer.state.pop(params[2], None)
            params[2].grad = None
        optimizer.step()
    assert optimizer.state[params[1]] == {"note": "frozen"}
    assert params[2] not in optimizer.state


@pytest.mark.parametrize("path", ["default", "fused", "reference"])
def test_a_float_that_became_a_tensor_may_change_in_place(path: str) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fusedreg.SGD([param], lr=0.125, **PATHS[path])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr = torch.tensor(0.25)
    optimizer.step()
    lr.fill_(0.5)
    optimizer.step()
    assert param.tolist() == [0.125] * 3


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
    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.engine.numbers):
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


@pytest.mark.parametrize("path", ["default", "fused"])
@pytest.mark.parametrize("wide", [False, True])
def test_counts_of_two_dtypes_are_counted_by_kernels(path: str, wide: bool) -> None:
    """`step` is torch's float32, in files of a float64 default float64; the mass is float64."""
    case = next(case for case in KERNEL_CASES if case.id == "rmsprop_momentum-elastic_net")
    optimizer, reference = (
        case.make(parameters(shapes=[(3,), (2,)]), how) for how in (path, "reference")
    )
    for each in (optimizer, reference):
        run(each, 1)
        if wide:
            state = each.state[parameters_of(each)[1]]
            state["step"] = state["step"].double()
        run(each, 2)
    # One launch of rows and one of steps for each set of dtypes.
    assert optimizer.launches == (4 if wide else 2)
    assert_close(parameters_of(optimizer), parameters_of(reference), 8)
    for mine, other in zip(parameters_of(optimizer), parameters_of(reference), strict=True):
        counts = optimizer.state[mine]["step"], optimizer.state[mine]["momentum_mass"]
        assert counts[0] == 3
        assert counts[1].dtype == torch.float64
        assert_close(counts, [reference.state[other][n] for n in ("step", "momentum_mass")], 1)
    assert optimizer.state[parameters_of(optimizer)[0]]["step"].dtype == torch.float32


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
        plans.add(id(optimizer._stepper.plan))
    assert len(plans) == 1


def test_plan_holds_while_nothing_moves() -> None:
    optimizer = fusedreg.AdamW(parameters(shapes=[(5,), (3,)]), fused=True, max_grad_norm=1.0)
    run(optimizer, 1)
    plan = optimizer._stepper.plan
    for lr in (0.1, 0.2, 0.3):
        optimizer.param_groups[0].update(lr=lr, weight_decay=lr / 2, betas=(lr, 0.9))
        run(optimizer, 1)
    assert optimizer._stepper.plan is plan


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
        plans.append(fused._stepper.plan)
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


@pytest.mark.parametrize("independent", [False, True])
@each_case(KERNEL_CASES)
def test_numbers_on_the_device_are_live_and_equal_those_of_the_host(
    case: Case, independent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is changed in place, without anyone telling, and read in each step."""
    options: dict[str, Any] = {"max_grad_norm": 0.5}
    if independent:
        options |= {"decoupled_weight_decay": True, "lr_independent_decay": True}
    values: dict[str, list[float]] = {"lr": [0.1, 0.0, 0.3]}
    for name in {"weight_decay", "l1"} & case.kwargs.keys():
        values[name] = [case.kwargs[name], 0.5 * case.kwargs[name], 2.0 * case.kwargs[name]]
    values |= {"decay_lr": [0.1, 0.2, 0.4]} if independent else {}

    plain = case.make(parameters(shapes=[(5,), (7,)]), "fused", **options)
    for step in range(3):
        for name, each in values.items():
            plain.param_groups[0][name] = each[step]
        run(plain, 1, first_seed=step)

    for module in (fusedreg.scalars, fusedreg.checks, fusedreg.engine.numbers):
        monkeypatch.setattr(module, "on_host", lambda value: False)
    optimizer = case.make(parameters(shapes=[(5,), (7,)]), "fused", **options)
    group = optimizer.param_groups[0]
    for name, each in values.items():
        group[name] = torch.tensor(each[0], dtype=torch.float64)
    for step in range(3):
        for name, each in values.items():
            group[name].fill_(each[step])
        run(optimizer, 1, first_seed=step)
    assert frozen(parameters_of(optimizer)) == frozen(parameters_of(plain))
