"""Bad input is refused in torch's words plus the remedy, and changes nothing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal import common_optimizers

import fusedreg

from cases import CLASSES, PATHS, TORCH_CLASSES, parameters, set_grads
from compare import refused

NAN = math.nan


def defaults(cls: type) -> dict[str, Any]:
    return cls(parameters()).defaults


def having(option: str) -> list[type]:
    """The classes that have an option."""
    return [cls for cls in CLASSES if option in defaults(cls)]


# ---- torch's own list --------------------------------------------------------------------------


def upstream_errors() -> Iterator[Any]:
    """The CPU entries of `optim_error_inputs_func_*`, and those for CUDA, where it has no list."""
    for cls in TORCH_CLASSES:
        listed = getattr(common_optimizers, f"optim_error_inputs_func_{cls.__name__.lower()}")
        for entry in listed("cpu", torch.float32):
            assert entry.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
            given, error = entry.optimizer_error_input, entry.error_type
            name = f"{cls.__name__}-{given.desc}"
            yield pytest.param(cls, given.params, given.kwargs, error, entry.error_regex, id=name)
        for message, kwargs in {
            "`fused` and `foreach` cannot be `True` together": {"fused": True, "foreach": True},
            "`fused` does not support `differentiable`": {"fused": True, "differentiable": True},
        }.items():
            yield pytest.param(
                cls, None, kwargs, RuntimeError, message, id=f"{cls.__name__}-{message}"
            )


@pytest.mark.parametrize(("cls", "params", "kwargs", "error", "message"), list(upstream_errors()))
def test_torchs_errors(
    cls: type, params: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    expected = pytest.warns if issubclass(error, Warning) else pytest.raises
    with expected(error, match=message) as seen:
        cls(parameters() if params is None else params, **kwargs)
    if expected is pytest.raises:
        assert seen.type is error


# ---- options -----------------------------------------------------------------------------------

# What is wrong in every class that has the option, and what torch calls that.
BAD_OPTIONS: dict[str, list[tuple[str, list[Any]]]] = {
    "lr": [("learning rate", [-1.0, NAN, torch.tensor(-1.0), torch.tensor(NAN)])],
    "weight_decay": [("weight_decay value", [-1, -1e-9, NAN, torch.tensor(-1.0)])],
    "l1": [("l1 value", [-0.1, NAN, -math.inf])],
    "l1_mode": [("l1_mode value", ["lasso", "", None])],
    "momentum": [("momentum value", [-0.5, NAN])],
    "dampening": [("dampening value", [NAN])],
    "alpha": [("alpha value", [-0.1, 1.0, NAN, torch.tensor(1.0)])],
    "lr_decay": [("lr_decay value", [-0.5, NAN])],
    "initial_accumulator_value": [("initial_accumulator_value value", [-0.1, NAN, math.inf])],
    "eps": [("epsilon value", [-1e-8, NAN])],
    "betas": [
        ("beta parameter at index 0", [(1.0, 0.9), (-0.1, 0.9), (NAN, 0.9)]),
        ("beta parameter at index 1", [(0.9, 1.0), (0.9, -0.1), (0.9, NAN)]),
    ],
}


def bad_options(cls: type) -> Iterator[tuple[str, Any, str]]:
    """Name, bad value and message of each."""
    for name in BAD_OPTIONS.keys() & defaults(cls):
        for label, values in BAD_OPTIONS[name]:
            for value in values:
                yield name, value, rf"^Invalid {label}.*\(expected"


def trained(cls: type, path: str = "reference", **kwargs: Any) -> Any:
    """An optimizer with two groups, state, gradients for a next step, and a clip."""
    params = parameters(shapes=[(3,), (2, 2)])
    groups = [{"params": [("first", params[0])]}, {"params": [("second", params[1])]}]
    optimizer = cls(groups, max_grad_norm=1.0, **PATHS[path], **kwargs)
    for seed in range(2):
        set_grads(params, seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_option_is_refused_by_the_constructor(cls: type) -> None:
    for name, value, message in bad_options(cls):
        with pytest.raises(ValueError, match=message):
            cls(parameters(), **{name: value})


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_option_is_refused_by_add_param_group(cls: type) -> None:
    optimizer = trained(cls)
    for name, value, message in bad_options(cls):
        group = {"params": list(nn.Linear(2, 2).named_parameters()), name: value}
        with refused(optimizer, ValueError, message):
            optimizer.add_param_group(group)
    optimizer.step()  # the groups that were refused are not in the way


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_option_edited_into_a_group_is_refused_by_step(cls: type, path: str) -> None:
    optimizer = trained(cls, path)
    group = optimizer.param_groups[1]
    for name, value, message in bad_options(cls):
        if isinstance(value, torch.Tensor) and not fusedreg.checks.on_host(value):
            continue  # a step does not wait for a value on an accelerator
        good, group[name] = group[name], value
        with refused(optimizer, ValueError, message):
            optimizer.step()
        group[name] = good
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_option_that_is_no_number_is_refused(cls: type, path: str) -> None:
    optimizer = trained(cls, path)
    group, message = optimizer.param_groups[1], r"^Invalid .*\(expected a number"
    numbers = [name for name, value in defaults(cls).items() if type(value) in (int, float)]
    assert {"lr", "weight_decay", "l1"} <= {*numbers}
    for name in {*numbers, "decay_lr"}:
        for value in ("0.1", [0.1], *(() if name == "decay_lr" else (None,))):  # None: the lr
            with pytest.raises(TypeError, match=message):
                cls(parameters(), **{name: value})
            good, group[name] = group[name], value
            with refused(optimizer, TypeError, message):
                optimizer.step()
            group[name] = good
    optimizer.step()


@pytest.mark.parametrize("make", [*CLASSES, partial(fusedreg.FusedOptimizer, defaults={"lr": 0.1})])
def test_unknown_option_is_refused(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'lambda1'"):
        make(parameters(), lambda1=0.1)


# ---- options that do not go together -----------------------------------------------------------


def added(optimizer: Any, options: dict[str, Any]) -> Callable[[], Any]:
    group = {"params": list(nn.Linear(2, 2).named_parameters()), **options}
    return partial(optimizer.add_param_group, group)


def loaded(optimizer: Any, options: dict[str, Any]) -> Callable[[], Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(options)
    return partial(optimizer.load_state_dict, saved)


def edited(optimizer: Any, options: dict[str, Any]) -> Callable[[], Any]:
    optimizer.param_groups[1].update(options)
    return optimizer.step


WAYS = {
    "constructed": lambda optimizer, options: partial(type(optimizer), parameters(), **options),
    "added": added,
    "loaded": loaded,
    "edited": edited,
}
ways = pytest.mark.parametrize("way", WAYS)


def assert_refused(cls: type, way: str, message: str, path: str = "reference", **more: Any) -> None:
    """However the options come into the optimizer, nothing changes."""
    optimizer = trained(cls, path)
    attempt = WAYS[way](optimizer, more)
    with refused(optimizer, ValueError, message):
        attempt()


def chooses_its_decay(cls: type) -> bool:
    """AdamW's is always decoupled."""
    return "decoupled_weight_decay" not in cls.fixed_options


