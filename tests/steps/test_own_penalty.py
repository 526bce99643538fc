"""A penalty that the package does not have, written as a user would, works on every path.

It is a bound, |w| <= bound: the penalty is 0 inside and infinite outside, and its proximal operator
is the projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, TypedDict

import pytest
import torch
from torch import Tensor

import fusedreg
from fusedreg.kernels.language import tl, triton
from fusedreg.options import Option
from fusedreg.penalties import Penalty, Term, kkt_distance
from fusedreg.scalars import Number

from cases import CLASSES, FULL, PATHS, parameters, run, set_grads

INFINITY = float("inf")


@triton.jit
def project(w, rate, mass, gain, numbers):
    """The nearest number within the bound; a bound of 0 is none."""
    bound = numbers[0].to(w.dtype)
    inside = tl.where(w > bound, bound, tl.where(w < -bound, -bound, w))
    return tl.where(bound == 0.0, w, inside)


def check_bound(group: Mapping[str, Any], name: str, _: bool) -> None:
    if not group[name] > 0:
        raise ValueError(f"Invalid {name} value: {group[name]} (expected a number > 0)")


class BoundOptions(TypedDict, total=False):
    bound: Annotated[float, Option(INFINITY, check_bound)]


class Bound(Penalty):
    """The constraint |w| <= bound."""

    options = BoundOptions

    def terms(self, group: Mapping[str, Any]) -> Iterable[Term]:
        if group["bound"] < INFINITY:
            yield Term("prox", project, (group["bound"],), uses_gain=False)

    def prox(self, settings: Mapping[str, Any], w: Tensor, rate: Number, gain: Number) -> Tensor:
        return w.clamp(-settings["bound"], settings["bound"])

    def value(self, settings: Mapping[str, Any], w: Tensor) -> Tensor:
        outside = (w.abs() > settings["bound"]).any()
        return torch.where(outside, INFINITY, 0.0)

    def subdifferential(self, settings: Mapping[str, Any], w: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.where(w > -settings["bound"], 0.0, -INFINITY)
        high = torch.where(w < settings["bound"], 0.0, INFINITY)
        return low, high


@cache
def bounded(cls: type[fusedreg.FusedOptimizer]) -> Any:
    """A class with a bound beside its other penalties."""

    class Bounded(cls):  # type: ignore[misc, valid-type]  # a base that is a variable
        penalties = (*cls.penalties, Bound())

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)

    return Bounded


def on_path(cls: Any, path: str) -> Any:
    return lambda params, **options: cls(params, **{**PATHS[path], **options})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("path", ["reference", "default", "fused"])
def test_a_step_is_projected(path: str, cls: Any, dtype: torch.dtype) -> None:
    """The bits are those of a step without the bound, clamped, whatever else the class does."""
    options = {**FULL[cls].kwargs, "max_grad_norm": 1.0}
    ours, free = parameters(dtype=dtype), parameters(dtype=dtype)
    optimizer = on_path(bounded(cls), path)(ours, bound=0.5, **options)
    twin = on_path(cls, path)(free, **options)
    reached = False
    for seed in range(3):
        set_grads(ours, seed)
        set_grads(free, seed)
        optimizer.step()
        twin.step()
        with torch.no_grad():
            for param, other in zip(ours, free, strict=True):
                other.clamp_(-0.5, 0.5)
                assert torch.equal(param, other)
                reached |= bool((param.abs() == 0.5).any())
    assert reached
    assert optimizer.backend == twin.backend
    assert optimizer.launches == twin.launches


@pytest.mark.parametrize("path", ["reference", "default", "fused"])
def test_the_fixed_point_is_optimal(path: str) -> None:
    """Of ||w - target||^2 / 2 with L1, L2 and the bound: the KKT distance goes to 0."""
    target = torch.tensor([3.0, -0.2, 0.05, -4.0], dtype=torch.float64)
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    cls = bounded(fusedreg.SGD)
    optimizer = on_path(cls, path)([w], lr=0.5, l1=0.1, weight_decay=0.5, bound=1.0)
    for _ in range(60):
        w.grad = w.detach() - target
        optimizer.step()
    assert w.tolist() == pytest.approx([1.0, -0.1 / 1.5, 0.0, -1.0], abs=1e-12)
    group, grad = optimizer.param_groups[0], w.detach() - target
    assert kkt_distance(cls.penalties, group, w.detach(), grad).max() < 1e-12
    moved = w.detach() + torch.tensor([-0.1, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert kkt_distance(cls.penalties, group, moved, moved - target).max() > 1
    assert sum(penalty.value(group, w.detach()) for penalty in cls.penalties) == pytest.approx(
        0.1 * w.abs().sum().item() + 0.25 * (w**2).sum().item()
    )


def test_without_the_bound_its_distance_is_that_of_the_functions() -> None:
    """penalties.kkt_distance and fusedreg.penalty.kkt_distance say the same of the elastic net."""
    w, grad = torch.randn(50), torch.randn(50)
    w[::3] = 0.0
    optimizer = fusedreg.SGD([w.requires_grad_()], lr=0.1, l1=0.3, weight_decay=0.7)
    ours = kkt_distance(optimizer.penalties, optimizer.param_groups[0], w.detach(), grad)
    expected = fusedreg.penalty.kkt_distance(w.detach(), grad, l1=0.3, weight_decay=0.7)
    # Both sum three numbers of at most 4, in another order.
    assert (ours - expected).abs().max() <= 2 * 2**-22


@pytest.mark.parametrize("path", ["reference", "default", "fused"])
def test_a_group_without_the_bound_keeps_every_bit(path: str) -> None:
    """One launch serves both groups; a bound may be turned on later and off again."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    ours, free = parameters(shapes=[(4,), (9,)]), parameters(shapes=[(4,), (9,)])
    groups = [{"params": ours[:1], "bound": 0.25}, {"params": ours[1:]}]
    optimizer = on_path(bounded(fusedreg.SGD), path)(groups, **options)
    twin = on_path(fusedreg.SGD, path)(free, **options)
    run(optimizer, 2)
    run(twin, 2)
    assert ours[0].abs().max() == 0.25
    assert torch.equal(ours[1], free[1])
    assert optimizer.launches == twin.launches
    optimizer.param_groups[1]["bound"] = 0.125
    run(optimizer, 1)
    assert ours[1].abs().max() == 0.125
    optimizer.param_groups[1]["bound"] = INFINITY
    run(optimizer, 3)
    assert ours[1].abs().max() > 0.125


