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


def test_defaults_and_fixed_options_of_bases_stay() -> None:
    class Amsgrad(fusedreg.AdamW):
        fixed_options = MappingProxyType({"amsgrad": True})

    class Sparse(fusedreg.Lion):
        option_defaults = MappingProxyType({"l1": 0.5})

    group = Amsgrad(parameters()).param_groups[0]
    assert (group["amsgrad"], group["decoupled_weight_decay"]) == (True, True)
    group = Sparse(parameters()).param_groups[0]
    assert (group["l1"], group["l1_mode"]) == (0.5, "decoupled")


def test_a_subclass_may_write_out_what_its_base_has_a_default_for() -> None:
    class Base(fusedreg.FusedOptimizer):
        option_defaults = MappingProxyType({"weight_decay": 0.125})

    class Child(Base):
        def __init__(self, params: Any, weight_decay: float = 0.5, **options: Any) -> None:
            super().__init__(params, {"lr": 0.1, "weight_decay": weight_decay}, **options)

    assert Base(parameters(), {"lr": 0.1}).param_groups[0]["weight_decay"] == 0.125
    assert Child(parameters()).param_groups[0]["weight_decay"] == 0.5


def test_a_fixed_pair_may_be_a_list() -> None:
    class Fixed(fusedreg.Adam):
        fixed_options = MappingProxyType({"betas": (0.5, 0.75)})

    optimizer = Fixed(parameters())
    optimizer.param_groups[0]["betas"] = [0.5, 0.75]
    run(optimizer, 1)
    optimizer.param_groups[0]["betas"] = [0.5, 0.5]
    with pytest.raises(ValueError, match="every group of Fixed has betas"):
        run(optimizer, 1)


def test_a_copy_that_lacks_an_option_of_the_optimizer_has_its_default() -> None:
    state = Tagged(parameters(), label="mine").__getstate__()
    del state["_attributes"]["tag"]
    older = Tagged.__new__(Tagged)
    older.__setstate__(state)
    assert (older.tag, older.label) == (1.0, "mine")