@ways
@pytest.mark.parametrize("cls", [cls for cls in CLASSES if chooses_its_decay(cls)])
def test_only_a_decoupled_decay_can_leave_out_lr(cls: type, way: str) -> None:
    options = {"lr_independent_decay": True, "decoupled_weight_decay": False}
    assert_refused(cls, way, "^lr_independent_decay=True needs decoupled_weight_decay", **options)


@ways
@pytest.mark.parametrize("cls", CLASSES)
def test_a_decay_that_leaves_out_lr_needs_one_to_divide_by(cls: type, way: str) -> None:
    options = {"lr_independent_decay": True}
    if chooses_its_decay(cls):
        options["decoupled_weight_decay"] = True
    zero = {"lr": 0.0} if way in ("constructed", "added") else {"decay_lr": 0.0}
    assert_refused(cls, way, "^Invalid decay_lr value: 0 ", **options, **zero)


WITHOUT_PROX = [cls for cls in CLASSES if defaults(cls)["l1_mode"] != "prox"]


@ways
@pytest.mark.parametrize("cls", WITHOUT_PROX)
def test_a_class_that_no_threshold_can_solve_refuses_one(cls: type, way: str, path: str) -> None:
    message = f"^Invalid l1_mode value: 'prox' for {cls.__name__}: .*l1_mode='decoupled'"
    assert_refused(cls, way, message, path, l1_mode="prox")


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1.0, ValueError),
        (NAN, ValueError),
        ("1", TypeError),
        pytest.param(torch.tensor(1.0), TypeError, id="tensor"),
    ],
)
@pytest.mark.parametrize("cls", CLASSES)
def test_bad_max_grad_norm_is_refused(cls: type, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Invalid max_grad_norm value.*\(expected"):
        cls(parameters(), max_grad_norm=value)
    optimizer = trained(cls)
    with refused(optimizer, error, "Invalid max_grad_norm value", r"\(expected"):
        optimizer.max_grad_norm = value


@pytest.mark.parametrize("cls", CLASSES)
def test_differentiable_names_torch_optim(cls: type, path: str) -> None:
    with pytest.raises(NotImplementedError, match=r"torch\.optim"):
        cls(parameters(), differentiable=True)
    optimizer = trained(cls, path)
    optimizer.param_groups[1].update(differentiable=True, fused=False)
    with refused(optimizer, NotImplementedError, r"torch\.optim"):
        optimizer.step()


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"momentum": 0.9, "dampening": 0.5}],
    ids=["without_momentum", "with_dampening"],
)
def test_nesterov_needs_momentum_without_dampening(kwargs: dict[str, float], path: str) -> None:
    message = "Nesterov momentum requires a momentum and zero dampening"  # torch's
    with pytest.raises(ValueError, match=message):
        fusedreg.SGD(parameters(), nesterov=True, **kwargs)
    optimizer = trained(fusedreg.SGD, path, momentum=0.9)
    optimizer.param_groups[1].update({"momentum": 0.0, **kwargs, "nesterov": True})
    with refused(optimizer, ValueError, message):
        optimizer.step()


