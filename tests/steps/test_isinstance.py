"""A class is its torch.optim namesake where others ask, and runs none of its code."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch.optim import Optimizer

import fusedreg

from cases import CLASSES, TORCH_CLASSES, parameters, run


def namesake(cls: type) -> type[Optimizer]:
    found: type[Optimizer] = getattr(torch.optim, cls.__name__)
    return found


def torchs(cls: type) -> set[type]:
    """The classes of torch.optim, Optimizer aside, that a class is."""
    found = {base for base in cls.__mro__ if base.__module__.startswith("torch.optim")}
    return found - {Optimizer}


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_an_optimizer_is_an_instance_of_its_namesake(cls: type) -> None:
    """And of nothing more than that: AdamW is an Adam in torch too, and Adam no AdamW."""
    assert torchs(cls) == torchs(namesake(cls))
    optimizer = cls(parameters())
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert isinstance(each, namesake(cls))
        assert isinstance(each, fusedreg.FusedOptimizer)


def test_what_torch_does_not_have() -> None:
    assert torchs(fusedreg.Lion) == torchs(fusedreg.FusedOptimizer) == set()
    assert issubclass(fusedreg.LAMB, fusedreg.Adam)


@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_nothing_of_the_namesake_runs(cls: type) -> None:
    """Its `step` asks `_init_group` for the states, and nothing else asks it."""
    leaking = {
        name
        for base in torchs(cls)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and getattr(cls, name) is getattr(base, name)
    }
    assert leaking == {"_init_group"}


@pytest.mark.parametrize("cls", CLASSES)
def test_a_subclass_is_one_too(cls: type) -> None:
    class Own(cls):  # type: ignore[misc]
        def check_group(self, group: Any, read_device: bool) -> None:
            super().check_group(group, read_device)

    optimizer, plain = (each(parameters()) for each in (Own, cls))
    assert torchs(Own) == torchs(cls)
    for each in (optimizer, plain):
        run(each, 2)
    for mine, theirs in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert all(map(torch.equal, mine["params"], theirs["params"]))


# ---- registries that walk down from torch.optim.Optimizer ----------------------------------------


def below(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from below(each)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_walker_meets_a_class_below_its_namesake(cls: type) -> None:
    assert cls in below(Optimizer)
    assert (cls in below(fusedreg.FusedOptimizer)) == (not torchs(cls))


def test_a_walker_meets_ones_own_class() -> None:
    class Own(fusedreg.FusedOptimizer):
        pass

    class OwnAdamW(fusedreg.AdamW):
        pass

    assert Own in below(fusedreg.FusedOptimizer)
    assert OwnAdamW in below(torch.optim.AdamW)


RESOLVE = """
import fusedreg, torch
from class_resolver import ClassResolver
from class_resolver.contrib.torch import optimizer_resolver
for resolver in (optimizer_resolver, ClassResolver.from_subclasses(torch.optim.Optimizer)):
    for name in {names}:
        assert resolver.lookup(name.lower()) is getattr(torch.optim, name), name
        assert resolver.lookup(getattr(fusedreg, name)) is getattr(fusedreg, name), name
"""


def test_class_resolver_finds_torchs() -> None:
    """In a program of its own, which imports fusedreg first, as pykeen's importer may do."""
    code = RESOLVE.format(names=[cls.__name__ for cls in TORCH_CLASSES])
    subprocess.run([sys.executable, "-c", code], check=True)


def parsed(path: str) -> Namespace:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Optimizer, "optimizer", skip={"params"})
    found: Namespace = parser.parse_args([f"--optimizer={path}", "--optimizer.lr=0.5"])
    return found.optimizer


@pytest.mark.parametrize("package", ["fusedreg", "torch.optim"])
@pytest.mark.parametrize("cls", TORCH_CLASSES)
def test_jsonargparse_takes_the_full_path(cls: type, package: str) -> None:
    """As in LightningCLI; docs/recipes.md says so."""
    found = parsed(f"{package}.{cls.__name__}")
    assert (found.class_path, found.init_args.lr) == (f"{package}.{cls.__name__}", 0.5)


OURS, TORCHS = ({cls.__name__ for cls in classes} for classes in (CLASSES, TORCH_CLASSES))


@pytest.mark.parametrize("name", [*sorted(OURS - TORCHS), "ASGD", "Rprop"])
def test_jsonargparse_takes_a_name_that_only_one_has(name: str) -> None:
    assert parsed(name).class_path.endswith(f".{name}")


def test_jsonargparse_does_not_choose_between_two() -> None:
    with pytest.raises(ArgumentError, match=r"torch\.optim\.AdamW, fusedreg\.AdamW"):
        parsed("AdamW")
