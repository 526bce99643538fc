"""Files that cannot be right are refused, and a file is judged by itself and by its class."""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import fusedreg
from fusedreg.scalars import Count

from cases import (
    CLASSES,
    FULL,
    parameters,
    run,
    set_grads,
)
from compare import frozen, parameters_of, refused

SHAPES = [(0,), (5, 3), ()]

Spoil = Callable[[dict[str, Any]], Any]


# ---- files that cannot be right ------------------------------------------------------------------

LAST = len(SHAPES) - 1
"""The parameter whose state is spoiled: all before it are good."""


def trained(cls: type, seed: int = 0) -> Any:
    """Two groups, one parameter without a gradient, state of every kind, and a clip."""
    params = parameters(seed, shapes=[*SHAPES, (2,)])
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}]
    optimizer = FULL[cls].make(groups, max_grad_norm=1.0)
    run(optimizer, 1)
    optimizer.state.pop(params[3])
    return optimizer


def assert_refused(cls: type, spoil: Spoil, message: str) -> None:
    """Loading what `spoil` makes of a good file, or returns, changes nothing at all."""
    optimizer, other = trained(cls), trained(cls, seed=1)
    saved = copy.deepcopy(other.state_dict())
    spoiled = spoil(saved)
    with refused(optimizer, ValueError, message):
        optimizer.load_state_dict(saved if spoiled is None else spoiled)


NO_FILE: dict[str, Spoil] = {
    "list": lambda saved: [saved],
    "tensor": lambda saved: torch.ones(3),
    "number": lambda saved: 3,
    "empty": lambda saved: {},
    "weights": lambda saved: nn.Linear(3, 2).state_dict(),
    "whole_training": lambda saved: {"model": {}, "optimizer": saved},
    "no_state": lambda saved: {"param_groups": saved["param_groups"]},
    "no_groups": lambda saved: {"state": saved["state"]},
    "state_of_another_kind": lambda saved: {**saved, "state": [*saved["state"].values()]},
    "groups_of_another_kind": lambda saved: {**saved, "param_groups": saved["param_groups"][0]},
    "no_params": lambda saved: {**saved, "param_groups": [{"lr": 0.1}, {"lr": 0.1}]},
}


@pytest.mark.parametrize("spoil", NO_FILE.values(), ids=NO_FILE)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_no_state_dict_is_refused(cls: type, spoil: Spoil) -> None:
    assert_refused(cls, spoil, "^loaded state dict (is no dict|lacks)")


def test_a_hook_may_make_a_state_dict_of_what_is_none() -> None:
    optimizer, other = trained(fusedreg.AdamW), trained(fusedreg.AdamW, seed=1)
    optimizer.register_load_state_dict_pre_hook(lambda _, whole: whole["optimizer"])
    optimizer.load_state_dict({"epoch": 3, "optimizer": other.state_dict()})
    assert frozen(optimizer.state_dict()) == frozen(other.state_dict())


def one_group(saved: dict[str, Any]) -> None:
    saved["param_groups"].pop()


def three_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"].append({**saved["param_groups"][1], "params": []})


def parameter_too_few(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].pop()


def parameter_too_many(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["params"].append(9)


def bad_number(saved: dict[str, Any]) -> None:
    saved["param_groups"][1]["lr"] = math.nan


def state_of_nobody(saved: dict[str, Any]) -> None:
    saved["state"][9] = saved["state"][LAST]


MISFITS = [
    (one_group, "^loaded state dict has a different number of parameter groups"),  # torch's words
    (three_groups, "^loaded state dict has a different number of parameter groups"),
    (parameter_too_few, "^loaded state dict .* doesn't match the size of optimizer's group"),
    (parameter_too_many, "^loaded state dict .* doesn't match the size of optimizer's group"),
    (bad_number, "^Invalid learning rate: nan"),
    (state_of_nobody, "^loaded state dict .*9"),
]


@pytest.mark.parametrize(("spoil", "message"), MISFITS, ids=[each[0].__name__ for each in MISFITS])
@pytest.mark.parametrize("cls", CLASSES)
def test_groups_that_do_not_fit_are_refused(cls: type, spoil: Spoil, message: str) -> None:
    assert_refused(cls, spoil, message)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, name)
        for cls in CLASSES
        if len({*cls.tensor_states, *cls.counts}) > 1  # else it would lack all, as is allowed
        for name in (*cls.tensor_states, *cls.counts)
        if name not in cls.late_states
    ],
)
def test_incomplete_state_is_refused(cls: type, name: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        del saved["state"][LAST][name]

    assert_refused(cls, spoil, f"^loaded state dict lacks '{name}' for parameter {LAST}")


def states(cls: type) -> set[str]:
    return {*cls.tensor_states, *cls.counts}


@pytest.mark.parametrize("cls", CLASSES)
def test_state_of_another_class_is_refused(cls: type) -> None:
    foreign = next(each for each in CLASSES if not states(each) & states(cls))

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][LAST] = copy.deepcopy(trained(foreign).state_dict()["state"][LAST])

    keys = "|".join(trained(foreign).state_dict()["state"][LAST])
    message = f"'({keys})' for parameter {LAST}, which {cls.__name__} does not keep"
    assert_refused(cls, spoil, f"^loaded state dict contains {message}")


