"""What the benchmark accepts as right: contenders within the bounds, other formulas far outside."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder, which is on sys.path only where a script of it runs."""
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("AdamW + L1", {"l1": 0.0}),
        *(
            (method, wrong)
            for method in ("AdamW", "Adam + L2", "AdamW + L1")
            for wrong in ({"weight_decay": 0.0}, {"betas": (0.9, 0.99)})
        ),
    ],
)
def test_bounds_tell_other_formulas(bench: Any, method: str, dtype: str, wrong: Any) -> None:
    """In float32 every other formula is refused; in bfloat16 those that roundings do not hide."""
    contenders, methods, verify = bench("contenders"), bench("methods"), bench("verify")
    right = methods.METHODS[method]
    groups = contenders.make_groups([[(64, 64)]], methods.DTYPES[dtype], torch.device("cpu"))
    task = contenders.Task(right, None)
    begin = verify.start(groups, task)
    must_be = verify.expected(begin, groups, task)
    l1 = wrong.get("l1", right.l1)
    kwargs = {**right.kwargs, **{k: v for k, v in wrong.items() if k != "l1"}}
    other = contenders.Task(
        methods.Method(right.cls, kwargs, right.states, right.foreach, l1), None
    )
    for make in contenders.TORCH.values():
        assert verify.check(make(groups, task), groups, begin, must_be).matches
        refused = not verify.check(make(groups, other), groups, begin, must_be).matches
        hidden = dtype == "bfloat16" and ("betas" in wrong or (l1 and "weight_decay" in wrong))
        assert refused or hidden


RARE: dict[str, list[dict[str, Any]]] = {
    "RMSprop": [{"momentum": 0.0}, {"alpha": 0.99}, {"centered": True}],
    "Adagrad": [{"lr_decay": 0.1}, {"initial_accumulator_value": 0.1}],
    "Lion": [{"betas": (0.9, 0.9)}, {"betas": (0.5, 0.99)}],
    "LAMB": [{"cls": "AdamW"}],  # the same without the trust ratio
}
"""Other formulas, beside those in which the decay is left out or coupled otherwise."""


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("method", RARE)
def test_bounds_tell_other_formulas_of_rare_methods(bench: Any, method: str, clip: bool) -> None:
    """In float32 what is wrong is out by a hundred bounds, and what is right within one."""
    contenders, methods, verify = bench("contenders"), bench("methods"), bench("verify")
    right = methods.METHODS[method]
    groups = contenders.make_groups([[(64, 64), (300,)]], torch.float32, torch.device("cpu"))
    task = contenders.Task(right, verify.max_norm(groups) if clip else None)
    begin = verify.start(groups, task)
    must_be = verify.expected(begin, groups, task)

    def of_bound(other: Any, max_norm: float | None, **options: Any) -> float:
        contender = contenders.own(groups, contenders.Task(other, max_norm), **options)
        return verify.check(contender, groups, begin, must_be).of_bound

    for options in ({}, {"fused": False}):
        assert of_bound(right, task.max_norm, **options) <= 1
    decoupled = method in {"Lion", "LAMB"}
    for wrong in ({"weight_decay": 0.0}, {"decoupled_weight_decay": not decoupled}, *RARE[method]):
        cls = wrong.get("cls", right.cls)
        kwargs = {**right.kwargs, **{k: v for k, v in wrong.items() if k != "cls"}}
        other = replace(right, cls=cls, kwargs=kwargs)
        assert of_bound(other, task.max_norm) > 100, wrong
    if clip:
        assert of_bound(right, None) > 100


def test_few_signs_are_in_doubt(bench: Any) -> None:
    """Where they are, either is right, and they are 2 lr apart. The norm may be off by 1e-4, and so
    may the number whose sign is taken, which has a density of about 1 there, in three steps."""
    contenders, methods, verify = bench("contenders"), bench("methods"), bench("verify")
    groups = contenders.make_groups([[(1000, 1000)]], torch.float32, torch.device("cpu"))
    task = contenders.Task(methods.METHODS["Lion"], verify.max_norm(groups))
    bound = verify.expected(verify.start(groups, task), groups, task).bound
    in_doubt = bound > methods.LR
    assert 0 < in_doubt.double().mean() < 1e-3
    assert bound[in_doubt].min() > 2 * methods.LR
    assert bound[~in_doubt].max() < 1e-5


def test_a_layerwise_sample_has_whole_tensors(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders, methods, verify = bench("contenders"), bench("methods"), bench("verify")
    monkeypatch.setattr(verify, "SAMPLE", 100)
    groups = contenders.make_groups(
        [[(90,), (50, 50)], [(2000,), (7,)]], torch.float32, torch.device("cpu")
    )
    task = contenders.Task(methods.METHODS["LAMB"], verify.max_norm(groups))
    begin = verify.start(groups, task)
    must_be = verify.expected(begin, groups, task)
    assert must_be.values.numel() == 97
    assert verify.check(contenders.own(groups, task), groups, begin, must_be).matches
    other = contenders.Task(replace(task.method, cls="AdamW"), task.max_norm)
    assert not verify.check(contenders.own(groups, other), groups, begin, must_be).matches
