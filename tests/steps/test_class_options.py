"""Options as a class changes them: other defaults, fixed ones, and those of the optimizer."""

from __future__ import annotations

import copy
import pickle
from types import MappingProxyType
from typing import Annotated, Any, TypedDict

import pytest

import fusedreg
from fusedreg.options import Option

from cases import parameters, run


def test_a_default_of_no_option_is_refused() -> None:
    with pytest.raises(TypeError, match=r"option_defaults has 'weight_decy'.* mean 'weight_decay'"):
        type("Own", (fusedreg.SGD,), {"option_defaults": {"weight_decy": 0.1}})
    cls: Any = type("Own", (fusedreg.SGD,), {"fixed_options": {"nesterv": True}})
    with pytest.raises(TypeError, match=r"fixed_options has 'nesterv'.* mean 'nesterov'"):
        cls(parameters())


def test_a_default_that_the_constructor_passes_is_changed_there() -> None:
    """What a constructor passes on cannot be told from what a user has chosen."""
    cls: Any = type("Own", (fusedreg.SGD,), {"option_defaults": {"weight_decay": 0.1}})
    with pytest.raises(TypeError, match="option_defaults has 'weight_decay', but its constructor"):
        cls(parameters())


class Nesterov(fusedreg.SGD):
    fixed_options = MappingProxyType({"nesterov": True})


@pytest.mark.parametrize(
    ("cls", "name", "options"),
    [
        (fusedreg.AdamW, "decoupled_weight_decay", {}),
        (Nesterov, "nesterov", {"momentum": 0.9}),
    ],
)
def test_a_fixed_option_is_that_everywhere(cls: Any, name: str, options: Any, path: str) -> None:
    """In groups, after a step, from a file, and in a copy, which could not keep another."""
    optimizer = cls(parameters(), **options)
    assert optimizer.param_groups[0][name] is True
    words = f"Invalid {name} value: False .every group of {cls.__name__} has {name}=True"
    with pytest.raises(ValueError, match=words):
        cls([{"params": parameters(), name: False}], **options)
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": parameters(), name: False})
    assert len(optimizer.param_groups) == 1
    run(optimizer, 1)
    file = optimizer.state_dict()
    file["param_groups"][0][name] = False  # as another class may have written
    optimizer.load_state_dict(file)
    assert optimizer.param_groups[0][name] is True
    before = [param.tolist() for param in optimizer.param_groups[0]["params"]]
    optimizer.param_groups[0][name] = False
    with pytest.raises(ValueError, match=words):
        run(optimizer, 1)
    assert [param.tolist() for param in optimizer.param_groups[0]["params"]] == before


def test_a_fixed_option_is_refused_by_the_constructor_too() -> None:
    class Decoupled(fusedreg.Adam):
        fixed_options = MappingProxyType({"decoupled_weight_decay": True})

    with pytest.raises(ValueError, match="every group of Decoupled has"):
        Decoupled(parameters(), decoupled_weight_decay=False)


class TagOptions(TypedDict, total=False):
    tag: Annotated[float, Option(1.0, of_group=False)]
    label: Annotated[str, Option("none", of_group=False)]


class Tagged(fusedreg.SGD):
    option_sets = (*fusedreg.SGD.option_sets, TagOptions)

    @property
    def tag(self) -> float:
        return self._tag

    @tag.setter
    def tag(self, value: float) -> None:
        self._tag = float(value)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_options_of_the_optimizer_are_attributes_that_copies_keep(how: Any) -> None:
    optimizer = Tagged(parameters(), label="mine")
    optimizer.tag = 3
    copied = how(optimizer)
    assert (copied.tag, copied.label) == (3.0, "mine")
    run(copied, 1)
