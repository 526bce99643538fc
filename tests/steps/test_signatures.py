"""Constructors as tools see them: signatures, types, and names that are wrong."""

from __future__ import annotations

import inspect
import pydoc
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

import pytest
import torch
from torch import Tensor
from typing_extensions import Unpack

import fusedreg
from fusedreg.contract import AllOptions, Options
from fusedreg.options import Option, declarations

from cases import CLASSES, TORCH_CLASSES, parameters

OURS = declarations(Options)
OTHER_DEFAULTS: dict[type, dict[str, Any]] = {
    fusedreg.AdamW: {"decoupled_weight_decay": True},
    fusedreg.Lion: {"decoupled_weight_decay": True, "l1_mode": "decoupled"},
    fusedreg.LAMB: {"decoupled_weight_decay": True},
}
KEYWORDS = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def shown(cls: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls).parameters)


# ---- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_signature_ends_with_the_common_options(cls: type) -> None:
    found = shown(cls)
    assert all(parameter.kind in KEYWORDS for parameter in found.values())
    assert list(found)[-len(OURS) :] == list(OURS)
    defaults = {name: option.default for name, option in OURS.items()}
    assert {name: found[name].default for name in OURS} == {
        **defaults,
        **OTHER_DEFAULTS.get(cls, {}),
    }


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_signature_begins_as_torchs(cls: type) -> None:
    torchs = shown(getattr(torch.optim, cls.__name__))
    found = {name: shown(cls)[name] for name in torchs}
    kinds = [(each.name, each.kind, each.default) for each in found.values()]
    assert kinds == [(each.name, each.kind, each.default) for each in torchs.values()]
    positional = [name for name, each in torchs.items() if each.kind is KEYWORDS[1]]
    assert list(shown(cls))[: len(positional)] == positional


@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_shown_are_those_of_a_group(cls: Any) -> None:
    optimizer = cls(parameters())
    for name, parameter in shown(cls).items():
        if name in optimizer.own_options:
            assert getattr(optimizer, name) == parameter.default
        elif name != "params":
            assert optimizer.defaults[name] == parameter.default


@pytest.mark.parametrize("cls", [*CLASSES, fusedreg.FusedOptimizer])
def test_type_hints_name_every_parameter(cls: Any) -> None:
    hints = typing.get_type_hints(cls.__init__)
    assert hints.pop("return") is type(None)
    assert hints.keys() == shown(cls).keys()
    assert hints["l1"] == float | Tensor
    assert hints["skip_nonfinite"] is bool
    assert typing.get_args(hints["l1_mode"]) == ("prox", "decoupled", "subgradient")


@pytest.mark.parametrize("cls", CLASSES)
def test_help_shows_them(cls: type) -> None:
    text = pydoc.plain(pydoc.render_doc(cls))
    assert "max_grad_norm: float | None = None" in text
    assert "**options" not in text.split("Methods defined here")[0]


# ---- how it is called ----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_positional_calls_are_torchs(cls: Any) -> None:
    torch_cls = getattr(torch.optim, cls.__name__)
    values = [
        parameter.default
        for name, parameter in shown(torch_cls).items()
        if parameter.kind is KEYWORDS[1] and name != "params"
    ]
    values[0] = 0.125
    (group,), (torchs,) = (each(parameters(), *values).param_groups for each in (cls, torch_cls))
    assert {name: group[name] for name in torchs if name != "params"} == {
        name: value for name, value in torchs.items() if name != "params"
    }


CALLS: dict[str, str] = {
    'AdamW(w, 1e-3, (0.9, 0.95), l1=0.1, l1_mode="prox", max_grad_norm=1.0)': "",
    "SGD(w, lr=torch.tensor(0.1), state_dtype=torch.float32)": "",
    "LAMB(w, decay_lr=None, process_group=None)": "",
    "Lion(w, l11=0.1)": 'Unexpected keyword argument "l11" for "Lion"',
    'Adam(w, l1="much")': 'Argument "l1" to "Adam" has incompatible type "str"',
    'RMSprop(w, l1_mode="lasso")': 'Argument "l1_mode" to "RMSprop" has incompatible type',
    "LAMB(w, amsgrad=True)": 'Unexpected keyword argument "amsgrad" for "LAMB"',
}
"""Constructors, and what mypy says of each."""


def test_mypy_knows_the_options() -> None:
    lines = ["import fusedreg, torch", "w = [torch.nn.Parameter(torch.ones(2))]"]
    lines += [f"fusedreg.{call}" for call in CALLS]
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--strict", "-c", "\n".join(lines)],
        capture_output=True,
        check=False,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    found = dict(re.findall(r"^<string>:(\d+): error: (.*)$", ran.stdout, re.MULTILINE))
    expected = {str(3 + index): words for index, words in enumerate(CALLS.values()) if words}
    assert found.keys() == expected.keys(), ran.stdout + ran.stderr
    for line, words in expected.items():
        assert words in found[line]