def required(cls: type) -> set[str]:
    return states(cls) - {*cls.late_states}


@pytest.mark.parametrize(
    ("foreign", "cls"),
    [
        (foreign, cls)
        for foreign in CLASSES
        for cls in CLASSES
        if not required(foreign) <= states(cls)
    ],
)
def test_file_of_another_class_is_refused(foreign: type, cls: type) -> None:
    """Also where the two share a state: Adam's file has Lion's, and RMSprop's has SGD's."""
    saved, optimizer = trained(foreign).state_dict(), trained(cls)
    with refused(optimizer, ValueError, "loaded state dict (contains|lacks)"):
        optimizer.load_state_dict(saved)


# ---- a file is judged by itself and by the class that loads it -----------------------------------

STATELESS = "SGD without momentum"
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (name, {"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    },
    STATELESS: ("SGD", {}),
    "AMSGrad": ("Adam", {"amsgrad": True}),
}
"""Each class of torch.optim, and those of its options that keep other states."""
ADAMS = {"Adam", "AdamW", "AMSGrad", "RAdam", "SparseAdam"}
"""The same moments, of the same meaning."""
INTERCHANGEABLE: dict[type, set[str]] = {
    fusedreg.SGD: {"SGD", STATELESS},
    fusedreg.Adam: ADAMS,
    fusedreg.AdamW: ADAMS,
    fusedreg.LAMB: ADAMS,
    fusedreg.RMSprop: {"RMSprop"},
    fusedreg.Adagrad: {"Adagrad"},
    fusedreg.Lion: set(),
}
MATRIX = [(2, 3), (3, 2)]
"""Muon takes nothing else."""


def written_by(writer: str) -> dict[str, Any]:
    name, options = WRITERS[writer]
    cls = getattr(torch.optim, name)
    optimizer = cls(parameters(shapes=MATRIX), **options)

    def closure() -> torch.Tensor:
        params = parameters_of(optimizer)
        set_grads(params, 0)
        for param in params if name == "SparseAdam" else ():
            param.grad = param.grad.to_sparse()
        return torch.ones(())

    optimizer.step(closure)
    saved: dict[str, Any] = copy.deepcopy(optimizer.state_dict())
    assert saved["state"] or writer == STATELESS
    return saved


@pytest.fixture(params=[False, True], ids=["alone", "beside_others"])
def _other_classes(request: pytest.FixtureRequest) -> Iterator[list[type]]:
    """Classes of this program that have nothing to do with the file."""
    if not request.param:
        yield []
        return

    class Masked(fusedreg.SGD):
        tensor_states = (*fusedreg.SGD.tensor_states, "mask")
        counts = MappingProxyType({**fusedreg.SGD.counts, "counter": Count()})

    class Velocities(fusedreg.FusedOptimizer):
        tensor_states = ("velocity", "exp_avg", "note")
        counts = MappingProxyType({"mu_product": Count(1.0)})

    yield [Masked, Velocities]


@pytest.mark.usefixtures("_other_classes")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("cls", CLASSES)
def test_file_of_each_class_of_torch_loads_or_is_refused(cls: type, writer: str) -> None:
    saved, optimizer = written_by(writer), cls(parameters(shapes=MATRIX))
    if writer in INTERCHANGEABLE[cls]:
        optimizer.load_state_dict(saved)
        kept = optimizer.state_dict()["state"]
        assert {key: state.keys() for key, state in kept.items()} == {
            key: state.keys() for key, state in saved["state"].items()
        }
        run(optimizer, 1)
        return
    with refused(optimizer, ValueError, "^loaded state dict (contains|lacks) .* class"):
        optimizer.load_state_dict(saved)


OWN_STATES = {
    "mask": torch.tensor([True, False]),
    "counter": torch.tensor(3),
    "velocity": torch.ones(2),
    "note": "warm",
}


@pytest.mark.usefixtures("_other_classes")
@pytest.mark.parametrize("cls", CLASSES)
def test_own_entries_come_along_whatever_classes_there_are(cls: type) -> None:
    """Also of a parameter that has no state else."""
    optimizer, other = trained(cls), trained(cls, seed=1)
    for param in parameters_of(optimizer):
        optimizer.state[param].update(OWN_STATES)
    other.load_state_dict(optimizer.state_dict())
    for param in parameters_of(other):
        assert other.state[param].keys() >= OWN_STATES.keys()
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["mu_product", "eta", "momentum_mass", "step"])
def test_a_count_of_another_class_is_refused(name: str, cls: Any) -> None:
    """NAdam's file differs from Adam's by `mu_product` alone."""

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][LAST][name] = torch.tensor(0.5)

    if name not in cls.counts:
        assert_refused(cls, spoil, f"^loaded state dict contains '{name}' for parameter {LAST}")


