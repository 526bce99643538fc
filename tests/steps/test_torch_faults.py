"""Faults of torch.optim 2.13 that fusedreg does not have: docs/differences.md, one test each.

Where it is cheap the same test is run on torch.optim too and must fail there, so that the page
stays true.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import fusedreg

from cases import PATHS, TORCH_CLASSES
from compare import assert_close, frozen

Test = Callable[..., None]

torch_2_13 = pytest.param(
    torch.optim,
    id="torch",
    marks=pytest.mark.skipif(
        not torch.__version__.startswith("2.13."),
        reason="the faults were measured in torch 2.13; another torch may not have them",
    ),
)


def fault(raises: type[Exception] = AssertionError) -> Callable[[Test], Test]:
    """Run a test for fusedreg, and for torch.optim 2.13, which must fail it with `raises`."""

    def decorate(test: Test) -> Test:
        @pytest.mark.parametrize("optim", [pytest.param(fusedreg, id="fusedreg"), torch_2_13])
        @wraps(test)
        def both(optim: ModuleType, **arguments: Any) -> None:
            with nullcontext() if optim is fusedreg else pytest.raises(raises):
                test(optim=optim, **arguments)

        return both

    return decorate


def ones(n: int = 3, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter of ones with a gradient of ones."""
    param = nn.Parameter(torch.ones(n, dtype=dtype))
    param.grad = torch.ones(n, dtype=dtype)
    return param


@fault()
def test_t1_nesterov_foreach_leaves_the_gradient(optim: ModuleType) -> None:
    param = ones()
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    optimizer.step()
    assert torch.equal(param.grad, torch.ones(3))


def test_t2_first_step_that_overflows_leaves_no_garbage_in_the_momentum() -> None:
    # torch's buffer is uninitialised memory, which only sometimes shows: not run on torch.
    param, clean = ones(), ones()
    make = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": True}
    optimizer, never_skipped = fusedreg.SGD([param], **make), fusedreg.SGD([clean], **make)
    optimizer.found_inf = torch.tensor(1.0)
    param.grad.fill_(math.inf)
    optimizer.step()
    assert torch.equal(param, torch.ones(3))
    optimizer.found_inf.zero_()
    param.grad.fill_(1.0)
    for _ in range(3):
        optimizer.step()
        never_skipped.step()
        assert torch.equal(param, clean)


@fault(raises=TypeError)
def test_t3_fused_momentum_takes_a_gradient_that_comes_later(optim: ModuleType) -> None:
    early, late = ones(), ones()
    late.grad = None
    optimizer = optim.SGD([early, late], lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    late.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(late, torch.full((3,), 0.9))


@fault()
@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
@pytest.mark.parametrize("found_inf", [2.0, 0.5])
def test_t4_found_inf_of_several_devices_skips(
    optim: ModuleType, found_inf: float, name: str
) -> None:
    param = ones()
    optimizer = getattr(optim, name)([param], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(found_inf)  # GradScaler sums one flag per device
    param.grad.fill_(math.inf)
    optimizer.step()
    assert torch.equal(param, torch.ones(3))
    assert all(not state.any() for state in optimizer.state[param].values())


@fault()
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("layout", ["view", "gradient"])
def test_t5_fused_respects_strides(optim: ModuleType, name: str, layout: str) -> None:
    data, grad = torch.arange(24.0).reshape(4, 6), torch.randn(4, 6)
    if layout == "view":
        data, grad = data[:, ::2], grad[:, ::2]
        param = nn.Parameter(data)
        param.grad = grad
    else:
        param = nn.Parameter(data.clone())
        param.grad = grad.t().contiguous().t()
    contiguous = nn.Parameter(data.contiguous().clone())
    contiguous.grad = grad.contiguous()
    for each in (param, contiguous):
        optimizer = getattr(optim, name)([each], lr=0.1, fused=True)
        for _ in range(3):
            optimizer.step()
    assert_close([param], [contiguous], ulps=3 * 2)  # per step as in test_oracle


@fault()
def test_t6_loading_keeps_the_precision_of_the_states(optim: ModuleType) -> None:
    param = ones(dtype=torch.bfloat16)
    optimizer = optim.AdamW([param])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    precise = torch.full((3,), 1 + 2.0**-20)
    saved["state"][0]["exp_avg"] = precise.clone()
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[param]["exp_avg"], precise)


@fault()
def test_t7_loading_shares_no_memory(optim: ModuleType) -> None:
    params = ones(), ones()
    first, second = (optim.AdamW([param]) for param in params)
    first.step()
    second.load_state_dict(first.state_dict())
    before = frozen(first.state[params[0]])
    second.step()
    assert frozen(first.state[params[0]]) == before


@fault()
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("SGD", {"momentum": 0.9, "weight_decay": 0.5}),
        ("Adam", {"weight_decay": 0.5}),
        ("AdamW", {}),
        ("RMSprop", {"weight_decay": 0.5}),
    ],
)
def test_t8_saving_before_training_does_not_change_it(
    optim: ModuleType, name: str, kwargs: dict[str, float]
) -> None:
    ends = []
    for save_first in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = getattr(optim, name)(model.parameters(), lr=0.1, **kwargs)
        if save_first:
            get_optimizer_state_dict(model, optimizer)
        for scale in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 4), float(scale))).square().sum().backward()
            optimizer.step()
        ends.append(frozen(list(model.parameters())))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_t8_a_first_step_of_zeros_counts_as_in_torch(cls: type) -> None:
    """Nobody but torch.distributed.checkpoint steps for the state alone."""
    ends = []
    for made_by in (cls, getattr(torch.optim, cls.__name__)):
        param = nn.Parameter(torch.ones(2))
        optimizer = made_by([param], lr=0.0)
        for value in (0.0, 1.0, 2.0):
            param.grad = torch.full((2,), value)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1
        ends.append(param)
    assert_close(ends[:1], ends[1:], 4)  # rounding errors of three steps


