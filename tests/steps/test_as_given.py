"""Options in every form that torch.optim takes, and keys of groups that would be ignored."""

from __future__ import annotations

import collections
import copy
import pickle
import typing
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import fusedreg

from cases import CLASSES, FULL, PLAIN, TORCH_CLASSES, parameters, run
from compare import frozen, parameters_of, refused

WITH_BETAS = [cls for cls in CLASSES if "betas" in PLAIN[cls].options]
ways = pytest.mark.parametrize("way", ["constructed", "added", "set", "loaded"])


def optimizer_of(cls: Any, path: str, way: str = "constructed", **options: Any) -> Any:
    """An optimizer whose group has `options`, which came there in that way."""
    params, case = parameters(shapes=[(3,)]), PLAIN[cls]
    if way == "constructed":
        return case.make([{"params": params, **options}], path)
    optimizer = case.make(parameters(shapes=[(2,)]) if way == "added" else params, path)
    if way == "added":
        optimizer.add_param_group({"params": params, **options})
    elif way == "set":
        run(optimizer, 1)
        optimizer.param_groups[0].update(options)
    else:
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["param_groups"][0].update(options)
        optimizer.load_state_dict(state_dict)
    return optimizer


# ---- keys ---------------------------------------------------------------------------------------

OWN = {"max_grad_norm": 1.0, "skip_nonfinite": True, "process_group": "a group"}


@ways
@pytest.mark.parametrize("name", OWN)
def test_a_group_cannot_have_an_option_of_the_optimizer(path: str, name: str, way: str) -> None:
    remedy = rf"^Invalid key in a param group: '{name}' .* optimizer\.{name}\)"
    if way == "set":
        optimizer = optimizer_of(fusedreg.SGD, path, "set", **{name: OWN[name]})
        with refused(optimizer, ValueError, remedy):
            optimizer.step()
    else:
        with pytest.raises(ValueError, match=remedy):
            optimizer_of(fusedreg.SGD, path, way, **{name: OWN[name]})


def test_an_option_of_the_optimizer_may_be_repeated_as_wrappers_do(path: str) -> None:
    params = parameters(shapes=[(3,)])
    group = {"params": params, "max_grad_norm": 1.0}
    optimizer = PLAIN[fusedreg.SGD].make([group], path, max_grad_norm=1.0)
    run(optimizer, 2)
    optimizer.max_grad_norm = 2.0
    with refused(optimizer, ValueError, "optimizer.max_grad_norm"):
        optimizer.step()


misspelt = pytest.mark.parametrize(
    ("key", "option"),
    [
        ("weightdecay", "weight_decay"),  # one letter less
        ("l11", "l1"),  # one more
        ("wieght_decay", "weight_decay"),  # two swapped
        ("max_grad_nrom", "max_grad_norm"),
        ("l1_mod", "l1_mode"),
        ("maximise", "maximize"),  # another one
    ],
)


@misspelt
def test_a_misspelt_key_of_a_new_group_is_refused(path: str, key: str, option: str) -> None:
    words = rf"^Invalid key in a param group: {key!r} .* did you mean {option!r}\?"
    for way in ("constructed", "added"):
        with pytest.raises(ValueError, match=words):
            optimizer_of(fusedreg.SGD, path, way, **{key: 0.5})