# ---- names that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("typo", "meant"),
    [("l11", "l1"), ("weightdecay", "weight_decay"), ("max_gradnorm", "max_grad_norm")],
)
def test_misspelt_keyword_is_refused_with_the_nearest(cls: Any, typo: str, meant: str) -> None:
    words = rf"^{cls.__name__}\.__init__\(\) got an unexpected keyword argument '{typo}'\. "
    with pytest.raises(TypeError, match=words + rf"Did you mean '{meant}'\?$"):
        cls(parameters(), **{typo: 0.1})


def test_the_nearest_may_be_a_parameter_of_the_class() -> None:
    with pytest.raises(TypeError, match=r"'amsgrd'\. Did you mean 'amsgrad'"):
        fusedreg.AdamW(parameters(), amsgrd=True)  # type: ignore[call-arg]


def test_keyword_that_resembles_none_is_refused_as_python_does() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'preconditioner'$"):
        fusedreg.SGD(parameters(), preconditioner=None)  # type: ignore[call-arg]


@pytest.mark.parametrize(("typo", "meant"), [("l11", "l1"), ("weight_dceay", "weight_decay")])
def test_misspelt_default_of_a_subclass_is_refused(typo: str, meant: str) -> None:
    words = f"FusedOptimizer has no option '{typo}', .* Did you mean '{meant}'"
    with pytest.raises(TypeError, match=words):
        fusedreg.FusedOptimizer(parameters(), {"lr": 0.1, typo: 0.5})


# ---- classes of users ----------------------------------------------------------------------------


def test_options_of_a_subclass_may_resemble_others() -> None:
    """A name that its constructor has is no misspelt one, in groups neither."""

    class Ridge(fusedreg.FusedOptimizer):
        def __init__(self, params: Any, lr: float = 0.1, l2: float = 0.0, **options: Any) -> None:
            super().__init__(params, {"lr": lr, "l2": l2}, **options)

    optimizer = Ridge([{"params": parameters(), "l2": 0.25}], l1=0.5)
    assert optimizer.param_groups[0]["l2"] == 0.25
    assert optimizer.param_groups[0]["l1"] == 0.5
    assert list(shown(Ridge)) == ["params", "lr", "l2", *declarations(AllOptions)]


def below_1(group: Any, name: str, _: bool) -> None:
    if not group[name] < 1:
        raise ValueError(f"Invalid {name} value: {group[name]}")


class OwnOptions(TypedDict, total=False):
    slack: Annotated[float, Option(0.5, below_1)]


def test_a_subclass_may_declare_options_of_its_own() -> None:
    class Slack(fusedreg.FusedOptimizer):
        option_sets = (*fusedreg.FusedOptimizer.option_sets, OwnOptions)
        option_defaults = MappingProxyType({"weight_decay": 0.125})

        def __init__(self, params, lr=0.1, **options):  # type: ignore[no-untyped-def]
            super().__init__(params, {"lr": lr}, **options)

    assert shown(Slack)["slack"].default == 0.5
    assert shown(Slack)["weight_decay"].default == 0.125
    group = Slack(parameters()).param_groups[0]
    assert (group["slack"], group["weight_decay"]) == (0.5, 0.125)
    with pytest.raises(ValueError, match="Invalid slack value: 2"):
        Slack(parameters(), slack=2)
    with pytest.raises(ValueError, match=r"'slck' .* did you mean 'slack'"):
        Slack([{"params": parameters(), "slck": 0.1}])


class Scheduled(fusedreg.AdamW):
    def __init__(self, *args: Any, warmup: int = 10, **options: Any) -> None:
        super().__init__(*args, **options)
        self.warmup = warmup


class Sparse(fusedreg.Adam):
    def __init__(self, params: Any, l1: float = 0.5, **options: Unpack[Options]) -> None:
        super().__init__(params, l1=l1, **options)


def test_a_subclass_that_passes_options_on_shows_those_of_its_parent() -> None:
    assert shown(Scheduled)["weight_decay"].default == 1e-2
    assert shown(Scheduled)["betas"].default == (0.9, 0.999)
    assert shown(Scheduled)["warmup"].default == 10
    optimizer = Scheduled(parameters(), 0.5, warmup=3, l1=0.25)
    assert (optimizer.warmup, optimizer.defaults["lr"]) == (3, 0.5)
    assert optimizer.defaults["weight_decay"] == 1e-2


def test_a_subclass_that_names_its_options_shows_only_those() -> None:
    assert list(shown(Sparse)) == ["params", "l1", *(name for name in OURS if name != "l1")]
    assert shown(Sparse)["l1"].default == Sparse(parameters()).defaults["l1"] == 0.5


def test_names_that_only_type_checkers_import_do_no_harm() -> None:
    """The annotation cannot be read then, and the options count as passed on."""
    namespace: dict[str, Any] = {"fusedreg": fusedreg}
    source = """
from __future__ import annotations
class Late(fusedreg.SGD):
    def __init__(self, params: Missing, **options: Unpack[Missing]) -> None:
        super().__init__(params, **options)
"""
    exec(source, namespace)
    assert shown(namespace["Late"]).keys() == shown(fusedreg.SGD).keys()