def count_call(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step hook that pickle can find."""
    optimizer.calls = getattr(optimizer, "calls", 0) + 1


@fault()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_t9_a_copy_keeps_hooks_and_amp_support(
    optim: ModuleType, duplicate: Callable[[Any], Any]
) -> None:
    optimizer = optim.AdamW([ones()], fused=True)
    optimizer.register_step_post_hook(count_call)
    twin = duplicate(optimizer)
    twin.step()
    assert getattr(twin, "calls", 0) == 1
    assert not hasattr(optimizer, "calls")
    assert getattr(twin, "_step_supports_amp_scaling", False)


def constant_gradient(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> None:
    grad = torch.linspace(-1, 1, param.numel(), dtype=param.dtype)
    for _ in range(300):
        param.grad = grad.clone()
        optimizer.step()


@fault()
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_t10_centered_rmsprop_is_finite(optim: ModuleType, momentum: float, foreach: bool) -> None:
    """The variance of a gradient that does not change is rounded below 0; its root is NaN."""
    param = nn.Parameter(torch.zeros(500))
    options = {"alpha": 0.9, "centered": True, "momentum": momentum, "foreach": foreach}
    constant_gradient(optim.RMSprop([param], lr=1e-3, **options), param)
    assert param.isfinite().all()


def test_t10_on_every_path(path: str) -> None:
    """Also where l1 divides by that root, and eps limits what is left of it."""
    param = nn.Parameter(torch.zeros(50))
    options = {"alpha": 0.9, "eps": 1e-3, "l1": 0.1, "centered": True, **PATHS[path]}
    constant_gradient(fusedreg.RMSprop([param], lr=1e-5, **options), param)
    assert param.isfinite().all()
    assert param.any()


@fault(raises=KeyError)
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("RMSprop", "momentum", 0.9), ("RMSprop", "centered", True), ("Adam", "amsgrad", True)],
)
def test_options_may_be_turned_on_later(
    optim: ModuleType, name: str, option: str, value: Any
) -> None:
    param = ones()
    optimizer = getattr(optim, name)([param], lr=0.1)
    optimizer.step()
    optimizer.param_groups[0][option] = value
    before = param.detach().clone()
    optimizer.step()
    assert (param < before).all()


@fault()
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "Adagrad"])
@pytest.mark.parametrize("grad", [0.0, 1e-4])
def test_a_small_float16_gradient_is_not_divided_by_zero(
    optim: ModuleType, name: str, grad: float
) -> None:
    """In float16 1e-8 and the square of 1e-4 are 0, so the for-loop divides by 0."""
    param = ones(dtype=torch.float16)
    param.grad.fill_(grad)
    getattr(optim, name)([param], lr=0.1, weight_decay=0.0, foreach=False).step()
    assert param.isfinite().all()
    assert grad or torch.equal(param, torch.ones_like(param))


@fault()
def test_t11_capturable_with_lr_zero_is_finite(optim: ModuleType) -> None:
    param = ones()
    param.grad.zero_()
    # torch refuses capturable on a CPU; differentiable takes the same formula there.
    flag = "differentiable" if optim is torch.optim else "capturable"
    param.requires_grad_(optim is not torch.optim)
    optimizer = optim.Adam([param], lr=0.0, **{flag: True})
    optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_t12_one_cycle_leaves_a_tensor_beta_beside_a_float() -> None:
    # What torch's scheduler writes is no constructor's argument; a step takes it all the same.
    ends = []
    for kind in (float, torch.tensor):
        param = ones()
        betas = tuple(kind(torch.tensor(beta).item()) for beta in (0.9, 0.99))
        optimizer = fusedreg.Adam([param], betas=betas)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
        for _ in range(3):
            optimizer.step()
            scheduler.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.add_param_group({"params": [ones()], "betas": optimizer.param_groups[0]["betas"]})
        optimizer.step()
        ends.append(frozen([optimizer.param_groups[0]["params"], optimizer.state[param]]))
    assert isinstance(optimizer.param_groups[0]["betas"][0], float)
    assert isinstance(optimizer.param_groups[0]["betas"][1], torch.Tensor)
    assert ends[0] == ends[1]


@fault(raises=AttributeError)
def test_t13_a_scheduler_takes_a_compiled_step(optim: ModuleType) -> None:
    param = ones()
    optimizer = optim.AdamW([param], lr=0.1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for done in range(1, 4):
        optimizer.step()
        scheduler.step()  # would warn, and so fail here, had it not seen the optimizer's step
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**done
        assert optimizer.state[param]["step"] == done


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One CPU rank."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@fault(raises=NotImplementedError)
def test_t14_fused_sgd_takes_a_dtensor(optim: ModuleType, mesh: DeviceMesh) -> None:
    param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    optimizer = optim.SGD([param], lr=0.5, momentum=0.9, fused=True)
    optimizer.step()
    assert torch.equal(param.full_tensor(), torch.full((4, 3), 0.5))
    assert isinstance(optimizer.state[param]["momentum_buffer"], DTensor)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_t14_dtensors_step_and_clip_as_tensors_do(name: str, mesh: DeviceMesh, path: str) -> None:
    whole, plain = torch.randn(4, 3), torch.randn(2)
    options = {"lr": 0.1, "l1": 0.1, "max_grad_norm": 0.5}
    runs = []
    for place in (lambda x: x, lambda x: distribute_tensor(x, mesh, [Shard(0)])):
        # A plain tensor beside it: torch's clip_grad_norm_ refuses to mix them.
        params = [nn.Parameter(place(whole.clone())), nn.Parameter(plain.clone())]
        optimizer = getattr(fusedreg, name)(params, **options, **PATHS[path])
        for seed in range(3):
            torch.manual_seed(seed)
            params[0].grad, params[1].grad = place(torch.randn(4, 3)), torch.randn(2)
            optimizer.step()
        runs.append([params[0], params[1], optimizer.grad_norm])
    (expected, *plain), (actual, *beside) = runs
    assert torch.equal(actual.full_tensor(), expected)
    assert frozen(beside) == frozen(plain)


@fault(raises=RuntimeError)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_t15_clipping_takes_an_empty_tensor(optim: ModuleType, dtype: torch.dtype) -> None:
    params = [ones(0, dtype), ones(4, dtype), ones(0, dtype)]
    if optim is torch.optim:
        nn.utils.clip_grad_norm_(params, 1.0, norm_type=math.inf)
    optimizer = fusedreg.SGD(params, lr=1.0, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm == 2.0
    factor = torch.tensor(1 / (2 + 1e-6), dtype=torch.float64).to(dtype)
    assert torch.equal(params[1], 1 - factor.expand(4))


@fault()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_t16_fused_sgd_updates_every_element(
    optim: ModuleType, dtype: torch.dtype, momentum: float
) -> None:
    param = ones(100, dtype)
    optimizer = optim.SGD([param], lr=0.5, momentum=momentum, fused=True)
    optimizer.step()
    assert torch.equal(param, torch.full((100,), 0.5, dtype=dtype))
    if momentum:
        assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.ones(100, dtype=dtype))


@fault()
@pytest.mark.parametrize("fused", [None, False])
def test_t17_norm_of_a_large_tensor_is_exact(optim: ModuleType, fused: bool | None) -> None:
    """To the rounding of `grad_norm` to float32; torch, summing in float32, is 1.3e-4 short."""
    param = ones(5_000_000)
    param.grad = torch.randn(5_000_000)
    exact = param.grad.double().square().sum().sqrt()
    if optim is torch.optim:
        norm = nn.utils.clip_grad_norm_(param, math.inf)
    else:
        optimizer = fusedreg.SGD([param], max_grad_norm=math.inf, fused=fused)
        optimizer.step()
        norm = optimizer.grad_norm
    assert abs(norm / exact - 1) <= 2.0**-24


def test_sparsity_counts_dtensors(mesh: DeviceMesh) -> None:
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [2.0, 3.0, 4.0]]))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    assert fusedreg.sparsity(layer)["weight"] == (2, 6)