@misspelt
def test_a_misspelt_key_that_appears_later_is_named_once(path: str, key: str, option: str) -> None:
    with warnings.catch_warnings(record=True, action="always") as seen:
        optimizer = optimizer_of(fusedreg.SGD, path, "set", **{key: 0.5})
        for _ in range(2):
            run(optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
    (warning,) = seen
    message = f"param group key {key!r} is no option and has no effect: is {option!r} meant"
    assert message in str(warning.message)


def test_other_keys_are_a_users_own(path: str) -> None:
    """Those of schedulers, of layer-wise decay and of whoever reads groups."""
    own = {"name": "head", "lr_scale": 0.5, "initial_lr": 1.0, "max_lr": 2.0, "layer": 3, "a": "b"}
    with warnings.catch_warnings(action="error"):
        optimizer = optimizer_of(fusedreg.SGD, path, **own)
        run(optimizer, 2)
    assert own.items() <= optimizer.param_groups[0].items()


def test_clipping_to_0_is_refused(path: str) -> None:
    remedy = r"^Invalid max_grad_norm value: 0.0 .*None turns clipping off"
    with pytest.raises(ValueError, match=remedy):
        PLAIN[fusedreg.SGD].make(parameters(), path, max_grad_norm=0)
    optimizer = PLAIN[fusedreg.SGD].make(parameters(), path, max_grad_norm=1.0)
    with refused(optimizer, ValueError, remedy):
        optimizer.max_grad_norm = 0.0


# ---- constructors -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_an_optimizer_is_built_again_from_its_defaults(cls: Any) -> None:
    for case in (PLAIN[cls], FULL[cls]):
        optimizer = case.make(parameters())
        again = type(optimizer)(parameters(), **optimizer.defaults)
        assert again.defaults == optimizer.defaults
        for each in (optimizer, again):
            run(each, 2)
        assert frozen(parameters_of(again)) == frozen(parameters_of(optimizer))


@pytest.mark.parametrize("cls", CLASSES)
def test_signatures_resolve(cls: Any) -> None:
    hints = typing.get_type_hints(cls.__init__)
    assert {"lr", "l1", "process_group", "return"} <= hints.keys()


def test_adamw_names_the_class_with_a_coupled_decay() -> None:
    with pytest.raises(ValueError, match="use Adam"):
        fusedreg.AdamW(parameters(), decoupled_weight_decay=False)


def test_decay_lr_can_be_chosen(path: str) -> None:
    """It is the lr of each group where it is not."""
    groups = [
        {"params": parameters(shapes=[(3,)])},
        {"params": parameters(shapes=[(3,)]), "lr": 0.5},
        {"params": parameters(shapes=[(3,)]), "lr": 0.5, "decay_lr": 2.0},
    ]
    case = PLAIN[fusedreg.AdamW]
    optimizer = case.make(groups, path, lr=0.1, lr_independent_decay=True)
    assert [group["decay_lr"] for group in optimizer.param_groups] == [0.1, 0.5, 2.0]
    chosen = case.make(parameters(shapes=[(3,)]), path, lr=0.1, decay_lr=0.4)
    assert chosen.param_groups[0]["decay_lr"] == 0.4


# ---- numbers ------------------------------------------------------------------------------------

PAIRS = {
    "list": list,
    "UserList": collections.UserList,
    "deque": collections.deque,
    "array": numpy.array,
    "tensor": lambda pair: torch.tensor(pair, dtype=torch.float64),
    "numpy_floats": lambda pair: tuple(map(numpy.float64, pair)),
    "numpy_and_float": lambda pair: (numpy.float64(pair[0]), pair[1]),
    "float32": lambda pair: [numpy.float32(pair[0]), numpy.float32(pair[1])],
}


@pytest.mark.sampled(4)
@ways
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("cls", WITH_BETAS)
def test_betas_are_any_two_numbers(cls: Any, path: str, kind: str, way: str) -> None:
    betas = PAIRS[kind]([0.75, 0.875])  # which float32 holds
    optimizer = optimizer_of(cls, path, way, betas=betas)
    expected = optimizer_of(cls, path, way, betas=(0.75, 0.875))
    for each in (optimizer, expected):
        run(each, 2)
    assert frozen(parameters_of(optimizer)) == frozen(parameters_of(expected))
    (group,) = (g for g in optimizer.param_groups if len(g["params"][0]) == 3)
    if not (way == "set" and kind in ("list", "float32")):  # which may change where it stands
        assert group["betas"] == (0.75, 0.875)
        assert type(group["betas"]) is tuple
    pickle.loads(pickle.dumps(optimizer)).step()


@pytest.mark.parametrize("cls", WITH_BETAS)
def test_a_list_that_is_set_is_read_in_every_step(cls: Any, path: str) -> None:
    betas = [0.5, 0.75]
    optimizer = optimizer_of(cls, path, "set", betas=betas)
    expected = optimizer_of(cls, path, "set", betas=(0.5, 0.75))
    for each in (optimizer, expected):
        run(each, 1)
    betas[0] = 0.25
    expected.param_groups[0]["betas"] = (0.25, 0.75)
    for each in (optimizer, expected):
        run(each, 2)
    assert frozen(parameters_of(optimizer)) == frozen(parameters_of(expected))


@pytest.mark.sampled(3)
@ways
@pytest.mark.parametrize("kind", [numpy.array, numpy.float64, lambda x: torch.tensor([x])])
@pytest.mark.parametrize("cls", CLASSES)
def test_lr_is_any_one_number(cls: Any, path: str, kind: Any, way: str) -> None:
    optimizer = optimizer_of(cls, path, way, lr=kind(0.25))
    expected = optimizer_of(cls, path, way, lr=0.25)
    for each in (optimizer, expected):
        run(each, 2)
    assert frozen(parameters_of(optimizer)) == frozen(parameters_of(expected))


def test_an_array_of_several_rates_is_refused(path: str) -> None:
    optimizer = optimizer_of(fusedreg.SGD, path, "set", lr=numpy.array([0.1, 0.2]))
    with refused(optimizer, TypeError, "Invalid learning rate"):
        optimizer.step()


# ---- state that a user wrote --------------------------------------------------------------------


def stepped(cls: Any, path: str, **options: Any) -> tuple[Any, nn.Parameter]:
    param = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = PLAIN[cls].make([param], path, **options)
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    return optimizer, param


@pytest.mark.parametrize("reset", [None, "deleted"])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_momentum_buffer_of_none_begins_anew(
    path: str, reset: str | None, dampening: float
) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
    optimizer, param = stepped(fusedreg.SGD, path, **options)
    torchs = nn.Parameter(torch.ones(3, dtype=torch.float64))
    expected = torch.optim.SGD([torchs], **options)
    torchs.grad = torch.full_like(torchs, 0.5)
    expected.step()
    for number in range(3):
        if number == 1:
            expected.state[torchs]["momentum_buffer"] = None
            if reset == "deleted":
                del optimizer.state[param]["momentum_buffer"]
            else:
                optimizer.state[param]["momentum_buffer"] = None
        optimizer.step()
        expected.step()
    torch.testing.assert_close(param, torchs, rtol=0, atol=1e-15)  # 4 ulp


@pytest.mark.parametrize("cls", [c for c in CLASSES if "step" in c.counts])
@pytest.mark.parametrize("value", [0, 7, 2.0, numpy.float64(3), numpy.int64(4), None])
def test_a_number_as_step_counts_on(cls: Any, path: str, value: Any) -> None:
    optimizer, param = stepped(cls, path)
    optimizer.state[param]["step"] = value
    optimizer.step()
    count = optimizer.state[param]["step"]
    assert isinstance(count, torch.Tensor)
    assert count.item() == (0 if value is None else value) + 1
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("value", [torch.tensor([1.0, 2.0]), "1", float("nan"), [1.0]])
def test_what_is_no_step_count_is_refused(path: str, value: Any) -> None:
    optimizer, param = stepped(fusedreg.Adam, path)
    optimizer.state[param]["step"] = value
    with refused(optimizer, RuntimeError, "The state 'step' ", "parameter 0 of group 0"):
        optimizer.step()


@pytest.mark.parametrize("value", [0.0, torch.ones(4), torch.ones(1, 3)])
def test_what_is_no_moment_is_refused(path: str, value: Any) -> None:
    optimizer, param = stepped(fusedreg.Adam, path)
    optimizer.state[param]["exp_avg"] = value
    with refused(optimizer, RuntimeError, "The state 'exp_avg' ", "Delete optimizer.state"):
        optimizer.step()


@pytest.mark.parametrize("cls", TORCH_CLASSES)
@pytest.mark.parametrize("how", ["clear", "empty", "delete", "replace"])
def test_state_that_was_cleared_begins_anew(cls: Any, path: str, how: str) -> None:
    optimizer, param = stepped(cls, path)
    expected, twin = stepped(cls, path)
    param.data.fill_(1.0)
    if how == "clear":
        optimizer.state.clear()
    elif how == "empty":
        optimizer.state[param] = {}
    elif how == "delete":
        optimizer.state.pop(param, None)
    else:
        optimizer.state = collections.defaultdict(dict)
    optimizer.step()
    assert frozen(param) == frozen(twin)
    assert frozen(dict(optimizer.state[param])) == frozen(dict(expected.state[twin]))