@pytest.mark.parametrize("momentum", [1.0, 1.5])
@pytest.mark.parametrize("cls", having("momentum"))
def test_momentum_of_one_has_no_l1_threshold(cls: type, momentum: float, path: str) -> None:
    cls(parameters(), momentum=momentum)  # without l1 torch's answer stands: allowed
    optimizer = trained(cls, path, momentum=0.9, l1=0.1)
    optimizer.param_groups[1]["momentum"] = momentum
    with refused(optimizer, ValueError, f"Invalid momentum value: {momentum}", "l1_mode='prox'"):
        optimizer.step()


# ---- parameters and gradients ------------------------------------------------------------------


def sparse_grad() -> torch.Tensor:
    layer = nn.Embedding(3, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    return layer.weight


def integer_grad() -> torch.Tensor:
    param = torch.tensor([1, 2])
    param.grad = torch.tensor([1, 1])
    return param


def integer_param() -> torch.Tensor:
    param = torch.tensor([1, 2])
    param.grad_dtype = torch.float32
    param.grad = torch.ones(2)
    return param


class Elsewhere(torch.Tensor):
    """Says that it lies on a GPU, for a machine without one."""

    device = torch.device("cuda:0")


def on_another_device() -> torch.Tensor:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2).as_subclass(Elsewhere)
    return param


def resized() -> torch.Tensor:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    param.data = torch.ones(2, 2)
    return param


def turned_complex() -> torch.Tensor:
    param = nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    param.data = torch.ones(2, dtype=torch.complex64)
    return param


def expanded() -> torch.Tensor:
    param = nn.Parameter(torch.ones(1).expand(2))
    param.grad = torch.ones(2)
    return param