@pytest.mark.parametrize("path", ["default", "fused"])
def test_more_penalties_than_a_launch_has_slots_for_take_two(path: str) -> None:
    modes: list[dict[str, Any]] = [{"l1_mode": "prox"}, {"l1_mode": "decoupled"}]
    results = []
    for fused in (False, PATHS[path].get("fused")):
        params = parameters(shapes=[(7,), (7,)])
        groups = [{"params": [p], **mode} for p, mode in zip(params, modes, strict=True)]
        optimizer = bounded(fusedreg.SGD)(groups, lr=0.1, l1=0.3, bound=0.5, fused=fused)
        run(optimizer, 3)
        results.append([param.detach().clone() for param in params])
    assert optimizer.launches == 4  # rows and step, of each
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_its_option_is_one_like_any_other() -> None:
    cls = bounded(fusedreg.AdamW)
    assert inspect.signature(cls).parameters["bound"].default == INFINITY
    with pytest.raises(ValueError, match=r"Invalid bound value: 0\.0"):
        cls(parameters(), bound=0.0)
    with pytest.raises(TypeError, match=r"'bond'.*Did you mean 'bound'"):
        cls(parameters(), bond=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bound'"):
        fusedreg.AdamW(parameters(), bound=1.0)  # type: ignore[call-arg]
    optimizer = cls(parameters(), bound=0.5)
    run(optimizer, 1)
    again = cls(parameters())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["bound"] == 0.5
