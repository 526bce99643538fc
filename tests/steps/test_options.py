"""Options are read afresh in every step: edited, scheduled, or of another type than float."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import fusedreg
from fusedreg.check.oracle import Slot, one_step

from cases import CASES, CLASSES, PATHS, TORCH_CLASSES, Case, each_case, parameters, run, set_grads
from compare import assert_close, frozen, parameters_of, torchs_state

SHAPES = [(0,), (5, 3), (), (17,)]


@each_case(CASES)
def test_options_edited_between_steps_count_at_once(case: Case, path: str) -> None:
    optimizer = case.make(parameters(shapes=SHAPES), path)
    group = optimizer.param_groups[0]
    slots = [Slot(param.detach().clone()) for param in group["params"]]
    for seed in range(3):
        options = {"lr": 0.1 / (1 + seed), "weight_decay": 0.1 * seed}
        if "l1" in case.kwargs:
            options["l1"] = 0.3 / (1 + seed)
        group.update(options)
        set_grads(group["params"], seed)
        for slot, param in zip(slots, group["params"], strict=True):
            one_step(slot, param.grad, case, **options)
        optimizer.step()
    # 2 ulp a step as in test_oracle.
    assert_close(group["params"], [slot.w for slot in slots], ulps=3 * 2)


@each_case(CASES)
def test_tensor_lr_is_live(case: Case, path: str) -> None:
    if path == "foreach" and issubclass(case.cls, fusedreg.Adam):
        with pytest.raises(ValueError, match="lr as a Tensor is not supported"):
            case.make(parameters(), path, lr=torch.tensor(0.1))
        return
    for shape in [(), (1, 1)]:
        lr = torch.full(shape, 0.25)
        live, fixed = (case.make(parameters(shapes=SHAPES), path, lr=rate) for rate in (lr, 1.0))
        for seed in range(2):
            lr.mul_(0.5)
            fixed.param_groups[0]["lr"] = lr.item()
            run(live, 1, seed)
            run(fixed, 1, seed)
        assert live.param_groups[0]["lr"] is lr
        assert frozen(parameters_of(live)) == frozen(parameters_of(fixed))
        assert torchs_state(live) == torchs_state(fixed)


def cycles(optimizer: Any) -> dict[str, bool]:
    """Whether there is a momentum that can go up where lr goes down."""
    return {"cycle_momentum": not optimizer.defaults.keys().isdisjoint({"momentum", "betas"})}


def lr_schedulers() -> dict[str, Callable[[Any], Any]]:
    """Every scheduler of torch, over six steps."""
    one = lr_scheduler
    return {
        "LambdaLR": lambda o: one.LambdaLR(o, lambda epoch: 0.9**epoch),
        "MultiplicativeLR": lambda o: one.MultiplicativeLR(o, lambda epoch: 0.8),
        "StepLR": lambda o: one.StepLR(o, 2, gamma=0.3),
        "MultiStepLR": lambda o: one.MultiStepLR(o, [1, 3]),
        "ConstantLR": lambda o: one.ConstantLR(o, total_iters=3),
        "LinearLR": lambda o: one.LinearLR(o, start_factor=0.2, total_iters=4),
        "ExponentialLR": lambda o: one.ExponentialLR(o, 0.7),
        "PolynomialLR": lambda o: one.PolynomialLR(o, total_iters=5, power=2.0),
        "CosineAnnealingLR": lambda o: one.CosineAnnealingLR(o, 4),
        "CosineAnnealingWarmRestarts": lambda o: one.CosineAnnealingWarmRestarts(o, 2),
        "SequentialLR": lambda o: one.SequentialLR(
            o, [one.ConstantLR(o, total_iters=2), one.ExponentialLR(o, 0.7)], milestones=[2]
        ),
        "ChainedScheduler": lambda o: one.ChainedScheduler(
            [one.LinearLR(o, total_iters=3), one.ExponentialLR(o, 0.9)], optimizer=o
        ),
        "ReduceLROnPlateau": lambda o: one.ReduceLROnPlateau(o, patience=1),
        "CyclicLR": lambda o: one.CyclicLR(o, 0.01, 0.1, step_size_up=2, **cycles(o)),
        "OneCycleLR": lambda o: one.OneCycleLR(o, 0.1, total_steps=8, **cycles(o)),
    }


def test_table_of_schedulers_is_complete() -> None:
    assert {*lr_schedulers(), "LRScheduler"} >= set(lr_scheduler.__all__)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", lr_schedulers())
@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_scheduler_moves_fusedreg_as_torch(cls: type, name: str, path: str) -> None:
    """Including momentum and betas, which CyclicLR and OneCycleLR write into the groups."""
    torch_cls = getattr(torch.optim, cls.__name__)
    no_tensors = path == "foreach" and issubclass(cls, fusedreg.Adam)  # refused in torch, too
    for make_lr in (float,) if no_tensors else (float, torch.tensor):
        runs = []
        for make, options in (cls, PATHS[path]), (torch_cls, {}):
            params = parameters(dtype=torch.float32, shapes=SHAPES)
            optimizer = make(params, lr=make_lr(0.05), **options)
            scheduler = lr_schedulers()[name](optimizer)
            seen = []
            for seed in range(6):
                run(optimizer, 1, seed)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                written = ("lr", "momentum", "betas", "initial_lr")
                group = optimizer.param_groups[0]
                seen.append(frozen({key: group[key] for key in written if key in group}))
            runs.append((seen, params))
        (ours, params), (theirs, expected) = runs
        assert ours == theirs
        # A step of each side rounds by half an ulp, in the worst case always the other way.
        assert_close(params, expected, ulps=6)


@pytest.mark.parametrize("cls", CLASSES)
def test_numpy_scalars_are_numbers(cls: type, path: str) -> None:
    ends = []
    for kind in (float, np.float64):
        param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = cls([param], lr=kind(0.1), l1=kind(0.01), weight_decay=kind(0.1), **PATHS[path])
        for lr in (0.1, 0.0):
            optimizer.param_groups[0]["lr"] = kind(lr)
            param.grad = torch.tensor([1.0, math.inf if lr == 0 else 1.0])
            optimizer.step()
        ends.append(frozen(param))
        assert param.isfinite().all()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("cls", CLASSES)
def test_keys_that_a_user_adds_to_a_group_are_left_alone(cls: type, path: str) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    mask = torch.ones(2)
    optimizer = cls([{"params": [param], "mask": mask}], **PATHS[path])
    optimizer.step()
    assert optimizer.param_groups[0]["mask"] is mask
    assert (param < 1).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_of_lazy_modules_are_taken(cls: type, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that lazy modules are new
        layer = torch.nn.LazyLinear(3)
    optimizer = cls(layer.parameters(), lr=0.1, l1=0.01, **PATHS[path])
    layer(torch.ones(2, 4)).sum().backward()
    before = frozen(list(layer.parameters()))
    optimizer.step()
    assert frozen(list(layer.parameters())) != before
