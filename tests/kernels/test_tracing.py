"""Steps that a mode of torch looks at: fake tensors, the meta device, make_fx, torch.compile.

Such a mode sees operations and no memory, so the reference path steps there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fusedreg

from cases import CLASSES, FULL, PLAIN, Case, each_case
from compare import frozen, refused

EACH = [*PLAIN.values(), *FULL.values()]


def train(model: nn.Module, optimizer: Any, device: str = "cpu") -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5, device=device)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("clip", [None, 1.0])
@each_case(EACH)
def test_fake_tensors_are_stepped_by_their_shapes(
    case: Case, path: str, clip: float | None
) -> None:
    with FakeTensorMode():
        model = nn.Linear(5, 2)
        optimizer = case.make(model.parameters(), path, max_grad_norm=clip, skip_nonfinite=True)
        train(model, optimizer)
        state = optimizer.state[model.weight]
        names = {*optimizer.states(optimizer.param_groups[0])}
        assert names <= state.keys()
        assert all(isinstance(value, FakeTensor) for value in state.values())
        assert all(state[name].shape == model.weight.shape for name in names)


@each_case(EACH)
def test_meta_tensors_are_stepped_by_their_shapes(case: Case, path: str) -> None:
    model = nn.Linear(5, 2, device="meta")
    optimizer = case.make(model.parameters(), path, max_grad_norm=1.0)
    train(model, optimizer, "meta")
    for name in optimizer.states(optimizer.param_groups[0]):
        assert optimizer.state[model.weight][name].is_meta


@pytest.mark.parametrize("cls", CLASSES)
def test_memory_is_estimated_before_training(cls: Any) -> None:
    """torch's own tool for that, with the states that it counts as the optimizer's."""
    from torch.distributed._tools.mem_tracker import MemTracker  # noqa: PLC0415  # not public

    with FakeTensorMode():
        model = nn.Linear(500, 200)
        optimizer = PLAIN[cls].make(model.parameters(), "default")
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(torch.randn(4, 500)).sum().backward()
            optimizer.step()
        kept = tracker.get_tracker_snapshot("current")[torch.device("cpu")]
    (states,) = (size for kind, size in kept.items() if "opt" in str(kind).lower())
    moments = len(optimizer.states(optimizer.param_groups[0]))
    size = 4 * sum(param.numel() for param in model.parameters())
    assert moments * size <= states <= moments * size + 100  # counts


@each_case(EACH)
def test_make_fx_records_the_update(case: Case, path: str) -> None:
    """Also of counts: a graph that is run twice has counted twice."""

    def begun(how: str) -> tuple[Any, nn.Parameter]:
        param = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = case.make([param], how)
        param.grad = torch.ones(5)
        optimizer.step()
        return optimizer, param

    (optimizer, param), (expected, twin) = begun(path), begun("reference")

    def step(grad: torch.Tensor) -> torch.Tensor:
        param.grad = grad
        optimizer.step()
        return param.detach().clone()

    grads = [torch.linspace(2, -3, 5) * k for k in (1, 2, 3)]
    graph = make_fx(step)(grads[0])  # which steps once too
    with torch.no_grad():
        for grad in grads[1:]:
            graph(grad)
    for grad in grads:
        twin.grad = grad
        expected.step()
    torch.testing.assert_close(param, twin, rtol=1e-6, atol=1e-6)  # 8 ulp
    assert frozen(optimizer.state[param].get("step")) == frozen(expected.state[twin].get("step"))


def test_a_mode_that_counts_operations_sees_the_step(path: str) -> None:
    optimizer = PLAIN[fusedreg.Adam].make([nn.Parameter(torch.ones(3))], path)
    (param,) = optimizer.param_groups[0]["params"]
    for _ in range(2):
        param.grad = torch.ones(3)
        with FlopCounterMode(display=False):
            optimizer.step()
        optimizer.step()
    assert optimizer.state[param]["step"] == 4


def test_a_real_parameter_is_no_fake_one(path: str) -> None:
    """torch's operations would leave it as it is, in silence."""
    param = nn.Parameter(torch.ones(3))
    optimizer = PLAIN[fusedreg.SGD].make([param], path)
    param.grad = torch.ones(3)
    with (
        refused(optimizer, RuntimeError, "inside a FakeTensorMode", "step outside of it"),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_is_constructed_inside_a_compiled_function(cls: Any) -> None:
    torch._dynamo.reset()
    param = nn.Parameter(torch.ones(4))

    @torch.compile(backend="eager")
    def make(param: nn.Parameter) -> Any:
        return cls([param], lr=0.125)

    optimizer, plain = make(param), nn.Parameter(torch.ones(4))
    expected = cls([plain], lr=0.125)
    for each, p in ((optimizer, param), (expected, plain)):
        p.grad = torch.ones(4)
        each.step()
    assert frozen(param) == frozen(plain)
