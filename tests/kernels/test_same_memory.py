"""The same address with another meaning, and other addresses with the same.

Everything that decides how memory is read is compared in every step: shape, strides, dtype and
address of parameters, gradients and states.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fusedreg

from cases import FULL, PLAIN, Case, each_case
from compare import frozen, refused

EACH = [*PLAIN.values(), *FULL.values()]


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape) / 7


def begun(case: Case, path: str, shape: tuple[int, ...] = (4, 4)) -> tuple[Any, nn.Parameter]:
    """An optimizer after two steps of one parameter, whose elements are told apart."""
    param = nn.Parameter(numbered(*shape))
    optimizer = case.make([param], path)
    for _ in range(2):
        param.grad = numbered(*shape).flip(0)
        optimizer.step()
    return optimizer, param


def moments(optimizer: Any, param: nn.Parameter) -> dict[str, torch.Tensor]:
    names = optimizer.states(optimizer.param_groups[0])
    return {name: optimizer.state[param][name] for name in names}


@pytest.mark.parametrize("what", ["param", "grad", "state"])
@pytest.mark.parametrize("in_place", [False, True])
@each_case(EACH)
def test_transposed_memory_is_read_as_it_lies(
    case: Case, path: str, what: str, in_place: bool
) -> None:
    """One element of each row would be that of a column. Address and size do not tell."""
    (optimizer, param), (expected, twin) = begun(case, path), begun(case, "reference")

    def transpose(x: torch.Tensor) -> torch.Tensor:
        if in_place:
            x.data = x.data.t()
            return x
        return x.t()

    for each, p in ((optimizer, param), (expected, twin)):
        if what == "param":
            p.data = p.data.t()
            p.grad = numbered(4, 4).flip(1)
        elif what == "grad":
            p.grad = numbered(4, 4).flip(1)
            each.step()
            p.grad.data = p.grad.data.t()
        else:
            p.grad = numbered(4, 4).flip(1)
            for name, value in moments(each, p).items():
                each.state[p][name] = transpose(value)
        each.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)  # 8 ulp of the largest weight
    for name, value in moments(optimizer, param).items():
        torch.testing.assert_close(value, expected.state[twin][name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("change", ["another_shape", "two_dimensions_less"])
@each_case(EACH)
def test_a_reshaped_parameter_goes_on_only_with_a_state_that_fits(
    case: Case, path: str, change: str
) -> None:
    optimizer, param = begun(case, path, (3, 4))
    shape = {"another_shape": (4, 3), "two_dimensions_less": (12,)}[change]
    param.grad = None
    param.data = param.data.view(shape)
    param.grad = numbered(*shape)
    if moments(optimizer, param):
        with refused(optimizer, RuntimeError, "must match the size of the parameter"):
            optimizer.step()
        del optimizer.state[param]
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(value.shape == shape for value in moments(optimizer, param).values())


@each_case(EACH)
def test_a_gradient_of_another_shape_is_refused_also_in_the_same_memory(
    case: Case, path: str
) -> None:
    optimizer, param = begun(case, path, (3, 4))
    assert param.grad is not None
    param.grad.data = param.grad.data.view(4, 3)
    with refused(optimizer, RuntimeError, "must match the size of the parameter"):
        optimizer.step()


@pytest.mark.parametrize("what", ["param", "state"])
@each_case(EACH)
def test_another_dtype_in_the_same_memory_is_read_as_such(case: Case, path: str, what: str) -> None:
    """Half of the bytes are left as they are."""
    (optimizer, param), (expected, twin) = begun(case, path), begun(case, "reference")
    for each, p in ((optimizer, param), (expected, twin)):
        p.grad = None
        for tensor in [p] if what == "param" else moments(each, p).values():
            values = tensor.data.to(torch.bfloat16)
            narrow = torch.empty(0, dtype=torch.bfloat16).set_(
                tensor.untyped_storage(), 0, tensor.shape, tensor.stride()
            )
            tensor.data = narrow.copy_(values)
        p.grad = numbered(4, 4).to(p.dtype)
        each.step()
    assert param.dtype == twin.dtype
    torch.testing.assert_close(param, twin, rtol=2**-7, atol=2**-7)  # 2 ulp of bfloat16
    for name, value in moments(optimizer, param).items():
        torch.testing.assert_close(value, expected.state[twin][name], rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("what", ["param", "grad", "state"])
def test_freed_storage_is_refused(path: str, what: str) -> None:
    """FullyShardedDataParallel frees storage of a parameter that is not needed now."""
    optimizer, param = begun(PLAIN[fusedreg.Adam], path)
    tensor = {"param": param, "grad": param.grad, "state": optimizer.state[param]["exp_avg"]}[what]
    assert tensor is not None
    if path in ("reference", "device"):
        pytest.skip("torch's operations see to it")
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory: its storage was freed"):
        optimizer.step()


@each_case(EACH)
def test_moved_tensors_are_followed_without_a_new_plan(case: Case, path: str) -> None:
    (optimizer, param), (stayed, twin) = begun(case, path), begun(case, path)
    plan = optimizer._stepper.plan
    for seed in range(3):
        for name, value in moments(optimizer, param).items():
            optimizer.state[param][name] = value.clone()
        param.data = param.data.clone()
        for p in (param, twin):
            p.grad = numbered(4, 4) * (seed - 1)
        optimizer.step()
        stayed.step()
    assert frozen(param) == frozen(twin)
    assert frozen(optimizer.state[param]) == frozen(stayed.state[twin])
    assert optimizer._stepper.plan is plan


def test_without_torchs_guards_every_tensor_is_looked_at(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusedreg.engine.watch, "TensorGuards", None)
    for case in (PLAIN[fusedreg.Adam], FULL[fusedreg.SGD]):
        test_moved_tensors_are_followed_without_a_new_plan(case, path)
        test_transposed_memory_is_read_as_it_lies(case, path, "param", in_place=True)


def test_what_torchs_guards_call_another_tensor_may_be_the_same(path: str) -> None:
    """They compare requires_grad and autocast too, which change nothing of memory."""
    optimizer, param = begun(PLAIN[fusedreg.Adam], path)
    plan = optimizer._stepper.plan
    param.requires_grad_(False)
    optimizer.step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    assert optimizer._stepper.plan is plan
