"""The lr by which lr_independent_decay divides: of the constructor, a file, a copy."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoints import SHAPES, assert_continues
from torch import nn

from cases import CLASSES, SOME, TORCH_CLASSES, Case, by_id, parameters, run
from compare import parameters_of


def independent(cls: type, lr: Any, params: list[Any] | None = None) -> Any:
    """An optimizer whose decay leaves out lr."""
    names = ("lr_independent_decay", "decoupled_weight_decay")  # AdamW has only one of them
    options = {name: True for name in names if name in inspect.signature(cls).parameters}
    return cls(params or parameters(shapes=SHAPES), lr=lr, weight_decay=0.1, **options)


def twin_of(optimizer: Any, lr: float) -> Any:
    params = [nn.Parameter(param.detach().clone()) for param in parameters_of(optimizer)]
    return independent(type(optimizer), lr, params)


@pytest.mark.parametrize("cls", CLASSES)
def test_decay_lr_comes_with_the_file(cls: type) -> None:
    optimizer = independent(cls, 0.1)
    optimizer.param_groups[0]["lr"] = 0.05  # as a schedule writes it
    run(optimizer, 2)
    resumed = twin_of(optimizer, 0.4)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["decay_lr"] == 0.1
    assert_continues(optimizer, resumed)


def says_nothing_of_decay(cls: type) -> bool:
    """torch.optim.Adam's file says that the decay is coupled."""
    return getattr(torch.optim, cls.__name__)(parameters()).defaults.get(
        "decoupled_weight_decay", True
    )


@pytest.mark.parametrize("cls", [cls for cls in TORCH_CLASSES if says_nothing_of_decay(cls)])
def test_decay_lr_stays_where_torchs_file_has_none(cls: type) -> None:
    theirs = getattr(torch.optim, cls.__name__)(parameters(shapes=SHAPES), lr=0.1)
    run(theirs, 1)
    optimizer = independent(cls, 0.4)
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["decay_lr"]) == (0.1, 0.4)
    run(optimizer, 1)


def pickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_copy_has_a_decay_lr_of_its_own(cls: type, duplicate: Callable[[Any], Any]) -> None:
    lr = torch.tensor(0.1)
    optimizer = independent(cls, lr)
    lr.fill_(0.05)  # as torch's schedules write into a tensor
    twin = duplicate(optimizer)
    assert twin.param_groups[0]["decay_lr"] == torch.tensor(0.1)
    assert_continues(optimizer, twin)
    twin.param_groups[0]["decay_lr"].fill_(1.0)
    assert optimizer.param_groups[0]["decay_lr"] == torch.tensor(0.1)


@pytest.mark.parametrize("case", **by_id(SOME))
def test_a_pickle_from_before_decay_lr_goes_on(case: Case) -> None:
    optimizer = case.make(parameters(shapes=SHAPES))
    run(optimizer, 1)
    old = copy.deepcopy(optimizer)
    for options in (old.defaults, *old.param_groups):
        del options["decay_lr"], options["lr_independent_decay"]
    twin = pickled(old)
    assert twin.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert twin.param_groups[0]["decay_lr"] == case.kwargs["lr"]
    for each in (optimizer, twin):
        each.add_param_group({"params": parameters(1, shapes=[(2,)])})
    assert_continues(optimizer, twin)