def test_subclass_with_a_state_of_its_own_asks_for_it() -> None:
    class Masked(fusedreg.Adam):
        tensor_states = (*fusedreg.Adam.tensor_states, "mask")

        def states(self, group: Any) -> tuple[str, ...]:
            return (*super().states(group), "mask")

    adam, masked, later = (
        cls(parameters(shapes=SHAPES)) for cls in (fusedreg.Adam, Masked, Masked)
    )
    run(adam, 1)
    with refused(masked, ValueError, "^loaded state dict lacks 'mask' for parameter 0"):
        masked.load_state_dict(adam.state_dict())
    with_mask = copy.deepcopy(adam.state_dict())
    for key, param in enumerate(parameters_of(adam)):
        with_mask["state"][key]["mask"] = torch.ones_like(param)
    later.load_state_dict(with_mask)
    assert frozen(later.state_dict()["state"]) == frozen(with_mask["state"])


@pytest.mark.parametrize("shape", [(3, 5), (5, 4), (15,), (1, 5, 3), (1,), (), (0,)], ids=str)
@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.tensor_states]
)
def test_state_of_another_shape_is_refused(cls: type, name: str, shape: tuple[int, ...]) -> None:
    """Also where it would broadcast."""

    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = torch.ones(shape, dtype=torch.float64)

    shown = re.escape(str(shape))
    assert_refused(cls, spoil, f"^loaded state dict contains '{name}' of shape {shown}")


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.counts])
def test_count_of_another_shape_is_refused(cls: type, name: str) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = torch.ones(2)

    assert_refused(cls, spoil, rf"^loaded state dict contains '{name}' of shape \(2,\)")


@pytest.mark.parametrize("value", [0.5, "warm", [1.0]], ids=repr)
@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in CLASSES for name in cls.tensor_states]
)
def test_state_that_is_no_tensor_is_refused(cls: type, name: str, value: object) -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][1][name] = value

    assert_refused(cls, spoil, f"^loaded state dict contains '{name}'")


# ---- files that others write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "note",
    ["warm", np.ones(2), torch.ones(2), {}, OrderedDict()],
    ids=["text", "array", "tensor", "dict", "empty"],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_a_user_keeps_beside_the_states_comes_with_the_file(cls: type, note: Any) -> None:
    optimizer, other = trained(cls), trained(cls, seed=1)
    for param in parameters_of(optimizer):  # the last has no state else
        optimizer.state[param]["note"] = note
    other.load_state_dict(optimizer.state_dict())
    for param in parameters_of(other):
        assert type(other.state[param]["note"]) is type(note)


@pytest.mark.parametrize("cls", CLASSES)
def test_any_mapping_is_a_state_dict(cls: type) -> None:
    optimizer, other = trained(cls), trained(cls, seed=1)
    saved = optimizer.state_dict()
    other.load_state_dict(
        UserDict(
            {
                **saved,
                "state": UserDict(saved["state"]),
                "param_groups": tuple(saved["param_groups"]),
            }
        )
    )
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


def test_state_that_is_no_dict_is_refused() -> None:
    def spoil(saved: dict[str, Any]) -> None:
        saved["state"][0] = None

    assert_refused(fusedreg.Adam, spoil, "^loaded state dict contains None as the state")


NO_MOMENT: dict[str, Spoil] = {
    "text": lambda saved: saved["state"][1].update(step="x"),
    "negative": lambda saved: saved["state"][1].update(step=torch.tensor(-3.0)),
    "nan": lambda saved: saved["state"][1].update(step=math.nan),
    "complex_step": lambda saved: saved["state"][1].update(step=torch.tensor(1j)),
    "sparse": lambda saved: saved["state"][1].update(exp_avg=torch.zeros(5, 3).to_sparse()),
    "complex": lambda saved: saved["state"][1].update(exp_avg=torch.zeros(5, 3) * 1j),
    "group_of_another_kind": lambda saved: {**saved, "param_groups": [3, 4]},
    "params_of_another_kind": lambda saved: {**saved, "param_groups": [{"params": None}] * 2},
}


@pytest.mark.parametrize("spoil", NO_MOMENT.values(), ids=NO_MOMENT)
def test_state_that_no_step_could_use_is_refused(spoil: Spoil) -> None:
    assert_refused(fusedreg.Adam, spoil, "^loaded state dict ")