def conjugated() -> torch.Tensor:
    param = nn.Parameter(torch.ones(2, dtype=torch.complex64).conj())
    param.grad = torch.ones(2, dtype=torch.complex64)
    return param


# What is wrong, torch's words, the remedy.
BAD_GRADS: list[tuple[Callable[[], torch.Tensor], str, str]] = [
    (sparse_grad, "does not support sparse gradients", "sparse=False"),
    (integer_grad, "only supports .* floating point", "requires_grad=False"),
    (integer_param, "floating point", "requires_grad=False"),
    (on_another_device, "Expected all tensors to be on the same device", "zero_grad"),
    (resized, "must match the size", "zero_grad"),
    (turned_complex, "real or complex", "zero_grad"),
    (expanded, "more than one element of the written-to tensor", "clone"),
    (conjugated, "view_as_real doesn't work on unresolved conjugated tensors", "resolve_conj"),
]


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_gradient_is_refused(cls: type, path: str) -> None:
    optimizer = trained(cls, path)
    group = optimizer.param_groups[1]
    for make, *words in BAD_GRADS:
        bad = make()
        group["params"].append(bad)
        group["param_names"].append("layer.bad")
        shape = re.escape(str(tuple(bad.shape)))
        with refused(optimizer, RuntimeError, *words, "'layer.bad'", shape, str(bad.dtype)):
            optimizer.step()
        group["params"].pop()
        group["param_names"].pop()
    optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_parameter_without_a_name_is_given_by_its_index(cls: type, path: str) -> None:
    good, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    good.grad = torch.ones(2)
    optimizer = cls([{"params": [other]}, {"params": [good, sparse_grad()]}], **PATHS[path])
    with refused(optimizer, RuntimeError, r"parameter 1 of group 1 of shape \(3, 2\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "l1_mode"),
    [
        (cls, mode)
        for cls in CLASSES
        for mode in fusedreg.penalties.l1.TERMS
        if mode != "prox" or cls not in WITHOUT_PROX
    ],
)
def test_complex_parameter_with_l1_is_refused(cls: type, l1_mode: str, path: str) -> None:
    message = ("Invalid l1 value: 0.1 for a complex parameter", "l1=0", "'phase'")
    phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    penalty = {"l1": 0.1, "l1_mode": l1_mode}
    with pytest.raises(ValueError, match=message[0]):
        cls([("phase", phase)], **penalty)
    optimizer = trained(cls, path)
    with refused(optimizer, ValueError, *message):
        optimizer.add_param_group({"params": [("phase", phase)], **penalty})
    optimizer.add_param_group({"params": [("phase", phase)], "l1_mode": l1_mode})
    phase.grad = torch.ones(2, dtype=torch.complex64)
    optimizer.step()  # without l1 it is stepped
    optimizer.param_groups[2]["l1"] = 0.1
    with refused(optimizer, ValueError, *message):
        optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_error_in_the_closure_passes_through(cls: type, path: str) -> None:
    def closure() -> float:
        raise KeyError("mine")

    optimizer = trained(cls, path)
    with refused(optimizer, KeyError, "mine"):
        optimizer.step(closure)


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for name in ("momentum", "dampening") for cls in having(name)]
)
def test_prox_needs_momentum_and_dampening_below_one(cls: type, name: str, path: str) -> None:
    options = {"momentum": 0.9, name: 1.0}
    with pytest.raises(ValueError, match=f"Invalid {name} value: 1.0 .*prox"):
        cls([nn.Parameter(torch.ones(2))], l1=0.1, **options, **PATHS[path])
    optimizer = cls([nn.Parameter(torch.ones(2))], **options, **PATHS[path])
    optimizer.param_groups[0]["l1"] = 0.1
    with refused(optimizer, ValueError, f"Invalid {name} value: 1.0"):
        optimizer.step()


@pytest.mark.parametrize("cls", having("betas"))
def test_betas_must_be_two(cls: type) -> None:
    with pytest.raises(ValueError, match="expected two numbers"):
        cls([nn.Parameter(torch.ones(2))], betas=(0.9, 0.99, 0.9))
