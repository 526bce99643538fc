"""What stands around a step: hooks, closures, names, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedreg

from cases import CASES, PATHS, SOME, Case, each_case, parameters, run, set_grads, tensors
from compare import frozen, parameters_of, results, snapshot

SHAPES = [(0,), (5, 3), (), (17,)]


def test_hooks_run_in_torchs_order_and_see_final_parameters(path: str) -> None:
    seen: list[tuple[str, float]] = []
    optimizer = fusedreg.SGD([nn.Parameter(torch.ones(()))], lr=0.5, l1=10.0, **PATHS[path])
    (param,) = parameters_of(optimizer)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, param.item()))

    def closure() -> float:
        assert torch.is_grad_enabled()
        seen.append(("closure", param.item()))
        optimizer.zero_grad()
        (2 * param).backward()
        return 7.0

    handles = [
        register_optimizer_step_pre_hook(note("global_pre")),
        register_optimizer_step_post_hook(note("global_post")),
    ]
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    try:
        assert optimizer.step(closure) == 7.0
    finally:
        for handle in handles:
            handle.remove()
    before = [("global_pre", 1.0), ("pre", 1.0), ("closure", 1.0)]
    # The threshold is part of the step: a hook that averages parameters sees the exact zero.
    assert seen == [*before, ("post", 0.0), ("global_post", 0.0)]


def test_pre_hook_may_rewrite_the_arguments(path: str) -> None:
    optimizer = fusedreg.AdamW(parameters(), **PATHS[path])
    optimizer.register_step_pre_hook(lambda opt, *_: ((opt, lambda: 3.0), {}))
    assert optimizer.step(lambda: 1.0) == 3.0
    assert optimizer.step() == 3.0


@each_case(SOME)
def test_closure_makes_the_gradients_that_are_clipped_and_used(case: Case, path: str) -> None:
    ends = []
    for with_closure in (False, True):
        optimizer = case.make(parameters(shapes=SHAPES), path, max_grad_norm=0.5)
        params = parameters_of(optimizer)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023  # called in this turn of the loop only
            loss = sum(param.square().sum() for param in params)  # noqa: B023
            loss.backward()
            return loss

        with torch.no_grad():  # step enables grad for the closure
            for _ in range(2):
                if with_closure:
                    expected = sum(param.square().sum() for param in params)
                    assert torch.equal(optimizer.step(closure), expected)
                else:
                    with torch.enable_grad():
                        closure()
                    assert optimizer.step() is None
        ends.append(snapshot(optimizer))
    assert ends[0] == ends[1]


def test_gradients_are_not_recorded(path: str) -> None:
    optimizer = fusedreg.AdamW(parameters(), l1=0.1, max_grad_norm=1.0, **PATHS[path])
    run(optimizer, 1)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(value.requires_grad for value in [*states, optimizer.grad_norm])
    assert all(param.is_leaf and param.requires_grad for param in parameters_of(optimizer))


@each_case(SOME)
def test_named_parameters_step_as_unnamed_ones(case: Case, path: str) -> None:
    named = [(f"layer.{i}", param) for i, param in enumerate(parameters())]
    optimizers = case.make(named, path), case.make(parameters(), path)
    for optimizer in optimizers:
        run(optimizer, 2)
    assert results(optimizers[0]) == results(optimizers[1])
    assert optimizers[0].param_groups[0]["param_names"] == [name for name, _ in named]
    assert optimizers[0].state_dict()["param_groups"][0]["param_names"][0] == "layer.0"


@each_case(SOME)
def test_duplicate_in_a_group_is_stepped_and_counted_once(case: Case, path: str) -> None:
    (once,), (twice,) = parameters(shapes=[(3,)]), parameters(shapes=[(3,)])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        double = case.make([twice, twice], path, max_grad_norm=0.5)
    single = case.make([once], path, max_grad_norm=0.5)
    for seed in range(2):
        set_grads([once], seed)
        twice.grad = once.grad.clone()
        single.step()
        double.step()
    assert frozen([twice, double.grad_norm]) == frozen([once, single.grad_norm])
    assert frozen(double.state.get(twice)) == frozen(single.state.get(once))


@each_case(CASES)
def test_repr_shows_every_option_of_every_group(case: Case) -> None:
    params = parameters(shapes=[(1,), (2,)])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": torch.tensor(0.5)}]
    shown = repr(case.make(groups))
    assert shown.startswith(f"{case.cls.__name__} (\nParameter Group 0\n")
    assert "Parameter Group 1" in shown
    for name, value in case.kwargs.items():
        assert f"    {name}: {value}" in shown


def test_a_compiled_train_step_equals_the_eager_one(path: str) -> None:
    ends = []
    # What can break is Dynamo's tracing up to the step; aot_eager has it and needs no C++ compiler.
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        options = {"lr": 0.1, "l1": 0.01, "max_grad_norm": 0.5, **PATHS[path]}
        optimizer = fusedreg.AdamW(model.parameters(), **options)

        def train_step(x: torch.Tensor) -> None:
            optimizer.zero_grad()  # noqa: B023  # called in this turn of the loop only
            model(x).square().mean().backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        compiled = wrap(train_step)
        for seed in range(3):
            (x,) = tensors(seed, torch.float32, [(5, 4)])
            compiled(x)
        ends.append(snapshot(optimizer))
    assert ends[0] == ends[1]
