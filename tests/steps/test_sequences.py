"""Steps of every kind after steps of every kind, with gradients that stay where they are.

Nothing then has to be sent again, so what a step believes to be as in the last must be so.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fusedreg

from cases import FULL, PLAIN, Case, each_case, set_grads
from compare import parameters_of


def step_plainly(optimizer: Any) -> None:
    optimizer.step()


def step_told(optimizer: Any, **numbers: float) -> None:
    """As GradScaler tells: `grad_scale`, `found_inf` or both."""
    for name, number in numbers.items():
        setattr(optimizer, name, torch.tensor(number))
    optimizer.step()
    for name in numbers:
        delattr(optimizer, name)


def step_with(optimizer: Any, **own: Any) -> None:
    before = {name: getattr(optimizer, name) for name in own}
    for name, value in own.items():
        setattr(optimizer, name, value)
    optimizer.step()
    for name, value in before.items():
        setattr(optimizer, name, value)


def step_nonfinite(optimizer: Any, **own: Any) -> None:
    """The gradient is NaN in place, and then what it was."""
    grad = parameters_of(optimizer)[0].grad
    assert grad is not None
    kept = grad.clone()
    grad.fill_(math.nan)
    step_with(optimizer, skip_nonfinite=True, **own)
    grad.copy_(kept)


def step_without(optimizer: Any, index: int) -> None:
    """One parameter has no gradient; the last one may be on the reference path."""
    param = parameters_of(optimizer)[index]
    grad, param.grad = param.grad, None
    optimizer.step()
    param.grad = grad


KINDS: dict[str, Callable[[Any], None]] = {
    "plain": step_plainly,
    "scaled": functools.partial(step_told, grad_scale=4.0),
    "scaled_and_finite": functools.partial(step_told, grad_scale=4.0, found_inf=0.0),
    "overflowed": functools.partial(step_told, grad_scale=4.0, found_inf=1.0),
    "clipped": functools.partial(step_with, max_grad_norm=0.2),
    "measured": functools.partial(step_with, max_grad_norm=math.inf),
    "skipped": step_nonfinite,
    "without_first": functools.partial(step_without, index=0),
    "without_last": functools.partial(step_without, index=-1),
}


def after(case: Case, path: str, kinds: tuple[str, ...], steps: Any, beside: bool) -> Any:
    """An optimizer after steps of these kinds; `beside`: the reference has a parameter too."""
    params = [nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (5, 3)]
    if beside:
        params.append(nn.Parameter(torch.ones(4, 4, dtype=torch.float64)[:, ::2]))  # with gaps
    optimizer = case.make(params, path)
    set_grads(params, 7)
    optimizer.step()
    for kind in kinds:
        steps[kind](optimizer)
    return optimizer


def assert_same(case: Case, path: str, kinds: tuple[str, ...], steps: Any, beside: bool) -> None:
    found, expected = (after(case, how, kinds, steps, beside) for how in (path, "reference"))
    for mine, theirs in zip(parameters_of(found), parameters_of(expected), strict=True):
        # A lost, repeated or scaled step is far beyond what roundings of four steps can do.
        torch.testing.assert_close(
            mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda m: f"{kinds} {m}"
        )
        for name, value in found.state[mine].items():
            torch.testing.assert_close(value, expected.state[theirs][name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beside", [False, True])
@each_case([PLAIN[fusedreg.SGD], FULL[fusedreg.Adam]])
def test_no_step_repeats_what_another_was_told(case: Case, beside: bool) -> None:
    for kinds in itertools.product(KINDS, repeat=3):
        assert_same(case, "default", kinds, KINDS, beside)


@each_case([FULL[fusedreg.SGD], PLAIN[fusedreg.LAMB]])
def test_no_step_repeats_what_another_was_told_in_pairs(case: Case, path: str) -> None:
    for kinds in itertools.product(KINDS, repeat=2):
        assert_same(case, path, (*kinds, "plain"), KINDS, beside=False)


@pytest.fixture
def _ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as ranks.py
    dist.init_process_group("cpu:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_ranks")
@each_case([PLAIN[fusedreg.SGD], PLAIN[fusedreg.Adam]])
def test_no_step_repeats_what_another_was_told_over_ranks(case: Case) -> None:
    """The norm of several ranks comes as a scale, and not from the launches."""
    ranks = {"process_group": dist.group.WORLD}
    steps = {
        "plain": step_plainly,
        "scaled": KINDS["scaled"],
        "clipped": functools.partial(step_with, max_grad_norm=0.2, **ranks),
        "skipped": functools.partial(step_nonfinite, **ranks),
    }
    for kinds in itertools.product(steps, repeat=3):
        assert_same(case, "default", kinds, steps, beside=False)


# ---- what a step leaves to others ----------------------------------------------------------------


def test_a_parameter_without_a_gradient_keeps_its_version(path: str) -> None:
    """Another loss may still go back through it: two losses in turn, or experts."""
    a, b = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = PLAIN[fusedreg.Adam].make([a, b], path)
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    a.grad = b.grad = None
    loss = (b * b).sum()
    (a * a).sum().backward()
    version = b._version
    optimizer.step()
    assert b._version == version
    loss.backward()
    other = (a * a).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("fused", [None, False])
def test_parameters_of_inference_mode_are_stepped(fused: bool | None) -> None:
    with torch.inference_mode():
        param = nn.Parameter(torch.ones(3))
        optimizer = fusedreg.SGD([param], lr=0.25, fused=fused)
        param.grad = torch.ones(3)
        optimizer.step()
        assert (param == 0.75).all()


def calls(cls: Any, path: str) -> int:
    """How often a hook is called in one step."""
    param = nn.Parameter(torch.ones(2))
    case = PLAIN[fusedreg.AdamW]
    made = {"lr": 0.1, "fused": case.make([torch.ones(1)], path).param_groups[0]["fused"]}
    optimizer, called = cls([param], **made), [0]

    def hook(*_: Any) -> None:
        called[0] += 1

    optimizer.register_step_post_hook(hook)
    param.grad = torch.ones(2)
    optimizer.step()
    return called[0]


def test_hooks_are_called_once_however_a_step_is_wrapped(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(fusedreg.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Wrapped(fusedreg.AdamW):
        step = torch.no_grad()(fusedreg.AdamW.step)

    assert [calls(cls, path) for cls in (fusedreg.AdamW, Own, Wrapped)] == [1, 1, 1]
    original = fusedreg.AdamW.step

    @functools.wraps(original)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    monkeypatch.setattr(fusedreg.AdamW, "step", timed)
    assert calls(fusedreg.AdamW, path) == 1
