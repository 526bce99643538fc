"""What a class in a module of one's own may do with options, counts and rules, on every path."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch

import fusedreg
from fusedreg.kernels.language import tl, triton  # noqa: F401  # the interpreter asks for tl
from fusedreg.kernels.rules import Rule
from fusedreg.scalars import Count

from cases import PATHS, set_grads


@triton.jit
def first_option(options, counts):
    return 1.0, (options[0],), counts


@triton.jit
def counting(options, counts):
    return 1.0, (options[0],), (counts[0] + 1.0,)


@triton.jit
def counting_second(options, counts):
    t = counts[1] + 1.0
    return 1.0, (t,), (counts[0], t)


@triton.jit
def scaled(g, states, scalars):
    return g * scalars[0].to(g.dtype), 1.0, ()


class Scaled(fusedreg.FusedOptimizer):
    """A step along the gradient times an option, which is a number, a pair or missing."""

    device_options = ("factor",)

    def __init__(self, params: Any, lr: float = 0.5, factor: Any = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "factor": factor}, **options)

    def device_rule(self, group: Any) -> Rule | None:
        known = isinstance(group["factor"], float)
        return Rule(first_option, scaled, width=1) if known else None

    def update(self, settings: Any, state: Any, grad: Any) -> Any:
        factor = settings["factor"]
        if factor is None:
            return grad, 1.0, {}
        return grad * (factor[0] if isinstance(factor, tuple) else factor), 1.0, {}


def step(optimizer: Any) -> list[float]:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    optimizer.step()
    return [param.item() for group in optimizer.param_groups for param in group["params"]]


def ones(count: int) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(())) for _ in range(count)]


@pytest.mark.parametrize("path", ["default", "fused"])
def test_groups_that_kernels_do_not_step_have_no_numbers_there(path: str) -> None:
    """Their options may be missing, or be more numbers than those of the others."""
    factors = [0.5, None, (0.25, 0.0, 0.0), 2.0]
    groups = [{"params": [w], "factor": x} for w, x in zip(ones(4), factors, strict=True)]
    optimizer = Scaled(groups, **PATHS[path])
    assert step(optimizer) == [0.75, 0.5, 0.875, 0.0]
    assert optimizer.backend == {"default": "llvm", "fused": "triton"}[path] + " and reference"


def test_the_lr_may_be_an_option_of_the_rule(path: str) -> None:
    """A schedule then changes it in both places."""

    class Squared(Scaled):
        device_options = ("lr",)

        def device_rule(self, group: Any) -> Rule:
            return Rule(first_option, scaled, width=1)

        def update(self, settings: Any, state: Any, grad: Any) -> Any:
            return grad * settings["lr"], 1.0, {}

    optimizer = Squared(ones(1), lr=1.0, **PATHS.get(path, {}))
    found = []
    for lr in (1.0, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = lr
        found += step(optimizer)
    assert found == [0.0, -0.25, -0.3125]


class Late(Scaled):
    """It counts the steps in which an option asks for it."""

    counts = MappingProxyType({"seen": Count()})
    late_states = ("seen",)

    def __init__(self, params: Any, lr: float = 0.5, count: bool = False, **options: Any) -> None:
        super(Scaled, self).__init__(params, {"lr": lr, "factor": 1.0, "count": count}, **options)

    def device_rule(self, group: Any) -> Rule:
        return Rule(counting, scaled, width=1)

    def counts_of(self, group: Any) -> tuple[str, ...]:
        return ("seen",) if group["count"] else ()

    def update(self, settings: Any, state: Any, grad: Any) -> Any:
        return grad, 1.0, {"seen": state["seen"] + 1} if "seen" in state else {}


def test_a_count_that_is_turned_on_later_is_created_then(path: str) -> None:
    optimizer = Late(ones(1), **PATHS.get(path, {}))
    for count in (False, True, True):
        optimizer.param_groups[0]["count"] = count
        step(optimizer)
    (state,) = optimizer.state.values()
    assert state["seen"] == 2


def test_update_alone_is_a_whole_optimizer(path: str) -> None:
    class Plain(fusedreg.FusedOptimizer):
        def update(self, settings: Any, state: Any, grad: Any) -> Any:
            return grad, 1.0, {}

    params = ones(2)
    optimizer = Plain(params, {"lr": 0.5}, **PATHS.get(path, {}))
    set_grads(params, seed=1)
    assert step(optimizer) == [0.5, 0.5]
    assert (optimizer.backend, optimizer.launches) == ("reference", 0)


def test_a_subclass_may_count_more_than_its_parent(path: str) -> None:
    class Counting(fusedreg.SGD):
        counts = MappingProxyType({**fusedreg.SGD.counts, "step": Count()})

        def device_rule(self, group: Any) -> Rule:
            return Rule(counting_second, scaled, width=1)

        def update(self, settings: Any, state: Any, grad: Any) -> Any:
            step = state["step"] + 1
            return grad * step, 1.0, {"step": step}

    optimizer = Counting(ones(1), lr=1.0, **PATHS.get(path, {}))
    assert [step(optimizer)[0] for _ in range(3)] == [0.0, -2.0, -5.0]


def test_a_loaded_buffer_stays_where_another_state_is_new(path: str) -> None:
    """Dampening leaves the first gradient alone, and this one is not the first."""

    class More(fusedreg.SGD):
        counts = MappingProxyType({**fusedreg.SGD.counts, "seen": Count()})
        late_states = (*fusedreg.SGD.late_states, "seen")

        def counts_of(self, group: Any) -> tuple[str, ...]:
            return (*super().counts_of(group), "seen")

        def device_rule(self, group: Any) -> None:
            return None

        def update(self, settings: Any, state: Any, grad: Any) -> Any:
            return super().update(settings, state, grad)

    options = {"lr": 0.125, "momentum": 0.5, "dampening": 0.5}
    theirs = torch.optim.SGD(ones(1), **options)
    step(theirs)
    params = [torch.nn.Parameter(param.detach().clone()) for param in ones(1)]
    optimizer = More(params, **options, **PATHS.get(path, {}))
    optimizer.load_state_dict(theirs.state_dict())
    params[0].data.copy_(theirs.param_groups[0]["params"][0].detach())
    assert step(optimizer) == step(theirs)
